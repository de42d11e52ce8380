"""The sampler: applies the active controls to logits and draws the next token of each row."""

import math
import random
from bisect import bisect_right
from itertools import accumulate

import torch

from mori.config import SamplingConfig
from mori.generation.sampling import Step, active_controls

WINDOW = 256  # likeliest tokens in which `draw_within_window` searches a nucleus
_WINDOW_CONTROLS = {"temperature", "top_k", "top_p"}  # the sampling controls that `draw_within_window` implements
_TOLERANCE = 1e-4  # cumulated probabilities this close to top_p are left to the exact functions
_STEPS_AHEAD = 64  # steps whose random numbers are copied to the device together, to save host syncs


class Sampler:
    """Draws the next token of each row.

    Args:
        seeds: one value per row. The random numbers of a row are `random.Random(str(seed)).random()`, a stream that Python
            guarantees: they depend neither on the device, nor on the other rows, nor on other users of random numbers.
        config: the controls, see `mori.generation.sampling.CONTROLS`.
        eos_ids: the tokens that end a text.
        dry_breaker_ids: the tokens across which DRY sees no repetition.
    """

    def __init__(
        self,
        seeds: list,
        config: SamplingConfig,
        *,
        device: torch.device | str = "cpu",
        eos_ids: list[int] = (),
        dry_breaker_ids: list[int] = (),
    ):
        self.seeds, self.config, self.device = list(seeds), config, torch.device(device)
        self.eos_ids, self.dry_breaker_ids = list(eos_ids), list(dry_breaker_ids)
        self.streams = [random.Random(str(seed)) for seed in seeds]
        self._control_streams: dict[str, list[random.Random]] = {}
        self._uniforms_ahead: dict[str, list[torch.Tensor]] = {}  # (B, 1) for each coming step, the next one last
        self._always, self._when_sampling = active_controls(config)
        names = {control.name for control in self._when_sampling}
        # A GPU sorts a vocabulary in less time than the host takes to read the window from it.
        self._windowed = names <= _WINDOW_CONTROLS and bool(names & {"top_k", "top_p"}) and self.device.type == "cpu"

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor, new_tokens: int = 0) -> torch.Tensor:
        """The next token of each row, `(B, 1)`; -1 if the logits are not finite or every token is forbidden.

        The last `new_tokens` of `input_ids` `(B, S)` were drawn, the others are the prompt.
        """
        logits, step = logits.float(), self._step(input_ids, new_tokens)
        for control in self._always:
            logits = control.apply(logits, step, self.config)
        if not self.config.temperature:
            best, token = logits.max(-1, keepdim=True)
            return torch.where(best.isfinite(), token, -1)
        if self._windowed:
            numbers = [stream.random() for stream in self.streams]
            tokens = draw_within_window(logits, numbers, self.config)
            if tokens is not None:
                return tokens
            uniforms = torch.tensor(numbers, dtype=torch.float64)[:, None]
        else:
            uniforms = self._next_uniforms("", self.streams)
        for control in self._when_sampling:
            logits = control.apply(logits, step, self.config)
        return draw(logits, uniforms)

    def filtered_logits(self, logits: torch.Tensor, input_ids: torch.Tensor, new_tokens: int = 0) -> torch.Tensor:
        """The logits `(B, V)` after all active controls; arguments as for a call."""
        step = self._step(input_ids, new_tokens)
        for control in (*self._always, *self._when_sampling):
            logits = control.apply(logits, step, self.config)
        return logits

    def _step(self, input_ids: torch.Tensor, new_tokens: int) -> Step:
        return Step(input_ids, new_tokens, self.eos_ids, self.dry_breaker_ids, self._control_uniforms)

    def _control_uniforms(self, name: str) -> torch.Tensor:
        if name not in self._control_streams:
            self._control_streams[name] = [random.Random(f"{seed}/{name}") for seed in self.seeds]
        return self._next_uniforms(name, self._control_streams[name])

    def _next_uniforms(self, name: str, streams: list[random.Random]) -> torch.Tensor:
        ahead = self._uniforms_ahead.setdefault(name, [])
        if not ahead:
            ahead += _next_numbers(streams, _STEPS_AHEAD).to(self.device).flip(0)
        return ahead.pop()


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row, `(B, 1)`, at which the cumulated probability passes `uniforms` `(B, 1)`, float64 in [0, 1).

    Sums in float64. A row's token does not depend on the other rows; it is -1 if the row's logits are not finite or all
    -inf.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    token = torch.searchsorted(cumulated, uniforms.clamp(max=1 - 2**-50) * total, right=True)
    return torch.where(total.isfinite() & (token < logits.size(1)), token, -1)


def draw_within_window(logits: torch.Tensor, uniforms: list[float], config: SamplingConfig) -> torch.Tensor | None:
    """The tokens `(B, 1)` that temperature, top_k, top_p and `draw` give, computed from the likeliest tokens only.

    Plain Python on a few numbers is faster on a CPU than sorting the vocabulary. None if the result is not certain, and the
    exact functions must decide. A token can differ from that of `draw` if the random number is within a rounding error of
    the boundary between two tokens.
    """
    size = config.top_k or WINDOW
    if size >= logits.size(1):
        return None
    top, tokens = logits.topk(size + 1)  # one more, to notice a tie at the end of the window
    top = (top / config.temperature).tolist()
    totals = [None] * len(top)
    if not config.top_k:
        best = torch.tensor([row[:1] for row in top])
        totals = (logits / config.temperature).sub_(best).exp_().sum(-1, dtype=torch.float64).tolist()
    rows = zip(top, tokens.tolist(), totals, uniforms, strict=True)
    drawn = [_draw_row(*row, config.top_p) for row in rows]
    return None if None in drawn else torch.tensor(drawn)[:, None]


def _draw_row(logits: list[float], tokens: list[int], total: float | None, uniform: float, top_p: float) -> int | None:
    """One row's token from its likeliest `tokens`, in descending order; None if the exact functions must decide.

    `total` is the weight of the vocabulary in units of the likeliest token's weight; None if top_k keeps only the window.
    """
    if not math.isfinite(logits[0]) or total is None and logits[-2] == logits[-1]:
        return None  # top_k also keeps tokens that tie with its last
    weights = [math.exp(logit - logits[0]) for logit in logits]
    kept = len(tokens) - 1 if total is None else None
    if top_p < 1:
        total, cumulated = total or sum(weights[:kept]), 0.0
        for position, weight in enumerate(weights[:kept]):
            excess = cumulated / total - top_p  # of the tokens before this one
            if abs(excess) < _TOLERANCE:
                return None
            if excess > 0:
                kept = position
                break
            cumulated += weight
    if kept is None or logits[kept - 1] == logits[kept]:
        return None  # the nucleus may exceed the window, or a tie at its end is decided by the order of the sort
    in_order = sorted(zip(tokens[:kept], weights, strict=False))  # the vocabulary's order, as in `draw`
    cumulated = list(accumulate(weight for _, weight in in_order))
    return in_order[bisect_right(cumulated, min(uniform, 1 - 2**-50) * cumulated[-1])][0]


def _next_numbers(streams: list[random.Random], steps: int) -> torch.Tensor:
    """The next numbers of each stream, `(steps, B, 1)`."""
    return torch.tensor([[[stream.random()] for stream in streams] for _ in range(steps)], dtype=torch.float64)
