"""The device and precision of a process, and its place among the ranks."""

import contextlib
import os
import re
import socket
import time
import uuid
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
_MISTAKE = "mistake"  # the key in the store of a mistake that one rank alone has made
_stores: list[dist.Store] = []  # of this process's runs with several ranks
_POLL_SECONDS = 0.02
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
    writer: int = 0  # the first rank that sees the run's folder as this one does, see `nodes.first_that_sees`
    publisher: int = 0  # the first rank that sees the place of the trained model as this one does

    @property
    def device_name(self) -> str:
        """The model of the GPU, or the type of another device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and logs."""
        return self.rank == 0

    @property
    def ranks_of_node(self) -> int:
        """The number of ranks on this machine, as torchrun tells."""
        return _variable("LOCAL_WORLD_SIZE", self.world_size)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the run's folder: the main rank, and without a shared disk the first rank of each node."""
        return self.rank == self.writer

    @property
    def is_publisher(self) -> bool:
        """Whether this rank writes the trained model: the main rank, and without a shared disk the first rank of each node."""
        return self.rank == self.publisher

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matmuls."""
        return _DTYPES.get(self.precision, torch.float32)

    def autocast(self):
        """The context of every forward pass: mixed precision, or no change in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def samples_in_fp32(self, model: nn.Module) -> bool:
        """Whether samples are drawn in fp32, as `generate` draws them: in fp32, and on a CPU if the weights are in fp32 and whole.

        A token reads every weight once, so that a CPU gains nothing by converting them first.
        """
        whole = self.device.type == "cpu" and not self.sharded
        return self.precision == "fp32" or whole and all(p.dtype == torch.float32 for p in model.parameters())

    def autocast_for_samples(self, model: nn.Module):
        """The context of drawing samples from `model`."""
        return contextlib.nullcontext() if self.samples_in_fp32(model) else self.autocast()

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
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value):
        """The main rank's value."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.control)
        return values[0]

    def agreed(self, action: Callable, here: bool = True) -> list:
        """Run `action` on the ranks where `here` is true; every rank returns the results of all, or raises the first UserError."""
        result, mistake = None, None
        try:
            result = action() if here else None
        except UserError as raised:
            mistake = raised
        except OSError as raised:
            mistake = UserError(f"{raised.filename}: {raised.strerror}")
        if mistake and not self.is_main:
            mistake = UserError(f"{_place(self.rank)}: {mistake}")
        outcomes = self.gather((result, mistake))
        if mistake := next((mistake for _, mistake in outcomes if mistake), None):
            mistake.reported_by_main_rank = not self.is_main
            raise mistake
        return [result for result, _ in outcomes]

    def on_main(self, action: Callable):
        """Run `action` on the main rank only; every rank returns its result, or raises its UserError."""
        return self.agreed(action, self.is_main)[0]

    def on_writers(self, action: Callable):
        """Run `action` on the writers; every rank returns the result of its file system's, or raises the first UserError."""
        return self.agreed(action, self.is_writer)[self.writer]

    def writers_first(self, action: Callable):
        """Run `action` on the writers, then on the other ranks; all raise the writers' first UserError."""
        results = []
        self.agreed(lambda: results.append(action()), self.is_writer)
        return results[0] if self.is_writer else action()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group of ranks."""
        _stores.clear()
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
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store = _store_of_this_start(store, rank, size, timeout)
        _stores.append(store)
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


def _store_of_this_start(store: dist.Store, rank: int, size: int, timeout: int) -> dist.PrefixStore:
    """The part of `store` that the processes of this start share with nobody else.

    torchrun keeps one store for all its restarts (torch 2.13), and nodes that joined at different times count their restarts
    differently. So each process leaves a name that was never used, and rank 0 answers it with the prefix of its keys.
    Raises DistStoreError if the ranks have not all come within `timeout` seconds.
    """
    name, prefix, answered, deadline = uuid.uuid4().hex, "", set(), time.monotonic() + timeout
    store.append("arrivals", f"{name} ")
    while not prefix or store.add(f"{prefix}/present", 0) < size:
        if rank == 0:
            for arrival in set(store.get("arrivals").decode().split()) - answered:
                answered.add(arrival)
                store.set(f"answer to {arrival}", name)
        if not prefix and store.check([f"answer to {name}"]):
            prefix = store.get(f"answer to {name}").decode()
            store.add(f"{prefix}/present", 1)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"not all {size} ranks have come within {timeout} seconds")
        time.sleep(_POLL_SECONDS)  # no wait inside the store, which a signal would not interrupt
    return dist.PrefixStore(prefix, store)


def tell_others(mistake: UserError) -> None:
    """Leave a mistake for the other ranks, which otherwise learn only that this one has exited."""
    if _stores and not getattr(mistake, "reported_by_main_rank", False):
        with contextlib.suppress(RuntimeError):
            _stores[-1].set(
                _MISTAKE, f"{_place(dist.get_rank())}: {mistake}" if dist.is_initialized() else str(mistake)
            )


def told_by_others() -> UserError | None:
    """The mistake that another rank has left, reported by the main rank; None if there is none."""
    with contextlib.suppress(OSError, RuntimeError):
        # PyTorch would wait long for a store that is gone, and print where in its code.
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=1).close()
        if _stores and _stores[-1].check([_MISTAKE]):
            mistake = UserError(_stores[-1].get(_MISTAKE).decode())
            mistake.reported_by_main_rank = os.environ.get("RANK") != "0"
            return mistake
    return None


def _place(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


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
