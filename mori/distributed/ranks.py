"""The device and precision of a process, and its place among the ranks."""

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mori.cli import UserError, plural
from mori.distributed.randomness import random_state, set_random_state

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
    sharded: bool = False  # whether each rank holds a part of the weights, so that all ranks must compute together

    @property
    def device_name(self) -> str:
        """The model of the GPU, or the type of another device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def ranks_of_node(self) -> int:
        """The number of ranks on this machine, as torchrun tells."""
        return _variable("LOCAL_WORLD_SIZE", self.world_size)

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
        """The model in DistributedDataParallel if there are several ranks that hold it whole; `example()` are arguments that give a loss of 0.

        DDP rearranges its buckets after the first backward pass, and a gradient's bucket decides the order in which the
        ranks are summed. Two passes over the example settle the layout, so that the first step after a resume sums in the
        same order as every other step. A pass before them shows whether the loss uses every parameter: only if it does not,
        DDP has to search each step for the gradients that it must not wait for.
        """
        if self.world_size == 1 or self.sharded:
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
        if self.sharded:
            model.set_requires_gradient_sync(not skip)
            return contextlib.nullcontext()
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


def start(device: str = "auto", precision: str = "fp32", timeout: int = 1800) -> Runtime:
    """Find the device, join the ranks that `torchrun` started (environment variables), and resolve the precision.

    `auto` precision is bf16 on a GPU with bf16 units, fp16 on an older one, fp32 on a CPU until `prepare.settle_precision` knows the
    model. The ranks give up one that does not answer for `timeout` seconds. Raises UserError if the device does not exist, or if the variables describe no ranks.
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


def lost_a_rank(error: BaseException) -> bool:
    """Whether `error` reports that another rank is gone, or did not answer in time."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_GLOO_SOURCE.search(str(error)))


def restarted() -> bool:
    """Whether torchrun has restarted this process (`--max-restarts`) after a failure."""
    return _variable("TORCHELASTIC_RESTART_COUNT", 0) > 0


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
