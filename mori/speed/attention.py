"""Causal attention in bf16 on a CPU, by blocks of queries: PyTorch's own kernel multiplies few rows at a time there."""

import math

import torch

_BLOCK = 128  # queries


def suits_blocks(query: torch.Tensor) -> bool:
    """Whether attention of `query` is computed in bf16 on a CPU, and not by the compiler."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype) == torch.bfloat16


def attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Causal attention `(B, T, H, D)` of `query` `(B, H, T, D)`, with one head of `key` and `value` for each H / K heads.

    The backward pass computes the probabilities again (Rabe and Staats, 2021, arXiv:2112.05682): memory grows with T, not its
    square. `scale` is by default 1 / sqrt(D).
    """
    (batch, heads, length, _), groups = query.shape, query.size(1) // key.size(1)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    rows = []
    for tensor in (query * scale, key, value):
        if tensor.size(1) < heads:
            tensor = tensor.repeat_interleave(groups, 1)
        rows.append(tensor.to(torch.bfloat16).reshape(batch * heads, length, -1))  # (BH, T, D)
    return _Attention.apply(*rows).view(batch, heads, length, -1).transpose(1, 2).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, query, key, value):
        result = torch.empty_like(value)
        for block, before in _blocks(query):
            result[:, block] = torch.bmm(_probabilities(query[:, block], key[:, before]), value[:, before])
        ctx.save_for_backward(query, key, value)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        for block, before in _blocks(query):
            probabilities = _probabilities(query[:, block], key[:, before])  # (BH, Q, S)
            grad_value[:, before] += torch.bmm(probabilities.mT, grad[:, block])
            grad_scores = torch.bmm(grad[:, block], value[:, before].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype)
            grad_query[:, block] = torch.bmm(grad_scores, key[:, before])
            grad_key[:, before] += torch.bmm(grad_scores.mT, query[:, block])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _blocks(query: torch.Tensor) -> list[tuple[slice, slice]]:
    """The columns of each block of queries, and of the keys that it attends to."""
    length = query.size(1)
    ends = [min(start + _BLOCK, length) for start in range(0, length, _BLOCK)]
    return [(slice(start, end), slice(0, end)) for start, end in zip([0, *ends], ends, strict=False)]


def _probabilities(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Those of the last Q of S tokens, `(BH, Q, S)`: each attends to itself and all before it."""
    scores, count = torch.bmm(query, key.mT), query.size(1)
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    scores[..., -count:].masked_fill_(later, -math.inf)
    return torch.softmax(scores, -1)
