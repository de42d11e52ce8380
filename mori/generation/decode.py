"""From prompts to new token ids: one pass over the prompts, then a token at a time over the model's key-value cache.

Two roads lead there. Models with an ordinary cache keep their keys and values in buffers that are allocated ahead, and
their step is recorded and replayed without its Python (see replay.py); on a GPU it reads the whole buffers behind a mask, so
that no shape changes, and is one graph. All others run as they are, with their own cache: sliding windows, state spaces,
mixtures of experts whose path depends on the values.
"""

import contextlib
import inspect
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mori.generation.sampling import Sampler
from mori.speed.matmul import OnAllCores
from mori.speed.replay import Graph, Recording, Replay

ROOM = 128  # tokens for which a cache has room at first beyond the prompt; it doubles when it is full
# model -> kind of step -> what is kept of a reader from one text to the next, see `_Reader.close`.
_kept: WeakKeyDictionary = WeakKeyDictionary()


class _Layer(DynamicLayer):
    """One layer's keys and values `(B, H, S, D)` in buffers with room to grow, so that nothing is copied at each token."""

    def __init__(self):
        super().__init__()
        self.length, self.recording = 0, None
        self.column: torch.Tensor | None = None  # where a step that has but one shape writes its token

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor | None = None) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys)
            self.keys, self.values = _with_room(keys, ROOM), _with_room(values, ROOM)
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
        self.grow(end)
        self.keys.narrow(2, start, count).copy_(keys)
        self.values.narrow(2, start, count).copy_(values)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def grow(self, length: int) -> None:
        """Have room for a text of `length`."""
        if length > self.room:
            self.keys, self.values = _with_room(self.keys, length), _with_room(self.values, length)

    @property
    def room(self) -> int:
        """For how many tokens there are buffers now."""
        return self.keys.size(2) if self.is_initialized else 0

    def get_seq_length(self, *_) -> int:
        return self.length

    def empty(self, keep_buffers: bool) -> None:
        """Back to the beginning; the memory is given back, or else filled with zeros: what is masked must be a number."""
        self.length = 0
        if not keep_buffers:
            self.keys, self.values, self.is_initialized = None, None, False
        elif self.is_initialized:
            self.keys.zero_()
            self.values.zero_()


def _with_room(tensor: torch.Tensor, more: int) -> torch.Tensor:
    """The same with room for `more` tokens at least; a multiple of 8 in all, as masked attention wants it on a GPU."""
    batch, heads, length, size = tensor.shape
    grown = tensor.new_zeros(batch, heads, (length + more + 7) // 8 * 8, size)
    grown.narrow(2, 0, length).copy_(tensor)
    return grown


def _one_shape(device: torch.device, autocast: bool) -> bool:
    """Whether a step is to have one shape, so that it can be captured. Under autocast the graph would cast all weights each time."""
    return device.type == "cuda" and not autocast


class _Reader:
    """The model reading a batch of texts, of which the first `pads` `(B, 1)` tokens are padding."""

    def __init__(self, model: nn.Module, pads: torch.Tensor, context: int | None):
        self.model, self.pads, self.padded = model, pads, bool(pads.any())
        self.last_position = (context or 2**62) - 1
        self.takes = set(inspect.signature(model.forward).parameters)
        self.cache, self.cache_name = None, None
        for name in ("cache", "past_key_values", "cache_params"):  # the first is the name since transformers 5.24
            # Some releases of transformers want positions for a state that generate() alone knows: read anew there.
            if name in self.takes and not (name == "cache_params" and "cache_position" in self.takes):
                self.cache_name = self.cache_name or name
        self.layers: list[_Layer] = []  # where the cache is ours
        self.recording, self.replay, self.checked, self.may_record, self.started = None, None, False, False, False
        self.room, self.slots = 0, None  # of the layers, where a step of one shape is recorded
        device = pads.device
        autocast = torch.is_autocast_enabled(device.type)
        self.one_shape = _one_shape(device, autocast)
        self.kind = (len(pads), self.padded, autocast and torch.get_autocast_dtype(device.type))
        self._grow(0)

    def close(self) -> None:
        """Keep the replay for the next texts of this kind, and the buffers into which a graph writes."""
        for layer in self.layers:
            layer.empty(keep_buffers=self.one_shape)
        if self.replay:
            kept = _kept.setdefault(self.model, {})
            if self.one_shape:
                kept.clear()  # one set of buffers is enough
            kept[self.kind] = self.layers, self.replay, self.room, self._weights()

    def _weights(self) -> list[tuple]:
        return [(weight.data_ptr(), weight.dtype) for weight in self.model.parameters()]

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the last token of the texts `(B, S)`; all that was read before is remembered."""
        self.length = input_ids.size(1)
        if self.length > self.columns.size(0):
            self._grow(self.length)
        if self.one_shape and self.started and self.layers:
            self._make_room()
        if self.replay:
            return self._replayed(input_ids[:, -1:]) if self.checked else self._checked(input_ids[:, -1:])
        if self.may_record:
            return self._recorded(input_ids[:, -1:])
        if not self.started and self.cache_name in ("cache", "past_key_values"):
            self._open_cache()
        if self.cache is not None and self.started:
            return self._forward(input_ids[:, -1:])
        logits = self._forward(input_ids)
        self.started = True
        self.may_record = bool(self.layers)
        return logits

    def _grow(self, length: int) -> None:
        """Positions and mask for twice the text."""
        self.columns = torch.arange(2 * length + ROOM, device=self.pads.device)
        self.positions = (self.columns - self.pads).clamp(0, self.last_position)  # (B, S)
        self.visible = (self.columns >= self.pads)[:, None, None]  # (B, 1, 1, S)

    def _make_room(self) -> None:
        """Where buffers are others than when the step was recorded, it must be recorded anew."""
        for layer in self.layers:
            layer.grow(self.length)
        if self.room != self.layers[0].room:
            self.room, self.may_record = self.layers[0].room, self.may_record or self.replay is not None
            self.slots = torch.arange(self.room, device=self.pads.device)
            self.replay, self.recording, self.checked = None, None, False
            self._forget_newest()

    def _open_cache(self) -> None:
        """An ordinary cache is replaced by one that does not move; any other is the model's own affair."""
        self.cache = DynamicCache(config=self.model.config)
        ordinary = self.cache.layers and all(type(layer) is DynamicLayer for layer in self.cache.layers)
        if ordinary and "position_ids" in self.takes:
            # Taken out while it is in use: two texts may be drawn in turn.
            layers, replay, room, weights = _kept.get(self.model, {}).pop(self.kind, (None, None, 0, None))
            if weights == self._weights():
                self.layers, self.replay, self.room = layers, replay, room
                self.slots = torch.arange(room, device=self.pads.device)
            else:
                self.layers = [_Layer() for _ in self.cache.layers]
            self.cache.layers = self.layers

    @torch.no_grad()
    def _forward(self, unread: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None):
        """The model's own pass over the tokens that were not read yet; the logits after the last, `(B, V)`."""
        start = self.length - unread.size(1)
        if mask is None and self.padded:
            mask = self.visible[:, 0, 0, : self.length].long()
        given = {"input_ids": unread, "attention_mask": mask, "use_cache": self.cache_name is not None}
        if "position_ids" in self.takes:
            given["position_ids"] = self.positions[:, start : self.length] if positions is None else positions
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        if "output_router_logits" in self.takes:
            given["output_router_logits"] = False  # they are for a loss, which nobody asks for here
        if self.cache is not None:
            given[self.cache_name] = self.cache
        with OnAllCores() if unread.size(1) == 1 else contextlib.nullcontext():
            out = self.model(**given)
        self.cache = out.get(self.cache_name) if self.cache_name else None
        return out.logits[:, -1]

    @torch.inference_mode()
    def _replayed(self, newest: torch.Tensor) -> torch.Tensor:
        return self.replay(*self._inputs_of_step(newest))

    def _gives(self, newest: torch.Tensor, own: torch.Tensor) -> bool:
        """Whether the replay gives the model's own logits."""
        try:
            return self._equal(self._replayed(newest), own)
        except RuntimeError:  # the model has other dtypes or shapes now
            return False

    def _equal(self, logits: torch.Tensor, own: torch.Tensor) -> bool:
        """To the bit; where a step of one shape reads the whole buffers, the sums are those of other kernels."""
        if not self.one_shape:
            return torch.equal(logits, own)
        tolerance = 5e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-3
        return bool((logits - own).abs().max() <= tolerance * own.abs().max())

    def _inputs_of_step(self, newest: torch.Tensor) -> list[torch.Tensor]:
        if self.one_shape:
            return [newest, self.columns.narrow(0, self.length - 1, 1), self.pads]
        inputs = [newest, self.positions.narrow(1, self.length - 1, 1)]
        return [*inputs, self.visible.narrow(3, 0, self.length)] if self.padded else inputs

    def _step(self, inputs: list[torch.Tensor], recording: Recording) -> torch.Tensor:
        """The model's pass over the newest token, in the form in which it is recorded."""
        if not self.one_shape:
            for layer in self.layers:
                layer.recording = recording
            return self._forward(inputs[0], *inputs[2:], positions=inputs[1])
        newest, column, pads = inputs
        for layer in self.layers:
            layer.column = column
        visible = ((self.slots >= pads) & (self.slots <= column))[:, None, None]  # (B, 1, 1, S)
        return self._forward(newest, visible, (column - pads).clamp(0, self.last_position))

    def _checked(self, newest: torch.Tensor) -> torch.Tensor:
        """The first step of a text whose replay is an earlier text's: it must still be the model's own pass, to the bit."""
        own = self._forward(newest)
        self._forget_newest()
        self.checked = self._gives(newest, own)
        if self.checked:
            return own
        self.replay = None
        self._forget_newest()
        return self._forward(newest)

    def _recorded(self, newest: torch.Tensor) -> torch.Tensor:
        """A step that is recorded. When two recordings are the same, and the replay of the second gives the logits of the
        model's own pass, all steps to come are replayed; at the first difference recording is given up.
        """
        own = None
        if self.padded or self.one_shape:  # the model is given another mask than it makes itself
            own = self._forward(newest)
            self._forget_newest()
        inputs = self._inputs_of_step(newest)
        recording, logits = Recording(inputs), None
        try:
            with recording:
                logits = self._step(inputs, recording)
        except (RuntimeError, ValueError, TypeError):  # Unrecordable, or a model that takes no such mask
            logits = None
        for layer in self.layers:
            layer.recording = layer.column = None
        if own is None:
            own = logits
        self.may_record = logits is not None and self._equal(logits, own)
        if self.may_record and self.recording:
            self._forget_newest()
            self.checked = recording.same_as(self.recording) and self._replays(recording, inputs, logits, own)
            self.may_record = self.checked
        self.recording = recording
        if not self.may_record:
            self.replay = None
            self._forget_newest()
            return self._forward(newest)
        self._set_length(self.length)
        return own

    @torch.inference_mode()
    def _replays(
        self, recording: Recording, inputs: list[torch.Tensor], logits: torch.Tensor, own: torch.Tensor
    ) -> bool:
        """Make the replay, and try it."""
        own = own.clone()  # it may be what the replay writes into
        self.replay = Replay(recording, self.recording, logits)
        if self.one_shape:
            with contextlib.suppress(RuntimeError):  # what cannot be captured stays a replay
                self.replay = Graph(self.replay, inputs)
        return self._gives(inputs[0], own)

    def _forget_newest(self) -> None:
        self._set_length(self.length - 1)

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length


def decode(
    model: nn.Module,
    prompts: list[list[int]],
    sampler: Sampler,
    max_new_tokens: int,
    *,
    context: int | None = None,
    steps_at_once: int = 1,
) -> Iterator[list[list[int]]]:
    """Draw `max_new_tokens` tokens after each of `prompts`; yields the new ids of every row, `steps_at_once` of them at a time.

    Whoever reads them decides when a row has ended, and leaves when all have. Prompts of unequal length are padded on the
    left. Where `context` tokens are full and all prompts are as long, the texts go on from their newer half.

    Raises FloatingPointError where the logits are not finite, or every token is forbidden.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pads = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
    vocabulary = model.get_output_embeddings().weight.size(0)
    # The texts as the sampler sees them, where padding is no token of the vocabulary, and as the model reads them.
    seen = torch.full((len(prompts), longest + max_new_tokens), vocabulary, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[longest - len(prompt) : longest] = torch.tensor(prompt, device=device)
    unread = seen.masked_fill(seen == vocabulary, 0)
    reader, first = _Reader(model, pads, context), 0  # the reader knows the texts from column `first` on
    try:
        for start in range(longest, longest + max_new_tokens, steps_at_once):
            stop = min(start + steps_at_once, longest + max_new_tokens)
            drawn = []
            for end in range(start, stop):
                if context and not reader.padded and end - first > context:
                    reader.close()
                    reader, first = _Reader(model, pads, context), end - max(1, context // 2)
                logits = reader.read(unread[:, first:end])
                with torch.inference_mode():
                    drawn.append(sampler(logits, seen[:, :end], end - longest))
                    # Where none could be drawn, the steps until that is read go on with a token that there is.
                    seen[:, end : end + 1] = unread[:, end : end + 1] = drawn[-1].clamp(min=0)
            new_ids = torch.cat(drawn, 1).tolist()
            if any(token < 0 for row in new_ids for token in row):
                raise FloatingPointError(
                    "no token can be drawn: the model has diverged (its logits are not finite), a control's value is too "
                    "extreme, or every token is forbidden"
                )
            yield new_ids
    finally:
        reader.close()
