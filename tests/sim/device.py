"""Tensors that say they are on `cuda:0`, are computed on the CPU, and fail where CUDA would.

An operation on tensors of two devices raises, and so does a host sync while a graph is captured or while
`torch.cuda.set_sync_debug_mode("error")` is set. Random numbers come from a generator of the device's own.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
# Operations whose result the host needs.
_READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten.is_nonzero.default, aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_consecutive.default,
}  # fmt: skip
# Operations whose indices may be on the host.
_INDEXED = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
}  # fmt: skip
_RANDOM = ("dropout", "bernoulli", "rand", "normal", "uniform", "multinomial", "exponential")
_host_generator = torch.default_generator


class Device:
    """The state of the simulated device."""

    generator = torch.Generator()
    capturing: "Recorder | None" = None  # while a graph is captured
    sync_debug_mode = "default"
    pinned: set[int] = set()  # addresses of host memory
    allocate: Callable[[str], None] = lambda name: (
        None
    )  # called with each operation's name; may raise an out-of-memory error


class Call:
    """A captured operation: replayed, it writes its results into the memory of the capture."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict, results: list[torch.Tensor]):
        self.function, self.args, self.kwargs, self.results = function, args, kwargs, results

    def replay(self) -> None:
        """Compute the results again."""
        again = _run(self.function, self.args, self.kwargs)
        tensors = [value for value in tree_flatten(again)[0] if isinstance(value, torch.Tensor)]
        for captured, new in zip(self.results, tensors, strict=True):
            if captured.data_ptr() != new.data_ptr():
                captured.copy_(new)


class Recorder:
    """Collects the `calls` of a capture, and undoes what they write: on a GPU, nothing runs before the graph is launched."""

    def __init__(self):
        self.calls: list[Call] = []
        self._generator_state = Device.generator.get_state()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note_writes(self, function: Callable, args: tuple, kwargs: dict) -> None:
        """Keep the values of the tensors that `function` will write into."""
        for number, argument in enumerate(function._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tree_flatten(written)[0]:
                    if isinstance(tensor, torch.Tensor) and id(tensor) not in self._before:
                        self._before[id(tensor)] = tensor, tensor.clone()

    def undo(self) -> None:
        """Restore values and random state."""
        for tensor, before in reversed(self._before.values()):
            tensor.copy_(before)
        Device.generator.set_state(self._generator_state)


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; `on_host` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: torch.Tensor, requires_grad: bool = False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            layout=on_host.layout,
            device=GPU,
            requires_grad=requires_grad,
        )
        tensor.on_host = on_host
        return tensor

    def __repr__(self) -> str:
        return f"simulated {self.on_host!r}"

    @property
    def data(self) -> torch.Tensor:
        """As `torch.Tensor.data`, whose setter would leave `on_host` as it is."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.on_host = value.on_host

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.on_host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values."""
        return self.on_host.untyped_storage()

    def storage_offset(self) -> int:
        """The position of the first value in that memory."""
        return self.on_host.storage_offset()

    def tolist(self) -> list:
        """The values, read by the host."""
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        """Raises TypeError, as for any tensor on a GPU."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    """Inside this context, an operation that names a CUDA device gives a `SimulatedTensor`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


def sync(reason: str) -> None:
    """The host waits: raises RuntimeError while a graph is captured or the debug mode is `error`, warns if it is `warn`."""
    if Device.capturing:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({reason})")
    if Device.sync_debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({reason})")
    if Device.sync_debug_mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation ({reason})", stacklevel=2)


def _dispatch(function, args: tuple, kwargs: dict):
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    simulated = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
    if function is aten.is_pinned.default:
        return not simulated and args[0].data_ptr() in Device.pinned
    if not simulated and not to_gpu:
        return function(*args, **kwargs)
    name = function.__name__
    Device.allocate(name)
    if function is aten._to_copy.default:
        return _to_copy(args, kwargs, to_gpu)
    if function is aten.copy_.default and len(simulated) == 1:
        _check_transfer(*args[:2], non_blocking=args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    elif function is aten.copy_.default and _same_memory(*map(_on_host, args[:2])):
        return args[0]  # PyTorch compares the storages of wrappers, which differ
    elif function is aten._fused_sdp_choice.default:
        return 0  # attention by matmuls
    else:
        if function in _READS:
            sync(name)
        _check_devices(function, args, tensors)
    if simulated and kwargs.get("device") is not None and not to_gpu:
        return function(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))  # such as new_zeros(device="cpu")
    wrappers = {id(tensor.on_host): tensor for tensor in simulated}  # an operation in place returns its argument
    args, kwargs = tree_map(_on_host, args), _for_host(kwargs)
    if Device.capturing:
        Device.capturing.note_writes(function, args, kwargs)
    result = _run(function, args, kwargs)
    return _captured(function, args, kwargs, tree_map(lambda value: _on_gpu(value, wrappers), result))


def _to_copy(args: tuple, kwargs: dict, to_gpu: bool):
    source = args[0]
    from_gpu = isinstance(source, SimulatedTensor)
    to_gpu = to_gpu or from_gpu and kwargs.get("device") is None
    if from_gpu != to_gpu:
        _check_transfer(SimulatedTensor if to_gpu else None, source, non_blocking=kwargs.get("non_blocking", False))
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    # Another dtype or a copy; `clone` keeps the format that was asked for.
    result = aten._to_copy.default(_on_host(source), **options)
    if not to_gpu:
        return result
    return _captured(aten._to_copy.default, (_on_host(source),), options, SimulatedTensor(result))


def _check_transfer(target, source: torch.Tensor, non_blocking: bool) -> None:
    """A copy between host and device waits, unless it comes from pinned memory and says so."""
    to_gpu = target is SimulatedTensor or isinstance(target, SimulatedTensor)
    if not (to_gpu and non_blocking and source.data_ptr() in Device.pinned):
        sync("copy from the host" if to_gpu else "copy to the host")


def _same_memory(target: torch.Tensor, source: torch.Tensor) -> bool:
    same = target.data_ptr() == source.data_ptr() and target.dtype == source.dtype
    return same and target.numel() == source.numel() and target.is_contiguous() and source.is_contiguous()


def _check_devices(function, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Scalars on the host are arguments of a kernel; indices on the host are copied to the device."""
    on_host = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0]
    if function in _INDEXED and isinstance(args[0], SimulatedTensor):
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            sync("a mask as an index")
        if any(not isinstance(index, SimulatedTensor) for index in indices):
            sync("an index on the host")
        on_host = [tensor for tensor in on_host if not any(tensor is index for index in indices)]
    if on_host:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})")


def _run(function, args: tuple, kwargs: dict):
    """Compute on the CPU, with the device's random numbers."""
    if not any(part in function.__name__ for part in _RANDOM):
        return function(*args, **kwargs)
    with device_generator():
        return function(*args, **kwargs)


@contextlib.contextmanager
def device_generator() -> Iterator[None]:
    """PyTorch's default generator on the CPU plays that of the device."""
    before = _host_generator.get_state()
    _host_generator.set_state(Device.generator.get_state())
    try:
        yield
    finally:
        Device.generator.set_state(_host_generator.get_state())
        _host_generator.set_state(before)


def _captured(function, args: tuple, kwargs: dict, result):
    """`result`, after the call was added to the graph that is being captured."""
    if Device.capturing:
        results = [value.on_host for value in tree_flatten(result)[0] if isinstance(value, SimulatedTensor)]
        Device.capturing.calls.append(Call(function, args, kwargs, results))
    return result


def _on_host(value):
    return value.on_host if isinstance(value, SimulatedTensor) else value


def _on_gpu(value, wrappers: dict[int, SimulatedTensor]):
    if not isinstance(value, torch.Tensor) or isinstance(value, SimulatedTensor):
        return value
    return wrappers[id(value)] if id(value) in wrappers else SimulatedTensor(value)


def _for_host(kwargs: dict) -> dict:
    kwargs = {name: tree_map(_on_host, value) for name, value in kwargs.items()}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    if hasattr(kwargs.get("generator"), "on_host"):
        kwargs["generator"] = kwargs["generator"].on_host
    return kwargs
