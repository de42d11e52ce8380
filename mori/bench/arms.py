"""The process of one arm, started by `harness.run_arm`: trains with `mori`, with `transformers.Trainer`, or with a minimal loop.

The only module of `mori` that uses Trainer.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from mori import distributed
from mori.bench.trainer_data import CourseBlocks, Order, TrainerWindows, check_shift_labels
from mori.config import TrainConfig, steps_of
from mori.data.token_file import text_bytes_from
from mori.data.windows import Batches
from mori.distributed import Runtime
from mori.evaluate import evaluate, windows_to_score
from mori.model import loading, saving
from mori.model.adapters import files as adapter_files
from mori.model.adapters import trainable
from mori.model.lm import CausalLMLoss
from mori.prepare import Prepared, prepare
from mori.speed.fused import fuse_activations
from mori.tracking.loggers import read_metrics
from mori.tracking.memory import peak_memory_bytes
from mori.tracking.monitor import Monitor
from mori.train import train

# `mori-exact` does all floating-point operations in Trainer's order.
_REORDERING = ("torch_compile", "tf32", "chunked_loss", "mask_free_attention", "fused_activations", "fused_adapters")
_EXACT = {**dict.fromkeys(_REORDERING, False), "cpu_matmul": "torch"}
_CHANGES = {"mori-exact": _EXACT, "mori-compiled": {"torch_compile": True}}
# The fields of the config that Trainer has under the same name and with the same meaning.
_SAME_IN_TRAINER = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "logging_steps",
)  # fmt: skip


def run_arm(arm: str, config: TrainConfig, folder: Path, started: float, warm_up_steps: int = 3) -> dict:
    """Do the run of one arm; return its figures.

    Writes the model to `folder/model`, and `folder/metrics.jsonl` and TensorBoard events (`bare` and `nanogpt` write none of them).
    `started` is the time (`time.time()`) from which `first_step_seconds` counts. The clock waits for the GPU after
    `warm_up_steps`, so that the seconds after them contain none of their work.
    """
    if arm in ("bare", "nanogpt"):
        return _bare_arm(config, warm_up_steps, fused=arm == "nanogpt")
    clock = _Clock(started, warm_up_steps, distributed.start(config.device))
    result = (_mori_arm if arm.startswith("mori") else _trainer_arm)(arm, config, folder, clock)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    names = ("loss", "grad_norm", "learning_rate")
    result["metrics"] = [{"step": line["step"], **{name: line[f"train/{name}"] for name in names}} for line in lines]
    result["steps"] = len(result["seconds_after_step"])
    result["targets"] = result["targets_after_step"][-1]
    return result


class _Clock:
    """Records the training seconds after each step, the wall time until the first step, and the peak memory at the last."""

    def __init__(self, started: float, warm_up_steps: int, runtime: Runtime):
        self.started, self.first_step_seconds = started, 0.0
        self.warm_up_steps, self.runtime = warm_up_steps, runtime
        self.seconds: list[float] = []
        self.peak_memory_bytes = 0

    def step(self, step: int, seconds: float) -> None:
        """Record step number `step` (from 1), `seconds` of training after the start."""
        if not self.seconds:
            self.first_step_seconds = time.time() - self.started
        self.seconds.append(seconds)
        self.peak_memory_bytes = peak_memory_bytes(self.runtime.device)
        if step == self.warm_up_steps:
            self.runtime.synchronize()

    def figures(self, targets: list[int]) -> dict:
        """The recorded figures; `targets` is the number of targets in each step."""
        return {
            "seconds_after_step": self.seconds,
            "targets_after_step": list(itertools.accumulate(targets)),
            "first_step_seconds": self.first_step_seconds,
            "training_peak_memory_bytes": self.peak_memory_bytes,
        }


def _batches(config: TrainConfig, windows: int) -> Batches:
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return Batches(windows, batch_size=size, accumulation=accumulation, seed=config.seed)


def _distinct_tokens(batches: Batches, steps: int, block_size: int) -> int:
    """The number of different corpus tokens in the windows of the first `steps` steps."""
    return min(steps * batches.windows_per_step, batches.windows) * block_size


# ------------------------------------------------------------------------------------------------------------- mori


def _mori_arm(arm: str, config: TrainConfig, folder: Path, clock: _Clock) -> dict:
    config = dataclasses.replace(
        config,
        logging_dir=str(folder.parent),
        run_name=folder.name,
        output_dir=str(folder / "model"),
        save_steps=1e9,  # no arm saves during training
        max_new_tokens=1,
        save_merged=False if config.use_peft else None,
        **_CHANGES.get(arm, {}),
    )
    summary = train(config, on_step=clock.step)
    batches = _batches(config, (summary["ledger"]["train_tokens"] - 1) // config.block_size)
    return {
        **clock.figures([batches.windows_in(step) * config.block_size for step in range(summary["steps"])]),
        "tokens_trained": _distinct_tokens(batches, summary["steps"], config.block_size),
        "held_out": {name: summary["eval"][name] for name in ("before", "after")},
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "settings": asdict(config),
    }


# ---------------------------------------------------------------------------------------------------------- Trainer


def _trainer_arm(arm: str, config: TrainConfig, folder: Path, clock: _Clock) -> dict:
    """Train with `transformers.Trainer`: `course` on the blocks of the course's recipe, the others on the windows of `mori`."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    from transformers import Trainer, default_data_collator

    runtime = distributed.start(config.device, config.precision)
    prepared = prepare(config, runtime)
    model = _trainers_model(config, prepared, folder).to(runtime.device)
    if arm == "course":
        dataset = CourseBlocks(_training_text(prepared), prepared.tokenizer, config.block_size)
    else:
        dataset = TrainerWindows(prepared.train)
        check_shift_labels(model, dataset[0])
    batches = _batches(config, len(dataset))
    total_steps = config.total_steps(batches.steps_per_epoch)
    arguments = _training_arguments(arm, config, folder, runtime, total_steps)
    record = _Record(config, prepared, model, runtime, clock, batches)
    trainer = (Trainer if arm == "course" else _trainer_class(batches))(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[record.callback()],
    )
    settings = {k: v for k, v in arguments.to_dict().items() if isinstance(v, (int, float, str, bool))}
    settings["effective_precision"] = runtime.precision
    if runtime.precision != "fp32" and not trainer.accelerator.native_amp:
        settings["effective_precision"] = f"fp32: accelerate has no {runtime.precision} on {runtime.device.type}"
    record.evaluate(0)
    trainer.train()
    peak = peak_memory_bytes(runtime.device)

    trained = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if config.use_peft:
        trained.save_pretrained(folder / "model")
    else:
        saving.save(trained, prepared.tokenizer, folder / "model")
    record.write(folder)
    # Trainer's own shift leaves the last input of a block without a target.
    targets = config.block_size - 1 if arm == "course" else config.block_size
    return {
        **clock.figures([batches.windows_in(step) * targets for step in range(total_steps)]),
        "tokens_trained": _distinct_tokens(batches, total_steps, config.block_size),
        "held_out": {"before": record.evaluations[0], "after": record.evaluations[-1]},
        "peak_memory_bytes": peak,
        "settings": settings,
    }


def _trainers_model(config: TrainConfig, prepared: Prepared, folder: Path) -> nn.Module:
    """The model that Trainer trains, frozen as that of `mori`; adapters are PEFT's, with the initial weights of `mori`."""

    def load() -> nn.Module:
        return loading.load_model(config.model, prepared.model_config, config.trust_remote_code)

    model = load()
    trainable.select(model, config, prepared.train.batch([0])[0])
    if not config.use_peft:
        return model
    from peft import PeftModel

    adapter_files.save(model, adapter_files.tensors(model), prepared.tokenizer, folder / "adapter", base=config.model)
    return PeftModel.from_pretrained(load(), folder / "adapter", is_trainable=True)


def _training_text(prepared: Prepared) -> str:
    """The text of all documents up to the held-out part."""
    boundary = prepared.ledger.tokens - prepared.ledger.held_out_tokens
    held_out = text_bytes_from(boundary, prepared.token_file, prepared.corpus, prepared.tokenizer)
    text = "\n".join(prepared.corpus.texts()).encode()
    return text[: len(text) - held_out].decode(errors="ignore")


def _training_arguments(arm: str, config: TrainConfig, folder: Path, runtime: Runtime, total_steps: int):
    from transformers import TrainingArguments

    tuned, warmup_steps = arm == "trainer-tuned", steps_of(config.warmup_steps, total_steps)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=total_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=config.lr_scheduler_kwargs,
        warmup_steps=warmup_steps,
        bf16=runtime.precision == "bf16",
        fp16=runtime.precision == "fp16",
        use_cpu=runtime.device.type == "cpu",
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none" if tuned else "tensorboard",
        torch_compile=tuned,
        logging_nan_inf_filter=not tuned,
        dataloader_num_workers=2 if tuned else 0,
        dataloader_pin_memory=runtime.device.type == "cuda",
        **{name: getattr(config, name) for name in _SAME_IN_TRAINER},
    )
    if tuned:
        # TrainingArguments set TF32 by PyTorch's newer API alone; torch.compile (2.10) requires both to agree.
        torch.set_float32_matmul_precision("high")
    return arguments


def _trainer_class(batches: Batches):
    """A Trainer that visits the windows in the order of `mori`."""
    from transformers import Trainer

    class OrderedTrainer(Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(
                self.train_dataset,
                batch_size=self._train_batch_size,
                sampler=Order(batches),
                generator=torch.Generator(),  # the loader draws a seed, which must not come from the RNG of dropout
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
            return self.accelerator.prepare(loader)

    return OrderedTrainer


class _Record:
    """The evaluations and the log of a Trainer run; evaluates at the same steps as `mori`, with the same code."""

    def __init__(self, config, prepared: Prepared, model, runtime: Runtime, clock: _Clock, batches: Batches):
        self.config, self.prepared, self.runtime, self.clock = config, prepared, runtime, clock
        self.module, self.total_steps = CausalLMLoss(model), config.total_steps(batches.steps_per_epoch)
        self.eval_every = steps_of(config.eval_steps, self.total_steps)
        self.windows = windows_to_score(config, len(prepared.held_out), self.eval_every, batches.windows_per_step)
        self.evaluations: list[dict] = []
        self.logged: list[dict] = []

    def evaluate(self, step: int) -> None:
        """Evaluate on the held-out text."""
        prepared, size = self.prepared, distributed.BatchSize(self.config.per_device_eval_batch_size)
        texts = prepared.held_out, prepared.held_out_bytes, self.windows
        evaluation = evaluate(self.module, *texts, batch_size=size, runtime=self.runtime)
        self.evaluations.append({"step": step, **asdict(evaluation)})

    def callback(self):
        """The TrainerCallback that seeds as `mori` does before the first step, measures time, evaluates and logs."""
        from transformers import TrainerCallback

        record = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                distributed.set_seed(record.config.seed)
                self.mark, self.seconds = time.perf_counter(), 0.0

            def on_step_end(self, args, state, control, **_):
                last = state.global_step == record.total_steps
                if last:
                    record.runtime.synchronize()  # as in `mori`, whose last step reads its loss
                self.seconds += time.perf_counter() - self.mark
                record.clock.step(state.global_step, self.seconds)
                if state.global_step % record.eval_every == 0 or last:
                    record.evaluate(state.global_step)
                self.mark = time.perf_counter()

            def on_log(self, args, state, control, logs, **_):
                if "loss" in logs:
                    names = ("loss", "grad_norm", "learning_rate", "epoch")
                    values = {f"train/{name}": float(logs[name]) for name in names}
                    record.logged.append({"step": state.global_step, **values})

        return Callback()

    def write(self, folder: Path) -> None:
        """Write `metrics.jsonl` and TensorBoard events."""
        evaluations = [{f"eval/{k}" if k != "step" else k: v for k, v in e.items()} for e in self.evaluations]
        monitor = Monitor(folder, first_step=0, total_steps=self.total_steps, enabled=True)
        for line in sorted(evaluations + self.logged, key=lambda line: line["step"]):
            monitor.scalars(line.pop("step"), {name: value for name, value in line.items() if value is not None})
        monitor.close()


# ------------------------------------------------------------------------------------------------------ minimal loop


def _bare_arm(config: TrainConfig, warm_up_steps: int, fused: bool) -> dict:
    """Train with the loop of a tutorial, to show the cost of PyTorch and the model alone.

    With `fused`, GELU is PyTorch's kernel, as in nanoGPT; attention and AdamW are fused in either case. Nothing else is changed.
    """
    runtime = distributed.start(config.device, config.precision)
    windows = prepare(config, runtime).train
    batches = _batches(config, len(windows))
    model = AutoModelForCausalLM.from_pretrained(config.model).to(runtime.device).train()
    if fused:
        fuse_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    scaler, losses, seconds = runtime.grad_scaler(), torch.zeros(config.max_steps, device=runtime.device), []
    for step in range(config.max_steps):
        input_ids, labels = (tensor.to(runtime.device) for tensor in windows.batch(batches[step][0]))
        with runtime.autocast():
            loss = F.cross_entropy(model(input_ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        if step + 1 in (warm_up_steps, config.max_steps):
            runtime.synchronize()
        seconds.append(time.perf_counter())
    every = config.logging_steps
    logged = ((step, losses[step - every : step]) for step in range(every, config.max_steps + 1, every))
    return {
        "seconds_after_step": seconds,
        "metrics": [{"step": step, "loss": part.mean().item()} for step, part in logged],
        "training_peak_memory_bytes": peak_memory_bytes(runtime.device),
    }


def main(job_file: str) -> None:
    """Read the job that `harness.run_arm` wrote, do it, and write `result.json` beside it."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folder = Path(job["folder"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = run_arm(job["arm"], TrainConfig(**job["config"]), folder, job["started"], job["warm_up_steps"])
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
