"""Attention by blocks, against PyTorch's own in double precision."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from families import batch, small_model

from mori.config import TrainConfig
from mori.distributed import Runtime
from mori.model import lm
from mori.model.variants import build_module
from mori.speed import attention
from mori.speed.attention import attention_by_blocks

BF16 = Runtime(torch.device("cpu"), 0, 1, "bf16")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 27])
@pytest.mark.parametrize("key_heads, value_size, scale", [(4, 16, None), (2, 16, None), (1, 12, 0.3)])
def test_attention_by_blocks_equals_sdpa(length, key_heads, value_size, scale, monkeypatch):
    """Blocks of 8 queries: one, a whole number, and one more. As in transformers, the tensors are transposed views."""
    monkeypatch.setattr(attention, "_BLOCK", 8)
    torch.manual_seed(length)
    sizes = [(4, 16), (key_heads, 16), (key_heads, value_size)]
    tensors = [torch.randn(2, length, *size).bfloat16().transpose(1, 2).requires_grad_() for size in sizes]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    direction = torch.randn(2, length, 4, value_size).bfloat16()
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    result = attention_by_blocks(*tensors, scale)
    results = [result, *torch.autograd.grad(result, tensors, direction)]
    expectations = [expected, *torch.autograd.grad(expected, exact, direction.double())]
    for actual, wanted in zip(results, expectations, strict=True):
        assert actual.dtype == torch.bfloat16 and actual.shape == wanted.shape
        assert (actual.double() - wanted).norm() <= 0.02 * max(wanted.norm(), 1e-2)


@pytest.mark.parametrize("length", [1, 8, 27])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_dropout_of_attention_by_blocks_is_that_of_sdpa(length, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 8)
    torch.manual_seed(length)
    tensors = [torch.randn(2, 4, length, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    direction = torch.randn(2, length, 4, 16).to(dtype)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, dropout_p=0.3).transpose(1, 2)
    random_state = torch.get_rng_state()
    torch.manual_seed(1)
    result = attention_by_blocks(*tensors, dropout=0.3)
    assert torch.equal(torch.get_rng_state(), random_state) and result.dtype == dtype
    results = [result, *torch.autograd.grad(result, tensors, direction)]
    expectations = [expected, *torch.autograd.grad(expected, exact, direction.double())]
    for actual, wanted in zip(results, expectations, strict=True):
        assert (actual.double() - wanted).norm() <= tolerance * max(wanted.norm(), 1e-2)


@pytest.mark.parametrize(
    "precision, dropout, block, by_blocks",
    [
        ("bf16", 0.0, 128, 2),
        ("bf16", 0.1, 128, 2),
        ("fp32", 0.0, 8, 0),
        ("fp32", 0.1, 8, 2),
        ("fp32", 0.1, 128, 0),
        ("fp32", 1.0, 8, 0),
    ],
)
def test_attention_by_blocks_is_for_bf16_and_for_dropout_in_long_windows(
    precision, dropout, block, by_blocks, monkeypatch
):
    monkeypatch.setattr(attention, "_BLOCK", block)
    calls, real = [], attention_by_blocks
    monkeypatch.setattr(lm, "attention_by_blocks", lambda *args: calls.append(1) or real(*args))
    runtime = BF16 if precision == "bf16" else CPU
    model = small_model("llama", 97)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    module, _ = build_module(model, TrainConfig(block_size=24), batch(), runtime)
    calls.clear()
    module.train()
    with runtime.autocast():
        module(*batch()).backward()
    assert len(calls) == by_blocks


def test_mask_free_family_is_as_exact_by_blocks(mask_free_family, monkeypatch):
    """The gradients are as far from those in fp32 as with PyTorch's kernel in bf16."""
    monkeypatch.setattr(attention, "_BLOCK", 8)
    gradients = []
    for runtime, by_blocks in ((CPU, False), (BF16, False), (BF16, True)):
        monkeypatch.setattr(lm, "suits_blocks", lambda query, dropout, answer=by_blocks: answer)
        module, description = build_module(
            small_model(mask_free_family, 97), TrainConfig(block_size=24), batch(), runtime
        )
        assert "mask-free" in description
        with runtime.autocast():
            loss = module(*batch())
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    exact, own, blocked = gradients
    assert 0 < (blocked - exact).norm() <= 1.5 * (own - exact).norm()
