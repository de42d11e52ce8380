"""Sampler controls: pure functions on logits, and `CONTROLS`, the ordered table of when and how each one applies.

`logits` is `(B, V)` in float; -inf marks a token that cannot be drawn. `input_ids` is `(B, S)`, the text so far; the id of
padding is V or above. The controls that `generate()` of transformers has do the same arithmetic in the same order.

To add a control, write a field in `config.SamplingConfig`, a function here, and its entry in `CONTROLS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from mori.cli import UserError
from mori.config import SamplingConfig


@lru_cache(maxsize=1024)
def _cached(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long, device=device)


def _ids(ids: Iterable[int], device: torch.device) -> torch.Tensor:
    """Token ids as a tensor `(N,)`, copied to the device once: the host waits for each copy."""
    return _cached(tuple(ids), device)


def apply_sequence_bias(logits: torch.Tensor, input_ids: torch.Tensor, biases: list) -> torch.Tensor:
    """Add a bias to the last token of each sequence whose other tokens end the text; `biases` is `[[ids, bias], ...]`.

    transformers' documentation of `sequence_bias`.
    """
    total = torch.zeros_like(logits)
    for ids, bias in sorted(biases, key=lambda pair: len(pair[0])):
        *prefix, last = ids
        if len(prefix) > input_ids.size(1):
            continue
        prefix_ends_text = (input_ids[:, input_ids.size(1) - len(prefix) :] == _ids(prefix, input_ids.device)).all(-1)
        total[:, last] += torch.where(prefix_ends_text, bias, 0.0)
    return logits + total


def apply_repetition_penalty(logits: torch.Tensor, input_ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens of the text less likely: positive logits / penalty, negative logits * penalty.

    Keskar et al., 2019, CTRL (arXiv:1909.05858), section 4.1. The prompt counts, each token once; padding does not count.
    """
    extended = pad(logits, (0, 1))  # the last column receives the padding
    input_ids = input_ids.clamp(max=logits.size(1))
    seen = extended.gather(1, input_ids)
    return extended.scatter(1, input_ids, torch.where(seen < 0, seen * penalty, seen / penalty))[:, :-1]


def apply_no_repeat_ngram(logits: torch.Tensor, input_ids: torch.Tensor, size: int) -> torch.Tensor:
    """Forbid every token that would repeat an n-gram of `size` tokens of the text (Paulus et al., 2017, arXiv:1705.04304)."""
    length, vocabulary = input_ids.size(1), logits.size(1)
    if length < size:
        return logits
    ngrams = input_ids.unfold(1, size, 1)  # (B, S - size + 1, size)
    repeats = (ngrams[..., :-1] == input_ids[:, None, length + 1 - size :]).all(-1) & (ngrams < vocabulary).all(-1)
    forbidden = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=logits.device)
    forbidden.scatter_(1, torch.where(repeats, ngrams[..., -1], vocabulary), True)
    return logits.masked_fill(forbidden[:, :-1], -torch.inf)


def apply_bad_words(logits: torch.Tensor, input_ids: torch.Tensor, words: list, eos_ids: list[int]) -> torch.Tensor:
    """Forbid the last token of each id sequence whose other tokens end the text; skip a lone end-of-text token.

    transformers' documentation of `bad_words_ids`.
    """
    ends = [[eos_id] for eos_id in eos_ids]
    return apply_sequence_bias(logits, input_ids, [[ids, -torch.inf] for ids in words if ids not in ends])


def suppress(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Forbid `tokens`."""
    vocabulary = torch.arange(logits.size(1), device=logits.device)
    forbidden = torch.isin(vocabulary, _ids(tokens, logits.device))
    return torch.where(forbidden, -torch.inf, logits)


def apply_min_length(logits: torch.Tensor, input_ids: torch.Tensor, length: int, eos_ids: list[int]) -> torch.Tensor:
    """Forbid the end of a text that has fewer than `length` tokens; padding does not count."""
    short = (input_ids < logits.size(1)).sum(-1, keepdim=True) < length  # (B, 1)
    return torch.where(short, suppress(logits, eos_ids), logits)


def force(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Forbid all but `tokens`, which become equally likely."""
    forced = torch.full_like(logits, -torch.inf)
    forced[:, tokens] = 0
    return forced


def apply_exponential_decay(logits: torch.Tensor, excess: int, factor: float, eos_ids: list[int]) -> torch.Tensor:
    """Raise the end-of-text logits by their size times `factor ** excess - 1`, once the text has `excess` tokens too many.

    transformers' documentation of `exponential_decay_length_penalty`.
    """
    if excess <= 0:
        return logits
    columns = _ids(eos_ids, logits.device)
    ends = logits[:, columns]
    penalty = torch.zeros_like(logits)
    penalty[:, columns] = (ends.abs() * (factor**excess - 1)).masked_fill(~ends.isfinite(), 0.0)
    return logits + penalty


def apply_frequency_and_presence(
    logits: torch.Tensor, new_ids: torch.Tensor, frequency: float, presence: float
) -> torch.Tensor:
    """Subtract `frequency` for each time a token was drawn, and `presence` if it was drawn at all.

    The formula of the OpenAI API reference ("Frequency and presence penalties"). `new_ids` `(B, N)` are the tokens drawn so
    far: the prompt does not count.
    """
    counts = torch.zeros_like(logits).scatter_add_(1, new_ids, torch.ones_like(new_ids, dtype=logits.dtype))
    return logits - counts * frequency - (counts > 0) * presence


def apply_dry(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    multiplier: float,
    base: float,
    allowed_length: int,
    breaker_ids: list[int],
) -> torch.Tensor:
    """Don't Repeat Yourself: subtract `multiplier * base ** (n - allowed_length)` from a token that would extend a repetition.

    n is the number of tokens that repeat before it; it must reach `allowed_length`, and the longest repetition counts. No
    repetition contains a token of `breaker_ids`. P. E. Weidmann, 2024 (text-generation-webui, pull request 5677), as in
    llama.cpp.
    """
    length, vocabulary = input_ids.size(1), logits.size(1)
    breaks = torch.isin(input_ids, _ids(breaker_ids, input_ids.device))
    breaks |= input_ids >= vocabulary
    lengths = torch.zeros(len(logits), length - 1, dtype=torch.long, device=logits.device)
    # Column i: whether the text up to token i ends like the whole text, so that token i + 1 would extend the repetition.
    matches = ~breaks[:, 1:]
    for back in range(length - 1):
        last = input_ids[:, length - 1 - back]
        same = (input_ids[:, : length - 1 - back] == last[:, None]) & ~breaks[:, length - 1 - back, None]
        matches = matches & pad(same, (back, 0))
        if not matches.any():
            break
        lengths += matches
    penalty = multiplier * base ** (lengths - allowed_length).to(logits.dtype)
    penalty = torch.where(lengths >= allowed_length, penalty, 0.0) if length > 1 else penalty
    largest = pad(torch.zeros_like(logits), (0, 1))  # the last column receives the padding
    largest.scatter_reduce_(1, input_ids[:, 1:].clamp(max=vocabulary), penalty, "amax")
    return logits - largest[:, :-1]


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution (Ackley et al., 1985)."""
    return logits / temperature


def apply_top_h(logits: torch.Tensor, h: float) -> torch.Tensor:
    """Keep the likeliest of the first 100 tokens whose summed entropy is at most `h` times the entropy of all 100.

    Potraghloo et al., 2025, Top-H decoding (arXiv:2509.02510).
    """
    log_probs, tokens = logits.topk(min(100, logits.size(1)))
    log_probs = log_probs - log_probs.logsumexp(-1, keepdim=True)
    probs = log_probs.softmax(-1)
    terms = log_probs.clamp(min=torch.finfo(logits.dtype).min) * probs
    max_entropy = -terms.sum(-1, keepdim=True) * h
    kept = (-probs * probs.log()).cumsum(-1) <= max_entropy
    kept[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, kept), -torch.inf)


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest logits of each row, and all that tie with the smallest of them (Fan et al., 2018, arXiv:1805.04833)."""
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
    probs = logits.softmax(-1)
    best, token = probs.max(-1, keepdim=True)
    return logits.masked_fill((probs < p * best).scatter(1, token, False), -torch.inf)


def apply_typical_p(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach `mass` (Meister et al., 2022, arXiv:2202.00666)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
    distance, order = (-log_probs - entropy).abs().sort(dim=-1)
    cumulated = logits.gather(1, order).softmax(-1).cumsum(-1)
    last = (cumulated < mass).sum(1, keepdim=True).clamp(max=logits.size(1) - 1)
    dropped = distance > distance.gather(1, last)
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def apply_epsilon_cutoff(logits: torch.Tensor, epsilon: float | torch.Tensor) -> torch.Tensor:
    """Keep the tokens of probability `epsilon` or more, and the likeliest (Hewitt et al., 2022, arXiv:2210.15191)."""
    best = logits.topk(1).values
    return logits.masked_fill((logits.softmax(-1) < epsilon) & (logits < best), -torch.inf)


def apply_eta_cutoff(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`apply_epsilon_cutoff` at min(epsilon, sqrt(epsilon) * exp(-entropy)) (Hewitt et al., 2022, arXiv:2210.15191)."""
    epsilon = torch.full((), epsilon, device=logits.device)
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    entropy = -(log_probs.clamp(min=torch.finfo(logits.dtype).min) * log_probs.softmax(-1)).sum(-1)
    return apply_epsilon_cutoff(logits, torch.min(epsilon, epsilon.sqrt() * torch.exp(-entropy))[:, None])


def apply_xtc(logits: torch.Tensor, threshold: float, rows: torch.Tensor) -> torch.Tensor:
    """Exclude Top Choices: of the tokens with a probability of `threshold` or more, keep only the least likely.

    Changes only the rows for which `rows` `(B, 1)` is true. P. E. Weidmann, 2024 (text-generation-webui, pull request 6335),
    as in llama.cpp.
    """
    probs = logits.softmax(-1)
    above = probs >= threshold
    least = torch.where(above, probs, torch.inf).argmin(-1, keepdim=True)
    return logits.masked_fill(above.scatter(1, least, False) & rows, -torch.inf)


@dataclass(slots=True)
class Step:
    """What a control can use besides the logits and the config.

    `input_ids` `(B, S)` is the text so far, of which the last `new_tokens` were drawn. `uniforms(name)` returns the next
    random number of each row, `(B, 1)` float64 in [0, 1), from streams that are reserved for `name`.
    """

    input_ids: torch.Tensor
    new_tokens: int
    eos_ids: list[int]
    dry_breaker_ids: list[int]
    uniforms: Callable[[str], torch.Tensor]

    @property
    def new_ids(self) -> torch.Tensor:
        """The tokens drawn so far, `(B, N)`."""
        return self.input_ids[:, self.input_ids.size(1) - self.new_tokens :]


@dataclass(frozen=True)
class Control:
    """An entry of `CONTROLS`.

    Args:
        name: the field of the config that turns it on.
        active: whether a config turns it on.
        apply: `(logits, step, config)` -> the new logits.
        always: applies to greedy decoding as well; others apply when sampling only, and after those.
        token_ids: the token ids that a config names for it, to be checked against the vocabulary.
    """

    name: str
    active: Callable[[SamplingConfig], object]
    apply: Callable[[torch.Tensor, Step, SamplingConfig], torch.Tensor]
    always: bool = False
    token_ids: Callable[[SamplingConfig], list[int]] = lambda config: []


# In the order of generate(). It has no frequency and presence penalties and no DRY: they stand at the place of a caller's own
# processors; and no XTC: it is the last.
CONTROLS = (
    Control(
        "sequence_bias",
        lambda c: c.sequence_bias,
        lambda x, step, c: apply_sequence_bias(x, step.input_ids, c.sequence_bias),
        always=True,
        token_ids=lambda c: [token for ids, _ in c.sequence_bias for token in ids],
    ),
    Control(
        "repetition_penalty",
        lambda c: c.repetition_penalty != 1,
        lambda x, step, c: apply_repetition_penalty(x, step.input_ids, c.repetition_penalty),
        always=True,
    ),
    Control(
        "no_repeat_ngram_size",
        lambda c: c.no_repeat_ngram_size,
        lambda x, step, c: apply_no_repeat_ngram(x, step.input_ids, c.no_repeat_ngram_size),
        always=True,
    ),
    Control(
        "bad_words_ids",
        lambda c: c.bad_words_ids,
        lambda x, step, c: apply_bad_words(x, step.input_ids, c.bad_words_ids, step.eos_ids),
        always=True,
        token_ids=lambda c: [token for ids in c.bad_words_ids for token in ids],
    ),
    Control(
        "min_length",
        lambda c: c.min_length,
        lambda x, step, c: apply_min_length(x, step.input_ids, c.min_length, step.eos_ids),
        always=True,
    ),
    Control(
        "min_new_tokens",
        lambda c: c.min_new_tokens,
        lambda x, step, c: suppress(x, step.eos_ids) if step.new_tokens < c.min_new_tokens else x,
        always=True,
    ),
    Control(
        "forced_eos_token_id",
        lambda c: c.forced_eos_token_id,
        lambda x, step, c: force(x, c.forced_eos_token_id) if step.new_tokens == c.max_new_tokens - 1 else x,
        always=True,
        token_ids=lambda c: c.forced_eos_token_id,
    ),
    Control(
        "exponential_decay_length_penalty",
        lambda c: c.exponential_decay_length_penalty,
        lambda x, step, c: apply_exponential_decay(
            x,
            step.new_tokens - int(c.exponential_decay_length_penalty[0]),
            c.exponential_decay_length_penalty[1],
            step.eos_ids,
        ),
        always=True,
    ),
    Control(
        "suppress_tokens",
        lambda c: c.suppress_tokens,
        lambda x, step, c: suppress(x, c.suppress_tokens),
        always=True,
        token_ids=lambda c: c.suppress_tokens,
    ),
    Control(
        "begin_suppress_tokens",
        lambda c: c.begin_suppress_tokens,
        lambda x, step, c: x if step.new_tokens else suppress(x, c.begin_suppress_tokens),
        always=True,
        token_ids=lambda c: c.begin_suppress_tokens,
    ),
    Control(
        "frequency_penalty",
        lambda c: c.frequency_penalty or c.presence_penalty,
        lambda x, step, c: apply_frequency_and_presence(x, step.new_ids, c.frequency_penalty, c.presence_penalty),
        always=True,
    ),
    Control(
        "dry_multiplier",
        lambda c: c.dry_multiplier,
        lambda x, step, c: apply_dry(
            x, step.input_ids, c.dry_multiplier, c.dry_base, c.dry_allowed_length, step.dry_breaker_ids
        ),
        always=True,
    ),
    Control("temperature", lambda c: c.temperature != 1, lambda x, step, c: apply_temperature(x, c.temperature)),
    Control("top_h", lambda c: c.top_h < 1, lambda x, step, c: apply_top_h(x, c.top_h)),
    Control("top_k", lambda c: c.top_k, lambda x, step, c: apply_top_k(x, c.top_k)),
    Control("top_p", lambda c: c.top_p < 1, lambda x, step, c: apply_top_p(x, c.top_p)),
    Control("min_p", lambda c: c.min_p, lambda x, step, c: apply_min_p(x, c.min_p)),
    Control("typical_p", lambda c: c.typical_p < 1, lambda x, step, c: apply_typical_p(x, c.typical_p)),
    Control("epsilon_cutoff", lambda c: c.epsilon_cutoff, lambda x, step, c: apply_epsilon_cutoff(x, c.epsilon_cutoff)),
    Control("eta_cutoff", lambda c: c.eta_cutoff, lambda x, step, c: apply_eta_cutoff(x, c.eta_cutoff)),
    Control(
        "xtc_probability",
        lambda c: c.xtc_probability,
        lambda x, step, c: apply_xtc(x, c.xtc_threshold, step.uniforms("xtc") < c.xtc_probability),
    ),
)


def active_controls(config: SamplingConfig) -> tuple[list[Control], list[Control]]:
    """The controls that `config` turns on: those that always apply, and those that apply when sampling."""
    active = [control for control in CONTROLS if control.active(config)]
    always = [control for control in active if control.always]
    when_sampling = [control for control in active if not control.always and config.temperature > 0]
    return always, when_sampling


def check_token_ids(config: SamplingConfig, vocabulary: int) -> None:
    """Raise UserError for a token id in `config` that the model's `vocabulary` does not have."""
    for control in CONTROLS:
        if (largest := max(control.token_ids(config), default=0)) >= vocabulary:
            raise UserError(
                f"{control.name} names token {largest}, but the model's vocabulary ends at {vocabulary - 1}"
            )
