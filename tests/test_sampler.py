import ast
import itertools
import math
import random
from dataclasses import fields

import pytest
import torch
from conftest import ROOT
from test_sampling import TRANSFORMERS, random_rows

from mori.config import SamplingConfig
from mori.generation.sampler import WINDOW, Sampler, draw, draw_within_window

NO_TEXT = torch.zeros(1, 1, dtype=torch.long)


def sampler(seeds: list = (0,), **controls) -> Sampler:
    return Sampler(seeds, SamplingConfig(**controls))


def test_sampler_temperature_zero_takes_the_largest_penalized_logit():
    logits = torch.tensor([[0.0, 3.0, 2.9]])
    assert sampler(temperature=0, top_k=2)(logits, NO_TEXT).tolist() == [[1]]
    assert sampler(temperature=0, repetition_penalty=1.2)(logits, torch.tensor([[1]])).tolist() == [[2]]


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
DRAWS, ROWS = 1_000_000, 15_625  # 64 steps, as many as the sampler takes random numbers for at once


def chi_square_quantile(freedom: int) -> float:
    """The 99.99 % quantile of chi-square, by Wilson and Hilferty (1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(controls: dict, error: float = 0.0) -> tuple[float, float]:
    """Pearson's statistic of a million draws against the exact probabilities, and its bound.

    The exact ones come from transformers' processors and a float64 softmax; `error` is the share by which the largest
    is changed.
    """
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0)) * 1.5
    text = torch.tensor([[3, 7, 11]])
    expected = logits.clone()
    for name, cases in TRANSFORMERS.items():
        if name in controls:
            processor = type(next(iter(cases.values()))[1]())
            expected = processor(controls[name])(text, expected)
    probs = expected.double().softmax(-1)[0]
    drawing = sampler(["chi"], **controls)
    drawing.streams = [random.Random(str(controls))] * ROWS  # rows of equal logits that share one stream
    tokens = [drawing(logits.expand(ROWS, -1), text.expand(ROWS, -1))[:, 0] for _ in range(DRAWS // ROWS)]
    counts = torch.bincount(torch.cat(tokens), minlength=60).double()
    if error:
        probs[probs.argmax()] *= 1 - error
        probs /= probs.sum()
    possible = probs > 0
    assert not counts[~possible].any()
    statistic = ((counts - probs * DRAWS) ** 2 / (probs * DRAWS))[possible].sum().item()
    return statistic, chi_square_quantile(max(1, int(possible.sum()) - 1))


@pytest.mark.parametrize("controls", SETTINGS, ids=lambda c: "-".join(c) or "none")
def test_sampler_draws_follow_the_exact_probabilities(controls):
    statistic, bound = chi_square(controls)
    assert statistic < bound


def test_chi_square_detects_an_error_of_one_percent():
    statistic, bound = chi_square({"top_k": 5}, error=0.01)
    assert statistic > bound


def exact_token(row: torch.Tensor, uniform: float, **controls) -> int:
    """The token by the functions on the whole vocabulary."""
    logits = sampler(**controls).filtered_logits(row[None], NO_TEXT)
    return draw(logits, torch.tensor([[uniform]], dtype=torch.float64)).item()


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
def test_window_draws_the_token_of_the_whole_vocabulary(controls, vocabulary):
    rng, windowed, drawn = random.Random(5), sampler([5], **controls), 0
    stream = random.Random("5")  # that of the sampler
    for row in random_rows(100, vocabulary, 11):
        uniform = rng.random()
        token = draw_within_window(row[None], [uniform], SamplingConfig(**controls))
        if token is not None:
            drawn += 1
            assert token.item() == exact_token(row, uniform, **controls)
        assert windowed(row[None], NO_TEXT).item() == exact_token(row, stream.random(), **controls)
    assert drawn if vocabulary > WINDOW else True


def test_window_leaves_a_rounding_error_at_top_p_to_the_exact_functions():
    """The likeliest three tokens have 0.5 together, up to the last bits: rounding decides whether the fourth stays."""
    torch.manual_seed(0)
    windowed, stream = sampler([5], top_p=0.5), random.Random("5")
    for _ in range(300):
        likely, rest = torch.rand(3, dtype=torch.float64) + 0.5, torch.rand(297, dtype=torch.float64) * 0.05
        rest[0] = 0.4 * rest.sum()
        row = torch.cat([likely / likely.sum(), rest / rest.sum()]).div(2).log().float()
        assert windowed(row[None], NO_TEXT).item() == exact_token(row, stream.random(), top_p=0.5)


def test_sampler_draws_from_a_nucleus_larger_than_the_window():
    flat = torch.zeros(1, 5000) + torch.arange(5000) * 1e-5
    windowed = sampler([1], top_p=0.9)
    drawn = {windowed(flat, NO_TEXT).item() for _ in range(400)}
    assert len(drawn) > WINDOW and min(drawn) < 4000 and min(drawn) >= 460


def test_sampler_rows_do_not_depend_on_each_other():
    rows, no_text = random_rows(8, 500, 4), torch.zeros(8, 1, dtype=torch.long)
    for controls in ({}, {"top_k": 9}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.7, "xtc_probability": 0.5}):
        together = sampler([f"s{i}" for i in range(8)], **controls)
        tokens = torch.cat([together(rows, no_text) for _ in range(5)], dim=1)
        for i in range(8):
            alone = sampler([f"s{i}"], **controls)
            assert [alone(rows[i : i + 1], NO_TEXT).item() for _ in range(5)] == tokens[i].tolist()


def test_sampler_seed_decides_and_global_generators_stay():
    logits, no_text = torch.zeros(64, 1000), torch.zeros(64, 1, dtype=torch.long)
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    tokens = sampler(range(64))(logits, no_text)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(sampler(range(64))(logits, no_text), tokens)
    assert not torch.equal(sampler(range(64, 128))(logits, no_text), tokens)
    assert len(set(tokens[:, 0].tolist())) > 50


@pytest.mark.parametrize(
    "logits, temperature",
    list(itertools.product([[[torch.nan, 1.0]], [[torch.inf, 1.0]], [[-torch.inf, -torch.inf]]], [0.0, 1.0]))
    + [([[0.0, 1.0]], 1e-42), ([[1.0, torch.nan]], 0.0)],
)
@pytest.mark.parametrize("top_k", [0, 1])
def test_sampler_gives_no_token_for_logits_that_are_not_finite(logits, temperature, top_k):
    assert sampler(temperature=temperature, top_k=top_k)(torch.tensor(logits), NO_TEXT).tolist() == [[-1]]


def test_draw_uniforms_at_the_ends_give_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert draw(logits, torch.tensor([[0.0]], dtype=torch.float64)).item() == 1
    assert draw(logits, torch.tensor([[1 - 2**-53]], dtype=torch.float64)).item() == 2


def test_every_sampling_field_is_read_in_the_package():
    """A field without an entry in the table would be accepted and do nothing."""
    read = set()
    for path in (ROOT / "mori/generation").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    assert {f.name for f in fields(SamplingConfig)} <= read


def test_controls_copy_their_token_ids_to_the_device_once(monkeypatch):
    """On a GPU the host waits for each copy."""
    config = SamplingConfig(
        sequence_bias=[[[5, 7], 2.0]], bad_words_ids=[[9], [3, 4]], min_new_tokens=9, suppress_tokens=[1],
        exponential_decay_length_penalty=[1, 1.5], dry_multiplier=0.8, eta_cutoff=0.1, xtc_probability=0.5,
    )  # fmt: skip
    sampler = Sampler([1], config, eos_ids=[2], dry_breaker_ids=[11])
    logits, texts = torch.randn(1, 97), torch.arange(1, 21)[None]
    sampler(logits, texts, 5)
    copies, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: copies.append(args) or tensor(*args, **options))
    sampler(logits, texts, 6)
    assert not copies
