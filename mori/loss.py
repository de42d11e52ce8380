"""The loss: cross-entropy summed over the tokens, on labels that the dataset has already shifted."""

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100
# Rows of logits that exist at once. On a CPU by measurement (runs/LOG.md); a GPU, where adding up the head's gradient once for each chunk
# weighs more, gets four times as many, by reckoning alone.
CHUNK = 512


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses, in nats, computed in fp32 (or wider).

    Args:
        logits: `(B, T, V)`, of any float type.
        labels: `(B, T)`, the token that follows each position; -100 is not counted.

    Returns:
        A scalar. It is a sum and not a mean, so that micro-batches add up to the loss of the whole step; the
        caller divides by the count of labels. Softmax cross-entropy as in `torch.nn.functional.cross_entropy`.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def count_targets(labels: torch.Tensor) -> int:
    """How many labels, which are on the host, count towards the loss."""
    return int((labels.numpy() != IGNORE_INDEX).sum())


def chunked_cross_entropy_sum(hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """`cross_entropy_sum(head(hidden), labels)` without ever holding all logits.

    They are made for some hundred tokens at a time, and the gradients of `hidden`, weight and bias are computed in the same
    breath, so that no logit is kept for, or computed again in, the backward pass (Wijmans et al., 2024, arXiv:2411.09009, and
    Hsu et al., 2024, arXiv:2410.10989, do so in kernels of their own). Under autocast the matrix products are in its type, and
    the loss, the softmax and the sums over chunks in fp32, as there. Differentiable once.

    Args:
        hidden: `(B, T, D)`, what the model gives to its head.
        head: the head, whose weight is `(V, D)`; the bias may be None.
        labels: `(B, T)`; -100 is not counted.
    """
    return _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head.weight, head.bias, labels.flatten())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        kind, device = hidden.device.type, hidden.device
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # of the softmax and of all sums
        total = torch.zeros((), dtype=wide, device=device)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None  # (N, D)
        # On a CPU a product with a thin (V, D), D below 128, is up to four times as fast turned into (D, V).
        turned = kind == "cpu" and dtype == wide and weight.size(1) < 128
        shape = weight.t().shape if turned else weight.shape
        grad_weight = torch.zeros(shape, dtype=wide, device=device) if of_weight else None  # (V, D)
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=device) if of_bias else None  # (V)
        with torch.autocast(kind, enabled=False):
            weight = weight.to(dtype)
            counted = labels != IGNORE_INDEX
            labels = labels.where(counted, 0)[:, None]  # (N, 1)
            chunk = CHUNK if kind == "cpu" else 4 * CHUNK
            # A row takes up a multiple of 64 numbers: products are slower on rows that begin anywhere, as those of 50,257 do.
            rows, width = min(chunk, len(hidden)), -(-len(weight) // 64) * 64
            buffer = torch.empty(rows, width, dtype=dtype, device=device)[:, : len(weight)]
            wide_buffer = buffer if dtype == wide else torch.empty_like(buffer, dtype=wide)
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                x, label, share = (
                    hidden[part].to(dtype),
                    labels[part],
                    counted[part, None].to(wide),
                )  # (C, D), (C, 1), (C, 1)
                z = buffer[: len(x)]  # (C, V)
                torch.mm(x, weight.t(), out=z) if bias is None else torch.addmm(bias.to(dtype), x, weight.t(), out=z)
                largest, of_label = z.amax(-1, keepdim=True).to(wide), z.gather(1, label)  # (C, 1)
                e = torch.sub(z, largest, out=wide_buffer[: len(x)]).exp_()  # (C, V), in the place of z where it fits
                total_e = e.sum(-1, keepdim=True)  # (C, 1)
                total += ((total_e.log() + (largest - of_label)) * share).sum()
                if not (of_hidden or of_weight or of_bias):
                    continue
                # softmax - one-hot is the gradient by the logits. The division by the sum, and which rows count, are left to the
                # small sides of the products.
                grad, scale = e.scatter_add_(1, label, -total_e), share / total_e
                if of_bias:
                    grad_bias += (grad * scale).sum(0)
                if dtype != wide:
                    grad, scale = torch.div(grad, total_e, out=z), share
                if of_hidden:
                    grad_hidden[part] = ((weight.t() @ grad.t()).t() if turned else grad @ weight) * scale
                if of_weight and turned:
                    grad_weight.addmm_((x * scale).t(), grad)
                elif of_weight and dtype == wide:
                    grad_weight.addmm_(grad.t(), x * scale)
                elif of_weight:
                    grad_weight += grad.t() @ (x * scale.to(dtype))
        ctx.turned = turned
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        for grad in (grad_hidden, grad_bias, None if ctx.turned else grad_weight):
            if grad is not None:
                grad.mul_(grad_output)  # in place: it is used once
        if ctx.turned and grad_weight is not None:
            grad_weight = torch.mul(grad_weight.t(), grad_output, out=grad_weight.new_empty(grad_weight.t().shape))
        return grad_hidden, grad_weight, grad_bias, None
