"""What a run will take and need, measured before its first step: a few steps, an evaluation and a save, all undone.

The steps are those of the loop, at a learning rate of 0: the weights stay as they are and need no copy, so the peak of memory is
that of the training. Counters, gradient scaler and schedule belong to a `State` that is thrown away, and the optimizer is
built again; a resumed run loads its moments again.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from mori import output
from mori.checkpoint import checkpoints
from mori.checkpoint.files import check_room, staging_folder, write_json
from mori.cli import UserError, guarded, plural
from mori.evaluate import evaluate
from mori.generation.generate import generate
from mori.run import Run
from mori.state import State
from mori.tracking.memory import peak_memory_bytes
from mori.tracking.monitor import Monitor
from mori.tracking.overview import plan

FEWEST_STEPS = 20  # of fewer, the measured ones would be a tenth
_STEPS_PER_TIMED_STEP, _MOST_TIMED_STEPS = 195, 5
_SAMPLED_TOKENS = 16
_SAVED_BYTES = 1 << 24
# The optimizers that move no weight at a learning rate of 0; with any other, a copy of the weights is kept on the host.
AT_REST = frozenset((
    "adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "muon", "adafactor", "sgd",
    "rmsprop", "adagrad",
))  # fmt: skip
Step = Callable[[Run, State], object]


class _AtRest:
    """A schedule of learning rate 0."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of any step."""
        return 0.0


def preflight(run: Run, state: State, train_step: Step) -> dict:
    """Rehearse the saves; measure what the run will take and need, print it, and write it to `preflight.json` in the run's folder.

    `train_step(run, state)` is the loop's own step; afterwards all but the sizes of micro-batches and evaluation batches, which
    are smaller after memory ran out, is as before, to the bit. Collective: every rank must call it. A run of fewer than
    `FEWEST_STEPS` steps measures nothing, unless it is a dry run.

    Returns the figures, see `preflight.json` in runs/README.md; {} if nothing was measured. Raises UserError if the disk has too
    little room or the model cannot be saved, and RunFailed if not even one window fits in memory.
    """
    runtime, dry_run = run.runtime, run.config.dry_run
    size = output.rehearse(run, state)
    if run.total_steps - state.step < FEWEST_STEPS and not dry_run:
        runtime.on_writers(lambda: check_disk(run, planned_files(run, state, size)))
        return {}
    windows = state.micro_batch.size, state.eval_batch.size
    with _undone(run, state):
        seconds, size = _measure(run, state, train_step)
    planned, refusal = runtime.on_main(lambda: planned_files(run, state, size)), None
    try:
        runtime.on_writers(lambda: check_disk(run, planned))
    except UserError as error:
        refusal = error
    figures = _figures(run, state, seconds, planned) | {"refused": [str(refusal)] if refusal else []}
    if runtime.is_main:
        with run.writes():
            write_json(run.run_dir / "preflight.json", figures)
        end = f"dry run: nothing is trained; these figures are in {run.run_dir / 'preflight.json'}"
        run.monitor.say("\n".join([plan(figures), *_smaller_batches(run, state, *windows), *[end] * dry_run]))
    if dry_run and runtime.is_writer:
        with contextlib.suppress(OSError):  # it holds checkpoints of an earlier run
            (run.run_dir / "checkpoints").rmdir()
    if refusal:
        raise refusal
    return figures


@dataclass(frozen=True)
class PlannedFiles:
    """What a run will write until it ends: `checkpoints` more at once, each of `checkpoint_bytes`, and the trained model."""

    checkpoints: int
    checkpoint_bytes: int
    model_bytes: int


def planned_files(run: Run, state: State, checkpoint_bytes: int) -> PlannedFiles:
    """The files to come: a checkpoint is written before an older one is deleted, and the best is kept beside the newest."""
    config, root = run.config, run.run_dir / "checkpoints"
    evaluates = config.eval_strategy != "no" and run.data.held_out is not None
    most, present = config.save_total_limit + evaluates + 1, len(checkpoints.published(root)) if run.resumed else 0
    is_over = run.is_over(state) and state.saved_step == state.step
    saves = 0 if is_over else max(run.work_left(state)["saves"], 1)  # a signal saves, too
    more = max(min(most, present + saves) - present, min(saves, 1))
    return PlannedFiles(more, checkpoint_bytes, sum(p.nbytes for p in _published(run, state.model)))


def check_disk(run: Run, planned: PlannedFiles) -> None:
    """Raise UserError if the disk has no room for `planned`. The folders of checkpoints and model must be there."""
    root, beside_model = run.run_dir / "checkpoints", staging_folder(run.output_dir).parent
    check_room({root: planned.checkpoints * planned.checkpoint_bytes, beside_model: planned.model_bytes})


def _published(run: Run, model: nn.Module) -> list[nn.Parameter]:
    """The weights that `output_dir` holds: those of the whole model, or of its adapters."""
    return (
        list(model.parameters())
        if not run.config.use_peft or output.merges(run.config, model)
        else run.weights.in_model
    )


@contextlib.contextmanager
def _undone(run: Run, state: State) -> Iterator[None]:
    """The context of work at a learning rate of 0 that leaves weights, buffers, optimizer and random state as they were."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in state.model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    kept = [_kept(parameter, whole=run.config.optim not in AT_REST) for parameter in run.weights.parameters]
    with run.runtime.unchanged_random_state(), torch.no_grad():
        with torch.enable_grad():
            yield
        for parameter, (where, values) in zip(run.weights.parameters, kept, strict=True):
            if values.numel():
                parameter[where] = values.to(parameter.device)
        for module, name, buffer, values in buffers:
            buffer.copy_(values)
            setattr(module, name, buffer)
    state.optimizer.zero_grad()
    state.optimizer.state.clear()  # frees its memory first
    state.optimizer = run.weights.build_optimizer(run.config)
    if run.resumed:
        checkpoints.load_moments(run.resumed, state.optimizer, run.weights.as_saved)


def _kept(weight: nn.Parameter, whole: bool) -> tuple:
    """An index of `weight` and a copy of its values there: those that adding 0 may change, or the `whole`.

    A sum with 0 turns -0.0 into 0.0, and some GPU kernels flush numbers below the smallest normal one to 0.
    """
    weight = weight.detach()
    if whole:
        return ..., weight.to("cpu", copy=True)
    small = weight.abs() < torch.finfo(weight.dtype).tiny
    where = small.logical_and_(weight.signbit() | (weight != 0))
    return (where, weight[where]) if where.any() else (..., weight.new_empty(0))


def _measure(run: Run, state: State, train_step: Step) -> tuple[dict[str, float], int]:
    """The seconds that training, evaluation and saving will take until the end of the run; the bytes of a checkpoint."""
    runtime, work = run.runtime, run.work_left(state)
    tokens = run.batches.windows_per_step * run.config.block_size
    training = work["tokens"] / tokens * _seconds_per_step(run, state, train_step)
    saving, size = runtime.on_main(lambda: _seconds_of_saves(run, state, work["saves"]))
    evaluation = work["evaluations"] and work["evaluations"] * _seconds_per_evaluation(run, state)
    return {"training": training, "evaluation": evaluation, "saving": saving}, size


def _seconds_per_step(run: Run, state: State, train_step: Step) -> float:
    """The mean of some whole steps on the same windows, after one that allocates the optimizer's moments."""
    quiet = Monitor(run.run_dir, first_step=state.step, total_steps=run.total_steps, enabled=False)
    run = replace(run, monitor=quiet)
    trial = State(run.config, run.runtime, state.model, state.optimizer, _AtRest(), run.started)
    trial.micro_batch = state.micro_batch
    trial.scaler.load_state_dict(state.scaler.state_dict())
    count = min(max((run.total_steps - state.step) // _STEPS_PER_TIMED_STEP, 1), _MOST_TIMED_STEPS)
    # The last step of an epoch may be short.
    number = max((state.step, state.step + 1), key=run.batches.windows_in)
    began = 0.0
    with run.step_graph.nothing_captured():
        for done in range(count + 1):
            if done == 1:
                began = _now(run)
            trial.step = number
            train_step(run, trial)
        return (_now(run) - began) / count


def _seconds_per_evaluation(run: Run, state: State) -> float:
    """By one batch of held-out windows, and the first tokens of the samples."""
    config, runtime, windows, seconds = run.config, run.runtime, run.eval_windows, 0.0
    if run.data.held_out is not None:
        batch = windows[: state.eval_batch.size * runtime.world_size]
        began = _now(run)
        evaluate(run.module, run.data.held_out, None, batch, batch_size=state.eval_batch, runtime=runtime)
        seconds = (_now(run) - began) * len(windows) / len(batch)
    sampling = config.sampling()
    tokens = min(config.max_new_tokens, _SAMPLED_TOKENS)
    sampling |= {"max_new_tokens": tokens, "min_new_tokens": min(config.min_new_tokens, tokens)}
    began = _now(run)
    if runtime.is_main or runtime.sharded:
        draw = partial(generate, tokenizer=run.data.tokenizer, prompts=config.prompt, seed=config.seed, **sampling)
        with contextlib.suppress(UserError), run.module.as_loaded() as loaded, runtime.autocast_for_samples(loaded):
            run.weights.call(lambda model: guarded("no sample", partial(draw, model)))
    return seconds + (_now(run) - began) * config.max_new_tokens / tokens


def _seconds_of_saves(run: Run, state: State, saves: int) -> tuple[float, int]:
    """The time of all saves and of the trained model, by that of a small checkpoint and a larger one; the bytes of a whole one."""
    times = []
    for sample_bytes in (0, _SAVED_BYTES):
        began = time.perf_counter()
        size = output.rehearse_checkpoint(run, state, sample_bytes)
        times.append(time.perf_counter() - began)
    planned = planned_files(run, state, size)
    largest = max(tensor.nbytes for tensor in state.stored.state_dict().values())
    per_byte = max(times[1] - times[0], 0.0) / min(largest, _SAVED_BYTES)
    if run.config.async_save:  # training goes on meanwhile; only the last is waited for
        saves = min(saves, 1)
    return saves * (times[0] + per_byte * size) + times[0] + per_byte * planned.model_bytes, size


def _now(run: Run) -> float:
    run.runtime.synchronize()
    return time.perf_counter()


def _figures(run: Run, state: State, seconds: dict[str, float], planned: PlannedFiles) -> dict:
    """What `preflight.json` holds. Collective."""
    runtime, trained = run.runtime, sum(parameter.numel() for parameter in run.weights.in_model)
    peaks = {"host": peak_memory_bytes(torch.device("cpu"))}
    if runtime.sharded:  # a save copies what the rank writes
        peaks["host"] += planned.checkpoint_bytes // runtime.world_size
    elif run.config.async_save and runtime.is_writer:
        peaks["host"] += planned.checkpoint_bytes
    if runtime.device.type == "cuda":
        peaks["device"] = peak_memory_bytes(runtime.device)
    ranks, free = runtime.gather(peaks), runtime.on_main(lambda: shutil.disk_usage(run.run_dir).free)
    tokens = round(run.batches.epoch(run.total_steps) * run.batches.windows * run.config.block_size)
    return {
        "step": state.step,
        "total_steps": run.total_steps,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "seconds_before": state.wall_seconds,
        "peak_memory_bytes": {name: max(rank[name] for rank in ranks) for name in peaks},
        "disk": {**asdict(planned), "free_bytes": free},
        "tokens": tokens,
        "trained_parameters": trained,
        "tokens_per_parameter": tokens / trained,
        "micro_batch_windows": state.micro_batch.size,
        "eval_batch_windows": state.eval_batch.size,
    }


def _smaller_batches(run: Run, state: State, windows: int, eval_windows: int) -> list[str]:
    """What memory ran out for, in words."""
    lines = []
    if state.micro_batch.size < windows:
        lines.append(
            f"memory ran out before step {state.step + 1}: micro-batches have {plural(state.micro_batch.size, 'window')} instead "
            f"of {windows} (the windows of a step stay the same)"
        )
        if not run.config.dry_run:
            run.monitor.scalars(state.step, {"train/micro_batch_size": state.micro_batch.size})
    if state.eval_batch.size < eval_windows:
        lines.append(
            f"memory ran out: evaluates {plural(state.eval_batch.size, 'window')} at a time instead of {eval_windows}"
        )
    return lines
