"""`scripts/bench.py train`, `memory` and `startup`: a training by `mori`, by Trainer, and by a minimal PyTorch loop."""

import math
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mori import distributed
from mori.bench import harness
from mori.bench.options import CONTEXTS, SHAPES, MemoryBenchConfig, StartupBenchConfig, TrainBenchConfig
from mori.cli import RunFailed, UserError
from mori.config import TrainConfig
from mori.data.corpus import read_corpus
from mori.data.files import find_files
from mori.data.tokenize import encode
from mori.distributed import Runtime
from mori.model import loading, saving
from mori.prepare import settle_precision
from mori.speed.peak import flops_per_token, peak_flops

# scripts/train.py, with the time of the first step.
MORI_PROGRAM = """
import sys, time
from mori.cli import parse
from mori.config import TrainConfig
from mori.speed.startup import imports
config = parse(TrainConfig, "", sys.argv[2:])
with imports():
    from mori.train import train
train(config, on_step=lambda step, _: print("\\nfirst step", time.time() - float(sys.argv[1]), flush=True))
"""
# The usual script with Trainer.
TRAINER_PROGRAM = """
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

    The arms are those of `mori.bench.arms`. Counts the steps after `uncounted_steps` with logging, without evaluation
    and saving. Raises RunFailed if the losses of an arm differ from those of `mori`, because other work takes other time.

    `share_of_peak` is the share of the device's peak, in the precision used, that the model's own operations reach (`peak_flops`,
    measured before each process on a CPU).
    """
    results, runtime = _measure(config)
    with torch.device("meta"):
        operations = flops_per_token(AutoModelForCausalLM.from_config(_model_config(config)), config.block_size)
    counted = config.max_steps - config.uncounted_steps
    tokens = counted * config.per_device_train_batch_size * config.block_size
    seconds = {arm: [run["seconds"] for run in runs] for arm, runs in results.items()}
    arms = {
        arm: {
            "seconds": seconds[arm],
            **harness.spread(seconds[arm]),
            "steps_per_second": [counted / s for s in seconds[arm]],
            "tokens_per_second": [tokens / s for s in seconds[arm]],
            "share_of_peak": [
                tokens * operations / run["seconds"] / run["peak_flops"] if run["peak_flops"] else None for run in runs
            ],
            "training_peak_memory_bytes": [run["training_peak_memory_bytes"] for run in runs],
            **_loss_figures(runs),
        }
        for arm, runs in results.items()
    }
    for arm, figures in arms.items():
        if all(figures["share_of_peak"]):
            figures["median_share_of_peak"] = statistics.median(figures["share_of_peak"])
            print(f"{arm:34} {figures['median_share_of_peak']:.2f} of the peak in {runtime.precision}")
    ratios = {f"{arm} / mori": harness.ratio(seconds[arm], seconds["mori"]) for arm in arms if arm != "mori"}
    _write("train", config, runtime, arms, ratios)


def memory(config: MemoryBenchConfig) -> None:
    """`scripts/bench.py memory`: the peak memory of a few steps, of the GPU, or of the process on a CPU.

    The peak of a process includes loading and the evaluation before the first step, but not saving. A ratio is the
    memory of `mori` divided by that of another arm.
    """
    results, runtime = _measure(config)
    peaks = {arm: [run["training_peak_memory_bytes"] for run in runs] for arm, runs in results.items()}
    arms = {
        arm: {
            "training_peak_memory_bytes": peaks[arm],
            **harness.spread(peaks[arm]),
            **_loss_figures(runs),
        }
        for arm, runs in results.items()
    }
    ratios = {f"mori / {arm}": harness.ratio(peaks["mori"], peaks[arm]) for arm in arms if arm != "mori"}
    _write("memory", config, runtime, arms, ratios)


def _loss_figures(runs: list[dict]) -> dict:
    return {
        "losses": runs[0]["losses"],
        "max_relative_loss_diff": max(run["max_relative_loss_diff"] for run in runs),
    }


def startup(config: StartupBenchConfig) -> None:
    """`scripts/bench.py startup`: seconds from the start of the process to the end of the first optimizer step, in fp32.

    `trainer` is the usual script: tokenizer, blocks, collator, Trainer. It neither evaluates nor samples before it
    trains, and the flags of `mori` switch both off, so that the two do the same work; `mori-default` has no such flags
    and shows what a user waits for. No arm finds the corpus tokenized.
    """
    harness.check_writable(config.output_dir)
    harness.require("accelerate", "trainer")
    runtime = distributed.start(config.device, "fp32")
    device = distributed.for_children(runtime.device)

    def run(arm: str) -> dict:
        run_dir = Path(tempfile.mkdtemp(dir=folder))
        command = startup_command(arm, config, folder, run_dir, device)
        lines = harness.run_process(arm, command, config.threads).splitlines()
        shutil.rmtree(run_dir)
        return {"seconds": next(float(line.split()[-1]) for line in lines if line.startswith("first step "))}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(config, folder, tokens=1)
        results = harness.in_turn(["mori", "mori-default", "trainer"], config.repeats, run)
    seconds = {arm: [run["seconds"] for run in runs] for arm, runs in results.items()}
    arms = {arm: {"seconds": values, **harness.spread(values)} for arm, values in seconds.items()}
    ratios = {f"trainer / {arm}": harness.ratio(seconds["trainer"], seconds[arm]) for arm in ("mori", "mori-default")}
    _write("startup", config, runtime, arms, ratios)


def startup_command(arm: str, config: StartupBenchConfig, folder: Path, run_dir: Path, device: str) -> list[str]:
    """The arguments of Python for `arm`; `folder` has the model and the corpus, the run writes to `run_dir`."""
    started, model, text = str(time.time()), str(folder / "model"), str(folder / "corpus.txt")
    size, block_size = str(config.per_device_train_batch_size), str(config.block_size)
    if arm == "trainer":
        return ["-c", TRAINER_PROGRAM, started, model, text, str(run_dir), size, block_size, device]
    # Two steps, the second one logged: Trainer's callback also comes before the first step is logged.
    flags = ["--max_steps", "2", "--logging_steps", "2", "--precision", "fp32", "--device", device]
    flags += ["--model", model, "--corpus", text, "--per_device_train_batch_size", size, "--block_size", block_size]
    flags += ["--output_dir", str(run_dir / "brain"), "--logging_dir", str(run_dir)]
    if arm == "mori":
        flags += ["--no-eval_on_start", "--held_out_fraction", "1e-9", "--max_new_tokens", "1"]
    return ["-c", MORI_PROGRAM, started, *flags]


def check_losses(arm: str, expected: dict[int, float], losses: dict[int, float], precision: str) -> float:
    """The largest relative difference between the losses of `arm` and the `expected` ones of `mori`, both by step.

    Compares the steps that both logged (Trainer does not log the last ones). Raises RunFailed if a difference exceeds
    `harness.LOSS_TOLERANCE`, or if no step was logged by both.
    """
    steps = expected.keys() & losses.keys()
    differences = [abs(expected[step] - losses[step]) / max(abs(expected[step]), 1e-12) for step in steps]
    if not differences or not all(difference <= harness.LOSS_TOLERANCE[precision] for difference in differences):
        largest = max(differences, key=lambda d: math.inf if math.isnan(d) else d, default=math.nan)
        raise RunFailed(
            f"the losses of {arm} differ from those of mori (relative difference {largest:.1e}): the timing is void"
        )
    return max(differences)


def _measure(config: TrainBenchConfig) -> tuple[dict[str, list[dict]], Runtime]:
    """Run every arm in turn; return the results of its repeats. Raises RunFailed at the first losses that differ."""
    harness.check_writable(config.output_dir)
    for arm in config.arms:
        if arm.startswith("trainer"):
            harness.require("accelerate", arm)
    runtime = distributed.start(config.device, config.precision)
    rows = config.per_device_train_batch_size * config.block_size
    settle_precision(config.precision, runtime, _model_config(config), rows)
    if runtime.precision == "fp16" and runtime.device.type == "cpu":
        raise UserError("precision fp16: on a CPU Trainer computes in fp32 instead; use --precision bf16 or fp32")
    threads, expected = config.threads or torch.get_num_threads(), {}

    def run(arm: str) -> dict:
        arm_folder = Path(tempfile.mkdtemp(dir=folder, prefix=f"{arm}-"))
        peak = measured_peak(runtime)
        result = harness.run_arm(arm, run_config, arm_folder, threads=threads, warm_up_steps=config.uncounted_steps)
        shutil.rmtree(arm_folder)
        losses = {line["step"]: line["loss"] for line in result["metrics"]}
        if not expected:  # the first run is one of mori
            expected.update(losses)
        seconds = result["seconds_after_step"]
        return {
            "seconds": seconds[-1] - seconds[config.uncounted_steps - 1],
            "losses": losses,
            "max_relative_loss_diff": check_losses(arm, expected, losses, runtime.precision),
            "training_peak_memory_bytes": result["training_peak_memory_bytes"],
            "peak_flops": peak,
        }

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_config = _run_config(config, folder, runtime)
        windows = config.max_steps * config.per_device_train_batch_size + 3
        make_inputs(config, folder, tokens=windows * config.block_size)
        arms = ["mori", *(arm for arm in config.arms if arm != "mori")]
        return harness.in_turn(arms, config.repeats, run), runtime


def _run_config(config: TrainBenchConfig, folder: Path, runtime: Runtime) -> TrainConfig:
    """The run that every arm does."""
    return TrainConfig(
        model=str(folder / "model"),
        corpus=[str(folder / "corpus.txt")],
        block_size=config.block_size,
        held_out_fraction=1e-9,  # one window
        per_device_train_batch_size=config.per_device_train_batch_size,
        max_steps=config.max_steps,
        lr_scheduler_type="constant",
        precision=runtime.precision,
        device=distributed.for_children(runtime.device),
        logging_steps=config.logging_steps,
        eval_steps=1e9,  # before the first step and after the last
        logging_dir=str(folder),
        run_name="run",
    ).resolve()


def measured_peak(runtime: Runtime) -> float | None:
    """`peak_flops`, measured again: the best of three on a CPU, because the first measurement starts the threads."""
    peaks = [peak_flops(runtime.device, runtime.precision) for _ in range(3)]
    return max(peaks) if all(peaks) else None


def make_inputs(config: StartupBenchConfig, folder: Path, tokens: int) -> None:
    """Write the inputs of all arms: `model` with random weights and a tokenizer, and `corpus.txt` of at least `tokens`."""
    text = "\n".join(text.strip() for text in read_corpus(find_files([])).texts()) + "\n"
    tokenizer = loading.train_tokenizer([text])
    copies = math.ceil(tokens / len(encode(tokenizer, text)))
    (folder / "corpus.txt").write_text(text * copies, encoding="utf-8")
    distributed.set_seed(0)
    saving.save(AutoModelForCausalLM.from_config(_model_config(config)), tokenizer, folder / "model")


def _model_config(config: StartupBenchConfig):
    context = {"max_position_embeddings": CONTEXTS[config.shape], "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(**SHAPES[config.shape], **context)


def _write(command: str, config: StartupBenchConfig, runtime: Runtime, arms: dict, ratios: dict) -> None:
    """Write the results; `shape` has the model's sizes and the options of the benchmark."""
    options = {k: v for k, v in asdict(config).items() if k not in ("shape", "arms", "output_dir", "threads", "device")}
    report = {
        "bench": command,
        "model": f"random weights, {config.shape}",
        "shape": {**SHAPES[config.shape], **options, "precision": runtime.precision},
        "arms": arms,
        "ratios": ratios,
    }
    name = f"{command}-{config.shape}-batch{config.per_device_train_batch_size}-block{config.block_size}"
    name += f"-{runtime.precision}-{runtime.device.type}"
    packages = ("accelerate",) if any(arm.startswith("trainer") for arm in arms) else ()
    harness.write(config.output_dir, name, report, packages, runtime.device, config.threads)
