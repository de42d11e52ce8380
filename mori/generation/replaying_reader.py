"""A faster reader for models whose cache holds keys, values and states: their step is recorded, then replayed without its Python.

On a GPU the step has one shape (attention reads whole buffers behind a mask) and is captured as a CUDA graph. Sliding windows
that a text does not fit in, caches of a model's own class and experts whose path depends on the values keep the plain `Reader`.
"""

import contextlib
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from mori.generation.reader import MARGIN, Reader, alike
from mori.model.context import rope_depends_on_length
from mori.speed.replay import Graph, Recording, Replay

# The models whose recordings were of no use, with the circumstances: later texts are read without recording.
_not_replayed: WeakKeyDictionary[nn.Module, set[tuple[bool, bool]]] = WeakKeyDictionary()
# The lengths, first and last, between which growing numbers were right, for the same circumstances: no need to try again there.
_replayed_between: WeakKeyDictionary[nn.Module, dict[tuple[bool, bool], tuple[int, int]]] = WeakKeyDictionary()


class BufferedLayer(DynamicLayer):
    """One layer's keys and values `(B, H, S, D)` in buffers that are allocated ahead, so that a new token copies no old ones."""

    def __init__(self):
        super().__init__()
        self.length = 0  # tokens in the buffers
        self.recording: Recording | None = None  # notes an update as one call
        self.column: torch.Tensor | None = None  # (1,); if set, an update writes there and returns the whole buffers

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor | None = None) -> None:
        """Note type and device; `update` allocates the buffers."""
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; returns all that attention shall read."""
        if not self.is_initialized:
            self.lazy_initialization(keys)
            self.keys, self.values = _enlarged(keys, MARGIN), _enlarged(values, MARGIN)
        if self.column is not None:
            self.keys.index_copy_(2, self.column, keys)
            self.values.index_copy_(2, self.column, values)
            return self.keys, self.values
        if self.recording:
            return self.recording.call(self._append, keys, values)
        return self._append(keys, values)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start, count = self.length, keys.size(2)
        self.length = end = start + count
        self.reserve(end)
        self.keys.narrow(2, start, count).copy_(keys)
        self.values.narrow(2, start, count).copy_(values)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def reserve(self, length: int) -> None:
        """Enlarge the buffers if they cannot hold `length` tokens."""
        if length > self.capacity:
            self.keys, self.values = _enlarged(self.keys, length), _enlarged(self.values, length)

    @property
    def capacity(self) -> int:
        """The number of tokens that the buffers can hold."""
        return self.keys.size(2) if self.is_initialized else 0

    def get_seq_length(self, *_) -> int:
        """The number of tokens in the buffers."""
        return self.length


class BufferedLayerWithStates(BufferedLayer, LinearAttentionAndFullAttentionLayer):
    """A buffered layer that has the states of linear attention beside its keys and values."""

    def lazy_initialization(self, *keys_and_values: torch.Tensor, **states) -> None:
        """Note type and device of keys and values, or allocate states."""
        kind = BufferedLayer if keys_and_values else LinearAttentionLayer
        kind.lazy_initialization(self, *keys_and_values, **states)


def open_reader(model: nn.Module, pads: torch.Tensor, context: int | None, length: int) -> Reader:
    """The fastest reader for the model, its device and texts of up to `length` tokens; other arguments as for `Reader`."""
    reader = Reader(model, pads, context)
    layers = reader.cache.layers if reader.cache else []
    ordinary = layers and all(_buffered(layer, length) for layer in layers)
    # Sharded weights are gathered by each layer's own call.
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not ordinary or is_sharded or rope_depends_on_length(model.config):
        return reader
    if _circumstances(reader) in _not_replayed.get(model, ()):
        return reader
    return (GraphReader if uses_graphs(pads.device) else ReplayingReader)(model, pads, context, length)


def _buffered(layer, length: int):
    """What stands for an empty layer of transformers' cache in a recording, or None if its step cannot be recorded.

    States are written in place and stay as they are; a sliding window that `length` tokens fit in is like full attention.
    """
    kind = type(layer)
    if kind is LinearAttentionLayer or not isinstance(layer, CacheLayerMixin):  # the latter keeps nothing
        return layer
    if kind in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        if layer.sliding_window <= length:
            return None
    elif kind not in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return None
    if not isinstance(layer, LinearAttentionLayer):
        return BufferedLayer()
    buffered = BufferedLayerWithStates()
    vars(buffered).update(vars(layer))  # how many states it has
    return buffered


def _circumstances(reader: Reader) -> tuple[bool, bool]:
    """What decides whether the step of a model can be replayed: padding and autocast."""
    return reader.padded, torch.is_autocast_enabled(reader.pads.device.type)


def uses_graphs(device: torch.device) -> bool:
    """Whether steps are captured as CUDA graphs. Not under autocast, which would cast all weights in every step."""
    return device.type == "cuda" and not torch.is_autocast_enabled(device.type)


class ReplayingReader(Reader):
    """Records two steps in a row. If both made the same calls, and the replay gives the model's own logits, the later steps
    are replayed; otherwise every step runs the model. If numbers grow from step to step, the replay must give the model's own
    logits at the end of the text, `longest` tokens, too.
    """

    may_grow = True  # numbers in the calls

    def __init__(self, model: nn.Module, pads: torch.Tensor, context: int | None, longest: int):
        super().__init__(model, pads, context)
        self.longest, self.recorded_length = longest, 0
        self.cache.layers = [_buffered(layer, longest) for layer in self.cache.layers]
        self.recordable = self.splits = True
        self.recording: Recording | None = None  # of the step before
        self.replay: Replay | Graph | None = None

    @property
    def layers(self) -> list[BufferedLayer]:
        """The layers that keep keys and values; a model may add some in its first pass."""
        return [layer for layer in self.cache.layers if isinstance(layer, BufferedLayer)]

    def step(self, newest: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the newest token `(B, 1)`."""
        if self.replay:
            return self.replayed(newest)
        if any(layer.length != self.length - 1 for layer in self.layers):  # it keeps more than a column for each token
            self.recordable = self.splits = False
        return self._recorded(newest) if self.recordable else self.forward(newest)

    @torch.inference_mode()
    def replayed(self, newest: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the newest token, by the replay."""
        self.replay.ahead = self.length - self.recorded_length
        return self.replay(*self.step_inputs(newest))

    def step_inputs(self, newest: torch.Tensor) -> list[torch.Tensor]:
        """The tensors that differ from step to step."""
        inputs = [newest, self.positions.narrow(1, self.length - 1, 1)]
        return [*inputs, self.visible.narrow(3, 0, self.length)] if self.padded else inputs

    def recordable_step(self, inputs: list[torch.Tensor], recording: Recording) -> torch.Tensor:
        """The model's pass in the form that is recorded: all that differs from step to step is in `inputs`."""
        newest, positions, *mask = inputs
        for layer in self.layers:
            layer.recording = recording
        return self.forward(newest, *mask, positions=positions)

    def matches(self, logits: torch.Tensor, own: torch.Tensor) -> bool:
        """Whether `logits` are the model's `own`."""
        return torch.equal(logits, own)

    def gets_own_mask(self) -> bool:
        """Whether `recordable_step` leaves its inputs to the model, so that its logits need no check."""
        return not self.padded and not self.prepares_inputs

    def make_replay(
        self, recording: Recording, logits: torch.Tensor, inputs: list[torch.Tensor], writes: bool
    ) -> Replay | Graph:
        """The replay of two equal recordings, the second of which gave `logits` for `inputs`."""
        return Replay(recording, self.recording, logits, writes)

    def _recorded(self, newest: torch.Tensor) -> torch.Tensor:
        """The logits of a step that is recorded; at the second one, make and check the replay."""
        own, before = None, [state.clone() for state in self.states()]
        if not self.gets_own_mask():
            own = self.forward(newest)
            self._rewind(before)
        inputs = self.step_inputs(newest)
        recording, logits = Recording(inputs, self.states()), None
        # The calls may depend on values (Unrecordable), or the model may reject the mask.
        with contextlib.suppress(RuntimeError, ValueError, TypeError, LookupError), recording:
            logits = self.recordable_step(inputs, recording)
        for layer in self.layers:
            layer.recording = layer.column = None
        own = logits if own is None else own
        own = None if own is None else own.clone()  # the replay may write into this tensor
        self.recordable = logits is not None and self.matches(logits, own)
        if self.recordable and self.recording:
            is_same, self.recorded_length = recording.same_as(self.recording, self.may_grow), self.length
            self.recordable = is_same and self._start_replaying(recording, logits, inputs, own, before)
        self.recording = recording
        if not self.recordable:
            self.replay, self.splits = None, False
            _not_replayed.setdefault(self.model, set()).add(_circumstances(self))
            self._rewind(before)
            return self.forward(newest)
        self._set_length(self.length)
        return own

    @torch.inference_mode()
    def _start_replaying(
        self,
        recording: Recording,
        logits: torch.Tensor,
        inputs: list[torch.Tensor],
        own: torch.Tensor,
        before: list[torch.Tensor],
    ) -> bool:
        """Make the replay; returns whether it gives the model's own logits and states, which were `before` the step."""
        states = [state.clone() for state in self.states()]
        for writes in (True, False):
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                self.replay = self.make_replay(recording, logits, inputs, writes)
                self._rewind(before)
                if self.matches(self.replay(*inputs), own) and all(map(self.matches, self.states(), states)):
                    return not getattr(self.replay, "grows", False) or self._keeps_growing()
        return False

    def _keeps_growing(self) -> bool:
        """Whether numbers that grow do so until the end of the text, or did in a text that began earlier and ended later."""
        tried = _replayed_between.setdefault(self.model, {})
        first, last = tried.get(_circumstances(self), (0, 0))
        if first <= self.length and self.longest <= last:
            return True
        if not self._replays_the_end():
            return False
        tried[_circumstances(self)] = self.length, self.longest
        return True

    def _replays_the_end(self) -> bool:
        """Whether the replay gives the model's own logits after the longest text, which has empty keys behind the present one."""
        length, input_ids, before = self.length, self.input_ids, [state.clone() for state in self.states()]
        newest = input_ids[:, -1:]
        between = pad(input_ids[:, :-1], (0, self.longest - length))
        self.length, self.input_ids = self.longest, torch.cat([between, newest], 1)
        if self.length > len(self.columns):
            self._allocate(self.length)
        for layer in self.layers:
            layer.reserve(self.length)
        try:
            self._set_length(self.length - 1)
            own = self.forward(newest).clone()
            self._rewind(before)
            self.replay.ahead = self.length - self.recorded_length
            return self.matches(self.replay(*self.step_inputs(newest)), own)
        finally:
            self.length, self.input_ids = length, input_ids
            self._rewind(before)

    def states(self) -> list[torch.Tensor]:
        """The tensors of the cache that each step overwrites."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, LinearAttentionLayer)]
        kept = [kept for layer in layers for kept in (layer.conv_states, layer.recurrent_states)]
        several = [state for states in kept for state in (states.values() if isinstance(states, dict) else [states])]
        return [state for state in several if state is not None]

    def _rewind(self, states: list[torch.Tensor]) -> None:
        """Return to the step before, when the cache had these states."""
        self._set_length(self.length - 1)
        for state, earlier in zip(self.states(), states, strict=True):
            state.copy_(earlier)

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length


class GraphReader(ReplayingReader):
    """Captures the replay as a CUDA graph: every step reads the whole buffers, masked, so that no shape changes."""

    may_grow = False

    def __init__(self, model: nn.Module, pads: torch.Tensor, context: int | None, longest: int):
        super().__init__(model, pads, context, longest)
        self.capacity = 0  # of the buffers that were recorded

    def step(self, newest: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the newest token; larger buffers need a new recording."""
        for layer in self.layers:
            layer.reserve(self.length)
        capacity = max((layer.capacity for layer in self.layers), default=MARGIN)
        if self.capacity != capacity:
            self.capacity = capacity
            self.slots = torch.arange(self.capacity, device=self.pads.device)
            if self.replay:  # it did not count
                self._set_length(self.length - 1)
            self.replay, self.recording = None, None
        return super().step(newest)

    def step_inputs(self, newest: torch.Tensor) -> list[torch.Tensor]:
        """The newest token, its column in the buffers, and the padding of each text."""
        return [newest, self.columns.narrow(0, self.length - 1, 1), self.pads]

    def recordable_step(self, inputs: list[torch.Tensor], recording: Recording) -> torch.Tensor:
        """The pass with a mask over the whole buffers."""
        newest, column, pads = inputs
        for layer in self.layers:
            layer.column = column
        positions, visible = (column - pads).clamp(0, self.last_position), None
        if self.layers:
            visible = ((self.slots >= pads) & (self.slots <= column))[:, None, None]  # (B, 1, 1, S)
        return self.forward(newest, visible, positions)

    def matches(self, logits: torch.Tensor, own: torch.Tensor) -> bool:
        """Up to rounding: other kernels sum over whole buffers."""
        return alike(logits, own)

    def gets_own_mask(self) -> bool:
        """Never: the mask covers the whole buffers."""
        return False

    def make_replay(
        self, recording: Recording, logits: torch.Tensor, inputs: list[torch.Tensor], writes: bool
    ) -> Replay | Graph:
        """The graph; the plain replay if the calls cannot be captured."""
        replay = super().make_replay(recording, logits, inputs, writes)
        with contextlib.suppress(RuntimeError):
            return Graph(replay, inputs)
        return replay


def _enlarged(tensor: torch.Tensor, extra: int) -> torch.Tensor:
    """A copy with `extra` zeros or more after the S tokens; in all a multiple of 8, which masked attention on a GPU needs."""
    batch, heads, length, size = tensor.shape
    larger = tensor.new_zeros(batch, heads, (length + extra + 7) // 8 * 8, size)
    larger.narrow(2, 0, length).copy_(tensor)
    return larger
