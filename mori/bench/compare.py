"""The same run by `mori` and by `transformers.Trainer`, side by side: equal numbers, and what they cost.

`compare` starts every arm in a process of its own; `python -m mori.bench.compare JOB` is that process. This is the only room
that knows Trainer.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset, Sampler

from mori import distributed as runtime
from mori import run as prepare
from mori.bench import report
from mori.checkpoint import files
from mori.config import CompareConfig, RunFailed, TrainConfig, UserError, checked, steps_of
from mori.data import corpus
from mori.data import windows as data
from mori.evaluate import evaluate
from mori.model import loading as models
from mori.tracking import overview
from mori.tracking.loggers import read_metrics
from mori.tracking.memory import peak_memory_bytes
from mori.tracking.monitor import Monitor
from mori.train import train

# Losses that differ by more than this (relative) are not the same work, and its timing says nothing.
SAME_WORK = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
# What `mori-exact` switches off: every choice that changes the order of floating-point operations.
_EXACT = {
    "torch_compile": False,
    "tf32": False,
    "chunked_loss": False,
    "mask_free_attention": False,
    "fused_activations": False,
    "fast_products": False,
}
_WARM_UP_STEPS = 3


def compare(config: CompareConfig) -> dict:
    """Run every arm `repeats` times in turn and write `compare.json`, `report.md` and its picture; returns the former.

    An arm that fails has its reason in `error`, and the others are still compared. Raises UserError for what is wrong
    before any arm starts, RunFailed when all of them fail.
    """
    config = checked(config).resolve()
    documents = corpus.read_documents(corpus.find_files(config.corpus))
    folder = Path(config.logging_dir).resolve() / f"compare-{config.run_name}"
    prepare.check_writable(folder, folder / "initial")
    where = runtime.start(config.device, config.precision)
    config = dataclasses.replace(config, device=runtime.for_children(where.device))
    runtime.set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model, (d.text for d in documents), config.trust_remote_code)
    model_config = models.load_config(
        config.model, tokenizer, dropout=config.dropout, trust_remote_code=config.trust_remote_code
    )
    text = prepare.prepare_text(config, documents, tokenizer, model_config, where)
    files.set_aside(folder)
    model = models.load_model(config.model, model_config, config.trust_remote_code)
    models.save(model, tokenizer, folder / "initial")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model

    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads()
    results: dict[str, list[dict]] = {arm: [] for arm in config.arms}
    for repeat, arm in itertools.product(range(config.repeats), config.arms):
        if results[arm] and results[arm][-1]["error"]:
            continue
        print(f"[{repeat + 1}/{config.repeats}] {arm} ...", end=" ", flush=True)
        found = _in_a_process(arm, config, folder, repeat, threads)
        results[arm].append(found)
        print(
            found["error"]
            or f"{_tokens_per_second(found):.0f} tokens/s, held-out loss {found['held_out']['after']['loss']:.6f}"
        )

    whole = {
        "name": config.run_name,
        "model": {"name": config.model, "parameters": parameters},
        "ledger": asdict(text.ledger),
        "config": asdict(config),
        "environment": overview.environment(where.device, where.precision, where.world_size) | {"threads": threads},
        "arms": {arm: _arm(runs) for arm, runs in results.items()},
        "pairs": {
            f"{a}|{b}": _pair(results[a], results[b], where.precision)
            for a, b in itertools.combinations(config.arms, 2)
            if not results[a][0]["error"] and not results[b][0]["error"]
        },
    }
    (folder / "compare.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    curves = {arm: read_metrics(folder / arm / "metrics.jsonl") for arm in config.arms}
    report.write(folder, whole, curves)
    print(f"the report is {folder / 'report.md'}; the curves: tensorboard --logdir {config.logging_dir}")
    if all(runs[0]["error"] for runs in results.values()):
        raise RunFailed(f"every arm failed; {folder / 'report.md'} says why")
    return whole


def _in_a_process(arm: str, config: CompareConfig, folder: Path, repeat: int, threads: int) -> dict:
    """Run an arm in a fresh process and read what it found; a failure is found too."""
    place = folder / arm if repeat == 0 else folder / ".repeats" / f"{arm}-{repeat}"
    place.mkdir(parents=True)
    run = config.arm_config(model=str(folder / "initial"), dropout=None)
    job = {
        "arm": arm,
        "config": asdict(run),
        "folder": str(place),
        "started": time.time(),
        "warm_up_steps": _WARM_UP_STEPS,
    }
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with (place / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "mori.bench.compare", str(place / "job.json")]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code == 0:
        found = json.loads((place / "result.json").read_text(encoding="utf-8"))
        if repeat:
            shutil.rmtree(place)  # only its figures count: TensorBoard shows one run for each arm
        return {**found, "model": place / "model", "error": None}
    said = (place / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = f"killed by signal {-code} (out of memory?)" if code < 0 else (said[-1] if said else f"exit code {code}")
    return {"error": f"{reason} (see {place / 'output.txt'})"}


def _arm(runs: list[dict]) -> dict:
    """One arm's entry in `compare.json`, over its repeats."""
    if runs[0]["error"]:
        return {"error": runs[0]["error"]}
    runs = [run for run in runs if not run["error"]]
    first = runs[0]
    return {
        "error": None,
        "held_out": first["held_out"],
        "steps": first["steps"],
        "tokens_trained": first["tokens_trained"],
        "targets": first["targets"],
        "tokens_per_second": _spread([_tokens_per_second(run) for run in runs]),
        "first_step_seconds": _spread([run["first_step_seconds"] for run in runs]),
        "peak_memory_bytes": median(run["peak_memory_bytes"] for run in runs),
        "settings": first["settings"],
    }


def _pair(a: list[dict], b: list[dict], precision: str) -> dict:
    """Two arms against each other: differences of the first repeat, ratios (a / b) repeat by repeat."""
    one, other = a[0], b[0]
    series = [{line["step"]: line for line in run["metrics"]} for run in (one, other)]
    same_steps = series[0].keys() == series[1].keys()
    found: dict = {"steps": len(series[0]) if same_steps else None}
    for name in ("loss", "grad_norm", "learning_rate"):
        differences = [abs(series[0][s][name] - series[1][s][name]) for s in series[0]] if same_steps else [None]
        found[f"max_abs_{name}_diff"] = max(differences, key=lambda d: d if d == d else math.inf)
    found["max_abs_weight_diff"] = max_weight_difference(one["model"], other["model"])
    relative = [
        abs(series[0][s]["loss"] - series[1][s]["loss"]) / max(abs(series[1][s]["loss"]), 1e-12)
        for s in (series[0] if same_steps else ())
    ]
    found["max_relative_loss_diff"] = max(relative, default=None)
    found["timing_valid"] = same_steps and all(r <= SAME_WORK[precision] for r in relative)
    both = [(x, y) for x, y in zip(a, b, strict=False) if not x["error"] and not y["error"]]
    found["speed_ratio"] = _spread([_tokens_per_second(x) / _tokens_per_second(y) for x, y in both])
    found["first_step_ratio"] = _spread([x["first_step_seconds"] / y["first_step_seconds"] for x, y in both])
    found["memory_ratio"] = _spread([x["peak_memory_bytes"] / y["peak_memory_bytes"] for x, y in both])
    return found


def max_weight_difference(one: Path, other: Path) -> float | None:
    """The largest absolute difference between the weights of two model folders; None where their tensors do not match."""
    found = 0.0
    names = sorted(path.name for path in one.glob("*.safetensors"))
    if names != sorted(path.name for path in other.glob("*.safetensors")):
        return None
    for name in names:
        with safe_open(one / name, "pt") as a, safe_open(other / name, "pt") as b:
            if set(a.keys()) != set(b.keys()):
                return None
            for key in a.keys():  # noqa: SIM118 (not a dict)
                difference = (a.get_tensor(key) - b.get_tensor(key)).abs()
                if difference.numel():
                    found = max(found, math.inf if difference.isnan().any() else difference.max().item())
    return found


def _tokens_per_second(run: dict) -> float:
    """Targets per second from the end of the warm-up steps (or of the first, in a very short run) to the last."""
    seconds, targets = run["seconds_after_step"], run["targets_after_step"]
    first = min(_WARM_UP_STEPS, len(seconds) - 1) - 1
    if first < 0:
        return targets[-1] / seconds[-1]
    return (targets[-1] - targets[first]) / (seconds[-1] - seconds[first])


def _spread(values: list[float]) -> dict:
    return {"median": median(values), "min": min(values), "max": max(values)}


# ---------------------------------------------------------------------------- what happens in an arm's own process


def run_arm(arm: str, config: TrainConfig, folder: Path, started: float, warm_up_steps: int = _WARM_UP_STEPS) -> dict:
    """Do the run of one arm, and return what is measured.

    The model is left in `folder/model`, the curves in `folder/metrics.jsonl` and as TensorBoard events. `started` is the
    time (`time.time()`) from which the seconds to the first step count. Whoever counts the steps after `warm_up_steps`
    counts all that a GPU does in them, and nothing that it does for earlier ones.
    """
    clock = _Clock(started, warm_up_steps, runtime.start(config.device))
    found = (_mori_arm if arm.startswith("mori") else _trainer_arm)(arm, config, folder, clock)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    names = ("loss", "grad_norm", "learning_rate")
    found["metrics"] = [{"step": line["step"], **{name: line[f"train/{name}"] for name in names}} for line in lines]
    found["steps"] = len(found["seconds_after_step"])
    found["targets"] = found["targets_after_step"][-1]
    return found


class _Clock:
    """Seconds of training alone after each step, the wall seconds until the first was done, the peak memory at the last."""

    def __init__(self, started: float, warm_up_steps: int, where: runtime.Runtime):
        self.started, self.first_step_seconds = started, 0.0
        self.warm_up_steps, self.where = warm_up_steps, where
        self.seconds: list[float] = []
        self.peak_memory_bytes = 0

    def step(self, step: int, seconds: float) -> None:
        if not self.seconds:
            self.first_step_seconds = time.time() - self.started
        self.seconds.append(seconds)
        self.peak_memory_bytes = peak_memory_bytes(self.where.device)
        if step == self.warm_up_steps:
            self.where.synchronize()

    def found(self, targets: list[int]) -> dict:
        return {
            "seconds_after_step": self.seconds,
            "targets_after_step": list(itertools.accumulate(targets)),
            "first_step_seconds": self.first_step_seconds,
            "training_peak_memory_bytes": self.peak_memory_bytes,
        }


def _mori_arm(arm: str, config: TrainConfig, folder: Path, clock: _Clock) -> dict:
    run = dataclasses.replace(
        config,
        logging_dir=str(folder.parent),
        run_name=folder.name,
        output_dir=str(folder / "model"),
        save_steps=1e9,  # no arm saves while it runs
        max_new_tokens=1,
        **(_EXACT if arm == "mori-exact" else {"torch_compile": True} if arm == "mori-compiled" else {}),
    )
    summary = train(run, on_step=clock.step)
    batches = _batches(run, (summary["ledger"]["train_tokens"] - 1) // run.block_size)
    return {
        **clock.found([batches.windows_in(step) * run.block_size for step in range(summary["steps"])]),
        "tokens_trained": _distinct_tokens(batches, summary["steps"], run.block_size),
        "held_out": {name: summary["eval"][name] for name in ("before", "after")},
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "settings": asdict(run),
    }


def _batches(config: TrainConfig, windows: int) -> data.Batches:
    return data.Batches(
        windows,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
    )


def _distinct_tokens(batches: data.Batches, steps: int, block_size: int) -> int:
    """How many different tokens of the corpus stand in the windows that `steps` steps visit."""
    return min(steps * batches.windows_per_step, batches.windows) * block_size


class _TrainerWindows(Dataset):
    """The very windows of `mori` under the names that keep a model from shifting the labels once more."""

    def __init__(self, windows: data.ShiftedDataset):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index]
        return {"input_ids": window["input_ids"], "labels": window["labels"], "shift_labels": window["labels"]}


class _CourseBlocks(Dataset):
    """The blocks of the course's recipe: each line is one row and loses all behind `max_length`; what remains is cut up."""

    def __init__(self, text: str, tokenizer, block_size: int, max_length: int = 1024):
        rows = (tokenizer(line, truncation=True, max_length=max_length)["input_ids"] for line in text.splitlines())
        ids = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.long)
        self.blocks = ids[: len(ids) // block_size * block_size].view(-1, block_size)
        if not len(self.blocks):
            raise UserError(
                f"the course's recipe leaves {len(ids)} tokens of this corpus, not one block of {block_size}"
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class _Order(Sampler):
    """The order in which `mori` visits the windows, epoch by epoch."""

    def __init__(self, batches: data.Batches):
        self.batches, self.epoch = batches, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches.windows

    def __iter__(self):
        yield from self.batches.order(self.epoch).tolist()


def check_shift_labels(model: torch.nn.Module, window: dict[str, torch.Tensor]) -> None:
    """Raise RunFailed where the model ignores `shift_labels` and would shift the labels once more, in silence."""
    batch = {name: value[None].to(model.device) for name, value in window.items()}
    with torch.no_grad():
        model.eval()
        found = model(**batch).loss.item()
        targets = torch.tensor(batch["labels"].numel(), device=model.device)
        expected = models.CausalLMLoss(model)(batch["input_ids"], batch["labels"], targets).item()
        model.train()
    if not math.isclose(found, expected, rel_tol=1e-4):
        raise RunFailed(
            f"{type(model).__name__} does not heed shift_labels (its loss is {found}, that of the labels as they are "
            f"{expected}): Trainer would train it on other targets"
        )


def _trainer_arm(arm: str, config: TrainConfig, folder: Path, clock: _Clock) -> dict:
    """Train with `transformers.Trainer`; `course` on the course's own blocks, the others on the windows of `mori`."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    documents = corpus.read_documents(corpus.find_files(config.corpus))
    where = runtime.start(config.device, config.precision)
    tokenizer = models.load_tokenizer(config.model, (), config.trust_remote_code)
    model_config = models.load_config(
        config.model, tokenizer, dropout=config.dropout, trust_remote_code=config.trust_remote_code
    )
    text = prepare.prepare_text(config, documents, tokenizer, model_config, where)
    model = models.load_model(config.model, model_config, config.trust_remote_code).to(where.device)

    tuned, course = arm == "trainer-tuned", arm == "course"
    if course:
        behind = corpus.text_bytes_from(
            text.ledger.tokens - text.ledger.held_out_tokens, text.tokens, documents, tokenizer
        )
        all_text = "\n".join(document.text for document in documents).encode()
        trained_on = _CourseBlocks(
            all_text[: len(all_text) - behind].decode(errors="ignore"), tokenizer, config.block_size
        )
    else:
        trained_on = _TrainerWindows(text.train)
        check_shift_labels(model, trained_on[0])
    batches = _batches(config, len(trained_on))
    total_steps = config.total_steps(batches.steps_per_epoch)
    warmup_steps, eval_every = steps_of(config.warmup_steps, total_steps), steps_of(config.eval_steps, total_steps)
    constant = "constant_with_warmup" if warmup_steps else "constant"
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=total_steps,
        optim=config.optim,
        learning_rate=config.learning_rate,
        lr_scheduler_type=constant if config.lr_scheduler_type == "constant" else config.lr_scheduler_type,
        warmup_steps=warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=where.precision == "bf16",
        fp16=where.precision == "fp16",
        use_cpu=where.device.type == "cpu",
        logging_steps=config.logging_steps,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none" if tuned else "tensorboard",
        torch_compile=tuned,
        logging_nan_inf_filter=not tuned,
        dataloader_num_workers=2 if tuned else 0,
        dataloader_pin_memory=where.device.type == "cuda",
    )

    if tuned:
        # TrainingArguments turned TF32 on in the newer of PyTorch's two ways; its compiler (torch 2.10) wants both alike.
        torch.set_float32_matmul_precision("high")
    module = models.CausalLMLoss(model)
    evaluations, logged = [], []

    def score(step: int) -> None:
        batch_size = runtime.BatchSize(config.per_device_eval_batch_size)
        found = evaluate(module, text.held_out, text.held_out_bytes, batch_size=batch_size, runtime=where)
        evaluations.append({"step": step, **asdict(found)})

    class Watch(TrainerCallback):
        """Seeds as `mori` does before its first step, keeps the clock, and scores when `mori` would."""

        def on_train_begin(self, args, state, control, **_):
            runtime.set_seed(config.seed)
            self.mark, self.seconds = time.perf_counter(), 0.0

        def on_step_end(self, args, state, control, **_):
            if state.global_step == total_steps:
                where.synchronize()  # as `mori` does, whose last step reads its loss
            self.seconds += time.perf_counter() - self.mark
            clock.step(state.global_step, self.seconds)
            if state.global_step % eval_every == 0 or state.global_step == total_steps:
                score(state.global_step)
            self.mark = time.perf_counter()

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                names = ("loss", "grad_norm", "learning_rate", "epoch")
                logged.append({"step": state.global_step, **{f"train/{name}": float(logs[name]) for name in names}})

    class SameOrder(Trainer):
        """Trainer on the windows in `mori`'s order; its loader draws nothing from the generator that dropout uses."""

        def get_train_dataloader(self):
            loader = DataLoader(
                self.train_dataset,
                batch_size=self._train_batch_size,
                sampler=_Order(batches),
                generator=torch.Generator(),
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
            return self.accelerator.prepare(loader)

    trainer = (Trainer if course else SameOrder)(
        model=model, args=arguments, train_dataset=trained_on, data_collator=default_data_collator, callbacks=[Watch()]
    )
    settings = {k: v for k, v in arguments.to_dict().items() if isinstance(v, (int, float, str, bool))}
    settings["effective_precision"] = where.precision
    if where.precision != "fp32" and not trainer.accelerator.native_amp:
        settings["effective_precision"] = f"fp32: accelerate has no {where.precision} on {where.device.type}"
    score(0)
    trainer.train()
    peak = peak_memory_bytes(where.device)

    models.save(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), tokenizer, folder / "model")
    scored = [{"step": e["step"], **{f"eval/{k}": v for k, v in e.items() if k != "step"}} for e in evaluations]
    monitor = Monitor(folder, first_step=0, total_steps=total_steps, enabled=True)
    for line in sorted(scored + logged, key=lambda line: line["step"]):
        monitor.scalars(line["step"], {k: v for k, v in line.items() if k != "step"})
    monitor.close()
    # Trainer's own shift leaves the last input of a block without a target.
    targets = config.block_size - 1 if course else config.block_size
    return {
        **clock.found([batches.windows_in(step) * targets for step in range(total_steps)]),
        "tokens_trained": _distinct_tokens(batches, total_steps, config.block_size),
        "held_out": {"before": evaluations[0], "after": evaluations[-1]},
        "peak_memory_bytes": peak,
        "settings": settings,
    }


def _main(job_file: str) -> None:
    """The process of one arm: read the job, do it, leave `result.json`."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folder = Path(job["folder"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = run_arm(job["arm"], TrainConfig(**job["config"]), folder, job["started"], job["warm_up_steps"])
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
