"""The training loop. Start here: `train` is the outer loop, `train_step` is one optimizer step.

`Run` (run.py) is built once before the first step; `State` (state.py) is what the loop changes and checkpoints hold.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

from mori import distributed, optim, output
from mori.checkpoint import run_folder
from mori.cli import Interrupted, RunFailed, UserError, callable_module, guarded, one_line, plural
from mori.config import TrainConfig
from mori.data.windows import load_step
from mori.evaluate import TOKEN_LOSS_EDGES, evaluate, first_nonfinite_tensor
from mori.generation.generate import generate
from mori.preflight import preflight
from mori.run import Run, build, check
from mori.state import State
from mori.tracking import copying


def train(config: TrainConfig, on_step: Callable[[int, float], None] = lambda step, seconds: None) -> dict:
    """Train as `config` says; returns the run's summary, which is also in `summary.json`, or what a dry run measured.

    After each step, `on_step` receives the number of steps done and the seconds spent training so far.

    Raises UserError for the user's mistakes, before the first step; RunFailed if the run cannot continue (the gradient is
    non-finite in too many consecutive steps, one window does not fit in memory, another rank has exited, or the model or the last
    checkpoint cannot be written); Interrupted after a signal, once the step is done and the run is saved; KeyboardInterrupt before the loop.
    """
    restored, stop_signals = distributed.restored_backends(), distributed.StopSignals()
    with restored, stop_signals as signals, contextlib.ExitStack() as locks, _readable_failures():
        run = check(config, locks)
        if summary := output.finished_summary(run):
            return summary
        state = build(run, locks)
        needs = preflight(run, state, train_step)
        if run.config.dry_run:
            return needs
        locks.push(lambda kind, error, trace: output.leave(run, state, error))
        signals.defer()
        grad_norm = lr = None  # of the step before, unless the run resumes here
        while True:
            output.publish_staged(run, state)
            if run.evaluation_is_due(state):
                # Some models draw random numbers in evaluation mode.
                with state.throughput.apart("evaluations"), run.runtime.unchanged_random_state():
                    evaluate_and_sample(run, state, signals)
                    run.monitor.report(output.summary(run, state))
                if state.stops_early and state.losses:
                    log(run, state, grad_norm, lr)
            if run.save_is_due(state):
                with state.throughput.apart("saves"):
                    output.save(run, state)
            if run.runtime.any(signals.received):
                stop(run, state, signals.received)
            if run.is_over(state):
                return output.finish(run, state, signals)
            state.throughput.start()
            weights = optim.sampled_weights(run.weights.parameters) if run.logs(state.step + 1) else None
            with run.monitor.profiled(state.step + 1):
                grad_norm, lr = train_step(run, state)
            if run.log_is_due(state):
                log(run, state, grad_norm, lr, weights)
            state.throughput.stop()
            run.monitor.move(state.step)
            on_step(state.step, state.throughput.seconds)


# ------------------------------------------------------------------------------------------------------- one step
def train_step(run: Run, state: State) -> tuple[torch.Tensor, float]:
    """One optimizer step; returns the gradient's norm before clipping, on the device, and the learning rate."""
    config, optimizer = run.config, state.optimizer
    loss = accumulate_gradients(run, state)
    lr = state.schedule.learning_rate(state.step)
    optim.set_learning_rate(optimizer, lr)
    run.weights.take_gradients(state.scaler.is_enabled())
    state.scaler.unscale_(optimizer)
    grad_norm = run.weights.clip_grad_norm_(config.max_grad_norm or math.inf)
    state.wait_for_snapshot()  # a thread may be copying the weights for a checkpoint
    skipped = optim.step_if_finite(optimizer, grad_norm)
    state.scaler.update()
    optimizer.zero_grad(set_to_none=not run.step_graph.enabled)
    state.count_step(loss, skipped, tokens=run.batches.windows_in(state.step) * config.block_size)
    return grad_norm, lr


def accumulate_gradients(run: Run, state: State) -> torch.Tensor:
    """Forward and backward passes over the micro-batches of a step; returns their summed loss, on the device.

    If memory runs out, the step starts again from the same random state, with micro-batches of half the size.
    """
    runtime, device = run.runtime, run.runtime.device
    random_state = distributed.random_state()
    while True:
        run.batches.batch_size = run.module.rows = state.micro_batch.size
        step_loss = torch.zeros((), device=device)
        with state.throughput.waiting():
            micro_batches, n_targets = load_step(run.data.train, run.batches[state.step], pin=device.type == "cuda")
        # The valid targets of the step over all micro-batches and ranks. DDP averages over ranks: divide by world_size.
        divisor = runtime.all_sum(n_targets.to(device, non_blocking=True)) / runtime.world_size
        with state.micro_batch:
            for number, (input_ids, labels) in enumerate(micro_batches, start=1):
                input_ids = input_ids.to(device, non_blocking=True)  # (B, T)
                labels = labels.to(device, non_blocking=True)  # (B, T)
                with runtime.no_sync(run.parallel, skip=number < len(micro_batches)):
                    step_loss += run.step_graph(partial(forward_backward, run, state), input_ids, labels, divisor)
        if not state.micro_batch.halved:
            return step_loss
        undo(run, state, random_state)


def forward_backward(
    run: Run, state: State, input_ids: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor
) -> torch.Tensor:
    """Add the gradients of a micro-batch `(B, T)`; returns its part of the step's loss."""
    with run.runtime.autocast():
        loss = run.parallel(input_ids, labels, divisor, state.loss_scale())
    state.scaler.scale(loss).backward()
    return loss.detach()


# ----------------------------------------------------------------------------------------------------------------
def undo(run: Run, state: State, random_state: tuple) -> None:
    """Reset gradients and random state, so that the step can be retried with a smaller micro-batch.

    With several ranks, the others are waiting for this rank's gradients: raises RunFailed, and torchrun restarts all ranks.
    """
    rank, size = run.runtime.rank, state.micro_batch.size
    if run.runtime.world_size > 1:
        run_folder.remember_batch_size(run.run_dir, rank, size)
        raise RunFailed(
            f"memory ran out on rank {rank}; the same command resumes with {plural(size, 'window')} at a time"
        )
    state.optimizer.zero_grad()
    run.step_graph.reset()
    distributed.set_random_state(random_state)
    run.monitor.say(
        f"step {state.step + 1}: memory ran out; from this step on, micro-batches have {plural(size, 'window')} instead of "
        f"{run.batches.batch_size} (the windows of a step stay the same)"
    )
    run.monitor.scalars(state.step, {"train/micro_batch_size": size})


def evaluate_and_sample(run: Run, state: State, signals: distributed.StopSignals) -> None:
    """Evaluate on the held-out text and draw samples; neither changes the training's random state."""
    runtime, monitor, size = run.runtime, run.monitor, state.eval_batch.size
    evaluation = evaluate(
        run.module,
        run.data.held_out,
        run.data.held_out_bytes,
        run.eval_windows,
        batch_size=state.eval_batch,
        runtime=runtime,
        give_up=lambda: signals.received and runtime.world_size == 1,  # ranks must stay together
    )
    if evaluation is None:
        return
    if state.eval_batch.size < size:
        monitor.say(
            f"step {state.step}: memory ran out; evaluated {plural(state.eval_batch.size, 'window')} at a time instead of {size}"
        )
    state.after = {"step": state.step, **asdict(evaluation)}
    if state.step > 0 and evaluation.loss is not None:
        state.schedule.observe(evaluation.loss)
        state.best.observe(state.after)
    monitor.say(f"step {state.step}: {evaluation}")
    copied = draw_samples(run, state) if runtime.is_main or runtime.sharded else {}
    monitor.scalars(state.step, {**evaluation.scalars(), **copied})
    monitor.histogram(state.step, "eval/token_loss", TOKEN_LOSS_EDGES, evaluation.token_losses)
    if state.step == 0:
        state.before, state.samples_before = state.after, state.samples_after
        monitor.say("\n".join(["before:", *state.samples_before]))


def draw_samples(run: Run, state: State) -> dict[str, float]:
    """Continue the prompts of the config with the model as it is now; returns, by tag, how much of the text is copied."""
    config, tokenizer = run.config, run.data.tokenizer
    try:
        with run.module.as_loaded() as loaded, run.runtime.autocast_for_samples(loaded):
            settings = {"seed": config.seed, **config.sampling()}
            completions = run.weights.call(
                lambda model: guarded("no sample", partial(generate, model, tokenizer, config.prompt, **settings))
            )
    except UserError as error:  # a model that cannot be sampled is still worth training
        state.samples_after = [f"({error})"]
        run.monitor.text(state.step, "samples/0", state.samples_after[0])
        return {}
    state.samples_after = [completion.prompt + completion.text for completion in completions]
    figures, spans = run.data.copying.measure([c.new_token_ids for c in completions], at_the_end=run.is_over(state))
    copied = [c.characters(tokenizer, ranges) for c, ranges in zip(completions, spans, strict=True)]
    state.after["copying"] = {**figures, "spans": copied}
    run.monitor.say(f"step {state.step}: {copying.sentence(figures)}")
    for number, (sample, marked) in enumerate(zip(state.samples_after, copied, strict=True)):
        run.monitor.text(state.step, f"samples/{number}", sample, marked)
    return copying.scalars(figures)


def log(
    run: Run, state: State, grad_norm: torch.Tensor | None, lr: float | None, weights: torch.Tensor | None = None
) -> None:
    """Read the interval's metrics from the device and log them; fail the run after too many consecutive skipped steps.

    `weights` are those sampled before the last step.
    """
    runtime = run.runtime
    losses, state.losses = runtime.all_sum(torch.stack(state.losses)).tolist(), []
    loss = sum(losses) / len(losses) / runtime.world_size
    skipped_steps, skipped_in_a_row = map(int, state.skipped.tolist())
    tokens_per_second, waited = state.throughput.since_last()
    values = {
        "train/loss": loss,
        **({} if grad_norm is None else {"train/grad_norm": grad_norm.item(), "train/learning_rate": lr}),
        "train/epoch": run.batches.epoch(state.step),
        "train/skipped_steps": skipped_steps,
        "perf/tokens_per_second": tokens_per_second,
        "perf/data_wait": waited,
        "perf/peak_memory_gib": state.peak_memory_bytes / 2**30,
    }
    if weights is not None:
        values["train/update_ratio"] = optim.update_ratio(weights, run.weights.parameters).item()
    if run.peak_flops:
        values["perf/mfu"] = tokens_per_second * run.flops_per_token / (run.peak_flops * runtime.world_size)
    run.monitor.scalars(state.step, values)
    run.monitor.progress(state.step, values)
    run.compile_if_it_pays(state, tokens_per_second)
    if skipped_in_a_row >= run.config.max_nonfinite_steps:
        give_up(run, state, loss, skipped_in_a_row)


def give_up(run: Run, state: State, loss: float, skipped_in_a_row: int) -> None:
    """Raise RunFailed with the windows of the last step and the first tensor in it that is not finite."""
    indices = run.batches[state.step - 1]
    name = first_nonfinite_tensor(run.module, *load_step(run.data.train, indices, pin=False), run.runtime)
    findings = run.runtime.gather((name, [index for group in indices for index in group]))
    name, windows = next((finding for finding in findings if finding[0]), findings[0])
    raise RunFailed(
        f"the gradient was not finite in {skipped_in_a_row} steps in a row, up to step {state.step} (loss {loss}); they were "
        f"skipped, the checkpoints are intact. First non-finite tensor: {name or 'the gradient norm'}, on the training windows "
        f"{', '.join(map(str, windows))}. Lower --learning_rate or use --precision fp32"
    )


def stop(run: Run, state: State, received: str) -> None:
    """After a signal: save, and raise Interrupted; raises RunFailed if the step could not be saved."""
    output.complete_save(run, state)
    if state.saved_step != state.step:
        output.save(run, state)
        output.complete_save(run, state)
    run.monitor.report(output.summary(run, state))
    run.monitor.close()
    reason = f"stopped by {received or 'another rank'}"
    if state.saved_step != state.step:
        raise RunFailed(
            f"{reason}, NOT saved at step {state.step}; the same command resumes from the checkpoint before"
        )
    raise Interrupted(f"{reason}, saved at step {state.step}; the same command resumes there")


@contextlib.contextmanager
def _readable_failures() -> Iterator[None]:
    """Convert out-of-memory and lost-rank errors to RunFailed; the other ranks hear of a mistake that this one alone has made."""
    try:
        yield
    except RunFailed:
        raise
    except UserError as mistake:
        distributed.tell_others(mistake)
        raise
    except (RuntimeError, MemoryError) as error:
        if distributed.out_of_memory(error):
            reason = f"memory ran out: {one_line(error)}; use a smaller --block_size or --model, or --precision bf16"
        elif distributed.lost_a_rank(error):
            if mistake := distributed.told_by_others():
                raise mistake from None
            reason = "another rank exited or timed out; the same command resumes from the last checkpoint"
        else:
            raise
        raise RunFailed(reason) from None


callable_module(__name__, TrainConfig, train)  # mori.train(model="mini", max_steps=50)
