import itertools
import math
import random

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import TopHLogitsWarper

from mori.generation import sampling
from mori.generation.sampling import Sampler, apply_dry, apply_frequency_and_presence, apply_xtc, draw

PROMPT, NEW = 8, 4
EOS = [2, 5]
BIASES = [[[1], -3.0], [[3], 2.5], [[2, 4], 1.5], [[6, 1, 5], -2.0]]
WORDS = [[2], [0], [3, 1], [1, 2, 6]]
DECAY = (2, 1.1)

# control -> a few values of it, each with what transformers does for it: the order is that of generate().
CONTROLS = {
    "sequence_bias": {"some": (BIASES, lambda: SequenceBiasLogitsProcessor(BIASES))},
    "repetition_penalty": {p: (p, lambda p=p: RepetitionPenaltyLogitsProcessor(p)) for p in (0.5, 1.2, 5.0)},
    "no_repeat_ngram_size": {n: (n, lambda n=n: NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3, 20)},
    "bad_words_ids": {"some": (WORDS, lambda: NoBadWordsLogitsProcessor(WORDS, EOS))},
    "min_new_tokens": {n: (n, lambda n=n: MinNewTokensLengthLogitsProcessor(PROMPT, n, EOS)) for n in (NEW, NEW + 1)},
    "exponential_decay_length_penalty": {"some": (DECAY, lambda: ExponentialDecayLengthPenalty(DECAY, EOS, PROMPT))},
    "suppress_tokens": {"some": ([0, 6], lambda: SuppressTokensLogitsProcessor([0, 6]))},
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
    """Rows of every nature: smooth, sharp, full of ties, full of -inf, with one token left."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, vocabulary, generator=g) * torch.logspace(-2, 2, count)[:, None]
    rows[1::5] = rows[1::5].round()
    rows[2::5] = rows[2::5].masked_fill(torch.rand(rows[2::5].shape, generator=g) < 0.7, -torch.inf)
    rows[3::5] = -torch.inf
    rows[:, 3] = torch.randn(count, generator=g)
    rows[4::25] = 0.0
    return rows


def random_texts(count: int, vocabulary: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        0, min(vocabulary, 9), (count, PROMPT + NEW), generator=torch.Generator().manual_seed(seed)
    ).clamp(max=vocabulary - 1)


def sampler(**controls) -> Sampler:
    return Sampler([0], eos_ids=EOS, **controls)


# 10,000 rows in all: the wide vocabularies have few rows each, the narrow ones many.
@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("vocabulary, count", [(7, 6000), (320, 3500), (5003, 400), (50_257, 100)])
def test_every_control_equals_transformers_to_the_bit(name, vocabulary, count):
    rows, texts = random_rows(count, vocabulary, vocabulary), random_texts(count, vocabulary)
    for value, theirs in CONTROLS[name].values():
        ours = sampler(**{name: value}).filtered(rows, texts, NEW)
        expected = theirs()(texts, rows.clone())
        assert torch.equal(ours, expected) or torch.equal(ours.nan_to_num(7e37), expected.nan_to_num(7e37)), value


@pytest.mark.parametrize("seed", range(50))
def test_together_in_the_order_of_generate(seed):
    choose = random.Random(seed)
    vocabulary = choose.choice([7, 320, 5003])
    rows, texts = random_rows(200, vocabulary, seed), random_texts(200, vocabulary, seed)
    names = [name for name in CONTROLS if choose.random() < 0.4]
    chosen = {name: choose.choice(list(CONTROLS[name].values())) for name in names}
    theirs = rows.clone()
    for _, processor in chosen.values():
        theirs = processor()(texts, theirs)
        alive = (theirs > -torch.inf).any(1)  # transformers' classes raise over a row in which all is forbidden
        rows, texts, theirs = rows[alive], texts[alive], theirs[alive]
    assert len(rows) > 20
    ours = sampler(**{name: value for name, (value, _) in chosen.items()}).filtered(rows, texts, NEW)
    assert torch.equal(ours.nan_to_num(7e37), theirs.nan_to_num(7e37)), names


def test_the_order_is_that_in_which_generate_builds_its_own():
    from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    values = {name: list(of.values())[0][0] for name, of in CONTROLS.items()}
    config = GenerationConfig(do_sample=True, eos_token_id=EOS, **values)
    config._eos_token_tensor = torch.tensor(EOS)
    built = model._get_logits_processor(config, input_ids_seq_length=PROMPT)
    assert [type(processor) for processor in built] == [type(list(of.values())[0][1]()) for of in CONTROLS.values()]


def test_unset_controls_do_nothing():
    rows = random_rows(50, 320, 2)
    assert torch.equal(sampler().filtered(rows, torch.zeros(50, 1, dtype=torch.long)), rows)


def test_padding_is_no_token_of_the_text():
    """A padded text, its padding beyond the vocabulary, is filtered as the text alone."""
    rows = random_rows(6, 50, 3)[:1]
    text = torch.tensor([[4, 1, 2, 4, 1]])
    padded = torch.cat([torch.full((1, 3), 50), text], dim=1)
    for controls in (
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"sequence_bias": [[[4, 1, 2], 5.0]]},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"dry_multiplier": 1.0},
    ):
        alone, beside = (sampler(**controls).filtered(rows, ids, 2) for ids in (text, padded))
        assert torch.equal(alone, beside) and not torch.equal(alone, rows), controls
    first = torch.tensor([[50, 50, 1]])  # a text shorter than an n-gram repeats nothing, though its padding does
    assert torch.equal(sampler(no_repeat_ngram_size=2).filtered(rows, first), rows)


def test_frequency_and_presence_count_what_was_drawn():
    """The formula of the API reference, by hand: 2 was drawn three times, 0 once, 1 stood in the prompt only."""
    logits, text = torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 2, 0, 2, 2]])
    ours = sampler(frequency_penalty=0.5, presence_penalty=0.25).filtered(logits, text, 4)
    assert ours.tolist() == [[1 - 0.5 - 0.25, 1.0, 1 - 1.5 - 0.25, 1.0]]
    assert torch.equal(apply_frequency_and_presence(logits, text[:, 2:], 0.5, 0.25), ours)


@pytest.mark.parametrize(
    "text, breakers, penalties",
    [
        ([1, 2, 3, 9, 1, 2], [], {3: 1.0}),  # "1 2" came before, and 3 followed: n = 2, the allowed length
        ([7, 1, 2, 3, 9, 7, 1, 2], [], {3: 1.75}),  # one token longer
        ([5, 7, 1, 2, 3, 9, 5, 7, 1, 2], [], {3: 1.75**2}),
        ([2, 3, 9, 2], [], {}),  # one token alone is below the allowed length
        ([1, 2, 3, 9, 1, 2], [1], {}),  # the repetition may not reach over 1, so it is one token long
        ([1, 2, 3, 9, 1, 2], [2], {}),  # it ends with a breaker
        ([1, 2, 3, 9, 1, 2], [3], {}),  # what would follow is a breaker
        ([1, 2, 3, 8, 1, 2, 4, 8, 1, 2], [], {3: 1.0, 4: 1.75}),  # two ways to go on
        ([1, 2, 3, 7, 1, 2, 3, 9, 7, 1, 2], [], {3: 1.75}),  # the longest counts
        ([4, 4, 4, 4], [], {4: 1.75}),  # an overlap with itself: three tokens before the last repeat
        ([6], [], {}),
    ],
)
def test_dry_by_worked_examples(text, breakers, penalties):
    ours = apply_dry(torch.zeros(1, 12), torch.tensor([text]), 1.0, 1.75, 2, breakers)
    assert {token: -value for token, value in enumerate(ours[0].tolist()) if value} == pytest.approx(penalties)


def dry_by_search(
    text: list[int], breakers: list[int], multiplier: float, base: float, allowed: int
) -> dict[int, float]:
    """DRY by its definition: the longest suffix of the text that stands before an earlier occurrence of the token."""
    longest = {}
    for at in range(1, len(text)):
        n = 0
        while n < at and text[at - 1 - n] == text[-1 - n] and text[-1 - n] not in breakers:
            n += 1
        if n >= allowed and text[at] not in breakers:
            longest[text[at]] = max(longest.get(text[at], 0), n)
    return {token: multiplier * base ** (n - allowed) for token, n in longest.items()}


def test_dry_against_a_search_in_random_texts():
    for seed in range(200):
        choose = random.Random(seed)
        text = [choose.randrange(4) for _ in range(choose.randrange(1, 40))]
        breakers = [3] if seed % 2 else []
        ours = apply_dry(torch.zeros(1, 5), torch.tensor([text]), 0.8, 1.5, 1 + seed % 3, breakers)
        expected = dry_by_search(text, breakers, 0.8, 1.5, 1 + seed % 3)
        assert {token: -value for token, value in enumerate(ours[0].tolist()) if value} == pytest.approx(expected), text


@pytest.mark.parametrize(
    "probabilities, threshold, left",
    [
        ([0.4, 0.3, 0.2, 0.1], 0.15, [2, 3]),  # of the three above, the least likely stays
        ([0.4, 0.3, 0.2, 0.1], 0.25, [1, 2, 3]),
        ([0.6, 0.2, 0.1, 0.1], 0.5, [0, 1, 2, 3]),  # one alone above: nothing is taken away
        ([0.4, 0.3, 0.2, 0.1], 0.9, [0, 1, 2, 3]),
        ([0.3, 0.3, 0.3, 0.1], 0.2, [0, 3]),  # of equals, one stays
    ],
)
def test_xtc_by_worked_examples(probabilities, threshold, left):
    logits = torch.tensor([probabilities, probabilities]).log()
    ours = apply_xtc(logits, threshold, torch.tensor([[True], [False]]))
    assert ours[0].isfinite().nonzero()[:, 0].tolist() == left and torch.equal(ours[1], logits[1])


def test_xtc_happens_as_often_as_it_should():
    made = Sampler([0], xtc_probability=0.3)
    assert sum(bool(made._chance()) for _ in range(4000)) / 4000 == pytest.approx(0.3, abs=0.03)


def test_temperature_zero_is_greedy_and_the_penalty_still_counts():
    rows, none = torch.tensor([[0.0, 3.0, 2.9]]), torch.tensor([[0]])
    assert sampler(temperature=0, top_k=2)(rows, none).tolist() == [[1]]
    assert sampler(temperature=0, repetition_penalty=1.2)(rows, torch.tensor([[1]])).tolist() == [[2]]


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 20, "top_p": 0.9, "temperature": 0.9},
    {"top_k": 30, "repetition_penalty": 1.2, "temperature": 1.5},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"eta_cutoff": 0.05, "top_h": 0.8},
    {"epsilon_cutoff": 0.02, "top_p": 0.95},
]
DRAWS = 1_000_000


def chi_square_quantile(freedom: int) -> float:
    """The 99.99 % quantile of chi-square, by Wilson and Hilferty (1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(controls: dict, wrong: float = 0.0) -> tuple[float, float]:
    """Pearson's statistic over a million draws against the exact probabilities, and its bound.

    The exact ones come from transformers' processors and a float64 softmax; `wrong` takes this share from the likeliest.
    """
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0)) * 1.5
    text = torch.tensor([[3, 7, 11]])
    expected = logits.clone()
    for name in CONTROLS:
        if name in controls:
            theirs = next((make for value, make in CONTROLS[name].values() if value == controls[name]), None)
            classes = {name: type(list(CONTROLS[name].values())[0][1]())}
            expected = (theirs or (lambda n=name, c=classes: c[n](controls[n])))()(text, expected)
    probabilities = expected.double().softmax(-1)[0]
    made = Sampler(["chi"], **controls)
    made.streams = [random.Random(str(controls))] * 50_000
    tokens = []
    for _ in range(
        DRAWS // 50_000
    ):  # one row of logits, drawn from by many numbers: what the sampler does for each row
        tokens.append(made(logits.expand(50_000, -1), text.expand(50_000, -1))[:, 0])
    counts = torch.bincount(torch.cat(tokens), minlength=60).double()
    if wrong:
        best = probabilities.argmax()
        probabilities[best] *= 1 - wrong
        probabilities /= probabilities.sum()
    possible = probabilities > 0
    assert not counts[~possible].any()
    statistic = ((counts - probabilities * DRAWS) ** 2 / (probabilities * DRAWS))[possible].sum().item()
    return statistic, chi_square_quantile(max(1, int(possible.sum()) - 1))


@pytest.mark.parametrize("controls", SETTINGS, ids=lambda c: "-".join(c) or "none")
def test_a_million_draws_follow_the_exact_probabilities(controls):
    statistic, bound = chi_square(controls)
    assert statistic < bound


def test_an_error_of_one_percent_in_one_token_is_seen():
    statistic, bound = chi_square({"top_k": 5}, wrong=0.01)
    assert statistic > bound


@pytest.mark.parametrize(
    "controls",
    [
        {"top_k": 50, "top_p": 0.95},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 0.99, "temperature": 1.4},
        {"top_k": 40, "temperature": 0.6},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [7, 320, 5003, 50_257])
def test_the_window_draws_the_token_that_all_the_vocabulary_would(controls, vocabulary, monkeypatch):
    rows = random_rows(100, vocabulary, 11)
    texts = torch.zeros(1, 1, dtype=torch.long)
    fast, slow = Sampler([5], **controls), Sampler([5], **controls)
    slow._windowed = False
    through_window = []
    inside = fast._draw_within_window
    monkeypatch.setattr(fast, "_draw_within_window", lambda *a: through_window.append(inside(*a)) or through_window[-1])
    for row in rows:
        assert torch.equal(fast(row[None], texts), slow(row[None], texts))
    if vocabulary > sampling.WINDOW:
        assert any(token is not None for token in through_window)  # the window is used at all


def test_a_border_within_a_rounding_error_is_left_to_the_exact_functions():
    """The likeliest tokens have 0.5 together, to the last bits: rounding decides whether the next one stays."""
    torch.manual_seed(0)
    made = [Sampler([5], top_p=0.5) for _ in range(2)]
    made[1]._windowed = False
    for _ in range(300):
        likely, rest = torch.rand(3, dtype=torch.float64) + 0.5, torch.rand(297, dtype=torch.float64) * 0.05
        rest[0] = 0.4 * rest.sum()
        row = torch.cat([likely / likely.sum(), rest / rest.sum()]).div(2).log().float()
        drawn = [one(row[None], torch.zeros(1, 1, dtype=torch.long)) for one in made]
        assert torch.equal(*drawn)


def test_a_nucleus_that_spills_over_the_window_is_found_whole():
    flat = torch.zeros(1, 5000) + torch.arange(5000) * 1e-5
    made = Sampler([1], top_p=0.9)
    drawn = {made(flat, torch.zeros(1, 1, dtype=torch.long)).item() for _ in range(400)}
    assert len(drawn) > sampling.WINDOW and min(drawn) < 4000 and min(drawn) >= 460


def test_a_row_draws_the_same_whatever_stands_beside_it():
    rows, none = random_rows(8, 500, 4), torch.zeros(8, 1, dtype=torch.long)
    for controls in ({}, {"top_k": 9}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.7, "xtc_probability": 0.5}):
        together = Sampler([f"s{i}" for i in range(8)], **controls)
        draws = torch.cat([together(rows, none) for _ in range(5)], dim=1)
        for i in range(8):
            alone = Sampler([f"s{i}"], **controls)
            assert (
                torch.cat([alone(rows[i : i + 1], none[:1]) for _ in range(5)], dim=1).tolist()
                == draws[i : i + 1].tolist()
            )


def test_the_seed_decides_and_the_global_generators_are_left_alone():
    logits, none = torch.zeros(64, 1000), torch.zeros(64, 1, dtype=torch.long)
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    first = Sampler(range(64))(logits, none)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(Sampler(range(64))(logits, none), first)
    assert not torch.equal(Sampler(range(64, 128))(logits, none), first)
    assert len(set(first[:, 0].tolist())) > 50


@pytest.mark.parametrize(
    "logits, temperature",
    list(itertools.product([[[torch.nan, 1.0]], [[torch.inf, 1.0]], [[-torch.inf, -torch.inf]]], [0.0, 1.0]))
    + [([[0.0, 1.0]], 1e-42)],
)
@pytest.mark.parametrize("top_k", [0, 1])
def test_logits_that_are_not_finite_give_no_token(logits, temperature, top_k):
    if temperature == 0 and logits == [[torch.nan, 1.0]]:
        logits = [[1.0, torch.nan]]
    assert sampler(temperature=temperature, top_k=top_k)(torch.tensor(logits), torch.tensor([[0]])).tolist() == [[-1]]


def test_the_border_of_the_last_token():
    """Uniforms of 0 and just below 1 fall on tokens that have a probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert draw(logits, torch.tensor([[0.0]], dtype=torch.float64)).item() == 1
    assert draw(logits, torch.tensor([[1 - 2**-53]], dtype=torch.float64)).item() == 2
