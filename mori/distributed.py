"""Where we run: device, ranks, random state, autocast and gradient scaling."""

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mori.config import RunFailed, UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Runtime:
    """The device and this process' place among its peers."""

    device: torch.device
    rank: int
    world_size: int
    precision: str
    control: dist.ProcessGroup | None = None  # for what the ranks say to each other on the host

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0

    def autocast(self):
        """The context of every forward pass: mixed precision, or nothing in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that fp16 gradients do not vanish (Micikevicius et al., 2018, arXiv:1710.03740); else does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def parallel(self, model: nn.Module, example: Callable[[], tuple]) -> nn.Module:
        """The model in DistributedDataParallel, when there are several ranks. `example()` are arguments that give a loss of 0.

        DDP lays out its buckets anew after the first backward pass, and the place of a gradient in them decides in which
        order the ranks are summed. That is done here, on the example, so that the first step after a resume sums like
        every other.
        """
        if self.world_size == 1:
            return model
        wrapped = DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        before = random_state()
        for _ in range(2):  # the new layout is made before the second
            with self.autocast():
                loss = wrapped(*example())
            loss.backward()
        wrapped.zero_grad()
        set_random_state(before)
        return wrapped

    def no_sync(self, model: nn.Module, skip: bool):
        """The context of a micro-batch whose gradients (`skip`) are not yet exchanged between ranks."""
        return model.no_sync() if skip and self.world_size > 1 else contextlib.nullcontext()

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; where there are several, in place on the device."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: object) -> bool:
        """Whether `flag` is true on any rank, without waiting for the device."""
        if self.world_size == 1:
            return bool(flag)
        found = torch.tensor(int(bool(flag)))
        dist.all_reduce(found, group=self.control)
        return bool(found)

    def gather(self, value) -> list:
        """What every rank holds, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action):
        """Run `action` on the main rank alone; its result, or its UserError, is every rank's."""
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
            mistake.told_by_main = not self.is_main
            raise mistake
        return result

    def main_first(self, action):
        """Run `action` on the main rank, then on the others; the main rank's UserError is raised on all."""
        made = []
        self.on_main(lambda: made.append(action()))
        return made[0] if self.is_main else action()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group of ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()


class BatchSize:
    """How many windows are put through the model at once. It is a context for that work: `with batch_size: ...`

    Where memory runs out inside, the work ends there, `size` is halved, and `halved` is true: the caller does it again.
    Raises RunFailed where not even one window fits.
    """

    def __init__(self, size: int):
        self.size, self.halved = size, False

    def __enter__(self) -> None:
        if self.halved:
            gc.collect()  # what the failed attempt left in reference cycles
            torch.cuda.empty_cache()  # libraries take memory that PyTorch does not hold
        self.halved = False

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or not out_of_memory(error):
            return False
        if self.size == 1:
            raise RunFailed(
                "not even one window fits in memory; use a smaller --block_size or --model, or --precision bf16"
            ) from None
        self.size, self.halved = -(-self.size // 2), True
        return True


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: the device's, or that of the host (PyTorch has no type for the latter)."""
    # "out of memory" say CUDA, its driver, Triton, and MPS. A handle of cuBLAS is memory too, beside PyTorch's own.
    said = (
        "can't allocate memory",
        "out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def lost_a_rank(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone, or did not answer in time (gloo has no type for it)."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def start(device: str = "auto", precision: str = "fp32", timeout: int = 1800) -> Runtime:
    """Find the device, join the other ranks (those of `torchrun`, by its environment variables), and settle the precision.

    A rank that does not answer for `timeout` seconds is given up by the others.

    `auto` precision is bf16 on a GPU that computes in it, fp16 on an older one, fp32 on a CPU.
    Raises UserError where the device does not exist.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    patience = timedelta(seconds=timeout)
    if world_size > 1 and not dist.is_initialized():
        # torchrun keeps one store for all restarts (torch 2.13): what the ranks of an earlier start left there, such as
        # their addresses, must not be found by those of this one.
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    if precision == "auto":
        precision = "fp32"
        if chosen.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if world_size == 1:
        return Runtime(chosen, 0, 1, precision)
    control = dist.new_group(backend="gloo", timeout=patience)
    return Runtime(chosen, dist.get_rank(), world_size, precision, control)


def _device(name: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and device.index >= count:
        raise UserError(f"device {name} does not exist: this machine has {count} GPU(s); use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps does not exist on this machine; use --device cpu or auto")
    return device


def for_children(device: torch.device) -> str:
    """Let the processes that this one starts see `device` alone, where it is a GPU; returns its name for them.

    Trainer takes all GPUs that it sees, and the first before any other.
    """
    if device.type == "cuda":
        torch.cuda.init()  # for this process the GPUs stay what they are
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = names[device.index or 0]
    return device.type


class StopSignals:
    """Notices SIGINT (Ctrl-C), SIGTERM and SIGUSR1 instead of dying of them; `received` is the name of the first.

    A second Ctrl-C leaves at once. `torchrun` passes a signal on to workers that the terminal has told already, so one
    that comes within a second is taken for the same. Outside the main thread, where Python allows no handlers, nothing
    is noticed.
    """

    def __init__(self):
        self.received, self._at, self._before = "", 0.0, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
            text = f"\n{self.received}: this step is finished and saved first (Ctrl-C again leaves at once)\n"
            with contextlib.suppress(OSError, ValueError):  # `| tee` may have died of the same Ctrl-C
                os.write(sys.stderr.fileno(), text.encode())  # print() may be interrupted in the middle of a print()
        elif number == signal.SIGINT and time.monotonic() - self._at > 1:
            raise KeyboardInterrupt


def restarted() -> bool:
    """Whether torchrun has started this process again (`--max-restarts`) after another one of the same command failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device."""
    seed %= 2**32  # NumPy's limit
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple:
    """The state of every random generator that a model may draw from; cheap enough for every step."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Put back what `random_state` gave."""
    python, legacy, cpu, cuda = state
    random.setstate(python)
    numpy.random.set_state(legacy)
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)


def rng_state() -> dict:
    """The same as plain JSON values."""
    (version, python, gauss), (_, keys, position, has_gauss, cached), cpu, cuda = random_state()
    state = {
        "python": [version, list(python), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
        "torch": cpu.numpy().tobytes().hex(),
    }
    return state if cuda is None else state | {"cuda": cuda.numpy().tobytes().hex()}


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` gave."""
    version, python, gauss = state["python"]
    keys, position, has_gauss, cached = state["numpy"]
    legacy = ("MT19937", keys, position, has_gauss, cached)
    cuda = _bytes(state["cuda"]) if "cuda" in state else None
    set_random_state(((version, tuple(python), gauss), legacy, _bytes(state["torch"]), cuda))


def _bytes(hexadecimal: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.uint8)
