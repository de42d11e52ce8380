"""`Run`, which is built once before the first step.

`check` validates all input and finds the checkpoint to resume from; `build` loads the model and builds the optimizer; `restore`
loads a checkpoint.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from mori import distributed, optim
from mori.checkpoint import checkpoints, run_folder
from mori.checkpoint.files import advice, set_aside, write_json
from mori.cli import RunFailed, UserError, checked, one_line, plural
from mori.config import TrainConfig, steps_of
from mori.data.windows import Batches, load_step
from mori.distributed import Runtime, nodes
from mori.distributed.sharding import Weights, weights_of
from mori.distributed.unloaded import load_model
from mori.evaluate import windows_to_score
from mori.export import hub
from mori.model import loading, special_tokens
from mori.model.adapters import files as adapter_files
from mori.model.adapters import trainable
from mori.model.lm import CausalLMLoss
from mori.model.probes import check_causal, check_positions
from mori.model.variants import WORTH_COMPILING_SECONDS, build_module, choose_cpu_matmul, compile_module, may_compile
from mori.prepare import Prepared, prepare
from mori.speed.peak import flops_per_token, peak_flops
from mori.speed.startup import keep_freed_memory, return_freed_memory
from mori.speed.step_graph import StepGraph
from mori.state import State
from mori.tracking.monitor import Monitor, say
from mori.tracking.overview import environment, evaluations_in_words, introduction
from mori.tracking.profiler import Profiler


@dataclass
class Run:
    """What stays the same during training: settings, data, folders, and the module that is trained."""

    config: TrainConfig
    runtime: Runtime
    data: Prepared
    run_dir: Path
    output_dir: Path
    started: float  # by time.perf_counter()
    batches: Batches | None = None  # set by `plan_steps`
    total_steps: int = 0
    schedule: optim.Schedule | None = None
    resumed: Path | None = None  # the checkpoint that the run resumes from
    module: CausalLMLoss | None = None  # set by `build`
    parallel: nn.Module | None = None  # `module`, in DDP if there are several ranks
    monitor: Monitor | None = None
    step_graph: StepGraph | None = None
    weights: Weights | None = None
    model_files: dict[str, bytes] = field(default_factory=dict)  # a model folder without its weights, set by `rehearse`
    flops_per_token: float = 0.0
    peak_flops: float | None = None

    @property
    def warmup_steps(self) -> int:
        """The number of warm-up steps."""
        return steps_of(self.config.warmup_steps, self.total_steps)

    @property
    def eval_every(self) -> int:
        """The number of steps between evaluations."""
        return self._interval(self.config.eval_strategy, self.config.eval_steps)

    @property
    def log_every(self) -> int:
        """The number of steps between logs."""
        return self._interval(self.config.logging_strategy, self.config.logging_steps)

    def _interval(self, strategy: str, steps: float) -> int:
        return self.batches.steps_per_epoch if strategy == "epoch" else steps_of(steps, self.total_steps)

    @property
    def eval_windows(self) -> Sequence[int]:
        """The held-out windows that every evaluation scores."""
        return windows_to_score(
            self.config, len(self.data.held_out or []), self.eval_every, self.batches.windows_per_step
        )

    @property
    def save_every(self) -> int:
        """The number of steps between checkpoints."""
        return self._interval(self.config.save_strategy, self.config.save_steps)

    @functools.cached_property
    def model_sha256(self) -> str:
        """The hash of the model's configuration as it was loaded."""
        return loading.config_hash(self.data.model_config)

    @functools.cached_property
    def base_sha256(self) -> str:
        """What identifies the frozen weights beside adapters; "" if checkpoints hold all weights."""
        if not self.config.use_peft:
            return ""
        commit = getattr(self.data.model_config, "_commit_hash", None)
        return adapter_files.base_identity(adapter_files.base_of(self.config.model), commit)

    def plan_steps(self, windows_per_step: int | None = None) -> None:
        """Set batches, number of steps and schedule. Raises UserError if a setting reaches beyond the last step."""
        config, runtime = self.config, self.runtime
        self.batches = Batches(
            len(self.data.train),
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            windows_per_step=windows_per_step,
        )
        self.total_steps = config.total_steps(self.batches.steps_per_epoch)
        if mistake := config.too_late(self.total_steps):
            raise UserError(mistake)
        self.schedule = optim.Schedule(config, self.warmup_steps, self.total_steps)

    def identity(self) -> dict:
        """The settings, data and hardware that a checkpoint records, to be compared with those of a resumed run."""
        runtime = self.runtime
        return {
            "config": asdict(self.config),
            "precision": runtime.precision,
            "world_size": runtime.world_size,
            "windows_per_step": self.batches.windows_per_step,
            "device": runtime.device_name,
            "model_sha256": self.model_sha256,
            "base_sha256": self.base_sha256,
            "document_bos": bool(self.data.special_tokens.begin),
            "parse_special_tokens": self.data.special_tokens.parsed,
            **self.data.hashes,
        }

    def evaluation_is_due(self, state: State) -> bool:
        """Whether to evaluate now: before the first step, at every interval, and at the end."""
        if state.evaluated or self.config.eval_strategy == "no":
            return False
        if state.step == 0:
            return self.config.eval_on_start
        return state.step % self.eval_every == 0 or state.step == self.total_steps

    def save_is_due(self, state: State) -> bool:
        """Whether to save now: at every interval and at the end, or at an evaluation that is the best so far."""
        strategy = self.config.save_strategy
        if state.step == 0 or state.saved_step == state.step or strategy == "no":
            return False
        if (strategy == "best" or self.config.load_best_model_at_end) and state.best.is_of(state.step):
            return True
        return self.saves_the_end and (state.step % self.save_every == 0 or self.is_over(state))

    @property
    def saves_the_end(self) -> bool:
        """Whether the last step of the run gets a checkpoint."""
        return self.config.save_strategy in ("steps", "epoch")

    def is_over(self, state: State) -> bool:
        """Whether the run has done its last step: all of them, or those until it stops early."""
        return state.step == self.total_steps or state.stops_early

    def work_left(self, state: State) -> dict[str, int]:
        """The tokens, evaluations and saves until the end of the run; what is due now is still to be done."""

        def times_due(every: int, is_done: bool) -> int:
            """How often a multiple of `every` or the last step is reached from now on."""
            first = state.step + is_done
            return self.total_steps // every - (first - 1) // every + (self.total_steps % every > 0)

        config, epochs = self.config, self.batches.epoch(self.total_steps) - self.batches.epoch(state.step)
        is_evaluated = state.evaluated or state.step == 0 and not config.eval_on_start
        evaluations = 0 if config.eval_strategy == "no" else times_due(self.eval_every, is_evaluated)
        is_saved = state.step == 0 or state.saved_step == state.step
        saves = times_due(self.save_every, is_saved) if self.saves_the_end else 0
        return {
            "tokens": round(epochs * self.batches.windows * config.block_size),
            "evaluations": evaluations,
            "saves": evaluations if config.save_strategy == "best" else saves,
        }

    def seconds_left(self, state: State) -> float | None:
        """The time until the run ends, by its steps, evaluations and saves so far; None before the first step."""
        return state.throughput.seconds_left(**self.work_left(state))

    def logs(self, step: int) -> bool:
        """Whether the run logs after `step` steps."""
        return step % self.log_every == 0 or step == self.total_steps

    def log_is_due(self, state: State) -> bool:
        """Whether to log now: at every interval, at the end, and if a run that only skips steps must end."""
        if self.logs(state.step):
            return True
        limit = self.config.max_nonfinite_steps
        return state.step % limit == 0 and bool(state.skipped[1] >= limit)  # reads the device only every `limit` steps

    def compile_if_it_pays(self, state: State, tokens_per_second: float) -> None:
        """At the second log, compile the model if the rest of the run will take long at the measured speed.

        Checkpoints hold the choice, because compiled code differs in the last bits.
        """
        config = self.config
        if state.compiled is not None or state.step < 2 * self.log_every:
            return
        tokens = (self.total_steps - state.step) * self.batches.windows_in(state.step - 1) * config.block_size
        pays = tokens > WORTH_COMPILING_SECONDS * tokens_per_second
        state.compiled = pays and may_compile(self.module, config, self.runtime)
        if state.compiled:
            self.step_graph.reset()
            rows = state.micro_batch.size
            batch = self.data.train.batch(range(min(len(self.data.train), rows)))
            self.monitor.say(f"step {state.step}: {compile_module(self.module, rows, batch, self.runtime)}")

    @contextlib.contextmanager
    def writes(self) -> Iterator[None]:
        """Convert OSError to a RunFailed of one line."""
        try:
            yield
        except OSError as error:
            raise RunFailed(f"cannot write in {self.run_dir}: {advice(error)}") from None


def check(config: TrainConfig, locks: contextlib.ExitStack) -> Run:
    """Validate the config and everything it names, join the ranks, prepare the data, and find the checkpoint to resume from.

    From here on `locks` keeps other processes out of the run's folder. Raises UserError for every mistake of the user.
    """
    started = time.perf_counter()
    is_named = bool(config.run_name)
    config = checked(config).resolve()
    run_dir, output_dir = Path(config.logging_dir).resolve() / config.run_name, Path(config.output_dir).resolve()
    runtime = distributed.start(config.device, config.precision, config.ddp_timeout)
    runtime.sharded = config.fsdp != "none" and runtime.world_size > 1
    nodes.introduce(runtime, config, run_dir, output_dir)
    if runtime.any(nodes.started_before(run_dir)):  # `none`, or a named checkpoint, was meant for the first start
        config = replace(config, resume_from_checkpoint="auto")
    if config.dtype == "bfloat16" and runtime.precision != "bf16":
        raise UserError(
            f"dtype bfloat16 needs bf16 arithmetic, but precision is {runtime.precision}; pass --precision bf16"
        )
    if config.base_dtype == "bfloat16" and runtime.precision == "fp32":
        raise UserError("base_dtype bfloat16 needs 16-bit arithmetic, but precision is fp32; pass --precision bf16")
    if config.push_to_hub:
        silence = runtime.on_main(lambda: hub.check(config, config.output_dir))
        if silence and runtime.is_main:
            say(f"WARNING: {silence}; the upload is tried at the end of the run")
    if runtime.device.type == "cpu" and not runtime.sharded:  # gathered weights of many sizes would leave holes
        keep_freed_memory()
    data = prepare(config, runtime)
    run = Run(config, runtime, data, run_dir, output_dir, started)
    run.plan_steps()
    if "bits_per_byte" in config.metric_for_best_model and data.held_out_bytes is None:
        raise UserError("metric_for_best_model bits_per_byte: the tokenizer loses text, so there is none; take loss")
    identity = run.identity()
    nodes.check_same_data(runtime, identity)
    run.run_dir, run.resumed = nodes.find_run(runtime, config, run_dir, is_named, identity, locks)
    if run.resumed:
        saved = checkpoints.load_state(run.resumed)
        windows = runtime.on_main(lambda: run_folder.check_resumed(config, run.resumed, identity, run.total_steps))
        run.plan_steps(windows)
        run_folder.check_length(run.resumed, run.total_steps)
        runtime.precision = run_folder.kept_precision(saved, config, identity)
    run.config = replace(config, run_name=run.run_dir.name)
    return run


def build(run: Run, locks: contextlib.ExitStack) -> State:
    """Load the model, select its fastest verified variant, build the optimizer, restore a checkpoint, open the run's folder."""
    config, runtime = run.config, run.runtime
    model, places = load_model(config, run.data.model_config, runtime)
    special_tokens.write_into(model, run.data.tokenizer)
    if "bfloat16" in (config.dtype, config.base_dtype):
        loading.store_in_bfloat16(model)
    saved = checkpoints.load_state(run.resumed) if run.resumed else {}
    library = choose_cpu_matmul(model, config, runtime, saved)
    batch = run.data.train.batch(range(min(len(run.data.train), config.per_device_train_batch_size)))
    check_positions(model, config.block_size)
    input_ids = batch[0].to(runtime.device)
    with runtime.autocast():
        trains = trainable.select(model, config, input_ids)
        run.module = CausalLMLoss(model)
        run.flops_per_token = flops_per_token(model, config.block_size)
        run.weights = weights_of(run.module, runtime, config.fsdp, places)
        other_loss = run.weights.call(lambda model: check_causal(model, config.model, input_ids))
    if other_loss and runtime.is_main:
        say(f"WARNING: {other_loss}")
    _, description = build_module(
        run.module,
        config,
        batch,
        runtime,
        separators=run.data.special_tokens.borders,
        cpu_matmul=library,
        compiled=bool(saved.get("compiled")),
    )
    state = State(config, runtime, model, run.weights.build_optimizer(config), run.schedule, run.started)
    distributed.set_seed(config.seed + runtime.rank)
    remembered = runtime.agreed(lambda: run_folder.remembered_batch_size(config, run.run_dir), runtime.is_writer)
    state.micro_batch.size = min([state.micro_batch.size, *filter(None, remembered)])
    if run.resumed:
        restore(run.resumed, saved, state, run.weights)
    run.parallel = runtime.parallel(run.module, lambda: _empty_micro_batch(run))
    run.parallel.train()
    run.peak_flops = peak_flops(runtime.device, runtime.precision)
    about = environment(runtime.device, runtime.precision, runtime.world_size)
    tables = _open_folder(run, locks, about) if runtime.is_writer else {}
    if runtime.is_main:
        say(_introduction(run, state, description, about, trains))
    run.monitor = Monitor(
        run.run_dir,
        report_to=() if config.dry_run else config.loggers,
        about=tables,
        profiler=Profiler(run.run_dir, config.profiled_steps, runtime.device) if config.profile_steps else None,
        first_step=state.step,
        total_steps=run.total_steps,
        seconds_left=lambda: run.seconds_left(state),
        enabled=runtime.is_main,
        resumed=run.resumed is not None,
    )
    locks.callback(run.monitor.close)  # also after a failure
    run.module.on_compile_failure = lambda error: run.monitor.say(f"WARNING: no longer compiled: {one_line(error)}")
    run.step_graph = StepGraph(
        config.cuda_graphs and runtime.device.type == "cuda" and runtime.world_size == 1,
        on_failure=lambda error: run.monitor.say(f"no CUDA graph: {one_line(error)}"),
    )
    if state.micro_batch.size < config.per_device_train_batch_size:
        run.monitor.say(f"{plural(state.micro_batch.size, 'window')} at a time: more did not fit in memory before")
    return_freed_memory()
    return state


def restore(folder: Path, saved: dict, state: State, weights: Weights) -> None:
    """Load the tensors in `folder`, and the counters and random state in `saved`. UserError if they do not match this run."""
    try:
        checkpoints.load_tensors(folder, state.stored, state.optimizer, weights.as_saved)
        state.load_state_dict(saved)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise UserError(f"{folder / 'state.json'} is not a state of mori ({error}); take another checkpoint") from None


def _empty_micro_batch(run: Run) -> tuple[torch.Tensor, ...]:
    """The arguments of a forward pass without labels, whose loss is 0."""
    device = run.runtime.device
    [(input_ids, labels)], _ = load_step(run.data.train, [[]], pin=False)
    return input_ids.to(device), labels.to(device), torch.tensor(1.0, device=device)


def _open_folder(run: Run, locks: contextlib.ExitStack, about: dict) -> dict[str, dict]:
    """Create and lock the run's folder; write its config, environment and ledger, and return them by name."""
    with run.writes():
        if run.config.resume_from_checkpoint == "none" and not run.config.dry_run:
            if os.name == "nt":  # Windows renames no folder in which a file is open
                locks.close()
            set_aside(run.run_dir)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        locks.close()
        locks.enter_context(run_folder.lock(run.run_dir))  # set_aside renamed the locked folder
        # The settings of the run alone, for `--config`, and not how this call came to it.
        of_the_call = ("resume_from_checkpoint", "extend", "dry_run")
        settings = {k: v for k, v in asdict(run.config).items() if k not in of_the_call}
        tables = {"config": settings, "environment": about, "ledger": asdict(run.data.ledger)}
        if not run.config.dry_run:
            for name, table in tables.items():
                write_json(run.run_dir / f"{name}.json", table)
        return tables


def _why_bf16(run: Run) -> str:
    """Why a CPU computes in bf16, in words; "" if nothing was measured."""
    speedup = run.data.bf16_speedup if run.runtime.precision == "bf16" else 0.0
    return speedup and f"bf16: this CPU multiplies it {speedup:.1f} times as fast as fp32 (or --precision fp32)"


def _introduction(run: Run, state: State, description: str, about: dict, trains: str) -> str:
    """The start-up message."""
    return introduction(
        run.config,
        environment=about,
        device=run.runtime.device,
        text=str(run.data.ledger),
        parameters=sum(parameter.numel() for parameter in state.model.parameters()),
        total_steps=run.total_steps,
        steps_per_epoch=run.batches.steps_per_epoch,
        windows_per_step=run.batches.windows_per_step,
        evaluations=evaluations_in_words(run.config, run.eval_every, len(run.eval_windows), run.data.held_out),
        faster=description,
        special=run.data.special_tokens.describe(state.model, run.data.tokenizer),
        notes=[*filter(None, [_why_bf16(run), trains]), *run.data.ledger.warnings()],
        run_dir=run.run_dir,
        resumed=run.resumed and (state.step, run.resumed),
    )
