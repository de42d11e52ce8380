"""The model reading a batch of texts: the prompts in one pass, then one token at a time with the model's own cache."""

import contextlib
import inspect

import torch
from torch import nn
from transformers import DynamicCache

from mori.speed.matmul import SplitMatvec

MARGIN = 128  # tokens beyond the prompt for which masks and buffers are allocated at first


class Reader:
    """Returns the logits after the newest token of each text; runs the model as it is, with any cache.

    Args:
        pads: `(B, 1)`, the number of padding tokens at the start of each text.
        context: the number of positions that the model knows; None if it has no limit.
    """

    def __init__(self, model: nn.Module, pads: torch.Tensor, context: int | None):
        self.model, self.pads, self.padded = model, pads, bool(pads.any())
        self.last_position = (context or 2**62) - 1
        self.parameters = set(inspect.signature(model.forward).parameters)
        self.cache_name = _cache_parameter(self.parameters)
        self.cache = None  # the model makes its own, unless it takes transformers' usual class
        if self.cache_name in ("cache", "past_key_values"):
            self.cache = DynamicCache(config=model.config)
        self.length = 0  # tokens read so far
        self._allocate(0)

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the last token of `input_ids` `(B, S)`, which are one token longer at each call.

        The returned tensor may be overwritten by the next call.
        """
        prompt = self.length == 0
        self.length = input_ids.size(1)
        if self.length > len(self.columns):
            self._allocate(self.length)
        if prompt or self.cache is None:
            return self.forward(input_ids)
        return self.step(input_ids[:, -1:])

    def step(self, newest: torch.Tensor) -> torch.Tensor:
        """The logits `(B, V)` after the newest token `(B, 1)`."""
        return self.forward(newest)

    @torch.no_grad()
    def forward(self, unread: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None):
        """The model's own pass over the `unread` tokens; the logits after the last one, `(B, V)`."""
        start = self.length - unread.size(1)
        if mask is None and self.padded:
            mask = self.visible[:, 0, 0, : self.length].long()
        arguments = {"input_ids": unread, "attention_mask": mask, "use_cache": self.cache_name is not None}
        if "position_ids" in self.parameters:
            arguments["position_ids"] = self.positions[:, start : self.length] if positions is None else positions
        if "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = 1
        if "output_router_logits" in self.parameters:
            arguments["output_router_logits"] = False  # used for the router loss only
        if self.cache is not None:
            arguments[self.cache_name] = self.cache
        with SplitMatvec() if unread.size(1) == 1 else contextlib.nullcontext():
            out = self.model(**arguments)
        self.cache = out.get(self.cache_name) if self.cache_name else None
        return out.logits[:, -1]

    def _allocate(self, length: int) -> None:
        """Make positions and mask for texts up to twice `length`."""
        self.columns = torch.arange(2 * length + MARGIN, device=self.pads.device)
        self.positions = (self.columns - self.pads).clamp(0, self.last_position)  # (B, S)
        self.visible = (self.columns >= self.pads)[:, None, None]  # (B, 1, 1, S)


def _cache_parameter(parameters: set[str]) -> str | None:
    """The name under which `forward` takes its cache; None if it has none that we can use."""
    if "cache" in parameters:  # since transformers 5.24
        return "cache"
    if "past_key_values" in parameters:
        return "past_key_values"
    # With cache_position, the model wants positions of its state that only generate() computes: read the whole text instead.
    return "cache_params" if "cache_params" in parameters and "cache_position" not in parameters else None
