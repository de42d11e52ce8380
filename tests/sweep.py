"""`python -m tests.sweep`: trains and decodes a small random model of every causal type that transformers knows.

Each case runs in a process of its own with a time limit. Rows are kept in `--rows`, so that a sweep that was stopped goes on where it was.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from families import small_config
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_TYPES

from mori.bench import arms, compare
from mori.cli import one_line, run_script
from mori.config import TrainConfig
from mori.data.files import SHIPPED
from mori.generation.generate import generate
from mori.model import loading, saving
from mori.train import train

VARIANTS = {"": {}, "decoder": {"is_decoder": True}, "router": {"output_router_logits": True}}
PROMPTS = ["Halo", "Halo semua, selamat datang", "Game ini"]
STEPS, BLOCK = 5, 16
# No token comes twice: an untrained model would repeat one, and nearly all mistakes would go unseen.
CONTROLS = {"max_new_tokens": 20, "min_new_tokens": 20, "no_repeat_ngram_size": 1}
SEEDED_BY_THE_CLOCK = ("reformer",)  # it draws its hashes from torch.seed(): no two runs are equal
CHECKS = (
    "built", "trained", "refused", "traceback", "equal_to_trainer", "single_equals_generate", "batch_equals_generate",
    "reloaded", "ended_at_the_context",
)  # fmt: skip


def cases() -> list[str]:
    """`type` for every causal type; `type+decoder` for encoders; `type+router` for mixtures of experts."""
    names = list(CAUSAL_TYPES)
    for model_type in CAUSAL_TYPES:
        with contextlib.suppress(Exception):
            known = small_config(model_type, 320).get_text_config().to_dict()
            names += [f"{model_type}+decoder"] * _is_encoder(model_type, known)
            names += [f"{model_type}+router"] * ("output_router_logits" in known)
    return names


def _is_encoder(model_type: str, known: dict) -> bool:
    masked = model_type in MASKED_TYPES or model_type == "bert-generation"
    return masked and known.get("is_decoder") is False and "decoder_layers" not in known


def model_of(case: str, vocabulary: int) -> torch.nn.Module:
    """The small model of a case, with random weights."""
    model_type, _, variant = case.partition("+")
    config = small_config(model_type, vocabulary)
    for name, value in VARIANTS[variant].items():
        setattr(config.get_text_config(), name, value)
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def examine(case: str, folder: Path) -> dict:
    """The row of a case; `folder` is empty."""
    row = {"case": case, "built": False}
    text = sorted(SHIPPED.glob("*.txt"))[1].read_text(encoding="utf-8")[:1500]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = loading.train_tokenizer([text], 300)
    with _failures(row, "built"):
        model = model_of(case, len(tokenizer) + 20)
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        saving.save(model, tokenizer, folder / "model")
        row["built"] = True
    if not row["built"]:
        return row
    config = TrainConfig(
        model=str(folder / "model"), corpus=[str(folder / "text.txt")], block_size=BLOCK, held_out_fraction=0.1,
        per_device_train_batch_size=2, max_steps=STEPS, eval_steps=STEPS, save_steps=STEPS, logging_steps=1,
        learning_rate=1e-3, max_new_tokens=4, prompt=PROMPTS[:1], device="cpu", precision="fp32",
        logging_dir=str(folder / "runs"), run_name="run", output_dir=str(folder / "brain"), gradient_checkpointing=False,
    )  # fmt: skip
    row |= _train(config, folder)
    if row["trained"]:
        row["equal_to_trainer"] = False
        with _failures(row, "trainer"):
            row |= _compare(config, folder)
        with _failures(row, "decoding"):
            row |= _decode(folder / "brain", tokenizer)
    return row


@contextlib.contextmanager
def _failures(row: dict, part: str) -> Iterator[None]:
    """Note what went wrong in `part`; a model may fail with any exception."""
    try:
        yield
    except Exception as error:
        row.setdefault("errors", {})[part] = f"{type(error).__name__}: {one_line(error)}"


def _train(config: TrainConfig, folder: Path) -> dict:
    """Train as a user does; the exit code, and the line on standard error of a run that was refused."""
    row = {"trained": False, "refused": False, "traceback": False}
    log, printed = (folder / "stderr.txt").open("w+"), (folder / "stdout.txt").open("w+")
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(printed):
        try:
            run_script("train.py", lambda: train(config) and None)
        except SystemExit as end:
            row["exit"] = end.code
        except Exception as error:
            row |= {"exit": 1, "traceback": True, "line": f"{type(error).__name__}: {one_line(error)}"}
    log.seek(0)
    lines = log.read().splitlines()
    row["trained"], row["refused"] = row["exit"] == 0, row["exit"] == 2
    printed.seek(0)
    row["other_loss"] = [line for line in printed.read().splitlines() if "has another training loss" in line]
    if not row["trained"] and lines:
        row.setdefault("line", lines[-1].replace(f"{folder}/", ""))
    summary = folder / "runs" / "run" / "summary.json"
    if summary.is_file():
        samples = json.loads(summary.read_text(encoding="utf-8"))["samples"]["after"]
        row["no_sample"] = [sample for sample in samples if sample.startswith("(no sample")]
    return row


def _compare(config: TrainConfig, folder: Path) -> dict:
    """Whether `mori-exact` and Trainer give the same losses and weights."""
    results, load_model = [], loading.load_model
    # A kernel may round by where a tensor begins in memory: mori copies the mapped file, and here Trainer does too.
    loading.load_model = lambda *arguments: loading.move(load_model(*arguments), torch.device("cpu"))
    try:
        for arm in ("mori-exact", "trainer"):
            (folder / arm).mkdir()
            result = arms.run_arm(arm, config.resolve(), folder / arm, time.time())
            results.append({**result, "model": folder / arm / "model", "error": None})
    finally:
        loading.load_model = load_model
    pair = compare.compare_arms([results[0]], [results[1]], "fp32")
    differences = [pair[f"max_abs_{name}_diff"] for name in ("loss", "grad_norm", "weight")]
    return {"equal_to_trainer": differences == [0.0] * 3, "largest_difference": max(differences)}


def _decode(brain: Path, tokenizer) -> dict:
    """Whether transformers alone reads the brain, and greedy texts equal those of `generate()`, alone and in a batch."""
    model, info = AutoModelForCausalLM.from_pretrained(brain, output_loading_info=True)
    model.eval()
    row = {"reloaded": not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]}
    options = {"temperature": 0, **CONTROLS}
    row["single_equals_generate"] = row["batch_equals_generate"] = row["ended_at_the_context"] = False
    with _failures(row, "generate"):
        alone = [_generated(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
        with _failures(row, "single"):
            ours = [_ids(generate(model, tokenizer, [prompt], **options))[0] for prompt in PROMPTS]
            row["single_equals_generate"] = ours == alone
        with _failures(row, "batch"):
            ours = _ids(generate(model, tokenizer, PROMPTS, **options))
            # Where the library's own batch differs from its single texts, the single texts are right.
            row["batch_equals_generate"] = ours == alone or ours == _generated(model, tokenizer, PROMPTS)
            row["batch_is_independent"] = ours == alone
    with _failures(row, "context"):
        [completion] = generate(model, tokenizer, PROMPTS[:1], temperature=0, max_new_tokens=100, min_new_tokens=100)
        row["ended_at_the_context"] = completion.finish_reason in ("context", "length")
        row["finish_reason"] = completion.finish_reason
    return row


def _ids(completions: list) -> list[list[int]]:
    return [completion.new_token_ids for completion in completions]


def _generated(model: torch.nn.Module, tokenizer, prompts: list[str]) -> list[list[int]]:
    """The new ids of `generate()`, up to the end of each text; where it cannot run, those of whole passes over the text."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    try:
        out = model.generate(**arguments, do_sample=False, pad_token_id=0, **CONTROLS)
    except Exception:
        if len(prompts) > 1:
            return []
        out = _whole_passes(model, batch["input_ids"])
    rows = out[:, batch["input_ids"].size(1) :].tolist()
    return [row[: row.index(0)] if 0 in row else row for row in rows]


@torch.no_grad()
def _whole_passes(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """`ids` `(1, T)` and the likeliest new tokens, none of them twice."""
    for _ in range(CONTROLS["max_new_tokens"]):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[0, ids[0]] = logits[0, 0] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def in_a_child(case: str, limit: float) -> dict:
    """`examine` in a forked process, which is killed after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        pid = os.fork()
        if not pid:
            _child(case, Path(folder), result)
        deadline = time.monotonic() + limit
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        if not ended[0]:
            os.killpg(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        return {"case": case, "built": False, "errors": {"process": f"ended with status {ended[1]}"}}


def _child(case: str, folder: Path, result: Path) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    code = 1
    try:
        (folder / "case").mkdir()
        row = examine(case, folder / "case")
        result.write_text(json.dumps(row), encoding="utf-8")
        code = 0
    finally:
        os._exit(code)


def failed_checks(row: dict) -> list[str]:
    """The checks that a row fails. A type that cannot be built, or is refused in one line, fails none."""
    if not row["built"] or row.get("refused"):
        return [] if row.get("line") or row.get("errors") else ["refused without a reason"]
    expected = [check for check in CHECKS if check not in ("built", "refused", "traceback")]
    if row.get("other_loss") or "trainer" in row.get("errors", {}) or row["case"] in SEEDED_BY_THE_CLOCK:
        expected.remove("equal_to_trainer")
    return [check for check in expected if not row.get(check)] + ["no sample"] * bool(row.get("no_sample"))


def counts(rows: list[dict]) -> dict:
    """How many rows of each variant pass each check, and how many fail none that they can pass."""
    table = {}
    for variant in VARIANTS:
        chosen = [row for row in rows if row["case"].partition("+")[2] == variant]
        passed = {check: sum(bool(row.get(check)) for row in chosen) for check in CHECKS}
        held = sum(not failed_checks(row) for row in chosen)
        table[variant or "plain"] = {"cases": len(chosen), "held": held, **passed}
    return table


def write_report(path: Path, table: dict, rows: list[dict]) -> None:
    """Write counts and rows with the versions and the commit, one row a line."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    totals = {name: sum(variant[name] for variant in table.values()) for name in table["plain"]}
    report = {
        "bench": "families", "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "device": "cpu", "threads": 1, "commit": commit,
        "totals": totals, "counts": table,
    }  # fmt: skip
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(report, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main() -> int:
    """Examine the cases that have no row yet; write all rows and their counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--types", default="", help="cases, separated by commas; all without it")
    parser.add_argument(
        "--rows", type=Path, default=Path("runs/sweep.jsonl"), help="rows so far; removed, all run again"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench/families.json"), help="JSON of a whole sweep")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    every = cases()
    chosen = [case for case in options.types.split(",") if case] or every
    if unknown := set(chosen) - set(every):
        parser.error(f"no case {', '.join(sorted(unknown))}")
    rows = {}
    if options.rows.is_file() and not options.types:
        rows = {row["case"]: row for row in map(json.loads, options.rows.read_text(encoding="utf-8").splitlines())}
    for number, case in enumerate(chosen, start=1):
        if case in rows:
            continue
        started = time.monotonic()
        rows[case] = in_a_child(case, options.limit)
        failed = failed_checks(rows[case])
        seconds = time.monotonic() - started
        reason = {name: rows[case][name] for name in ("line", "errors", "no_sample") if rows[case].get(name)}
        print(
            f"{number}/{len(chosen)} {case} {seconds:.1f} s",
            "FAILED " + ", ".join(failed) if failed else "",
            reason or "",
            flush=True,
        )
        if not options.types:
            options.rows.parent.mkdir(parents=True, exist_ok=True)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[case]) + "\n")
    table = counts(list(rows.values()))
    print(json.dumps(table, indent=1))
    if not options.types:
        write_report(options.output, table, [rows[case] for case in every])
    return 0


if __name__ == "__main__":
    sys.exit(main())
