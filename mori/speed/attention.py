"""Causal attention of a long window on a CPU, as batched products of blocks of queries with the keys up to them.

PyTorch's kernel for a CPU multiplies the small matrices of one head after another. Batches over the heads are 1.1 to 1.5 times as fast
where the processor is fast (runs/LOG.md), and what stands above the diagonal is computed for one block only.
"""

import math
from collections.abc import Iterator

import torch

LONG = 256  # tokens; in a shorter window there is nothing to gain
_BLOCK = 64  # queries at once: their weights stay in the cache


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """`scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)`, `(B, H, T, D)`, in fp32 or fp64.

    No more than a block's weights exist at once; the backward pass computes them again (Rabe and Staats, 2021,
    arXiv:2112.05682). Differentiable once.

    Args:
        query: `(B, H, T, D)`.
        key, value: `(B, G, T, D)`, the latter of any D, where each of the G heads serves H / G neighbouring heads of `query`.
        scale: of the scores; None is `1 / sqrt(D)`.
    """
    return _CausalAttention.apply(query, key, value, 1 / math.sqrt(query.size(-1)) if scale is None else scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale):
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        out = _empty(query, *query.shape[:3], value.size(3))
        blocks = _Blocks(query, key, scale)
        for row, heads in blocks.rows():
            q, k, v, into = query[row, heads], key[row], value[row], out[row, heads]
            for block, before in blocks.spans():
                into[:, block] = torch.bmm(blocks.weights(q[:, block], k[:, before]), v[:, before])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = (_empty(one, *one.shape) for one in (query, key, value))
        grad_key.zero_()
        grad_value.zero_()
        blocks = _Blocks(query, key, ctx.scale)
        for row, heads in blocks.rows():
            q, k, v, g, into = query[row, heads], key[row], value[row], grad[row, heads], grad_query[row, heads]
            for block, before in blocks.spans():
                weights = blocks.weights(q[:, block], k[:, before])  # (G, Q, S)
                grad_value[row, :, before] += torch.bmm(weights.transpose(1, 2), g[:, block])
                of_weights = torch.bmm(g[:, block], v[:, before].transpose(1, 2), out=blocks.scores_like(weights))
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                into[:, block] = torch.bmm(of_scores, k[:, before])
                grad_key[row, :, before] += torch.bmm(of_scores.transpose(1, 2), q[:, block])
        return grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value, None


class _Blocks:
    """The blocks of one call, and the memory that they share."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, scale: float):
        (self._batch, heads, self._length, _), self._groups, self._scale = query.shape, key.size(1), scale
        self._shared = heads // self._groups
        self._scores, self._weights = query.new_empty(2, self._groups * _BLOCK * self._length)
        self._above = query.new_full((_BLOCK, _BLOCK), -math.inf).triu_(1)

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Each row of the batch with one head of `query` for every head of `key`."""
        for row in range(self._batch):
            for first in range(self._shared):
                yield row, slice(first, None, self._shared)

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Each block of queries, and the keys up to its end."""
        for start in range(0, self._length, _BLOCK):
            end = min(start + _BLOCK, self._length)
            yield slice(start, end), slice(0, end)

    def weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The softmax `(G, Q, S)` of the scores of the last Q of S places; overwritten by the next call."""
        shape = (*query.shape[:2], key.size(1))
        scores, weights = (memory[: math.prod(shape)].view(shape) for memory in (self._scores, self._weights))
        torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=self._scale, out=scores)
        scores[:, :, -shape[1] :] += self._above[: shape[1], : shape[1]]
        return torch.softmax(scores, -1, out=weights)

    def scores_like(self, weights: torch.Tensor) -> torch.Tensor:
        """The memory of the scores, which are not needed once there are weights."""
        return self._scores[: weights.numel()].view_as(weights)


def _empty(like: torch.Tensor, batch: int, heads: int, length: int, size: int) -> torch.Tensor:
    """Memory for `(B, H, T, D)` in which the heads of a token stand side by side, as the layers around want it."""
    return like.new_empty(batch, length, heads, size).transpose(1, 2)
