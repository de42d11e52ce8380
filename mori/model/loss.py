"""The loss: cross-entropy summed over the tokens, on labels that the dataset has already shifted."""

import torch
import torch.nn.functional as F
from torch import nn

from mori.data.windows import IGNORE_INDEX
from mori.speed.matmul import CUT, Products

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


def chunked_cross_entropy_sum(
    hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, products: Products = CUT
) -> torch.Tensor:
    """`cross_entropy_sum(head(hidden), labels)` without ever holding all logits.

    They are made for some hundred tokens at a time, and the gradients of `hidden`, weight and bias are computed in the same
    breath, so that no logit is kept for, or computed again in, the backward pass (Wijmans et al., 2024, arXiv:2411.09009, and
    Hsu et al., 2024, arXiv:2410.10989, do so in kernels of their own). Under autocast the matrix products are in its type, and
    the loss, the softmax and the sums over chunks in fp32, as there. Differentiable once.

    Args:
        hidden: `(B, T, D)`, what the model gives to its head.
        head: the head, whose weight is `(V, D)`; the bias may be None.
        labels: `(B, T)`; -100 is not counted.
        products: how the products are computed on a CPU.
    """
    hidden, weight, bias = hidden.flatten(0, 1), head.weight, head.bias
    if not torch.is_grad_enabled():  # even then a Function hears that what it is given wants gradients (torch 2.13)
        hidden, weight, bias = hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels.flatten(), products)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, products):
        kind, device = hidden.device.type, hidden.device
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # of the softmax and of all sums
        total = torch.zeros((), dtype=wide, device=device)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None  # (N, D)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=device) if of_weight else None  # (V, D)
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=device) if of_bias else None  # (V)
        with torch.autocast(kind, enabled=False):
            weight = weight.to(dtype)
            counted = labels != IGNORE_INDEX
            labels = labels.where(counted, 0)  # (N)
            chunk = CHUNK if kind == "cpu" else 4 * CHUNK
            # The vocabulary comes first: so all three products run along memory, whatever number of tokens it has.
            buffer = torch.empty(len(weight) * min(chunk, len(hidden)), dtype=dtype, device=device)
            wide_buffer = buffer if dtype == wide else torch.empty_like(buffer, dtype=wide)
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                x, label, share = (
                    hidden[part].to(dtype),
                    labels[None, part],
                    counted[part].to(wide),
                )  # (C, D), (1, C), (C)
                z, e = (
                    one[: len(weight) * len(x)].view(len(weight), len(x)) for one in (buffer, wide_buffer)
                )  # (V, C)
                products.product(weight, x.t(), out=z)
                if bias is not None:
                    z += bias.to(dtype)[:, None]
                largest, of_label = z.amax(0).to(wide), z.gather(0, label)[0]  # (C)
                torch.sub(z, largest, out=e).exp_()  # in the place of z where it fits
                total_e = e.sum(0)  # (C)
                total += ((total_e.log() + (largest - of_label)) * share).sum()
                if not (of_hidden or of_weight or of_bias):
                    continue
                # softmax - one-hot is the gradient by the logits. The division by the sum, and which rows count, are left to the
                # small sides of the products.
                grad, scale = e.scatter_add_(0, label, -total_e[None]), share / total_e  # (V, C), (C)
                if of_bias:
                    grad_bias += grad @ scale
                if dtype != wide:
                    grad, scale = torch.div(grad, total_e, out=z), share
                scale = scale[:, None]
                if of_hidden:
                    grad_hidden[part] = products.product(grad.t(), weight) * scale
                if of_weight and dtype == wide:
                    products.add_product_(grad_weight, grad, x * scale)
                elif of_weight:
                    grad_weight += grad @ (x * scale.to(dtype))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        for grad in (grad_hidden, grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(grad_output)  # in place: it is used once
        return grad_hidden, grad_weight, grad_bias, None, None
