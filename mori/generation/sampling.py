"""From logits to the next token: controls that are pure functions, and one object that applies them and draws.

Everywhere `logits` is `(B, V)` in float and -inf marks a token that cannot be drawn; `input_ids` is `(B, S)`, the text so
far, in which padding has the id V or above. The controls that `generate()` has do the same arithmetic in the same order.
"""

import math
import random
from bisect import bisect_right
from itertools import accumulate

import torch
from torch.nn.functional import pad

WINDOW = 256  # likeliest tokens among which a nucleus is looked for before all are sorted
_UNSURE = 1e-4  # a cumulated probability this near to top_p is decided by the exact function
_AHEAD = 64  # steps whose random numbers are brought to the device at once, so that it does not wait for the host


def apply_sequence_bias(logits: torch.Tensor, input_ids: torch.Tensor, biases: list) -> torch.Tensor:
    """Add a bias to the last token of each sequence whose other tokens the text ends with; `biases` is `[[ids, bias], ...]`.

    transformers' documentation of `sequence_bias`.
    """
    total = torch.zeros_like(logits)
    for ids, bias in sorted(biases, key=lambda pair: len(pair[0])):
        *prefix, last = ids
        if len(prefix) > input_ids.size(1):
            continue
        wanted = torch.tensor(prefix, dtype=torch.long, device=input_ids.device)
        ends_so = (input_ids[:, input_ids.size(1) - len(prefix) :] == wanted).all(-1)
        total[:, last] += torch.where(ends_so, bias, 0.0)
    return logits + total


def apply_repetition_penalty(logits: torch.Tensor, input_ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens already in the text less likely: positive logits / penalty, negative ones * penalty.

    Keskar et al., 2019, CTRL (arXiv:1909.05858), section 4.1; the prompt counts, each token once, padding does not.
    """
    spare = pad(logits, (0, 1))  # a column for padding
    input_ids = input_ids.clamp(max=logits.size(1))
    seen = spare.gather(1, input_ids)
    return spare.scatter(1, input_ids, torch.where(seen < 0, seen * penalty, seen / penalty))[:, :-1]


def apply_no_repeat_ngram(logits: torch.Tensor, input_ids: torch.Tensor, size: int) -> torch.Tensor:
    """Forbid every token that would complete an n-gram of `size` tokens the text has already (Paulus et al., 2017, arXiv:1705.04304)."""
    length, vocabulary = input_ids.size(1), logits.size(1)
    if length < size:
        return logits
    windows = input_ids.unfold(1, size, 1)  # (B, S - size + 1, size)
    repeats = (windows[..., :-1] == input_ids[:, None, length + 1 - size :]).all(-1) & (windows < vocabulary).all(-1)
    banned = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(1, torch.where(repeats, windows[..., -1], vocabulary), True)
    return logits.masked_fill(banned[:, :-1], -torch.inf)


def apply_bad_words(logits: torch.Tensor, input_ids: torch.Tensor, words: list, eos_ids: list[int]) -> torch.Tensor:
    """Forbid the last token of each id sequence whose other tokens the text ends with; an end-of-text token alone stays.

    transformers' documentation of `bad_words_ids`.
    """
    return apply_sequence_bias(
        logits, input_ids, [[ids, -torch.inf] for ids in words if ids not in [[e] for e in eos_ids]]
    )


def suppress(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Forbid `tokens`: those of `suppress_tokens`, or the end of the text before `min_new_tokens`."""
    everyone = torch.arange(logits.size(1), device=logits.device)
    return torch.where(torch.isin(everyone, torch.tensor(tokens, device=logits.device)), -torch.inf, logits)


def apply_exponential_decay(logits: torch.Tensor, over: int, factor: float, eos_ids: list[int]) -> torch.Tensor:
    """Raise the end-of-text logits by their size times `factor ** over - 1`, once the text is `over` tokens too long.

    transformers' documentation of `exponential_decay_length_penalty`.
    """
    if over <= 0:
        return logits
    ends = logits[:, eos_ids]
    raised = (ends.abs() * (factor**over - 1)).masked_fill(~ends.isfinite(), 0.0)
    penalty = torch.zeros_like(logits)
    penalty[:, eos_ids] = raised
    return logits + penalty


def apply_frequency_and_presence(
    logits: torch.Tensor, new_ids: torch.Tensor, frequency: float, presence: float
) -> torch.Tensor:
    """Subtract `frequency` for each time a token was drawn, and `presence` once where it was drawn at all.

    The formula of the OpenAI API reference ("Frequency and presence penalties"); `new_ids` `(B, N)` are the tokens drawn
    so far: the prompt does not count.
    """
    counts = torch.zeros_like(logits).scatter_add_(1, new_ids, torch.ones_like(new_ids, dtype=logits.dtype))
    return logits - counts * frequency - (counts > 0) * presence


def apply_dry(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    multiplier: float,
    base: float,
    allowed_length: int,
    breakers: list[int],
) -> torch.Tensor:
    """Don't Repeat Yourself: subtract `multiplier * base ** (n - allowed_length)` from a token that would lengthen a repetition.

    n is how many tokens before it the repetition has, at least `allowed_length`; no repetition reaches over a token of
    `breakers`. P. E. Weidmann, 2024 (text-generation-webui, pull request 5677), as in llama.cpp; the longest n counts.
    """
    length, vocabulary = input_ids.size(1), logits.size(1)
    stop = torch.isin(input_ids, torch.tensor(breakers, dtype=torch.long, device=input_ids.device))
    stop |= input_ids >= vocabulary
    matched = torch.zeros(len(logits), length - 1, dtype=torch.long, device=logits.device)
    going_on = ~stop[:, 1:]  # column i: the text up to token i, continued by token i + 1
    for back in range(length - 1):
        last = input_ids[:, length - 1 - back]
        same = (input_ids[:, : length - 1 - back] == last[:, None]) & ~stop[:, length - 1 - back, None]
        going_on = going_on & pad(same, (back, 0))
        if not going_on.any():
            break
        matched += going_on
    penalty = multiplier * base ** (matched - allowed_length).to(logits.dtype)
    penalty = torch.where(matched >= allowed_length, penalty, 0.0) if length > 1 else penalty
    spare = pad(torch.zeros_like(logits), (0, 1))
    spare.scatter_reduce_(1, input_ids[:, 1:].clamp(max=vocabulary), penalty, "amax")
    return logits - spare[:, :-1]


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution (Ackley et al., 1985)."""
    return logits / temperature


def apply_top_h(logits: torch.Tensor, h: float) -> torch.Tensor:
    """Keep the likeliest tokens, of the first 100, whose entropy together is at most `h` times that of all 100.

    Potraghloo et al., 2025, Top-H decoding (arXiv:2509.02510).
    """
    likeliest, tokens = logits.topk(min(100, logits.size(1)))
    likeliest = likeliest - likeliest.logsumexp(-1, keepdim=True)
    probabilities = likeliest.softmax(-1)
    terms = likeliest.clamp(min=torch.finfo(logits.dtype).min) * probabilities
    budget = -terms.sum(-1, keepdim=True) * h
    kept = (-probabilities * probabilities.log()).cumsum(-1) <= budget
    kept[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, kept), -torch.inf)


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest logits of each row, and whatever ties with the last of them (Fan et al., 2018, arXiv:1805.04833)."""
    smallest_kept = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def apply_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probabilities reach `p`, at least one (Holtzman et al., 2020, arXiv:1904.09751)."""
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def apply_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens with at least `p` times the probability of the likeliest (Nguyen et al., 2024, arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    best, token = probabilities.max(-1, keepdim=True)
    return logits.masked_fill((probabilities < p * best).scatter(1, token, False), -torch.inf)


def apply_typical_p(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach `mass` (Meister et al., 2022, arXiv:2202.00666)."""
    logs = logits.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    distance, order = (-logs - entropy).abs().sort(dim=-1)
    reached = logits.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(1, keepdim=True).clamp(max=logits.size(1) - 1)
    dropped = distance > distance.gather(1, last)
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def apply_epsilon_cutoff(logits: torch.Tensor, epsilon: float | torch.Tensor) -> torch.Tensor:
    """Keep the tokens of probability `epsilon` or more, and the likeliest (Hewitt et al., 2022, arXiv:2210.15191)."""
    best = logits.topk(1).values
    return logits.masked_fill((logits.softmax(-1) < epsilon) & (logits < best), -torch.inf)


def apply_eta_cutoff(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`apply_epsilon_cutoff` at min(epsilon, sqrt(epsilon) * exp(-entropy)) (Hewitt et al., 2022, arXiv:2210.15191)."""
    epsilon = torch.tensor(epsilon, device=logits.device)
    logs = logits - logits.logsumexp(-1, keepdim=True)
    entropy = -(logs.clamp(min=torch.finfo(logits.dtype).min) * logs.softmax(-1)).sum(-1)
    return apply_epsilon_cutoff(logits, torch.min(epsilon, epsilon.sqrt() * torch.exp(-entropy))[:, None])


def apply_xtc(logits: torch.Tensor, threshold: float, rows: torch.Tensor) -> torch.Tensor:
    """Exclude Top Choices: of the tokens with a probability of `threshold` or more, keep only the least likely.

    Only in the rows where `rows` `(B, 1)` is true. P. E. Weidmann, 2024 (text-generation-webui, pull request 6335), as
    in llama.cpp.
    """
    probabilities = logits.softmax(-1)
    above = probabilities >= threshold
    least = torch.where(above, probabilities, torch.inf).argmin(-1, keepdim=True)
    return logits.masked_fill(above.scatter(1, least, False) & rows, -torch.inf)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row, `(B, 1)`, at which the cumulated probability passes `uniforms` `(B, 1)`, float64 in [0, 1).

    A row's token depends on nothing beside it. Sums are in float64. -1 where no token has a probability.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    reached = weights.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    token = torch.searchsorted(reached, uniforms.clamp(max=1 - 2**-50) * total, right=True)
    return torch.where(total.isfinite() & (token < logits.size(1)), token, -1)


class Sampler:
    """Draws the next token of each row, as the settings say.

    Args:
        seeds: what each row's random numbers come from, one value for each row. A row's numbers are
            `random.Random(str(seed)).random()`, a stream that Python promises to keep: they do not depend on the
            device, on the rows beside it, or on anybody else who draws random numbers.
        eos_ids: the tokens that end a text.
        dry_breaker_ids: the tokens over which DRY sees no repetition.

    The others are the fields of `config.SamplingConfig`. The controls are applied in the order of `generate()`; frequency, presence and DRY
    stand where it puts a caller's own processors, XTC at the end.
    """

    def __init__(
        self,
        seeds: list,
        *,
        device: torch.device | str = "cpu",
        eos_ids: list[int] = (),
        temperature: float = 1.0,
        top_h: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        epsilon_cutoff: float = 0.0,
        eta_cutoff: float = 0.0,
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        no_repeat_ngram_size: int = 0,
        dry_multiplier: float = 0.0,
        dry_base: float = 1.75,
        dry_allowed_length: int = 2,
        dry_breaker_ids: list[int] = (),
        sequence_bias: list = (),
        bad_words_ids: list = (),
        suppress_tokens: list[int] = (),
        min_new_tokens: int = 0,
        exponential_decay_length_penalty: list = (),
    ):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.device, self.xtc_probability = device, xtc_probability
        self.streams = [random.Random(str(seed)) for seed in seeds]
        self.xtc_streams = [random.Random(f"{seed}/xtc") for seed in seeds]
        eos_ids, breakers = list(eos_ids), list(dry_breaker_ids)

        # (whether it is on, what it does with logits, the text so far, and how many of its tokens are new)
        always = (
            (sequence_bias, lambda x, ids, new: apply_sequence_bias(x, ids, sequence_bias)),
            (repetition_penalty != 1, lambda x, ids, new: apply_repetition_penalty(x, ids, repetition_penalty)),
            (no_repeat_ngram_size, lambda x, ids, new: apply_no_repeat_ngram(x, ids, no_repeat_ngram_size)),
            (bad_words_ids, lambda x, ids, new: apply_bad_words(x, ids, bad_words_ids, eos_ids)),
            (min_new_tokens and eos_ids, lambda x, ids, new: suppress(x, eos_ids) if new < min_new_tokens else x),
            (
                exponential_decay_length_penalty and eos_ids,
                lambda x, ids, new: apply_exponential_decay(
                    x, new - int(exponential_decay_length_penalty[0]), exponential_decay_length_penalty[1], eos_ids
                ),
            ),
            (suppress_tokens, lambda x, ids, new: suppress(x, suppress_tokens)),
            (
                frequency_penalty or presence_penalty,
                lambda x, ids, new: apply_frequency_and_presence(
                    x, ids[:, ids.size(1) - new :], frequency_penalty, presence_penalty
                ),
            ),
            (
                dry_multiplier,
                lambda x, ids, new: apply_dry(x, ids, dry_multiplier, dry_base, dry_allowed_length, breakers),
            ),
        )
        when_sampling = (
            (temperature != 1, lambda x, ids, new: apply_temperature(x, temperature)),
            (top_h < 1, lambda x, ids, new: apply_top_h(x, top_h)),
            (top_k, lambda x, ids, new: apply_top_k(x, top_k)),
            (top_p < 1, lambda x, ids, new: apply_top_p(x, top_p)),
            (min_p, lambda x, ids, new: apply_min_p(x, min_p)),
            (typical_p < 1, lambda x, ids, new: apply_typical_p(x, typical_p)),
            (epsilon_cutoff, lambda x, ids, new: apply_epsilon_cutoff(x, epsilon_cutoff)),
            (eta_cutoff, lambda x, ids, new: apply_eta_cutoff(x, eta_cutoff)),
            (xtc_probability, lambda x, ids, new: apply_xtc(x, xtc_threshold, self._chance())),
        )
        self._first = [apply for on, apply in always if on]
        self._then = [apply for on, apply in when_sampling if on] if temperature else []
        wide = (top_h < 1, min_p, typical_p < 1, epsilon_cutoff, eta_cutoff, xtc_probability)
        # The host would have to read every token from a GPU, which sorts a vocabulary in less time than that takes.
        self._windowed = (top_k or top_p < 1) and not any(wide) and torch.device(device).type == "cpu"
        self._ahead: list[torch.Tensor] = []  # the next steps' random numbers, (B, 1) each, the last one first

    def filtered(self, logits: torch.Tensor, input_ids: torch.Tensor, new_tokens: int = 0) -> torch.Tensor:
        """The logits after every control that is on; the last `new_tokens` of `input_ids` are not of the prompt."""
        for apply in (*self._first, *self._then):
            logits = apply(logits, input_ids, new_tokens)
        return logits

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor, new_tokens: int = 0) -> torch.Tensor:
        """The next token of each row, `(B, 1)`; -1 where the logits are not finite or every token is forbidden."""
        logits = logits.float()
        for apply in self._first:
            logits = apply(logits, input_ids, new_tokens)
        if not self.temperature:
            best, token = logits.max(-1, keepdim=True)
            return torch.where(best.isfinite(), token, -1)
        if self._windowed:
            numbers = [stream.random() for stream in self.streams]
            if (tokens := self._draw_within_window(logits, numbers)) is not None:
                return tokens
            uniforms = torch.tensor(numbers, dtype=torch.float64)[:, None]
        else:
            uniforms = self._next_numbers()
        for apply in self._then:
            logits = apply(logits, input_ids, new_tokens)
        return draw(logits, uniforms)

    def _next_numbers(self) -> torch.Tensor:
        if not self._ahead:
            self._ahead = list(_numbers(self.streams, _AHEAD).to(self.device).flip(0))
        return self._ahead.pop()

    def _draw_within_window(self, logits: torch.Tensor, uniforms: list[float]) -> torch.Tensor | None:
        """What temperature, top_k, top_p and `draw` give, by looking at the likeliest tokens only; None where that is not sure.

        So few numbers are decided on in plain Python, at a fraction of what the small operations of PyTorch or NumPy cost.
        """
        size = self.top_k or WINDOW
        if size >= logits.size(1):
            return None
        top, tokens = logits.topk(size + 1)  # one more, to see a tie at the border
        top = (top / self.temperature).tolist()
        totals = [None] * len(top)
        if not self.top_k:
            best = torch.tensor([row[:1] for row in top])
            totals = (logits / self.temperature).sub_(best).exp_().sum(-1, dtype=torch.float64).tolist()
        drawn = list(map(self._draw_from, top, tokens.tolist(), totals, uniforms))
        return None if None in drawn else torch.tensor(drawn)[:, None]

    def _draw_from(self, logits: list[float], tokens: list[int], total: float | None, uniform: float) -> int | None:
        """One row's token, of the likeliest `tokens`; None where the exact functions must decide.

        `total` is the weight of all the vocabulary, where the likeliest token's is 1; None where top_k keeps but these. The
        kept tokens are put back into the order of the vocabulary, so that the token is the one of `draw` (but where the
        random number falls within a rounding error of the border between two).
        """
        if not math.isfinite(logits[0]) or total is None and logits[-2] == logits[-1]:
            return None  # top_k keeps whatever ties with the last
        weights = [math.exp(logit - logits[0]) for logit in logits]
        kept = len(tokens) - 1 if total is None else None
        if self.top_p < 1:
            total, reached = total or sum(weights[:kept]), 0.0
            for place, weight in enumerate(weights[:kept]):
                beyond = reached / total - self.top_p  # by how much the likelier ones alone exceed top_p
                if abs(beyond) < _UNSURE:
                    return None
                if beyond > 0:
                    kept = place
                    break
                reached += weight
        if kept is None or logits[kept - 1] == logits[kept]:
            return None  # the nucleus may reach beyond the window, or transformers' sort decides which of a tie stay
        in_order = sorted(zip(tokens[:kept], weights, strict=False))
        reached = list(accumulate(weight for _, weight in in_order))
        return in_order[bisect_right(reached, min(uniform, 1 - 2**-50) * reached[-1])][0]

    def _chance(self) -> torch.Tensor:
        return _numbers(self.xtc_streams, 1)[0].to(self.device) < self.xtc_probability


def _numbers(streams: list[random.Random], steps: int) -> torch.Tensor:
    """The next numbers of each stream, `(steps, B, 1)`."""
    return torch.tensor([[[stream.random()] for stream in streams] for _ in range(steps)], dtype=torch.float64)
