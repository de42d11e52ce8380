"""The model reading a batch of texts: the prompts in one pass, then one token at a time with the model's own cache."""

import contextlib
import inspect

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin

from mori.speed.matmul import SplitMatvec

MARGIN = 128  # tokens beyond the prompt for which masks and buffers are allocated at first


class Reader:
    """Returns the logits after the newest token of each text; runs the model as it is, with any cache.

    A model that overrides transformers' `prepare_inputs_for_generation` is asked for the inputs of each pass, as `generate()`
    asks it.

    Args:
        pads: `(B, 1)`, the number of padding tokens at the start of each text.
        context: the number of positions that the model knows; None if it has no limit.

    Attributes:
        carried: the caches and states that one pass leaves to the next, by the names of their parameters.
    """

    def __init__(self, model: nn.Module, pads: torch.Tensor, context: int | None):
        self.model, self.pads, self.padded = model, pads, bool(pads.any())
        self.last_position = (context or 2**62) - 1
        self.parameters = set(inspect.signature(model.forward).parameters)
        own = getattr(type(model), "prepare_inputs_for_generation", None)
        self.prepares_inputs = own not in (None, GenerationMixin.prepare_inputs_for_generation)
        if self.prepares_inputs and model._prepare_position_ids_for_generation(torch.zeros_like(pads), {}) is None:
            self.parameters -= {"position_ids"}  # it counts them itself
        cache = _new_cache(model, self.parameters)
        self.use_cache, self.carried = cache is not None, cache or {}
        self.splits = False  # a mode around each step would cost more than it gains, unless the step is recorded
        self.length = 0  # tokens read so far
        self._allocate(0)

    @property
    def cache(self) -> DynamicCache | None:
        """The cache, if the model has transformers' usual class."""
        return next((cache for cache in self.carried.values() if isinstance(cache, DynamicCache)), None)

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the last token of `input_ids` `(B, S)`, which are one token longer at each call.

        The returned tensor may be overwritten by the next call.
        """
        prompt = self.length == 0
        self.input_ids, self.length = input_ids, input_ids.size(1)
        if self.length > len(self.columns):
            self._allocate(self.length)
        if prompt or not self.carried:
            return self.forward(input_ids)
        return self.step(input_ids[:, -1:])

    def step(self, newest: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the newest token `(B, 1)`."""
        return self.forward(newest)

    @torch.no_grad()
    def forward(self, unread: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None):
        """The model's own pass over the `unread` tokens; the logits after the last one, `(B, V)`.

        `mask` and `positions` replace the mask and the positions of the padded texts.
        """
        if mask is None and self.padded:
            mask = self.visible[:, 0, 0, : self.length].long()
        arguments = {**self.carried, "attention_mask": mask, "use_cache": self.use_cache}
        if "position_ids" in self.parameters:
            arguments["position_ids"] = self.positions[:, : self.length] if positions is None else positions
        if "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = 1
        if "output_router_logits" in self.parameters:
            arguments["output_router_logits"] = False  # used for the router loss only
        if self.prepares_inputs and positions is None:
            arguments = self._prepared(unread, arguments)
        else:
            arguments["input_ids"] = unread
            if positions is None and "position_ids" in arguments:
                arguments["position_ids"] = arguments["position_ids"][:, -unread.size(1) :]
        with SplitMatvec() if self.splits and unread.size(1) == 1 else contextlib.nullcontext():
            out = self.model(**arguments)
        self.carried |= {name: out[name] for name in self.parameters & out.keys() if self.use_cache}
        return out.logits[:, -1]

    def _prepared(self, unread: torch.Tensor, arguments: dict) -> dict:
        """The inputs that the model itself makes for its next pass."""
        prompt = unread.size(1) == self.length
        return self.model.prepare_inputs_for_generation(
            self.input_ids, next_sequence_length=None if prompt else 1, is_first_iteration=prompt, **arguments
        )

    def _allocate(self, length: int) -> None:
        """Make positions and mask for texts up to twice `length`."""
        self.columns = torch.arange(2 * length + MARGIN, device=self.pads.device)
        self.positions = (self.columns - self.pads).clamp(0, self.last_position)  # (B, S)
        self.visible = (self.columns >= self.pads)[:, None, None]  # (B, 1, 1, S)


def reads_padded_alike(model: nn.Module, prompts: list[list[int]], context: int | None) -> bool:
    """Whether the model reads the shortest of `prompts` beside the longest, padded on the left, as it reads it alone.

    A model that counts positions from the padding, or takes the padding into its state, shows other logits after the prompts or
    after one of two steps. An indexer, which chooses the tokens that each token attends to, shows it only in long texts.
    """
    short, long = min(prompts, key=len), max(prompts, key=len)
    if len(short) == len(long):
        return True
    if any(name.startswith("index") for name in model.config.get_text_config().to_dict()):
        return False
    steps = min(2, (context or 2**62) - len(long))
    pads = torch.tensor([[len(long) - len(short)], [0]], device=next(model.parameters()).device)
    texts = [[0] * (len(long) - len(short)) + short + short[:1] * steps, long + short[:1] * steps]
    padded, alone = (
        torch.tensor(texts, device=pads.device),
        torch.tensor([short + short[:1] * steps], device=pads.device),
    )
    batch_reader, reader = Reader(model, pads, context), Reader(model, pads[1:], context)
    try:
        return all(
            alike(batch_reader.read(padded[:, : len(long) + step])[:1], reader.read(alone[:, : len(short) + step]))
            for step in range(steps + 1)
        )
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError):  # the model rejects the padding
        return False


def alike(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are equal up to the rounding of other kernels."""
    tolerance = 5e-2 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def _new_cache(model: nn.Module, parameters: set[str]) -> dict | None:
    """The cache for the first pass, by the name of its parameter; empty if the model makes its own, None if it must have none."""
    names = ("cache", "past_key_values", "cache_params")  # the first since transformers 5.24
    name = next((name for name in names if name in parameters), None)
    if name is None or not model._supports_default_dynamic_cache():
        return {}
    try:
        return {name: DynamicCache(config=model.config)}
    except AttributeError:  # the layers are described in the configurations of the model's parts
        return None
