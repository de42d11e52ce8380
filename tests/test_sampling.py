import random
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import TopHLogitsWarper

from mori.cli import UserError, flag
from mori.config import SamplingConfig
from mori.generation import generate as generate_module
from mori.generation import sampling
from mori.generation.generate import generate
from mori.generation.sampler import Sampler
from mori.generation.sampling import Control, apply_dry, apply_frequency_and_presence, apply_xtc, check_token_ids

PROMPT, NEW = 8, 4
EOS = [2, 5]
BIASES = [[[1], -3.0], [[3], 2.5], [[2, 4], 1.5], [[6, 1, 5], -2.0]]
WORDS = [[2], [0], [3, 1], [1, 2, 6]]
DECAY = (2, 1.1)

# control -> a few values, each with the processor of transformers; in the order of generate().
TRANSFORMERS = {
    "sequence_bias": {"some": (BIASES, lambda: SequenceBiasLogitsProcessor(BIASES))},
    "repetition_penalty": {p: (p, lambda p=p: RepetitionPenaltyLogitsProcessor(p)) for p in (0.5, 1.2, 5.0)},
    "no_repeat_ngram_size": {n: (n, lambda n=n: NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3, 20)},
    "bad_words_ids": {"some": (WORDS, lambda: NoBadWordsLogitsProcessor(WORDS, EOS))},
    "min_length": {n: (n, lambda n=n: MinLengthLogitsProcessor(n, EOS)) for n in (PROMPT + NEW, PROMPT + NEW + 1)},
    "min_new_tokens": {n: (n, lambda n=n: MinNewTokensLengthLogitsProcessor(PROMPT, n, EOS)) for n in (NEW, NEW + 1)},
    "forced_eos_token_id": {"some": (EOS, lambda: ForcedEOSTokenLogitsProcessor(PROMPT + 100, EOS))},
    "exponential_decay_length_penalty": {"some": (DECAY, lambda: ExponentialDecayLengthPenalty(DECAY, EOS, PROMPT))},
    "suppress_tokens": {"some": ([0, 6], lambda: SuppressTokensLogitsProcessor([0, 6]))},
    "begin_suppress_tokens": {"some": ([1, 6], lambda: SuppressTokensAtBeginLogitsProcessor([1, 6], PROMPT))},
    "temperature": {t: (t, lambda t=t: TemperatureLogitsWarper(t)) for t in (1e-3, 0.7, 0.9, 1.7, 50.0)},
    "top_h": {h: (h, lambda h=h: TopHLogitsWarper(h)) for h in (0.1, 0.4, 0.95)},
    "top_k": {k: (k, lambda k=k: TopKLogitsWarper(k)) for k in (1, 3, 50, 60_000)},
    "top_p": {p: (p, lambda p=p: TopPLogitsWarper(p)) for p in (1e-4, 0.1, 0.5, 0.95, 0.999)},
    "min_p": {p: (p, lambda p=p: MinPLogitsWarper(p)) for p in (0.01, 0.3, 1.0)},
    "typical_p": {p: (p, lambda p=p: TypicalLogitsWarper(p)) for p in (0.1, 0.9, 0.999)},
    "epsilon_cutoff": {e: (e, lambda e=e: EpsilonLogitsWarper(e)) for e in (3e-4, 0.1)},
    "eta_cutoff": {e: (e, lambda e=e: EtaLogitsWarper(e)) for e in (3e-4, 0.1)},
}


def random_rows(count: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Rows of logits: smooth, sharp, full of ties, full of -inf, with one token left."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, vocabulary, generator=g) * torch.logspace(-2, 2, count)[:, None]
    rows[1::5] = rows[1::5].round()
    rows[2::5] = rows[2::5].masked_fill(torch.rand(rows[2::5].shape, generator=g) < 0.7, -torch.inf)
    rows[3::5] = -torch.inf
    rows[:, 3] = torch.randn(count, generator=g)
    rows[4::25] = 0.0
    return rows


def processed(processor, texts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The result of transformers' `processor`."""
    result = processor(texts, rows.clone())
    if isinstance(processor, ExponentialDecayLengthPenalty):  # older releases turn -inf into NaN
        result = result.where(rows.isfinite(), rows)
    return result


def random_texts(count: int, vocabulary: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        0, min(vocabulary, 9), (count, PROMPT + NEW), generator=torch.Generator().manual_seed(seed)
    ).clamp(max=vocabulary - 1)


def filtered(logits: torch.Tensor, input_ids: torch.Tensor, new_tokens: int = 0, **controls) -> torch.Tensor:
    return Sampler([0], SamplingConfig(**controls), eos_ids=EOS).filtered_logits(logits, input_ids, new_tokens)


# 10,000 rows in all: few for a large vocabulary, many for a small one.
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("vocabulary, count", [(7, 6000), (320, 3500), (5003, 400), (50_257, 100)])
def test_control_equals_transformers_to_the_bit(name, vocabulary, count):
    rows, texts = random_rows(count, vocabulary, vocabulary), random_texts(count, vocabulary)
    for value, processor in TRANSFORMERS[name].values():
        ours = filtered(rows, texts, NEW, **{name: value})
        expected = processed(processor(), texts, rows)
        assert torch.equal(ours, expected) or torch.equal(ours.nan_to_num(7e37), expected.nan_to_num(7e37)), value


@pytest.mark.parametrize("seed", range(50))
def test_controls_together_equal_transformers(seed):
    rng = random.Random(seed)
    vocabulary = rng.choice([7, 320, 5003])
    rows, texts = random_rows(200, vocabulary, seed), random_texts(200, vocabulary, seed)
    names = [name for name in TRANSFORMERS if rng.random() < 0.4]
    chosen = {name: rng.choice(list(TRANSFORMERS[name].values())) for name in names}
    expected = rows.clone()
    for _, processor in chosen.values():
        expected = processed(processor(), texts, expected)
        alive = (expected > -torch.inf).any(1)  # transformers raises if a row has no token left
        rows, texts, expected = rows[alive], texts[alive], expected[alive]
    assert len(rows) > 20
    ours = filtered(rows, texts, NEW, **{name: value for name, (value, _) in chosen.items()})
    assert torch.equal(ours.nan_to_num(7e37), expected.nan_to_num(7e37)), names


def test_controls_order_is_that_of_generate():
    from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    values = {name: list(cases.values())[0][0] for name, cases in TRANSFORMERS.items()}
    config = GenerationConfig(do_sample=True, eos_token_id=EOS, **values)
    config._eos_token_tensor = torch.tensor(EOS)
    built = model._get_logits_processor(config, input_ids_seq_length=PROMPT)
    processors = [list(cases.values())[0][1]() for cases in TRANSFORMERS.values()]
    assert [type(processor) for processor in built] == [type(processor) for processor in processors]
    shared = [control.name for control in sampling.CONTROLS if control.name in TRANSFORMERS]
    assert shared == list(TRANSFORMERS)


def test_first_and_last_token_controls_equal_transformers():
    rows, texts = random_rows(50, 7, 1), random_texts(50, 7)
    ours = filtered(rows, texts, NEW, forced_eos_token_id=EOS, max_new_tokens=NEW + 1)
    assert torch.equal(ours, ForcedEOSTokenLogitsProcessor(PROMPT + NEW + 1, EOS)(texts, rows))
    ours = filtered(rows, texts, 0, begin_suppress_tokens=[1, 6])
    assert torch.equal(ours, SuppressTokensAtBeginLogitsProcessor([1, 6], PROMPT + NEW)(texts, rows))
    assert not torch.equal(ours, rows)


def test_unset_controls_change_nothing():
    rows = random_rows(50, 320, 2)
    assert torch.equal(filtered(rows, torch.zeros(50, 1, dtype=torch.long)), rows)


def test_controls_ignore_padding():
    rows = random_rows(6, 50, 3)[:1]
    text = torch.tensor([[4, 1, 2, 4, 1]])
    padded = torch.cat([torch.full((1, 3), 50), text], dim=1)
    for controls in (
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"sequence_bias": [[[4, 1, 2], 5.0]]},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"dry_multiplier": 1.0},
        {"min_length": 6},
    ):
        without, with_padding = (filtered(rows, ids, 2, **controls) for ids in (text, padded))
        assert torch.equal(without, with_padding) and not torch.equal(without, rows), controls
    short = torch.tensor([[50, 50, 1]])  # the padding repeats an n-gram, the text is too short for one
    assert torch.equal(filtered(rows, short, no_repeat_ngram_size=2), rows)


def test_frequency_and_presence_count_drawn_tokens_only():
    """2 was drawn three times, 0 once; 1 is in the prompt only."""
    logits, text = torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 2, 0, 2, 2]])
    ours = filtered(logits, text, 4, frequency_penalty=0.5, presence_penalty=0.25)
    assert ours.tolist() == [[1 - 0.5 - 0.25, 1.0, 1 - 1.5 - 0.25, 1.0]]
    assert torch.equal(apply_frequency_and_presence(logits, text[:, 2:], 0.5, 0.25), ours)


@pytest.mark.parametrize(
    "text, breakers, penalties",
    [
        ([1, 2, 3, 9, 1, 2], [], {3: 1.0}),  # 3 followed the earlier "1 2": n = 2, the allowed length
        ([7, 1, 2, 3, 9, 7, 1, 2], [], {3: 1.75}),  # one token longer
        ([5, 7, 1, 2, 3, 9, 5, 7, 1, 2], [], {3: 1.75**2}),
        ([2, 3, 9, 2], [], {}),  # one token is below the allowed length
        ([1, 2, 3, 9, 1, 2], [1], {}),  # the repetition excludes 1, so it is one token long
        ([1, 2, 3, 9, 1, 2], [2], {}),  # it ends with a breaker
        ([1, 2, 3, 9, 1, 2], [3], {}),  # the next token is a breaker
        ([1, 2, 3, 8, 1, 2, 4, 8, 1, 2], [], {3: 1.0, 4: 1.75}),  # two continuations
        ([1, 2, 3, 7, 1, 2, 3, 9, 7, 1, 2], [], {3: 1.75}),  # the longest counts
        ([4, 4, 4, 4], [], {4: 1.75}),  # an overlap with itself: three tokens before the last repeat
        ([6], [], {}),
    ],
)
def test_dry_worked_examples(text, breakers, penalties):
    ours = apply_dry(torch.zeros(1, 12), torch.tensor([text]), 1.0, 1.75, 2, breakers)
    assert {token: -value for token, value in enumerate(ours[0].tolist()) if value} == pytest.approx(penalties)


def dry_by_search(
    text: list[int], breakers: list[int], multiplier: float, base: float, allowed: int
) -> dict[int, float]:
    """DRY by its definition: the longest suffix of the text that precedes an earlier occurrence of the token."""
    longest = {}
    for position in range(1, len(text)):
        n = 0
        while n < position and text[position - 1 - n] == text[-1 - n] and text[-1 - n] not in breakers:
            n += 1
        if n >= allowed and text[position] not in breakers:
            longest[text[position]] = max(longest.get(text[position], 0), n)
    return {token: multiplier * base ** (n - allowed) for token, n in longest.items()}


def test_dry_equals_search_in_random_texts():
    for seed in range(200):
        rng = random.Random(seed)
        text = [rng.randrange(4) for _ in range(rng.randrange(1, 40))]
        breakers = [3] if seed % 2 else []
        ours = apply_dry(torch.zeros(1, 5), torch.tensor([text]), 0.8, 1.5, 1 + seed % 3, breakers)
        expected = dry_by_search(text, breakers, 0.8, 1.5, 1 + seed % 3)
        assert {token: -value for token, value in enumerate(ours[0].tolist()) if value} == pytest.approx(expected), text


@pytest.mark.parametrize(
    "probabilities, threshold, kept",
    [
        ([0.4, 0.3, 0.2, 0.1], 0.15, [2, 3]),  # of three above the threshold, the least likely stays
        ([0.4, 0.3, 0.2, 0.1], 0.25, [1, 2, 3]),
        ([0.6, 0.2, 0.1, 0.1], 0.5, [0, 1, 2, 3]),  # only one above: all stay
        ([0.4, 0.3, 0.2, 0.1], 0.9, [0, 1, 2, 3]),
        ([0.3, 0.3, 0.3, 0.1], 0.2, [0, 3]),  # one of several equals stays
    ],
)
def test_xtc_worked_examples(probabilities, threshold, kept):
    logits = torch.tensor([probabilities, probabilities]).log()
    ours = apply_xtc(logits, threshold, torch.tensor([[True], [False]]))
    assert ours[0].isfinite().nonzero()[:, 0].tolist() == kept and torch.equal(ours[1], logits[1])


def test_xtc_probability_is_the_share_of_changed_steps():
    sampler = Sampler([0], SamplingConfig(xtc_probability=0.3, xtc_threshold=0.2))
    logits, text = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.zeros(1, 1, dtype=torch.long)
    changed = sum(not torch.equal(sampler.filtered_logits(logits, text), logits) for _ in range(4000))
    assert changed / 4000 == pytest.approx(0.3, abs=0.03)


def test_check_token_ids_names_the_control():
    check_token_ids(SamplingConfig(suppress_tokens=[9], bad_words_ids=[[1, 9]], sequence_bias=[[[9], 1.0]]), 10)
    for controls in ({"suppress_tokens": [10]}, {"bad_words_ids": [[1, 10]]}, {"sequence_bias": [[[10], 1.0]]}):
        with pytest.raises(UserError, match=f"{next(iter(controls))} names token 10, .* ends at 9"):
            check_token_ids(SamplingConfig(**controls), 10)


@dataclass
class MadeUpConfig(SamplingConfig):
    only_token: int = flag(0, "all tokens but this one are forbidden; 0 is off")


def add_control(monkeypatch, always: bool) -> None:
    """What a contributor does for a new control: a field, a function, an entry in the table."""

    def apply_only_token(logits: torch.Tensor, token: int) -> torch.Tensor:
        kept = torch.arange(logits.size(1), device=logits.device) == token
        return logits.masked_fill(~kept, -torch.inf)

    entry = Control(
        "only_token",
        lambda c: c.only_token,
        lambda x, step, c: apply_only_token(x, c.only_token),
        always=always,
        token_ids=lambda c: [c.only_token],
    )
    monkeypatch.setattr(sampling, "CONTROLS", (entry, *sampling.CONTROLS))
    monkeypatch.setattr(generate_module, "SamplingConfig", MadeUpConfig)


@pytest.mark.parametrize("others", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("always", [True, False])
def test_new_control_works_through_generate(always, others, model_and_tokenizer, monkeypatch):
    """Also with top_k and top_p, for which a CPU has a fast window that knows nothing of the new control."""
    add_control(monkeypatch, always)
    others = {**others, "max_new_tokens": 4}
    [unset], [completion] = (
        generate(*model_and_tokenizer, ["Halo"], **controls) for controls in (others, {**others, "only_token": 42})
    )
    acts = always or others.get("temperature") != 0
    assert (completion.new_token_ids == [42] * 4) == acts
    assert unset.new_token_ids != [42] * 4
    with pytest.raises(UserError, match="only_token names token 9999"):
        generate(*model_and_tokenizer, ["Halo"], only_token=9999)
