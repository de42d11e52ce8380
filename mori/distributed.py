"""Device, ranks and precision; random state; signals; what to do when memory runs out."""

import contextlib
import gc
import itertools
import os
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mori.cli import RunFailed, UserError, plural

_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")  # Windows has the first two and the last
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# PyTorch has no error types for a host without memory, nor for cuBLAS, whose handles are memory too.
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
)
_starts = itertools.count()
_GLOO_SOURCE = re.compile(r"\bgloo/[\w/]+\.(?:cc|h):\d+\]")  # gloo raises RuntimeError with its source line


@dataclass
class Runtime:
    """The device and precision of this process, and its place among the ranks."""

    device: torch.device
    rank: int
    world_size: int
    precision: str
    control: dist.ProcessGroup | None = None  # gloo: messages between hosts that do not wait for the device

    @property
    def device_name(self) -> str:
        """The model of the GPU, or the type of another device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matmuls."""
        return _DTYPES.get(self.precision, torch.float32)

    def autocast(self):
        """The context of every forward pass: mixed precision, or no change in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    @contextlib.contextmanager
    def unchanged_random_state(self) -> Iterator[None]:
        """The context of work whose random numbers must not move those of the training."""
        before = random_state()
        try:
            yield
        finally:
            set_random_state(before)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A scaler that keeps fp16 gradients from vanishing (Micikevicius et al., 2018, arXiv:1710.03740); disabled otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def parallel(self, model: nn.Module, example: Callable[[], tuple]) -> nn.Module:
        """The model in DistributedDataParallel if there are several ranks; `example()` are arguments that give a loss of 0.

        DDP rearranges its buckets after the first backward pass, and a gradient's bucket decides the order in which the
        ranks are summed. Two passes over the example settle the layout, so that the first step after a resume sums in the
        same order as every other step. A pass before them shows whether the loss uses every parameter: only if it does not,
        DDP has to search each step for the gradients that it must not wait for.
        """
        if self.world_size == 1:
            return model

        def backward(module: nn.Module) -> None:
            with self.autocast():
                loss = module(*example())
            loss.backward()

        with self.unchanged_random_state():
            backward(model)
            unused = self.any(any(p.grad is None for p in model.parameters() if p.requires_grad))
            wrapped = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=unused,
            )
            for _ in range(2):
                backward(wrapped)
        wrapped.zero_grad()
        return wrapped

    def no_sync(self, model: nn.Module, skip: bool):
        """The context of a micro-batch; with `skip`, its gradients are not exchanged between ranks yet."""
        return model.no_sync() if skip and self.world_size > 1 else contextlib.nullcontext()

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; with several ranks, computed in place on the device."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: object) -> bool:
        """Whether `flag` is true on any rank, without waiting for the device."""
        if self.world_size == 1:
            return bool(flag)
        count = torch.tensor(int(bool(flag)))
        dist.all_reduce(count, group=self.control)
        return bool(count)

    def gather(self, value) -> list:
        """The value of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action):
        """Run `action` on the main rank only; every rank returns its result, or raises its UserError."""
        result, mistake = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as raised:
                mistake = raised
            except OSError as raised:
                mistake = UserError(f"{raised.filename}: {raised.strerror}")
        result, mistake = self.gather((result, mistake))[0]
        if mistake:
            mistake.reported_by_main_rank = not self.is_main
            raise mistake
        return result

    def main_first(self, action):
        """Run `action` on the main rank, then on the others; all ranks raise the main rank's UserError."""
        results = []
        self.on_main(lambda: results.append(action()))
        return results[0] if self.is_main else action()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group of ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()


class BatchSize:
    """The number of windows in one forward pass, and the context of that pass: `with batch_size: ...`

    If memory runs out inside the context, it ends there, `size` is halved and `halved` is true: the caller tries again.
    Raises RunFailed if not even one window fits.
    """

    def __init__(self, size: int):
        self.size, self.halved = size, False

    def __enter__(self) -> None:
        if self.halved:
            gc.collect()  # reference cycles keep tensors of the failed attempt
            torch.cuda.empty_cache()  # libraries allocate outside PyTorch's cache
        self.halved = False

    def __exit__(self, error_type, error, traceback) -> bool:
        if error is None or not out_of_memory(error):
            return False
        if self.size == 1:
            raise RunFailed(
                "not even one window fits in memory; use a smaller --block_size or --model, or --precision bf16"
            ) from None
        self.size, self.halved = -(-self.size // 2), True
        return True


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports that the device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def lost_a_rank(error: BaseException) -> bool:
    """Whether `error` reports that another rank is gone, or did not answer in time."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_GLOO_SOURCE.search(str(error)))


def start(device: str = "auto", precision: str = "fp32", timeout: int = 1800) -> Runtime:
    """Find the device, join the ranks that `torchrun` started (environment variables), and resolve the precision.

    `auto` precision is bf16 on a GPU with bf16 units, fp16 on an older one, fp32 on a CPU. The ranks give up one that does
    not answer for `timeout` seconds. Raises UserError if the device does not exist, or if the variables describe no ranks.
    """
    world_size, local_rank = _variable("WORLD_SIZE", 1), _variable("LOCAL_RANK", 0)
    if world_size > 1:
        _check_variables(world_size)
    resolved = _device(device, local_rank)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    limit = timedelta(seconds=timeout)
    if world_size > 1 and not dist.is_initialized():
        # torchrun keeps one store for all restarts (torch 2.13) and all runs of a process: a prefix hides earlier addresses.
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        prefix = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}, run {next(_starts)}"
        store = dist.PrefixStore(prefix, store)
        gpu = resolved if resolved.type == "cuda" else None  # bound to its GPU, NCCL connects at once
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=gpu)
    if precision == "auto":
        precision = "fp32"
        if resolved.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if world_size == 1:
        return Runtime(resolved, 0, 1, precision)
    control = dist.new_group(backend="gloo", timeout=limit)
    return Runtime(resolved, dist.get_rank(), world_size, precision, control)


def _variable(name: str, default: int) -> int:
    """A whole number from the environment; unset and empty are the same."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {name} is {text!r}, must be a whole number; unset it, or start with torchrun"
        )
    return int(text)


def _check_variables(world_size: int) -> None:
    """Raise UserError if a variable that `torchrun` sets for several ranks is missing or impossible."""
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment variable WORLD_SIZE is {world_size}, but without {', '.join(missing)}; unset WORLD_SIZE, or start "
            "several ranks with torchrun"
        )
    if _variable("RANK", 0) >= world_size or _variable("MASTER_PORT", 0) >= 1 << 16:
        values = ", ".join(f"{name} {os.environ[name]}" for name in needed)
        raise UserError(f"the environment variables {values} do not fit WORLD_SIZE {world_size}; start with torchrun")


def _device(name: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and device.index >= count:
        raise UserError(
            f"device {name} does not exist: this machine has {plural(count, 'GPU')}; use --device cpu or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps does not exist on this machine; use --device cpu or auto")
    return device


def for_children(device: torch.device) -> str:
    """Make `device` the only GPU that child processes see; returns its name for them. Trainer takes every GPU it sees."""
    if device.type == "cuda":
        torch.cuda.init()  # this process keeps its view of the GPUs
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = names[device.index or 0]
    return device.type


class StopSignals:
    """Records SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 instead of dying of them; `received` is the name of the first.

    Until `defer` is called there is nothing to save, and a signal raises KeyboardInterrupt. Afterwards a second Ctrl-C does so.
    `torchrun` forwards a signal to workers that have it from the terminal already, so a second one within a second counts as
    the same. A SIGHUP that `nohup` ignores stays ignored. Outside the main thread Python allows no handlers, and none are
    installed.
    """

    def __init__(self):
        self.received, self._at, self._before, self._deferred = "", 0.0, {}, False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _STOP_SIGNALS if hasattr(signal, name)):
                if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def defer(self, deferred: bool = True) -> None:
        """From now on the caller reads `received`, and stops when its step is saved; or a signal raises KeyboardInterrupt again."""
        self._deferred = deferred

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
            if not self._deferred:
                raise KeyboardInterrupt
            text = f"\n{self.received}: finishing and saving this step first (Ctrl-C again exits at once)\n"
            with contextlib.suppress(OSError):  # `| tee` may have died of the same Ctrl-C
                os.write(
                    2, text.encode()
                )  # print() is not reentrant; a notebook shows this file, but has no sys.stderr.fileno()
        elif number == signal.SIGINT and time.monotonic() - self._at > 1:
            raise KeyboardInterrupt


@contextlib.contextmanager
def restored_backends() -> Iterator[None]:
    """The context of a run: PyTorch's global settings are restored after it, for what else this process does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 announces another name for this setting
        precision = torch.get_float32_matmul_precision()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def restarted() -> bool:
    """Whether torchrun has restarted this process (`--max-restarts`) after a failure."""
    return _variable("TORCHELASTIC_RESTART_COUNT", 0) > 0


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device."""
    seed %= 2**32  # NumPy's limit
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple:
    """The state of every random generator that a model may use; cheap enough for every step."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Restore the result of `random_state`."""
    python, legacy, cpu, cuda = state
    random.setstate(python)
    numpy.random.set_state(legacy)
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)


def rng_state() -> dict:
    """The result of `random_state` as JSON values."""
    (version, python, gauss), (_, keys, position, has_gauss, cached), cpu, cuda = random_state()
    state = {
        "python": [version, list(python), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
        "torch": cpu.numpy().tobytes().hex(),
    }
    return state if cuda is None else state | {"cuda": cuda.numpy().tobytes().hex()}


def set_rng_state(state: dict) -> None:
    """Restore the result of `rng_state`."""
    version, python, gauss = state["python"]
    keys, position, has_gauss, cached = state["numpy"]
    legacy = ("MT19937", keys, position, has_gauss, cached)
    cuda = _bytes(state["cuda"]) if "cuda" in state else None
    set_random_state(((version, tuple(python), gauss), legacy, _bytes(state["torch"]), cuda))


def _bytes(hexadecimal: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.uint8)
