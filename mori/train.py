"""The training loop, from top to bottom.

`train` checks and makes everything ready, then loops; a single optimizer step stands between two rules.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from mori import distributed as runtime
from mori import optim
from mori import run as prepare
from mori.checkpoint import checkpoints as checkpoint
from mori.checkpoint import files
from mori.config import Interrupted, RunFailed, TrainConfig, UserError, checked, steps_of
from mori.data import corpus
from mori.data import windows as data
from mori.diagnose import first_bad_tensor
from mori.evaluate import evaluate
from mori.generation.generate import check_prompts, generate
from mori.model import loading as models
from mori.model import options as fast
from mori.speed.startup import keep_freed_memory
from mori.tracking import overview
from mori.tracking.memory import peak_memory_bytes
from mori.tracking.monitor import Monitor, say
from mori.tracking.throughput import Throughput


def train(config: TrainConfig, on_step: Callable[[int, float], None] = lambda step, seconds: None) -> dict:
    """Train as `config` says; returns the run's summary, which is also in `summary.json`.

    `on_step` is told the number of steps done and the seconds spent training so far, after each step.

    Whatever a user can get wrong is found before the first slow thing begins, and raises UserError. Raises RunFailed
    where the run cannot go on: the gradient is not finite again and again, memory does not hold one window, another rank
    is gone, or the model or the last checkpoint cannot be written. Raises Interrupted after a signal, when the step is
    done and the run is saved.
    """
    with runtime.StopSignals() as signals, contextlib.ExitStack() as held:
        try:
            return _train(config, on_step, signals, held)
        except (RunFailed, Interrupted):
            raise
        except (RuntimeError, MemoryError) as error:
            if runtime.out_of_memory(error):
                raise RunFailed(f"memory ran out: {str(error).splitlines()[0]}") from None
            if runtime.lost_a_rank(error):
                raise RunFailed(
                    "another rank is gone, or did not answer in time; the same command goes on from the last checkpoint"
                ) from None
            raise


def _train(
    config: TrainConfig,
    on_step: Callable[[int, float], None],
    signals: runtime.StopSignals,
    held: contextlib.ExitStack,
) -> dict:
    started = time.perf_counter()
    config = checked(config).resolve()
    if runtime.restarted():  # what was asked of the first start is begun already
        config = replace(config, resume_from_checkpoint="auto")
    paths = corpus.find_files(config.corpus)
    documents = corpus.read_documents(paths)
    run_dir, output_dir = Path(config.logging_dir).resolve() / config.run_name, Path(config.output_dir).resolve()
    prepare.check_writable(run_dir, output_dir)
    where = runtime.start(config.device, config.precision, config.ddp_timeout)
    if where.device.type == "cpu":
        keep_freed_memory()

    # What we train, and on what.
    runtime.set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model, (d.text for d in documents), config.trust_remote_code)
    model_config = models.load_config(
        config.model, tokenizer, dropout=config.dropout, trust_remote_code=config.trust_remote_code
    )
    check_prompts(config.prompt, tokenizer, model_config)
    text = prepare.prepare_text(config, documents, tokenizer, model_config, where)
    batches = data.Batches(
        len(text.train),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        rank=where.rank,
        world_size=where.world_size,
    )
    total_steps = config.total_steps(batches.steps_per_epoch)
    warmup_steps = steps_of(config.warmup_steps, total_steps)
    if warmup_steps > total_steps:
        raise UserError(f"warmup_steps {warmup_steps} is more than the {total_steps} steps of the run")
    eval_every, save_every = steps_of(config.eval_steps, total_steps), steps_of(config.save_steps, total_steps)

    identity = {"config": asdict(config), "precision": where.precision, "world_size": where.world_size, **text.hashes}

    def claim() -> tuple[Path | None, int | None]:
        """Keep other processes out of the run's folder, and find where the run goes on."""
        if run_dir.is_dir():
            held.enter_context(prepare.lock(run_dir))
        found = prepare.find_checkpoint(config, run_dir, identity, total_steps)
        return found, None if config.resume_from_checkpoint == "none" else prepare.remembered_batch_size(run_dir)

    resumed, remembered = where.on_main(claim)
    if finished := prepare.finished_summary(run_dir, output_dir, resumed, total_steps):
        if where.is_main:
            say(
                f"{run_dir} is finished ({total_steps} steps), its brain is in {config.output_dir}/. To train again, use another "
                "--run_name, or --resume_from_checkpoint none (the old run is set aside)"
            )
        where.close()
        return finished
    model = models.move(models.load_model(config.model, model_config, config.trust_remote_code), where.device)
    if config.dtype == "bfloat16":
        if where.precision != "bf16":
            raise UserError(f"dtype bfloat16 needs arithmetic in bf16, this is {where.precision}; say --precision bf16")
        models.store_in_bfloat16(model)
    example, separator = text.train.batch([0]), corpus.separator(tokenizer)
    # The one choice that a measurement decides, and that changes last bits: a run keeps to it.
    noted = checkpoint.load_state(resumed).get("products", "") if resumed else None
    module, chosen = fast.training_module(model, config, *example, where, separator, total_steps, noted)
    optimizer = optim.adamw(
        model,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        name=config.optim,
    )
    scaler = where.grad_scaler()
    runtime.set_seed(config.seed + where.rank)
    progress = prepare.restore(resumed, model, optimizer, scaler, where) if resumed else prepare.Progress()

    def nothing() -> tuple[torch.Tensor, ...]:
        """A micro-batch without labels."""
        [(input_ids, labels)], _ = data.load_step(text.train, [[]], pin=False)
        return input_ids.to(where.device), labels.to(where.device), torch.tensor(1.0, device=where.device)

    parallel = where.parallel(module, nothing)
    parameters = list(model.parameters())
    parallel.train()

    if where.is_main:
        with _writes(run_dir):
            if config.resume_from_checkpoint == "none":
                files.set_aside(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            held.close()
            held.enter_context(prepare.lock(run_dir))  # it may be another folder of that name now
            files.write_json(run_dir / "config.json", asdict(config))
            environment = overview.environment(where.device, where.precision, where.world_size)
            files.write_json(run_dir / "environment.json", environment)
            files.write_json(run_dir / "ledger.json", asdict(text.ledger))
        say(
            overview.introduction(
                config,
                environment=environment,
                device=where.device,
                text=str(text.ledger),
                blank_files=len(paths) - text.ledger.documents,
                parameters=sum(parameter.numel() for parameter in parameters),
                total_steps=total_steps,
                steps_per_epoch=batches.steps_per_epoch,
                faster=chosen,
                run_dir=run_dir,
                resumed=resumed,
            )
        )
    monitor = Monitor(
        run_dir, first_step=progress.step, total_steps=total_steps, enabled=where.is_main, resumed=resumed is not None
    )
    speed = Throughput(progress.tokens, progress.train_seconds)
    cost, peak = fast.flops_per_token(model, config.block_size), fast.peak_flops(where)
    # The micro-batches may be smaller than the config's where memory ran out; the windows of a step stay the same.
    largest = config.per_device_train_batch_size * (
        config.gradient_accumulation_steps if config.auto_find_batch_size else 1
    )
    micro_batch = runtime.BatchSize(min(largest, progress.train_batch_size or largest, remembered or largest))
    largest = config.per_device_eval_batch_size
    eval_batch = runtime.BatchSize(min(largest, progress.eval_batch_size or largest))
    if micro_batch.size < config.per_device_train_batch_size:
        monitor.say(f"{micro_batch.size} window(s) at a time: memory ran out before with more")
    earlier_seconds = progress.wall_seconds

    # Written on the device in every step, read by the host only when logging or saving.
    earlier_losses = torch.tensor(progress.unlogged_losses)
    losses = torch.zeros(min(config.logging_steps, total_steps) + len(earlier_losses), device=where.device)
    losses[: len(earlier_losses)] = earlier_losses
    skipped = torch.tensor([float(progress.skipped_steps), float(progress.skipped_in_a_row)], device=where.device)
    first_unlogged = progress.step - len(progress.unlogged_losses)

    def take_stock() -> None:
        """Evaluate on the held-out text and draw the samples; neither moves the training's random numbers."""
        size = eval_batch.size
        found = evaluate(
            module,
            text.held_out,
            text.held_out_bytes,
            batch_size=eval_batch,
            runtime=where,
            give_up=lambda: signals.received and where.world_size == 1,  # ranks must stay together
        )
        if found is None:
            return
        if eval_batch.size < size:
            monitor.say(
                f"step {progress.step}: memory ran out; evaluated {eval_batch.size} window(s) at a time instead of {size}"
            )
        progress.after = {"step": progress.step, **asdict(found)}
        monitor.scalars(progress.step, {f"eval/{name}": value for name, value in asdict(found).items()})
        if progress.best is None or math.isnan(progress.best["loss"]) or found.loss < progress.best["loss"]:
            progress.best = progress.after
        if where.is_main:
            try:
                with where.autocast():
                    drawn = generate(model, tokenizer, config.prompt, seed=config.seed, **config.sampling())
                progress.samples_after = [sample.prompt + sample.text for sample in drawn]
            except (FloatingPointError, RuntimeError, MemoryError) as error:
                if not isinstance(error, FloatingPointError) and not runtime.out_of_memory(error):
                    raise
                progress.samples_after = [f"(no sample: {error})"]
            for number, sample in enumerate(progress.samples_after):
                monitor.text(progress.step, f"samples/{number}", sample)
        monitor.say(
            f"step {progress.step}: held-out loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits per byte"
        )
        if progress.step == 0:
            progress.before, progress.samples_before = progress.after, progress.samples_after
            monitor.say("\n".join(["before:", *progress.samples_before]))

    def log(grad_norm: torch.Tensor, lr: float) -> None:
        """Read the interval's numbers from the device, write them, and stop a run that only skips."""
        nonlocal first_unlogged
        interval = where.all_sum(losses.clone())[: progress.step - first_unlogged].tolist()
        losses.zero_()
        first_unlogged = progress.step
        loss = sum(interval) / len(interval) / where.world_size
        progress.skipped_steps, progress.skipped_in_a_row = map(int, skipped.tolist())
        tokens_per_second, waited = speed.since_last()
        values = {
            "train/loss": loss,
            "train/grad_norm": grad_norm.item(),
            "train/learning_rate": lr,
            "train/epoch": batches.epoch(progress.step),
            "train/skipped_steps": progress.skipped_steps,
            "perf/tokens_per_second": tokens_per_second,
            "perf/data_wait": waited,
            "perf/peak_memory_gib": peak_memory_bytes(where.device) / 2**30,
        }
        if peak:
            values["perf/mfu"] = tokens_per_second * cost / (peak * where.world_size)
        monitor.scalars(progress.step, values)
        monitor.progress(progress.step, loss=f"{loss:.4f}", tok_s=f"{values['perf/tokens_per_second']:.0f}")
        if progress.skipped_in_a_row >= config.max_nonfinite_steps:
            give_up(loss)

    def give_up(loss: float) -> None:
        """Stop a run that only skips: name the last step's windows, and where its numbers first go bad."""
        mine = batches[progress.step - 1]
        bad = first_bad_tensor(module, *data.load_step(text.train, mine, pin=False), where)
        found = where.gather((bad, [index for group in mine for index in group]))
        bad, windows = next((one for one in found if one[0]), found[0])
        raise RunFailed(
            f"the gradient was not finite in {progress.skipped_in_a_row} steps in a row, up to step {progress.step} "
            f"(loss {loss}); none of them was taken, the checkpoints are good. First to go bad: "
            f"{bad or 'the scaled gradient'}, on the training windows {', '.join(map(str, windows))}. "
            "Lower --learning_rate or use --precision fp32"
        )

    def undo(before: tuple) -> None:
        """Forget what was done of a step when memory ran out: it is done again, in smaller parts, from the same state."""
        if where.world_size > 1:  # the others wait for this rank's gradients: all begin again from the last checkpoint
            prepare.remember_batch_size(run_dir, where.rank, micro_batch.size)
            raise RunFailed(
                f"memory ran out on rank {where.rank}; the same command goes on with {micro_batch.size} window(s) at a time"
            )
        optimizer.zero_grad()
        losses[progress.step - first_unlogged] = 0
        runtime.set_random_state(before)
        monitor.say(
            f"step {progress.step + 1}: memory ran out; it is done again, and all that follow, with {micro_batch.size} "
            f"window(s) at a time instead of {batches.batch_size} (the windows of a step stay the same)"
        )
        monitor.scalars(progress.step, {"train/micro_batch_size": micro_batch.size})

    def save_checkpoint() -> bool:
        """Save all that the run needs to go on as if it had never stopped; False where there is no room for it."""
        progress.unlogged_losses = losses[: progress.step - first_unlogged].tolist()
        progress.skipped_steps, progress.skipped_in_a_row = map(int, skipped.tolist())
        progress.tokens, progress.train_seconds = speed.tokens, speed.seconds
        progress.train_batch_size, progress.eval_batch_size = micro_batch.size, eval_batch.size
        progress.wall_seconds = earlier_seconds + time.perf_counter() - started
        ranks = where.gather({"rng": runtime.rng_state(), "unlogged_losses": progress.unlogged_losses})
        failed = False
        if where.is_main:
            state = {
                **identity,
                "products": module.products.name if module.products else "",
                "progress": asdict(progress),
                "ranks": ranks,
                "scaler": scaler.state_dict(),
            }
            root = run_dir / "checkpoints"
            monitor.sync()
            try:
                checkpoint.save(root, progress.step, model=model, optimizer=optimizer, state=state)
            except (OSError, FloatingPointError, checkpoint.CorruptCheckpoint, torch.OutOfMemoryError) as error:
                monitor.say(f"WARNING: no checkpoint at step {progress.step}: {error}; training goes on")
                failed = True
        failed = where.any(failed)  # until then the others wait, so that they agree, and none leaves during the save
        if where.is_main and not failed:
            try:
                checkpoint.prune(root, config.save_total_limit, progress.best and progress.best["step"])
            except OSError as error:
                monitor.say(f"WARNING: an old checkpoint is left: {error}")
        return not failed

    saved_step = progress.step if resumed else None
    while True:
        last = progress.step == total_steps
        evaluated = progress.after is not None and progress.after["step"] == progress.step
        wanted = progress.step % eval_every == 0 if progress.step else config.eval_on_start
        if (wanted or last) and not evaluated:
            take_stock()
        save_due = progress.step > 0 and (progress.step % save_every == 0 or last)
        if save_due and saved_step != progress.step and save_checkpoint():
            saved_step = progress.step
        if where.any(signals.received):
            if saved_step != progress.step and save_checkpoint():
                saved_step = progress.step
            monitor.close()
            stopped, go_on = f"stopped by {signals.received or 'another rank'}", "the same command goes on from"
            if saved_step != progress.step:
                raise RunFailed(f"{stopped}, NOT saved at step {progress.step}; {go_on} the checkpoint before")
            raise Interrupted(f"{stopped}, saved at step {progress.step}; {go_on} there")
        if last:
            break
        speed.start()
        # ------------------------------------------------------------------------------------------------ one step
        step = progress.step
        before = runtime.random_state()
        while True:
            batches.batch_size = module.rows = micro_batch.size
            loss = None  # one holds on to all activations of its pass
            with speed.waiting():
                micro_batches, n_targets = data.load_step(text.train, batches[step], pin=where.device.type == "cuda")
            # All valid targets of the step, over micro-batches and ranks; DDP averages gradients, so its share of them.
            divisor = where.all_sum(n_targets.to(where.device, non_blocking=True)) / where.world_size
            with micro_batch:
                for number, (input_ids, labels) in enumerate(micro_batches, start=1):
                    input_ids = input_ids.to(where.device, non_blocking=True)  # (B, T)
                    labels = labels.to(where.device, non_blocking=True)  # (B, T)
                    with where.no_sync(parallel, skip=number < len(micro_batches)):
                        with where.autocast():
                            loss = parallel(input_ids, labels, divisor)
                        scaler.scale(loss).backward()
                    losses[step - first_unlogged] += loss.detach()
            if not micro_batch.halved:
                break
            undo(before)

        lr = optim.learning_rate(
            step,
            peak=config.learning_rate,
            schedule=config.lr_scheduler_type,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
        optim.set_learning_rate(optimizer, lr)
        scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        nonfinite = optim.skip_unless_finite(optimizer, grad_norm)
        skipped[0] += nonfinite
        skipped[1] = (skipped[1] + 1) * nonfinite
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        progress.step += 1
        # ---------------------------------------------------------------------------------------------------------
        speed.tokens += batches.windows_in(step) * config.block_size
        lost = progress.step % config.max_nonfinite_steps == 0 and skipped[1] >= config.max_nonfinite_steps
        if progress.step % config.logging_steps == 0 or progress.step == total_steps or lost:
            log(grad_norm, lr)
        speed.stop()
        on_step(progress.step, speed.seconds)

    monitor.say("\n".join(["after:", *progress.samples_after]))
    monitor.close()
    summary = {
        "run_name": config.run_name,
        "model": config.model,
        "ledger": asdict(text.ledger),
        "eval": {"before": progress.before, "best": progress.best, "after": progress.after},
        "samples": {"before": progress.samples_before, "after": progress.samples_after},
        "steps": total_steps,
        "skipped_steps": progress.skipped_steps,
        "wall_seconds": earlier_seconds + time.perf_counter() - started,
        "tokens_per_second": speed.tokens / speed.seconds if speed.seconds else 0.0,
        "peak_memory_bytes": peak_memory_bytes(where.device),
        "output_dir": config.output_dir,
    }
    if where.is_main:
        _publish(model, tokenizer, output_dir)
        with _writes(run_dir):
            summary["output_sha256"] = files.hashes(output_dir)
            files.write_json(run_dir / "summary.json", summary)
        say(overview.results(summary, config.prompt[0]))
    where.barrier()
    where.close()
    if saved_step != total_steps:
        raise RunFailed(
            f"the last checkpoint could not be saved (see the warnings above); the brain in {config.output_dir}/ is whole"
        )
    return summary


def _publish(model, tokenizer, output_dir: Path) -> None:
    """Put the trained model at `output_dir`; the one before stays as `<name>.previous`."""
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise RunFailed(f"the model is not written: {len(bad)} of its tensors are not finite, such as {bad[0]}")
    try:
        files.publish(output_dir, lambda folder: models.save(model, tokenizer, folder))
    except (OSError, UserError) as error:
        raise RunFailed(
            f"cannot write the trained model to {output_dir}: {getattr(error, 'strerror', None) or error}; the last "
            "checkpoint holds it: make room and run the same command again"
        ) from None


@contextlib.contextmanager
def _writes(folder: Path) -> Iterator[None]:
    """A context in which a file that cannot be written ends the run in one line."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"cannot write in {folder}: {error.strerror}; make room and run the same command again"
        ) from None
