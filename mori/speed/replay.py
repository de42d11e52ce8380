"""Record a function of tensors once and replay it without its Python; on a GPU, as one CUDA graph.

A small model's step spends most of its time in the Python of its modules. A recording is a flat list of the same tensor
functions on the same weights, so the results are equal to the last bit. If no shape changes, a GPU captures the list as a graph.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Functions that turn a tensor's values into Python values or into a shape: the list of calls would depend on the values.
_READS_VALUES = frozenset(
    "item tolist numpy equal allclose is_nonzero __bool__ __int__ __float__ __index__ __contains__ "
    "nonzero argwhere unique unique_consecutive masked_select bincount".split()
)
# Functions that return their argument if there is nothing to do.
_MAY_DO_NOTHING = frozenset("contiguous dropout expand float to type type_as".split())
# Functions that can write into the recorded result; views of such a tensor need no second call.
_NAMES = "add addmm bmm cat cos div matmul mean mm mul neg pow rsqrt sin sub"
_INTO = {name: getattr(torch, name) for name in _NAMES.split()}
_INTO |= {"gelu": functional.gelu, "linear": functional.linear}
_VIEWS = frozenset(
    "__getitem__ chunk contiguous detach expand flatten narrow permute reshape select split squeeze t transpose "
    "unflatten unsqueeze view".split()
)


def _embedding(ids: torch.Tensor, weight: torch.Tensor, **options) -> torch.Tensor:
    if options.get("max_norm") is not None:  # changes the weight
        return functional.embedding(ids, weight, **options)
    return torch.embedding(weight, ids)


def _split(tensor: torch.Tensor, sizes, dim: int = 0) -> tuple[torch.Tensor, ...]:
    if isinstance(sizes, int):
        return torch.unsafe_split(tensor, sizes, dim)
    return torch.unsafe_split_with_sizes(tensor, list(sizes), dim)


# Equivalents without a Python wrapper.
_LEANER = {
    functional.layer_norm: torch.layer_norm,
    functional.embedding: _embedding,
    torch.Tensor.split: _split,
}


class Unrecordable(RuntimeError):
    """The function's calls depend on the values or on the position in the text, so it cannot be replayed."""


class Recording(TorchFunctionMode):
    """Inside this context, records every call of a tensor function (torch.overrides.TorchFunctionMode).

    Args:
        inputs: the tensors that a replay replaces; all other tensors from outside stay the same.
        states: tensors that the function overwrites, so that the next call sees other values there.
    """

    def __init__(self, inputs: list[torch.Tensor], states: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []  # function, arguments, keywords, result
        self.values: list = []  # slot -> value; tensors stay alive, so that their id() is not reused
        self.slot_of: dict[int, int] = {}
        self.inputs = [self._slot(tensor) for tensor in inputs]
        self.results: set[int] = set(self.inputs)  # slots that every replay fills
        self.varying = {*self.inputs, *map(self._slot, states)}  # slots whose values depend on inputs and states
        self._within = False

    def call(self, function: Callable, *args):
        """Call `function` and record it as one call, without the calls inside it."""
        self._within = True
        try:
            result = function(*args)
        finally:
            self._within = False
        self._record(function, args, {}, result)
        return result

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = _name(function)
        if self._within or (name in _MAY_DO_NOTHING and result is args[0]):
            return result
        reads_values = name in _READS_VALUES or _shaped_by_values(name, args)
        if reads_values and any(self.slot_of.get(id(value)) in self.varying for value in _flat((args, kwargs))):
            raise Unrecordable(f"{name} depends on the values")
        if name == "__setitem__" or any(isinstance(value, torch.Tensor) for value in _flat(result)):
            self._record(function, args, kwargs, result)
        return result

    def _slot(self, value) -> int:
        if isinstance(value, torch.Tensor) and id(value) in self.slot_of:
            return self.slot_of[id(value)]
        self.values.append(value)
        if isinstance(value, torch.Tensor):
            self.slot_of[id(value)] = len(self.values) - 1
        return len(self.values) - 1

    def _record(self, function: Callable, args: tuple, kwargs: dict, result) -> None:
        call = (function, _map(self._slot, args), _map(self._slot, kwargs), _map(self._slot, result))
        self.calls.append(call)
        self.results.update(_flat(call[3]))
        if not self.varying.isdisjoint(_flat(call[1:3])):
            self.varying.update(_flat(call[3]))
            if args and (result is args[0] or _name(function) == "__setitem__"):
                self.varying.update(self._slots_in_memory_of(args[0]))

    def _slots_in_memory_of(self, written: torch.Tensor) -> list[int]:
        """The slots of a tensor that was written into, of its views and of what it is a view of."""
        memory, slots = written.untyped_storage().data_ptr(), enumerate(self.values)
        tensors = [(slot, value) for slot, value in slots if isinstance(value, torch.Tensor)]
        return [slot for slot, tensor in tensors if tensor.untyped_storage().data_ptr() == memory]

    def same_as(self, other: "Recording", growing: bool = False) -> bool:
        """Whether both recorded the same functions, on the same slots, with the same constants.

        With `growing`, whole numbers may differ from those of `other`, as the length of a text does.
        """
        if self.calls != other.calls or self.results != other.results or len(self.values) != len(other.values):
            return False
        return all(
            slot in self.results or _same_constant(mine, theirs) or growing and bool(_growth(mine, theirs))
            for slot, (mine, theirs) in enumerate(zip(self.values, other.values, strict=True))
        )


class Replay:
    """The calls of a recording as a function of its inputs; it returns the tensor that stands for `result`.

    Args:
        recording, earlier: equal recordings at successive positions in the text: a shape that both share never changes, and a
            number that differs goes on changing by as much.
        writes: whether calls may write into the recorded results. PyTorch rounds some products otherwise then (`linear` of a
            tensor whose rows are not one after another).

    Attributes:
        ahead: by how many positions the next call is ahead of the recording.
        grows: whether numbers grow.

    A result whose shape never changes is written into the tensor of the recording if its function can; views of it need no
    second call. The next replay overwrites the returned tensor.
    """

    def __init__(self, recording: Recording, earlier: Recording, result: torch.Tensor, writes: bool = True):
        self._values = list(recording.values)
        self._inputs = recording.inputs
        self._result = recording.slot_of[id(result)]
        pairs = enumerate(zip(recording.values, earlier.values, strict=True))
        growths = {slot: _growth(*pair) for slot, pair in pairs if slot not in recording.results}
        self._growing = [(slot, recording.values[slot], growth) for slot, growth in growths.items() if growth]
        self.ahead, self.grows = 0, bool(self._growing)
        self._variable = {
            *recording.results,
            *(slot for slot, *_ in self._growing),
        }  # slots that differ in every replay
        self._program = []
        for function, args, kwargs, result in recording.calls:
            if self._is_fixed_view(function, args, kwargs, result):
                self._variable.difference_update(_flat(result))
                continue
            into = _INTO.get(_name(function).removeprefix("__").removesuffix("__"))
            if into and writes and self._can_be_written(args, result, earlier):
                function, kwargs = into, {**kwargs, "out": result}
                self._variable.discard(result)
            self._program.append(self._instruction(function, args, kwargs, result))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Repeat the calls; `inputs` are in the order of the recording."""
        values = self._values
        for slot, tensor in zip(self._inputs, inputs, strict=True):
            values[slot] = tensor
        for slot, value, growth in self._growing:
            values[slot] = _grown(value, growth, self.ahead)
        for function, arguments, slot, several in self._program:
            if several:
                for part, value in zip(slot, function(*arguments(values)), strict=True):
                    values[part] = value
            else:
                values[slot] = function(*arguments(values))
        return values[self._result]

    def _is_fixed_view(self, function: Callable, args: tuple, kwargs: dict, result) -> bool:
        """Whether the call returns views of a tensor that stays in place."""
        slots, base = _flat((args, kwargs)), self._values[args[0]] if args and isinstance(args[0], int) else None
        if _name(function) not in _VIEWS or not isinstance(base, torch.Tensor) or not self._variable.isdisjoint(slots):
            return False
        memory = base.untyped_storage().data_ptr()
        return all(self._values[slot].untyped_storage().data_ptr() == memory for slot in _flat(result))

    def _can_be_written(self, args: tuple, result: int, earlier: Recording) -> bool:
        """Whether a result has the same shape in both recordings and the type of its arguments: `out=` would bypass autocast."""
        tensor = self._values[result]
        types = {self._values[slot].dtype for slot in _flat(args) if isinstance(self._values[slot], torch.Tensor)}
        return types == {tensor.dtype} and tensor.shape == earlier.values[result].shape

    def _instruction(self, function: Callable, args: tuple, kwargs: dict, result) -> tuple:
        """A prepared call: constants are bound, and one function fetches the arguments from their slots."""
        several = isinstance(result, (tuple, list))
        function = _LEANER.get(function, function)
        args = tuple(arg if isinstance(arg, int) else self._constant(arg) for arg in args)
        if not self._variable.isdisjoint(_flat(kwargs)) or not all(isinstance(arg, int) for arg in args):
            return partial(_call_nested, function, args, kwargs), lambda values: (values,), result, several
        if kwargs:
            function = partial(function, **_map(self._values.__getitem__, kwargs))
        if len(args) > 1:
            return function, itemgetter(*args), result, several
        return function, (lambda values: (values[args[0]],)) if args else (lambda values: ()), result, several

    def _constant(self, nested):
        """A slot for the content of `nested` if no part of it changes between replays; else `nested` itself."""
        if not self._variable.isdisjoint(_flat(nested)):
            return nested
        self._values.append(_map(self._values.__getitem__, nested))
        return len(self._values) - 1


class Graph:
    """A replay as one CUDA graph: a single launch for all of its calls (torch.cuda.CUDAGraph).

    Args:
        replay: of a function in which every shape, and every tensor but the inputs, stays the same.
        inputs: the inputs of the capture.
        warm_up: call `replay` once before the capture: libraries initialize at their first call, which must not be captured.

    Raises RuntimeError if the calls cannot be captured. The next launch overwrites the returned tensor.
    """

    def __init__(self, replay: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], warm_up: bool = True):
        self._replay = replay  # the graph knows addresses only: the tensors must live as long
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device):
            if warm_up:
                on_side_stream(replay, *self._inputs)
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._result = replay(*self._inputs)
            except RuntimeError:
                torch.cuda.set_stream(before)  # a failed capture does not restore it (torch 2.13)
                raise

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result of the replay for `inputs`."""
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self._graph.replay()
        return self._result


def on_side_stream(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)` on another stream, as PyTorch asks for the calls before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = function(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    return result


def _name(function: Callable) -> str:
    return getattr(function, "__name__", "")


def _call_nested(function: Callable, args: tuple, kwargs: dict, values: list):
    return function(*_map(values.__getitem__, args), **_map(values.__getitem__, kwargs))


def _shaped_by_values(name: str, args: tuple) -> bool:
    if name == "repeat_interleave":
        return any(isinstance(repeats, torch.Tensor) for repeats in args[1:])
    if name == "__getitem__":
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in _flat(args[1]))
    return name == "where" and len(args) == 1


def _same_constant(mine, theirs) -> bool:
    if mine is theirs:
        return True
    return not isinstance(mine, torch.Tensor) and type(mine) is type(theirs) and mine == theirs


def _growth(mine, theirs):
    """By how much a whole number is larger than another, or the numbers of a slice, None among them; 0 for all else."""
    if isinstance(mine, slice) and isinstance(theirs, slice):
        pairs = (mine.start, theirs.start), (mine.stop, theirs.stop)
        grows = tuple(_growth(*pair) for pair in pairs)
        is_same = (
            all(growth or a == b for growth, (a, b) in zip(grows, pairs, strict=True)) and mine.step == theirs.step
        )
        return grows if is_same and any(grows) else 0
    return mine - theirs if type(mine) is type(theirs) is int else 0


def _grown(value, growth, steps: int):
    """The number or slice `value` after `steps` more positions."""
    if isinstance(value, slice):
        bounds = zip((value.start, value.stop), growth, strict=True)
        return slice(*(bound + by * steps if by else bound for bound, by in bounds), value.step)
    return value + growth * steps


def _map(function: Callable, value):
    """Apply `function` to every leaf of nested tuples, lists, slices and dictionaries."""
    if isinstance(value, tuple):
        return tuple(_map(function, item) for item in value)
    if isinstance(value, list):
        return [_map(function, item) for item in value]
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _flat(value) -> list:
    """The leaves of nested tuples, lists and dictionaries."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]
