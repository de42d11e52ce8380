"""`State`: everything that the loop changes and every checkpoint holds."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from mori import distributed
from mori.checkpoint.tensors import HostMemory
from mori.checkpoint.writing import Pending
from mori.config import TrainConfig
from mori.distributed import BatchSize, Runtime
from mori.model.adapters import files as adapter_files
from mori.optim import Schedule
from mori.tracking.memory import peak_memory_bytes
from mori.tracking.throughput import Throughput

# The counters of a checkpoint and their types.
_PROGRESS = {
    "step": int, "before": (dict, type(None)), "best": (dict, type(None)), "after": (dict, type(None)),
    "samples_before": list, "samples_after": list, "unlogged_losses": list, "skipped_steps": int, "skipped_in_a_row": int,
    "tokens": int, "train_seconds": (int, float), "wall_seconds": (int, float), "train_batch_size": int,
    "eval_batch_size": int, "best_saved": (dict, type(None)), "evaluations_without_improvement": (int, type(None)), "peak_memory_bytes": int,
}  # fmt: skip
_BATCH_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size")


class Best:
    """The best evaluation, and whether the run stops early, by the rules of Trainer and its EarlyStoppingCallback.

    The evaluation before the first step does not take part. The lowest metric is the best; NaN and infinity never are.

    Attributes:
        evaluation: the best evaluation, with its step.
        saved: the best evaluation that has a checkpoint, with its step and samples.
        without_improvement: evaluations since the last improvement; None before the first evaluation.
    """

    def __init__(self, config: TrainConfig):
        self._metric = config.metric_for_best_model.removeprefix("eval_")
        self._patience, self._threshold = config.early_stopping_patience, config.early_stopping_threshold
        self.evaluation: dict | None = None
        self.saved: dict | None = None
        self.without_improvement: int | None = None

    @property
    def out_of_patience(self) -> bool:
        """Whether too many evaluations in a row brought no improvement."""
        return self._patience is not None and (self.without_improvement or 0) >= self._patience

    def observe(self, evaluation: dict) -> None:
        """Compare an evaluation with the best one."""
        value, best = evaluation[self._metric], self.evaluation[self._metric] if self.evaluation else math.inf
        improves = value < best and best - value > self._threshold
        first = self.without_improvement is None
        self.without_improvement = 0 if first or improves else self.without_improvement + 1
        if value < best:
            self.evaluation = evaluation

    def is_of(self, step: int) -> bool:
        """Whether the evaluation at `step` is the best."""
        return self.evaluation is not None and self.evaluation["step"] == step


@dataclass
class PendingSave:
    """A checkpoint that is not published yet.

    Attributes:
        written: the part that this rank writes; None on a rank that writes none.
        saved_step, best_saved: the values in `State` and `Best` that hold if it fails.
    """

    written: Pending | None
    saved_step: int | None
    best_saved: dict | None


class State:
    """Everything that the loop changes; a checkpoint holds `state_dict` and the tensors of `stored` and `optimizer`.

    Attributes:
        stored: what checkpoints hold of the model: all of it, or its adapters.
        step: the number of optimizer steps done.
        before, after: the evaluation at step 0, and the latest.
        best: the best evaluation, and how many came after it.
        losses: the losses of the steps since the last log, scalars on the device.
        skipped: `(2,)` on the device: skipped steps, in total and consecutive.
        compiled: whether the model was compiled unasked; None while that is undecided.
        micro_batch, eval_batch: windows in one forward pass; fewer than the config's after memory ran out.
        saved_step: the step of the newest checkpoint, published or pending.
        pending_save: the checkpoint that is not published yet.
        host_memory: the memory of the snapshots of `async_save`.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        started: float,
    ):
        self.model, self.optimizer, self.scaler = model, optimizer, runtime.grad_scaler()
        self.schedule, self.runtime = schedule, runtime
        self.stored = adapter_files.stored(model)
        self.step = 0
        self.before: dict | None = None
        self.best = Best(config)
        self.after: dict | None = None
        self.samples_before: list[str] = []
        self.samples_after: list[str] = []
        self.losses: list[torch.Tensor] = []
        self.skipped = torch.zeros(2, device=runtime.device)
        self.throughput = Throughput()
        accumulated = config.gradient_accumulation_steps if config.auto_find_batch_size else 1
        self.micro_batch = BatchSize(config.per_device_train_batch_size * accumulated)
        self.eval_batch = BatchSize(config.per_device_eval_batch_size)
        self.saved_step: int | None = None
        self.pending_save: PendingSave | None = None
        self.host_memory = HostMemory()
        self._batch_settings = {name: getattr(config, name) for name in _BATCH_SETTINGS}
        self.compiled: bool | None = None if config.torch_compile is None else False
        self._wall_seconds, self._started, self._peak_memory_bytes = 0.0, started, 0

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start of the run, over all resumes."""
        return self._wall_seconds + time.perf_counter() - self._started

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory in use since the start of the run, over all resumes; see `mori.tracking.memory`."""
        return max(self._peak_memory_bytes, peak_memory_bytes(self.runtime.device))

    @property
    def evaluated(self) -> bool:
        """Whether the latest evaluation is of the present step."""
        return self.after is not None and self.after["step"] == self.step

    @property
    def stops_early(self) -> bool:
        """Whether the evaluation of the present step ends the run."""
        return self.evaluated and self.best.out_of_patience

    def state_dict(self) -> dict:
        """Everything but the tensors of model and optimizer, as JSON values. Collective: every rank must call it."""
        losses = torch.stack(self.losses).tolist() if self.losses else []
        skipped_steps, skipped_in_a_row = map(int, self.skipped.tolist())
        progress = {
            **{name: getattr(self, name) for name in ("step", "before", "after", "samples_before", "samples_after")},
            "best": self.best.evaluation,
            "best_saved": self.best.saved,
            "evaluations_without_improvement": self.best.without_improvement,
            "unlogged_losses": losses,
            "skipped_steps": skipped_steps,
            "skipped_in_a_row": skipped_in_a_row,
            "tokens": self.throughput.tokens,
            "train_seconds": self.throughput.seconds,
            "wall_seconds": self.wall_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "train_batch_size": self.micro_batch.size,
            "eval_batch_size": self.eval_batch.size,
        }
        ranks = self.runtime.gather({"rng": distributed.rng_state(), "unlogged_losses": losses})
        return {
            "progress": progress,
            "ranks": ranks,
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "compiled": self.compiled,
        }

    def wait_for_snapshot(self) -> None:
        """Wait until weights and optimizer may change: until a pending checkpoint has its copy of them."""
        if self.pending_save and self.pending_save.written:
            self.pending_save.written.wait_for_copy()

    def loss_scale(self) -> torch.Tensor | None:
        """The factor of the scaled loss, a scalar that stays on the device; None if losses are not scaled."""
        return self.scaler.scale(torch.ones((), device=self.runtime.device)) if self.scaler.is_enabled() else None

    def count_step(self, loss: torch.Tensor, skipped: torch.Tensor, tokens: int) -> None:
        """Count a finished step; `loss` and `skipped` (1.0 or 0.0) are scalars that stay on the device."""
        self.step += 1
        self.losses.append(loss)
        self.skipped = torch.stack([self.skipped[0] + skipped, (self.skipped[1] + 1) * skipped])
        self.throughput.tokens += tokens

    def load_state_dict(self, saved: dict) -> None:
        """Restore the result of `state_dict`, and the random generators. Raises an error if the value is malformed."""
        ranks, own = saved["ranks"], self.runtime.rank
        losses = [rank["unlogged_losses"] for rank in ranks]
        if len(ranks) != self.runtime.world_size:  # what is logged is the mean over the ranks
            losses = [[sum(step) / len(ranks) for step in zip(*losses, strict=True)]] * self.runtime.world_size
        in_earlier_versions = {
            "best_saved": saved["progress"]["best"], "evaluations_without_improvement": None, "peak_memory_bytes": 0,
        }  # fmt: skip
        progress = {**in_earlier_versions, **saved["progress"], "unlogged_losses": losses[own]}
        if progress.keys() != _PROGRESS.keys():
            raise ValueError(f"progress has the fields {', '.join(progress)}")
        for name, types in _PROGRESS.items():
            value = progress[name]
            if not isinstance(value, types) or isinstance(value, dict) and not {"step", "loss"} <= value.keys():
                raise ValueError(f"{name} is {value!r}")
        if not all(isinstance(loss, float) for loss in progress["unlogged_losses"]):
            raise ValueError("unlogged_losses are not numbers")
        for name in ("step", "before", "after", "samples_before", "samples_after"):
            setattr(self, name, progress[name])
        self.best.evaluation, self.best.saved = progress["best"], progress["best_saved"]
        self.best.without_improvement = progress["evaluations_without_improvement"]
        device = self.runtime.device
        self.losses = [torch.tensor(loss, device=device) for loss in progress["unlogged_losses"]]
        self.skipped = torch.tensor([float(progress[n]) for n in ("skipped_steps", "skipped_in_a_row")], device=device)
        self.throughput = Throughput(progress["tokens"], progress["train_seconds"])
        self._wall_seconds, self.saved_step = progress["wall_seconds"], self.step
        self._peak_memory_bytes = progress["peak_memory_bytes"]
        if all(saved["config"].get(name, value) == value for name, value in self._batch_settings.items()):
            self.micro_batch.size = min(self.micro_batch.size, progress["train_batch_size"] or self.micro_batch.size)
        self.eval_batch.size = min(self.eval_batch.size, progress["eval_batch_size"] or self.eval_batch.size)
        if saved["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(saved["scaler"])
        self.schedule.load_state_dict(saved.get("schedule", {}))
        self.compiled = saved.get("compiled")
        if own < len(ranks):
            distributed.set_rng_state(ranks[own]["rng"])
