"""The loss, whole and in chunks, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from families import batch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mori.data.windows import count_targets
from mori.model import loss
from mori.model.loss import chunked_cross_entropy_sum, cross_entropy_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cross_entropy_sum_equals_float64(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11).to(dtype), torch.randint(0, 11, (3, 7))
    labels[1, 2:5] = -100
    exact = -sum(
        F.log_softmax(logits[b, t].double(), -1)[labels[b, t]] for b in range(3) for t in range(7) if labels[b, t] >= 0
    )
    torch.testing.assert_close(cross_entropy_sum(logits, labels).double(), exact, rtol=1e-6, atol=0)
    assert count_targets(labels) == 18


def test_cross_entropy_sum_does_not_shift_labels():
    logits = torch.full((1, 4, 5), -1e4)
    labels = torch.tensor([[1, 2, 3, 4]])
    logits.scatter_(2, labels[..., None], 1e4)  # each position is sure of its own label
    assert cross_entropy_sum(logits, labels) == 0


def test_cross_entropy_sum_without_labels_is_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("chunk, width", [(7, 12), (16, 12), (1000, 12), (7, 130), (1000, 130)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_equals_float64(chunk, width, bias, dtype, monkeypatch):
    """In bf16 under autocast, with fp32 weights, as training does."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    weight_type = torch.float64 if dtype == torch.float64 else torch.float32
    head = nn.Linear(width, 31, bias=bias).to(weight_type)
    hidden = torch.randn(3, 16, width, dtype=weight_type, requires_grad=True)
    _, labels = batch(3, 16, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = chunked_cross_entropy_sum(hidden, head, labels) / 42
    ours.backward()
    exact_head = nn.Linear(width, 31, bias=bias).double()
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_head(exact_hidden).flatten(0, 1), labels.flatten(), reduction="sum") / 42
    exact.backward()
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = [(ours, exact), (hidden.grad, exact_hidden.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(head.parameters(), exact_head.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).abs().max() <= close * theirs.abs().max()


@pytest.mark.parametrize("vocabulary", [31, 64, 130])  # beside, on, and beyond a multiple of 64
def test_chunked_cross_entropy_survives_zero_probabilities(vocabulary):
    torch.manual_seed(0)
    head, hidden = nn.Linear(12, vocabulary), 300 * torch.randn(2, 24, 12)
    hidden[1] = 0
    _, labels = batch(2, 24, vocabulary)
    exact = F.cross_entropy(head.double()(hidden.double()).flatten(0, 1), labels.flatten(), reduction="none")
    assert exact.max() > 200  # exp(-104) is 0 in fp32
    found = chunked_cross_entropy_sum(hidden, head.float(), labels)
    torch.testing.assert_close(found.double(), exact.sum(), rtol=1e-6, atol=0)


def test_chunked_cross_entropy_without_gradients_or_with_a_frozen_head(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    head, hidden = nn.Linear(6, 11), torch.randn(2, 9, 6, requires_grad=True)
    _, labels = batch(2, 9, 11)
    whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        torch.testing.assert_close(chunked_cross_entropy_sum(hidden, head, labels), whole)
    assert operations.get_total_flops() == 2 * 18 * 6 * 11  # the logits, and nothing for a gradient
    head.requires_grad_(False)
    expected = torch.autograd.grad(whole, hidden)[0]
    chunked_cross_entropy_sum(hidden, head, labels).backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


def test_chunked_cross_entropy_in_fp16_keeps_every_gradient_that_the_whole_scaled_loss_keeps(monkeypatch):
    """Rare tokens have gradients far below fp16's smallest number; at the size of the scaled loss they survive."""
    monkeypatch.setattr(loss, "CHUNK", 32)
    torch.manual_seed(0)
    head, hidden, scale, n_targets = nn.Linear(32, 8000), 15 * torch.randn(2, 24, 32), torch.tensor(65536.0), 43
    _, labels = batch(2, 24, 8000)
    labels[0, :5] = -100

    def errors(sum_of_losses) -> list[float]:
        """The median over tokens of the weight's relative error, and those of hidden and bias."""
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            result = sum_of_losses(leaf) / n_targets
        (scale * result).backward()
        rows = (head.weight.grad / scale - exact_head.weight.grad).norm(dim=1) / exact_head.weight.grad.norm(dim=1)
        pairs = [(leaf.grad, exact_hidden.grad), (head.bias.grad, exact_head.bias.grad)]
        return [rows.median().item(), *(((a / scale - b).norm() / b.norm()).item() for a, b in pairs)]

    exact_head, exact_hidden = nn.Linear(32, 8000).double(), hidden.double().requires_grad_()
    exact_head.load_state_dict(head.state_dict())
    exact = F.cross_entropy(exact_head(exact_hidden).flatten(0, 1), labels.flatten(), reduction="sum") / n_targets
    exact.backward()
    whole = errors(lambda h: cross_entropy_sum(head(h), labels))
    chunked = errors(lambda h: chunked_cross_entropy_sum(h, head, labels, scale / n_targets))
    unscaled = errors(lambda h: chunked_cross_entropy_sum(h, head, labels))
    assert max(whole) < 5e-3
    assert all(mine <= 1.05 * theirs for mine, theirs in zip(chunked, whole, strict=True))
    assert unscaled[0] > 1.5 * whole[0]
