"""`scripts/bench.py train`, `memory` and `startup`: a training by `mori`, by Trainer, and by a loop with nothing around it."""

import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig, AutoModelForCausalLM

from mori import distributed as runtime
from mori import run as prepare
from mori.bench import harness as bench
from mori.bench.compare import SAME_WORK
from mori.config import (
    BENCH_CONTEXTS,
    MemoryBenchConfig,
    RunFailed,
    StartupBenchConfig,
    TrainBenchConfig,
    TrainConfig,
    UserError,
)
from mori.data import corpus
from mori.data import windows as data
from mori.model import loading as models
from mori.model import options as fast
from mori.speed.matmul import race
from mori.tracking.memory import peak_memory_bytes

# What scripts/train.py does, telling when the first step is done.
MORI_LINES = """
import sys, time
from mori.config import TrainConfig, parse
from mori.speed.startup import imports, training_memory
config = parse(TrainConfig, "", sys.argv[2:])
with imports(training_memory(config)):
    from mori.train import train
train(config, on_step=lambda step, _: print("\\nfirst step", time.time() - float(sys.argv[1]), flush=True))
"""
# What a person would write with Trainer instead.
TRAINER_LINES = """
import sys, time
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainerCallback,
    TrainingArguments)
started, model, corpus, output_dir, batch_size, block_size, device = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.eos_token
ids, size = tokenizer(open(corpus, encoding="utf-8").read())["input_ids"], int(block_size)
blocks = [{"input_ids": ids[i : i + size]} for i in range(0, len(ids) - size + 1, size)]
class FirstStep(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("\\nfirst step", time.time() - float(started), flush=True)
arguments = TrainingArguments(output_dir, max_steps=1, per_device_train_batch_size=int(batch_size), use_cpu=device == "cpu")
Trainer(model=AutoModelForCausalLM.from_pretrained(model), args=arguments, train_dataset=blocks, callbacks=[FirstStep()],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)).train()
"""


def train(config: TrainBenchConfig) -> None:
    """`scripts/bench.py train`: seconds of the same steps, on the same windows from the same weights, by every arm.

    `mori`, `trainer` and `trainer-tuned` are the arms of `scripts/compare.py`, `bare` is the loop below: what PyTorch
    and the model take by themselves. Counted are the steps after `uncounted_steps`, logging included, evaluation and
    saving not. Raises RunFailed where the losses are not those of `mori`: other work takes other time.

    `share_of_peak` is what the model's own operations come to, of what the device can do (`fast.peak_flops`, on a CPU
    measured before each process).
    """
    runs, where = _measure(config)
    with torch.device("meta"):
        operations = fast.flops_per_token(AutoModelForCausalLM.from_config(_model_config(config)), config.block_size)
    counted = config.max_steps - config.uncounted_steps
    tokens = counted * config.per_device_train_batch_size * config.block_size
    seconds = {arm: [run["seconds"] for run in found] for arm, found in runs.items()}
    arms = {
        arm: {
            "seconds": seconds[arm],
            **bench.spread(seconds[arm]),
            "steps_per_second": [counted / took for took in seconds[arm]],
            "tokens_per_second": [tokens / took for took in seconds[arm]],
            "share_of_peak": [
                tokens * operations / run["seconds"] / run["peak_flops"] if run["peak_flops"] else None for run in found
            ],
            "training_peak_memory_bytes": [run["training_peak_memory_bytes"] for run in found],
            "losses": found[0]["losses"],
            "max_relative_loss_diff": max(run["max_relative_loss_diff"] for run in found),
        }
        for arm, found in runs.items()
    }
    ratios = {f"{arm} / mori": bench.ratio(seconds[arm], seconds["mori"]) for arm in arms if arm != "mori"}
    _report("train", config, where, arms, ratios)


def memory(config: MemoryBenchConfig) -> None:
    """`scripts/bench.py memory`: the most memory that a few steps take, of the GPU where there is one, else of the process.

    The process' includes what loading and the evaluation before the first step took; saving comes later, and is not in it.
    The ratios say what share of an arm's memory `mori` takes.
    """
    runs, where = _measure(config)
    peaks = {arm: [run["training_peak_memory_bytes"] for run in found] for arm, found in runs.items()}
    arms = {
        arm: {
            "training_peak_memory_bytes": peak,
            **bench.spread(peak),
            "losses": found[0]["losses"],
            "max_relative_loss_diff": max(run["max_relative_loss_diff"] for run in found),
        }
        for (arm, found), peak in zip(runs.items(), peaks.values(), strict=True)
    }
    ratios = {f"mori / {arm}": bench.ratio(peaks["mori"], peaks[arm]) for arm in arms if arm != "mori"}
    _report("memory", config, where, arms, ratios)


def startup(config: StartupBenchConfig) -> None:
    """`scripts/bench.py startup`: seconds from the start of the process to the end of the first optimizer step, in fp32.

    `trainer` is the script that a person would write: tokenizer, blocks, collator, Trainer. It neither evaluates nor
    samples before it trains, and `mori` is told not to either, so that both do the same work; `mori-default` does all
    that it does when nothing is said: what a person waits for. No arm finds the corpus tokenized.
    """
    bench.check_writable(config.output_dir)
    bench.require("accelerate", "trainer")
    where = runtime.start(config.device, "fp32")
    device = runtime.for_children(where.device)

    def run(arm: str) -> dict:
        place = Path(tempfile.mkdtemp(dir=folder))
        size, block_size = str(config.per_device_train_batch_size), str(config.block_size)
        begin = time.time()
        if arm == "trainer":
            command = ["-c", TRAINER_LINES, str(begin), str(folder / "model"), str(folder / "corpus.txt")]
            command += [str(place), size, block_size, device]
        else:
            command = ["-c", MORI_LINES, str(begin), "--model", str(folder / "model")]
            command += ["--corpus", str(folder / "corpus.txt"), "--max_steps", "2", "--precision", "fp32"]
            command += ["--logging_steps", "2"]  # Trainer's callback too comes before the first step is logged
            command += ["--output_dir", str(place / "brain"), "--logging_dir", str(place), "--device", device]
            command += ["--per_device_train_batch_size", size, "--block_size", block_size]
            alike = ["--no-eval_on_start", "--held_out_fraction", "1e-9", "--max_new_tokens", "1"]
            command += [] if arm == "mori-default" else alike
        lines = bench.in_a_process(arm, command, config.threads).splitlines()
        shutil.rmtree(place)
        return {"seconds": next(float(line.split()[-1]) for line in lines if line.startswith("first step "))}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_start(config, folder, tokens=1)
        found = bench.in_turn(["mori", "mori-default", "trainer"], config.repeats, run)
    seconds = {arm: [run["seconds"] for run in runs] for arm, runs in found.items()}
    arms = {arm: {"seconds": took, **bench.spread(took)} for arm, took in seconds.items()}
    ratios = {f"trainer / {arm}": bench.ratio(seconds["trainer"], seconds[arm]) for arm in ("mori", "mori-default")}
    _report("startup", config, where, arms, ratios)


def check_losses(arm: str, ours: dict[int, float], theirs: dict[int, float], precision: str) -> float:
    """The largest relative difference between the losses of `mori` and those of `arm`, both by step.

    Steps that only one of them logs are left out (Trainer says nothing of the last ones). Raises RunFailed where the
    losses differ by more than `SAME_WORK` allows, or have no step in common.
    """
    both = ours.keys() & theirs.keys()
    differences = [abs(ours[step] - theirs[step]) / max(abs(ours[step]), 1e-12) for step in both]
    if not differences or not all(difference <= SAME_WORK[precision] for difference in differences):
        worst = max(differences, key=lambda d: d if d == d else math.inf, default=math.nan)
        raise RunFailed(f"the losses of {arm} and mori differ by {worst:.1e} of themselves: the timing is void")
    return max(differences)


def _measure(config: TrainBenchConfig) -> tuple[dict[str, list[dict]], runtime.Runtime]:
    """Run every arm in turn; what each repeat found, and where it ran. Raises RunFailed at the first losses that differ."""
    bench.check_writable(config.output_dir)
    for arm in config.arms:
        if arm.startswith("trainer"):
            bench.require("accelerate", arm)
    where = runtime.start(config.device, config.precision)
    if where.precision == "fp16":
        raise UserError("this GPU does not compute in bf16; say --precision fp32")

    expected: dict[int, float] = {}  # the losses of the very first run, which is one of mori's

    def run(arm: str) -> dict:
        place = Path(tempfile.mkdtemp(dir=folder, prefix=f"{arm}-"))
        job = {"arm": arm, "config": asdict(run_config), "folder": str(place), "started": time.time()}
        (place / "job.json").write_text(json.dumps({**job, "warm_up_steps": config.uncounted_steps}), encoding="utf-8")
        peak = _peak(where)
        room = "mori.bench.train" if arm == "bare" else "mori.bench.compare"
        bench.in_a_process(arm, ["-m", room, str(place / "job.json")], config.threads or torch.get_num_threads())
        found = json.loads((place / "result.json").read_text(encoding="utf-8"))
        shutil.rmtree(place)
        seconds, losses = found["seconds_after_step"], {line["step"]: line["loss"] for line in found["metrics"]}
        expected.update({} if expected else losses)
        return {
            "seconds": seconds[-1] - seconds[config.uncounted_steps - 1],
            "losses": losses,
            "max_relative_loss_diff": check_losses(arm, expected, losses, where.precision),
            "training_peak_memory_bytes": found["training_peak_memory_bytes"],
            "peak_flops": peak,
        }

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_config = TrainConfig(
            model=str(folder / "model"),
            corpus=[str(folder / "corpus.txt")],
            block_size=config.block_size,
            held_out_fraction=1e-9,  # one window
            per_device_train_batch_size=config.per_device_train_batch_size,
            max_steps=config.max_steps,
            lr_scheduler_type="constant",
            precision=where.precision,
            device=runtime.for_children(where.device),
            logging_steps=config.logging_steps,
            eval_steps=1e9,  # before the first step and after the last
            logging_dir=str(folder),
            run_name="run",
        ).resolve()
        windows = config.max_steps * config.per_device_train_batch_size + 3
        _make_start(config, folder, tokens=windows * config.block_size)
        arms = ["mori", *(arm for arm in config.arms if arm != "mori")]
        return bench.in_turn(arms, config.repeats, run), where


def _peak(where: runtime.Runtime) -> float | None:
    """`fast.peak_flops` as it is at this minute: on a CPU the best of three races, for the first one wakes the threads."""
    found = []
    for _ in range(3):
        race.cache_clear()
        found.append(fast.peak_flops(where))
    return max(found) if all(found) else None


def _make_start(config: StartupBenchConfig, folder: Path, tokens: int) -> None:
    """Leave what all arms begin with: `model`, of random weights, with a tokenizer, and `corpus.txt`, of `tokens` or more."""
    text = "\n".join(document.text.strip() for document in corpus.read_documents(corpus.find_files([]))) + "\n"
    tokenizer = models.train_tokenizer([text])
    copies = math.ceil(tokens / len(corpus.encode(tokenizer, text)))
    (folder / "corpus.txt").write_text(text * copies, encoding="utf-8")
    runtime.set_seed(0)
    models.save(AutoModelForCausalLM.from_config(_model_config(config)), tokenizer, folder / "model")


def _model_config(config: StartupBenchConfig):
    context = {"max_position_embeddings": BENCH_CONTEXTS[config.shape], "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(**bench.SHAPES[config.shape], **context)


def _report(command: str, config: StartupBenchConfig, where: runtime.Runtime, arms: dict, ratios: dict) -> None:
    """Write the figures; what was asked for, flag by flag, is part of the shape."""
    asked = {k: v for k, v in asdict(config).items() if k not in ("shape", "arms", "output_dir", "threads", "device")}
    report = {
        "bench": command,
        "model": f"random weights, {config.shape}",
        "shape": {**bench.SHAPES[config.shape], **asked, "precision": where.precision},
        "arms": arms,
        "ratios": ratios,
    }
    name = f"{command}-{config.shape}-batch{config.per_device_train_batch_size}-block{config.block_size}"
    packages = ("accelerate",) if any(arm.startswith("trainer") for arm in arms) else ()
    name += f"-{where.precision}-{where.device.type}"
    bench.write(config.output_dir, name, report, packages, where.device, config.threads)


# ------------------------------------------------------------------------------------- the loop with nothing around it


def _bare(config: TrainConfig, windows: data.ShiftedDataset, batches: data.Batches, where: runtime.Runtime, on_step):
    """The loss of every step, `(steps,)`."""
    model = AutoModelForCausalLM.from_pretrained(config.model).to(where.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    losses = torch.zeros(config.max_steps, device=where.device)
    for step in range(config.max_steps):
        input_ids, labels = (tensor.to(where.device) for tensor in windows.batch(batches[step][0]))
        with where.autocast():
            logits = model(input_ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        on_step(step + 1)
    return losses


def _main(job_file: str) -> None:
    """The process of the arm `bare`: read the job, do it, leave `result.json` as `mori.compare` does."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    config = TrainConfig(**job["config"])
    where = runtime.start(config.device, config.precision)
    tokenizer = models.load_tokenizer(config.model, ())
    documents = corpus.read_documents(corpus.find_files(config.corpus))
    text = prepare.prepare_text(config, documents, tokenizer, models.load_config(config.model, tokenizer), where)
    batches = data.Batches(
        len(text.train), batch_size=config.per_device_train_batch_size, accumulation=1, seed=config.seed
    )
    seconds = []

    def on_step(step: int) -> None:
        if step in (job["warm_up_steps"], config.max_steps):
            where.synchronize()
        seconds.append(time.perf_counter())

    losses = _bare(config, text.train, batches, where, on_step).tolist()
    every = config.logging_steps
    logged = range(every, config.max_steps + 1, every)
    found = {
        "seconds_after_step": seconds,
        "metrics": [{"step": step, "loss": sum(losses[step - every : step]) / every} for step in logged],
        "training_peak_memory_bytes": peak_memory_bytes(where.device),
    }
    (Path(job["folder"]) / "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
