"""Causal attention in blocks, against PyTorch's written out in float64."""

import pytest
import torch
from families import small_model
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mori.model.loading import CausalLMLoss
from mori.speed import attention
from mori.speed import matmul as products
from mori.speed.attention import causal_attention


def tensors(heads: int, groups: int, length: int, size: int, of_value: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Query, key and value, as a layer's one projection and its views give them."""
    torch.manual_seed(0)
    shapes = ((heads, size), (groups, size), (groups, of_value))
    projected = torch.randn(2, length, sum(count * width for count, width in shapes), dtype=dtype)
    parts = projected.split([count * width for count, width in shapes], -1)
    return [
        part.unflatten(-1, shape).transpose(1, 2).requires_grad_() for part, shape in zip(parts, shapes, strict=True)
    ]


def written_out(query, key, value, scale):
    """Vaswani et al., 2017: the softmax of the scores of what is not later, times the values."""
    key, value = (one.repeat_interleave(query.size(1) // one.size(1), 1) for one in (key, value))
    later = torch.ones(query.size(2), query.size(2), dtype=torch.bool).triu(1)
    return (query @ key.mT * scale).masked_fill(later, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("heads, groups, of_value", [(3, 3, 8), (4, 2, 8), (6, 1, 8), (2, 2, 5)])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_outcome_and_all_gradients(length, heads, groups, of_value, scale):
    given = tensors(heads, groups, length, 8, of_value)
    found, expected = causal_attention(*given, scale), written_out(*given, scale or 8**-0.5)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_in_fp32_it_is_as_near_to_float64_as_pytorch_s_own():
    given = tensors(4, 4, 300, 64, 64)
    exact, narrow = written_out(*given, 1 / 8), [one.detach().float() for one in given]
    own = scaled_dot_product_attention(*narrow, is_causal=True)
    assert (causal_attention(*narrow) - exact).abs().max() < 2 * (own - exact).abs().max()


def test_no_tensor_has_a_number_for_each_pair_of_tokens():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in (result if isinstance(result, (tuple, list)) else [result]))
            return result

    given = tensors(2, 2, 640, 8, 8, torch.float32)
    with Watch():
        causal_attention(*given).sum().backward()
    assert 2 * 64 * 640 <= max(sizes) <= 2 * 2 * 64 * 640  # a block's scores and weights, for two heads


@pytest.fixture
def called(monkeypatch):
    """How often attention was computed in blocks, for windows of 24 tokens too."""
    done, inside = [], products.causal_attention
    monkeypatch.setattr(products, "LONG", 24)
    monkeypatch.setattr(attention, "_BLOCK", 7)
    monkeypatch.setattr(products, "causal_attention", lambda *args: done.append(1) or inside(*args))
    return done


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "granite", "mistral", "gpt_neox"])
def test_a_model_s_loss_and_gradients_stay(family, called):
    model = small_model(family, 97)
    input_ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    module, found = CausalLMLoss(model, mask_free=family != "mistral").eval(), []
    for module.products in (None, products.CUT, products.ONEDNN):
        loss = module(input_ids, input_ids)
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        sees_all = family != "mistral"  # whose layers look back eight tokens, which is a mask
        assert len(called) == (2 if module.products is products.ONEDNN and sees_all else 0)
    for one, other in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_mask": torch.ones(24, 24).bool().tril(), "is_causal": False},
        {"attn_mask": torch.eye(24).bool()},
        {"dropout_p": 0.1},
        {"is_causal": False},
        {"length": 23},
        {"dtype": torch.float64},
        {"autocast": True},
        {"groups": 1, "enable_gqa": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_attention_is_pytorch_s_own(change, called):
    asked = {"is_causal": True, "length": 24, "dtype": torch.float32, "autocast": False, "groups": 2, **change}
    length, dtype, autocast, groups = (asked.pop(name) for name in ("length", "dtype", "autocast", "groups"))
    given = tensors(2, groups, length, 8, 8, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)
        expected = scaled_dot_product_attention(*given, **asked)
        torch.manual_seed(1)
        with products.FastProducts(products.ONEDNN):
            found = scaled_dot_product_attention(*given, **asked)
    assert not called and torch.equal(found, expected)
