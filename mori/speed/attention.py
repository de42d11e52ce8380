"""Causal attention on a CPU by blocks of queries, where PyTorch's own is slow: in bf16, and with dropout."""

import math

import torch

_BLOCK = 128  # queries


def suits_blocks(query: torch.Tensor, dropout: float) -> bool:
    """Whether blocks are the better way for `query` `(B, H, T, D)`: on a CPU, in bf16, or in fp32 with dropout if T is not small.

    With dropout, PyTorch keeps several matrices of all probabilities, and computes those of later tokens too.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling() or dropout >= 1:
        return False
    dtype = _dtype(query)
    return dtype == torch.bfloat16 or dtype == torch.float32 and dropout > 0 and query.size(2) > _BLOCK


def attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention `(B, T, H, D)` of `query` `(B, H, T, D)`, with one head of `key` and `value` for each H / K heads.

    The backward pass computes the probabilities again (Rabe and Staats, 2021, arXiv:2112.05682): what it keeps grows with T; with
    `dropout`, the probability that a probability is set to zero, also a byte for each of them. `scale` is by default 1 / sqrt(D).
    The random numbers are those of `torch.nn.functional.scaled_dot_product_attention`.
    """
    (batch, heads, length, _), groups, dtype = query.shape, query.size(1) // key.size(1), _dtype(query)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    rows = []
    for tensor in (query * scale, key, value):
        if tensor.size(1) < heads:
            tensor = tensor.repeat_interleave(groups, 1)
        rows.append(tensor.to(dtype).reshape(batch * heads, length, -1))  # (BH, T, D)
    kept = None
    if dropout:
        kept = torch.empty(batch * heads, length, length, dtype=torch.bool).bernoulli_(1 - dropout)
    return _Attention.apply(*rows, kept, dropout).view(batch, heads, length, -1).transpose(1, 2).contiguous()


def _dtype(query: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


class _Attention(torch.autograd.Function):
    """Attention of rows `(BH, T, D)`; `kept` `(BH, T, T)` are the probabilities that dropout leaves, if there is any."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, query, key, value, kept, dropout):
        result = torch.empty_like(value)
        for block, before in _blocks(query):
            probabilities = _probabilities(query[:, block], key[:, before])
            if kept is not None:
                probabilities.mul_(kept[:, block, before])
            result[:, block] = torch.bmm(probabilities, value[:, before])
        ctx.save_for_backward(query, key, value, kept)
        ctx.factor = 1 / (1 - dropout)
        return result if kept is None else result.mul_(ctx.factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        query, key, value, kept = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        if kept is not None:
            grad = grad * ctx.factor
        for block, before in _blocks(query):
            probabilities = _probabilities(query[:, block], key[:, before])  # (BH, Q, S)
            grad_scores = torch.bmm(grad[:, block], value[:, before].mT)
            weights = probabilities
            if kept is not None:
                weights = probabilities * kept[:, block, before]
                grad_scores.mul_(kept[:, block, before])
            grad_value[:, before] += torch.bmm(weights.mT, grad[:, block])
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype)
            grad_query[:, block] = torch.bmm(grad_scores, key[:, before])
            grad_key[:, before] += torch.bmm(grad_scores.mT, query[:, block])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


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
