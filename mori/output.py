"""What a run writes: checkpoints while it trains, the trained model and a summary at its end.

`rehearse` tries both before the first step, so that no run fails after hours of training.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import nn

from mori import distributed
from mori.checkpoint import checkpoints, files, run_folder, shards, writing
from mori.checkpoint.files import advice, publish, rehearse_publication, staging_folder
from mori.checkpoint.tensors import HostMemory, check_finite
from mori.cli import RunFailed, UserError, guarded, one_line, plural
from mori.config import TrainConfig
from mori.distributed import nodes
from mori.export import hub
from mori.generation.generate import model_settings
from mori.model import saving
from mori.model.adapters import files as adapter_files
from mori.run import Run
from mori.state import PendingSave, State
from mori.tracking.monitor import say
from mori.tracking.overview import environment, results, sample_command
from mori.tracking.report.card import CARD, model_card
from mori.tracking.report.write import Reporter

Result = TypeVar("Result")
_OF_WHOLE_MODELS = ("config.json", "generation_config.json")
_SMALL_BYTES = 2 << 30  # of a model that is published whole, with its adapters merged


def rehearse(run: Run, state: State) -> int:
    """Save and publish a part of the model in the true places, and undo it; sets `model_files`. Collective.

    Returns the bytes of a whole checkpoint, as far as they are known: before its first step, only AdamW's moments are.
    Raises UserError if a later save would fail for another reason than a full disk (see `check_disk`).
    """
    runtime, beside = run.runtime, {}

    def rehearse_model() -> None:
        with _readable_failures(run), run.module.as_loaded() as model:
            planned = summary(run, state)
            fill = partial(_write_model, run, model, run_summary=planned, rehearsal=True)
            contents = rehearse_publication(run.output_dir, fill)
        beside.update((n, data) for n, data in contents.items() if not n.endswith((".safetensors", CARD)))
        if run.config.use_peft:  # transformers takes a folder with a config.json for a whole model
            settings = json.dumps(adapter_files.adapter_config(state.model, adapter_files.base_of(run.config.model)))
            for name in _OF_WHOLE_MODELS:
                beside.pop(name, None)
            beside[adapter_files.CONFIG] = settings.encode()

    runtime.agreed(rehearse_model, runtime.is_publisher)
    run.model_files = runtime.from_main(beside)
    size = runtime.on_writers(lambda: rehearse_checkpoint(run, state))
    if not state.optimizer.state and run.config.optim == "adamw_torch_fused":
        size += 2 * sum(parameter.nbytes for parameter in run.weights.in_model)
    return size


def rehearse_checkpoint(run: Run, state: State, sample_bytes: int = 0) -> int:
    """Save a part of a checkpoint, with `sample_bytes` of a tensor, and remove it; returns the bytes of a whole one.

    Raises UserError if a later save would fail for another reason than a full disk.
    """
    with _readable_failures(run):
        return writing.rehearse(
            run.run_dir / "checkpoints",
            model=state.stored,
            optimizer=state.optimizer,
            beside=run.model_files,
            sample_bytes=sample_bytes,
            as_saved=run.weights.as_saved,
        )


@contextlib.contextmanager
def _readable_failures(run: Run) -> Iterator[None]:
    """Convert the errors of saving to UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot save in {run.run_dir} and {run.output_dir}: {advice(error)}") from None
    except writing.SAVE_ERRORS as error:
        if distributed.out_of_memory(error):
            raise
        raise UserError(f"this model cannot be saved: {one_line(error)}") from None


def save(run: Run, state: State) -> None:
    """Save a checkpoint; a run resumed from it continues as if it had never stopped. A failure is a warning.

    With `async_save` only the snapshot is taken now, and a thread writes it; `publish_staged` or `complete_save` publishes it.
    """
    complete_save(run, state)  # never two at once
    config, runtime, root, step = run.config, run.runtime, run.run_dir / "checkpoints", state.step
    before = state.saved_step, state.best.saved
    if state.best.is_of(step):
        state.best.saved = {**state.best.evaluation, "samples": state.samples_after}
    if runtime.is_writer:
        writing.discard(root, step)
    saved = runtime.from_main({**run.identity(), "cpu_matmul": run.module.cpu_matmul, **state.state_dict()})
    written = None
    if runtime.is_writer:
        run.monitor.sync()
    if runtime.is_writer or runtime.sharded:
        take = partial(
            writing.snapshot,
            step,
            model=state.stored,
            optimizer=state.optimizer,
            state=saved,
            beside=run.model_files,
            weights_file=adapter_files.WEIGHTS if config.use_peft else writing.MODEL,
            memory=state.host_memory if config.async_save else None,
            as_saved=run.weights.as_saved,
            ranks=runtime.world_size if runtime.sharded else 1,
        )
        written = writing.Pending(root, step, take, in_background=config.async_save)
    state.pending_save, state.saved_step = PendingSave(written, *before), step
    if not config.async_save:
        complete_save(run, state)


def publish_staged(run: Run, state: State) -> None:
    """Publish the pending checkpoint if it is on disk."""
    pending = state.pending_save
    if pending and not run.runtime.any(pending.written and not pending.written.is_staged):
        complete_save(run, state)


def complete_save(run: Run, state: State) -> None:
    """Wait until the pending checkpoint is on disk, publish it, and delete old ones. A failure is a warning."""
    if state.pending_save is None:
        return
    runtime, root, pending, step = run.runtime, run.run_dir / "checkpoints", state.pending_save, state.saved_step
    try:
        files, failure = _attempt(pending.written.files) if pending.written else ({}, "")
        parts = runtime.gather((files, failure)) if runtime.sharded else [(files, failure)]
        failure = next((failure for _, failure in parts if failure), "")
        if runtime.is_writer and not failure:
            _, failure = _attempt(lambda: writing.publish(root, step, *(files for files, _ in parts)))
    finally:
        if pending.written:
            pending.written.end()
        if runtime.is_writer:
            writing.discard(root, step)
    state.pending_save = None
    results = runtime.gather((runtime.is_writer, failure))  # the ranks wait here, so that none exits during the save
    failures = {rank: reason for rank, (is_writer, reason) in enumerate(results) if is_writer}
    for rank, reason in failures.items():
        if reason and (rank == 0 or reason != failures[0]):
            where = f" on the node of rank {rank}" if rank else ""
            run.monitor.say(f"WARNING: no checkpoint at step {step}{where}: {reason}; training continues")
    if all(failures.values()) or runtime.sharded and any(failures.values()):  # without shards, any whole copy will do
        state.saved_step, state.best.saved = pending.saved_step, pending.best_saved
        return
    if runtime.is_writer and not failure:
        try:
            checkpoints.prune(root, run.config.save_total_limit, state.best.saved and state.best.saved["step"])
        except OSError as error:
            run.monitor.say(f"WARNING: could not delete an old checkpoint: {error}")


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result of a part of a save, and how it failed."""
    try:
        return action(), ""
    except writing.SAVE_ERRORS as error:
        if isinstance(error, (RuntimeError, MemoryError)) and not distributed.out_of_memory(error):
            raise
        return None, str(error)


def leave(run: Run, state: State, error: BaseException | None) -> None:
    """After the loop, also after an error in it: publish the pending checkpoint if this rank writes all of it; end its thread."""
    if state.pending_save and state.pending_save.written:
        written = state.pending_save.written
        with contextlib.suppress(*writing.SAVE_ERRORS):
            # A second Ctrl-C does not wait, and a rank that is lost cannot say what it has staged.
            if run.config.async_save and isinstance(error, Exception) and not run.runtime.sharded:
                writing.publish(written.root, written.step, written.files())
        written.end()
        if run.runtime.is_writer:
            writing.discard(written.root, written.step)


def finish(run: Run, state: State, signals: distributed.StopSignals) -> dict:
    """Publish the trained model, write the summary and return it; then upload the model, if the config says so.

    Raises RunFailed if the upload fails, or if the last checkpoint was not saved, and Interrupted after a signal in the upload.
    """
    config, runtime = run.config, run.runtime
    complete_save(run, state)
    if state.stops_early:
        run.monitor.say(
            f"step {state.step}: stops early, {plural(state.best.without_improvement, 'evaluation')} without an improvement"
        )
    if state.samples_after:
        run.monitor.say("\n".join(["after:", *state.samples_after]))
    run.monitor.close()
    published_step = state.step
    if config.load_best_model_at_end and state.best.saved:
        nodes.bring_everywhere(runtime, _best_checkpoint(run, state), run.monitor.say)
    if config.load_best_model_at_end and (runtime.is_publisher or runtime.sharded):
        published_step = load_best(run, state)
    run_summary = runtime.from_main({**summary(run, state), "published_step": published_step})
    if runtime.is_publisher or runtime.sharded:
        publish_model(run, run_summary)
    runtime.barrier()
    if runtime.is_writer and run.output_dir.is_dir():  # of a sharded model, the first node has it
        with run.writes():
            run_summary["output_sha256"] = files.hashes(run.output_dir)
            files.write_json(run.run_dir / "summary.json", run_summary)
    if runtime.is_main:
        run.monitor.report(run_summary, finished=True)
        is_last_step = run_summary["published_step"] == state.step
        same = runtime.samples_in_fp32(state.model) and is_last_step and bool(state.samples_after)
        say(results(run_summary, sample_command(config, model_settings(state.model)), same_text=same))
    runtime.barrier()
    runtime.close()  # the others do not wait for the upload
    signals.defer(False)
    if runtime.is_main and config.push_to_hub:
        hub.push(config, config.output_dir)
    if run.saves_the_end and state.saved_step != state.step:
        raise RunFailed(
            f"the last checkpoint could not be saved (see the warnings above); the brain in {config.output_dir}/ is complete"
        )
    return run_summary


def load_best(run: Run, state: State) -> int:
    """Load the weights of the best checkpoint into the model; returns their step. A damaged one leaves the last weights."""
    best = state.best.saved
    if best is None or best["step"] == state.step:
        return state.step
    folder, error = _best_checkpoint(run, state), None
    tell = say if run.runtime.is_main else lambda message: None
    try:
        if run.runtime.is_publisher:
            checkpoints.verify(folder)
    except (checkpoints.CorruptCheckpoint, UserError) as raised:
        error = raised
    try:
        error = run.runtime.gather(error)[0] if run.runtime.sharded else error
        if error is None:
            checkpoints.load_weights(folder, state.stored)
    except UserError as raised:
        error = raised
    if error:
        if isinstance(error, checkpoints.CorruptCheckpoint) and run.runtime.is_publisher:
            checkpoints.set_damaged_aside(folder, error, say)
        tell(f"WARNING: the best checkpoint cannot be published, so the last weights are: {error}")
        return state.step
    tell("\n".join([f"at step {best['step']}, the best, which is published:", *best.get("samples", [])]))
    return best["step"]


def _best_checkpoint(run: Run, state: State) -> Path:
    return checkpoints.folder_of(run.run_dir / "checkpoints", state.best.saved["step"])


def publish_model(run: Run, run_summary: dict) -> None:
    """Write the trained model and its card to `output_dir`; an existing model is renamed to `<name>.previous`.

    Collective if the ranks share the weights.
    """
    with run.module.as_loaded() as model:
        try:
            if not run.runtime.sharded:
                check_finite(adapter_files.stored(model).state_dict(), dict(model.named_buffers()))
            if run.runtime.is_publisher:
                publish(run.output_dir, lambda folder: _write_model(run, model, folder, run_summary))
            else:
                _write_model(run, model, staging_folder(run.output_dir), run_summary)
        except FloatingPointError as error:
            raise RunFailed(f"the model is not written: {error}") from None
        except (OSError, UserError) as error:
            reason = f"{advice(error)}: it resumes from the newest checkpoint"
            raise RunFailed(f"cannot write the trained model to {run.output_dir}: {reason}") from None


def _write_model(run: Run, model: nn.Module, folder: Path, run_summary: dict, rehearsal: bool = False) -> None:
    """Write what `output_dir` holds: the whole model, or its adapters, and the card."""
    config, runtime, base = run.config, run.runtime, adapter_files.base_of(run.config.model)
    merged = not config.use_peft or merges(config, model)
    if merged and runtime.sharded and not rehearsal:
        saving.save_divided(model, run.data.tokenizer, folder, writers=runtime.ranks_of_node)
    elif merged:
        saving.save(model, run.data.tokenizer, folder, rehearsal=rehearsal)
    else:
        adapters = adapter_files.tensors(model)
        if rehearsal:
            adapters = {name: shards.local(tensor) for name, tensor in adapters.items()}
        elif runtime.sharded:
            adapters = shards.owned(adapter_files.WEIGHTS, adapters, dict.fromkeys(adapters, 0), HostMemory())
        if runtime.is_publisher:
            check_finite({} if rehearsal else adapters)
            adapter_files.save(model, adapters, run.data.tokenizer, folder, base)
    if not runtime.is_publisher:
        return
    card = model_card(
        run_summary,
        config,
        ledger=str(run.data.ledger),
        environment=environment(runtime.device, runtime.precision, runtime.world_size),
        base=hub.base_metadata(base),
        lora=adapter_files.adapter_config(model, base) if config.use_peft else None,
        merged=merged,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def merges(config: TrainConfig, model: nn.Module) -> bool:
    """Whether the adapters are merged into the published model: as the config says, else if the model is small."""
    if config.save_merged is not None or config.load_in_4bit:
        return bool(config.save_merged)
    return sum(parameter.nbytes for parameter in model.parameters()) < _SMALL_BYTES


def summary(run: Run, state: State) -> dict:
    """What the run did; its summary.json.

    `best_checkpoint` is the folder of the best weights, if they are still there. `samples.copied` (`samples.copied_before`) holds,
    for each sample after (before) the training, the ranges of characters that stand word for word in the training text.
    """
    evaluations = {"before": state.before, "best": state.best.evaluation, "after": state.after}
    copying = {name: (evaluation or {}).get("copying", {}) for name, evaluation in evaluations.items()}
    checkpoint = state.best.saved and _best_checkpoint(run, state)
    return {
        "run_name": run.config.run_name,
        "model": run.config.model,
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in run.weights.in_model),
        "sha256": {**run.data.hashes, "model_sha256": run.model_sha256},
        "ledger": asdict(run.data.ledger),
        "eval": {name: evaluation and _without("copying", evaluation) for name, evaluation in evaluations.items()},
        "copying": {name: _without("spans", figures) or None for name, figures in copying.items()},
        "samples": {
            "before": state.samples_before,
            "after": state.samples_after,
            "copied_before": copying["before"].get("spans", []),
            "copied": copying["after"].get("spans", []),
        },
        "scored_windows": len(run.eval_windows),
        "held_out_windows": len(run.data.held_out or []),
        "steps": state.step,
        "total_steps": run.total_steps,
        "stopped_early": state.step < run.total_steps,
        "published_step": state.step,
        "evaluations_without_improvement": state.best.without_improvement,
        "best_checkpoint": str(checkpoint) if checkpoint and checkpoint.is_dir() else None,
        "skipped_steps": int(state.skipped[0]),
        "wall_seconds": state.wall_seconds,
        "tokens_per_second": state.throughput.average,
        "peak_memory_bytes": state.peak_memory_bytes,
        "output_dir": run.config.output_dir,
    }


def _without(name: str, values: dict) -> dict:
    return {key: value for key, value in values.items() if key != name}


def finished_summary(run: Run) -> dict | None:
    """Close a run that has nothing left to do, say so, upload its model, and return its summary; None for any other run."""
    config, runtime = run.config, run.runtime
    summaries = runtime.agreed(
        lambda: run_folder.finished_summary(config, run.run_dir, run.output_dir, run.resumed, run.total_steps) or {},
        runtime.is_publisher,
    )
    summary = summaries[0] if all(summary for summary in summaries if summary is not None) else None
    if summary and runtime.is_main:
        steps, again = plural(run.total_steps, "step"), "To train again"
        if summary["steps"] != run.total_steps:
            steps = f"stopped early at step {summary['steps']} of {run.total_steps}"
            again = "A larger --early_stopping_patience continues it. To train again"
        say(
            f"{run.run_dir} is finished ({steps}), its brain is in {config.output_dir}/. {again}, "
            "use another --run_name, or --resume_from_checkpoint none (the old run is set aside)"
        )
        if not config.dry_run:  # the run may have been killed before its last report
            with contextlib.suppress(UserError):
                guarded("no report", partial(Reporter(run.run_dir).write, summary, finished=True))
    if summary:
        runtime.close()
    if summary and runtime.is_main and config.push_to_hub and not config.dry_run:
        hub.push(config, config.output_dir)
    return summary
