import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mori.sampling import Sampler, apply_repetition_penalty, apply_temperature, apply_top_k, apply_top_p


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


@pytest.mark.parametrize("vocabulary", [7, 320, 5003])
def test_every_control_equals_transformers_to_the_bit_on_a_thousand_rows(vocabulary):
    rows = random_rows(1000, vocabulary, vocabulary)
    input_ids = torch.randint(0, vocabulary, (1000, 12), generator=torch.Generator().manual_seed(1))
    for k in (1, 3, 50, vocabulary, vocabulary + 9):
        assert torch.equal(apply_top_k(rows, k), TopKLogitsWarper(k)(input_ids, rows.clone()))
    for p in (1e-4, 0.1, 0.5, 0.95, 0.999):
        assert torch.equal(apply_top_p(rows, p), TopPLogitsWarper(p)(input_ids, rows.clone()))
    for t in (1e-3, 0.7, 0.9, 1.7, 50.0):
        assert torch.equal(apply_temperature(rows, t), TemperatureLogitsWarper(t)(input_ids, rows.clone()))
    for penalty in (0.5, 1.2, 5.0):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(input_ids, rows.clone())
        assert torch.equal(apply_repetition_penalty(rows, input_ids, penalty), theirs)


def test_together_in_the_order_of_generate():
    rows = random_rows(1000, 320, 5)
    input_ids = torch.randint(0, 320, (1000, 12), generator=torch.Generator().manual_seed(1))
    theirs = rows.clone()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.95),
    ):
        theirs = processor(input_ids, theirs)
    sampler = Sampler(temperature=0.7, top_k=50, top_p=0.95, repetition_penalty=1.2)
    assert torch.equal(sampler.filtered(rows, input_ids), theirs)


def test_unset_controls_do_nothing():
    rows = random_rows(50, 320, 2)
    assert torch.equal(Sampler().filtered(rows, torch.zeros(50, 1, dtype=torch.long)), rows)


def test_temperature_zero_is_greedy_and_the_penalty_still_counts():
    rows, none = torch.tensor([[0.0, 3.0, 2.9]]), torch.tensor([[0]])
    assert Sampler(temperature=0, top_k=2)(rows, none).tolist() == [[1]]
    assert Sampler(temperature=0, repetition_penalty=1.2)(rows, torch.tensor([[1]])).tolist() == [[2]]


def test_draws_follow_the_probabilities():
    """Pearson's chi-square over 200,000 draws; 27.9 is its 99.9 % quantile at 9 degrees of freedom."""
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    draws = Sampler(seed=1)(logits.expand(200_000, -1), torch.zeros(200_000, 1, dtype=torch.long))
    counts, expected = torch.bincount(draws[:, 0], minlength=10), logits[0].double().softmax(0) * 200_000
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    logits, none = torch.zeros(64, 1000), torch.zeros(64, 1, dtype=torch.long)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = Sampler(seed=7)(logits, none)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(Sampler(seed=7)(logits, none), first)
    assert not torch.equal(Sampler(seed=8)(logits, none), first)


@pytest.mark.parametrize(
    "logits, temperature", [([[torch.nan, 1.0]], 1.0), ([[0.0, 1.0]], 1e-42), ([[torch.inf, 1.0]], 1.0)]
)
def test_logits_that_are_not_finite_are_named(logits, temperature):
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler(temperature=temperature)(torch.tensor(logits), torch.tensor([[0]]))
