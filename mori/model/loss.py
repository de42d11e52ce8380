"""The loss: cross-entropy summed over the tokens, on labels that the dataset has already shifted."""

import torch
import torch.nn.functional as F
from torch import nn

from mori.data.windows import IGNORE_INDEX

CHUNK = 512  # tokens whose logits exist at once on a CPU (measured); 4x larger on a GPU (not measured)


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, token_losses: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Sum of the token losses in nats, computed in fp32 or wider, as `torch.nn.functional.cross_entropy`.

    Micro-batches add up to the loss of the whole step; the caller divides by the number of labels.

    Args:
        logits: `(B, T, V)`, of any float type.
        labels: `(B, T)`, the token that follows each position; -100 is ignored.
        token_losses: receives the losses of the tokens, a part at a time, with 0 for labels that are ignored.

    Returns:
        A scalar.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if token_losses is None:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    log_probs, labels = logits.flatten(0, 1).log_softmax(-1), labels.flatten()
    token_losses.append(F.nll_loss(log_probs, labels, ignore_index=IGNORE_INDEX, reduction="none"))
    return F.nll_loss(log_probs, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_cross_entropy_sum(
    hidden: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    token_losses: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`cross_entropy_sum(head(hidden), labels)` without holding all logits at once.

    The forward pass computes the logits of a few hundred tokens at a time together with the gradients of `hidden`, weight and
    bias, so that no logit is kept or recomputed for the backward pass (Wijmans et al., 2024, arXiv:2411.09009; Hsu et al.,
    2024, arXiv:2410.10989). Under autocast the matmuls have its type; the loss, the softmax and the sums over chunks are
    fp32. Differentiable once.

    Args:
        hidden: `(B, T, D)`, the input of the head.
        head: its weight is `(V, D)`; the bias may be None.
        labels: `(B, T)`; -100 is ignored.
        grad_scale: a scalar, on the device: the gradient that the backward pass will bring to this loss. The gradients are
            computed at that size, so that in fp16 none is lost that a scaled loss keeps (Micikevicius et al., 2018,
            arXiv:1710.03740).
        token_losses: as in `cross_entropy_sum`.
    """
    hidden, weight, bias = hidden.flatten(0, 1), head.weight, head.bias
    if not torch.is_grad_enabled():  # needs_input_grad stays True under no_grad (torch 2.13)
        hidden, weight, bias = hidden.detach(), weight.detach(), bias if bias is None else bias.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels.flatten(), grad_scale, token_losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, grad_scale, token_losses):
        kind, device = hidden.device.type, hidden.device
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # of the softmax and of all sums
        total = torch.zeros((), dtype=wide, device=device)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # (N, D)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=device) if needs_weight else None  # (V, D)
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=device) if needs_bias else None  # (V)
        with torch.autocast(kind, enabled=False):
            weight = weight.to(dtype)
            counted = labels != IGNORE_INDEX
            labels = labels.where(counted, 0)  # (N)
            chunk = CHUNK if kind == "cpu" else 4 * CHUNK
            # The vocabulary is the first dimension: all three matmuls then run along memory, for any number of tokens.
            buffer = torch.empty(len(weight) * min(chunk, len(hidden)), dtype=dtype, device=device)
            wide_buffer = buffer if dtype == wide else torch.empty_like(buffer, dtype=wide)
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                x, label, share = (
                    hidden[part].to(dtype),
                    labels[None, part],
                    counted[part].to(wide),
                )  # (C, D), (1, C), (C)
                logits, exps = (
                    b[: len(weight) * len(x)].view(len(weight), len(x)) for b in (buffer, wide_buffer)
                )  # (V, C)
                if bias is None:
                    torch.mm(weight, x.t(), out=logits)
                else:  # one rounding of the sum
                    torch.addmm(bias.to(dtype)[:, None], weight, x.t(), out=logits)
                largest, label_logit = logits.amax(0).to(wide), logits.gather(0, label)[0]  # (C)
                torch.sub(logits, largest, out=exps).exp_()  # overwrites the logits if the types are equal
                exp_sum = exps.sum(0)  # (C)
                losses = (exp_sum.log() + (largest - label_logit)) * share
                total += losses.sum()
                if token_losses is not None:
                    token_losses.append(losses)
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                # The gradient by the logits is softmax - one-hot. The small operands of the matmuls carry the division by
                # exp_sum and the labels that are ignored.
                grad = exps.scatter_add_(0, label, -exp_sum[None])  # (V, C)
                divisor = exp_sum if grad_scale is None else exp_sum / grad_scale  # (C)
                scale = share / divisor
                if needs_bias:
                    grad_bias += grad @ scale
                if dtype != wide:
                    grad, scale = torch.div(grad, divisor, out=logits), share
                scale = scale[:, None]
                if needs_hidden:
                    grad_hidden[part] = torch.mm(grad.t(), weight) * scale
                if needs_weight and dtype == wide:
                    grad_weight.addmm_(grad, x * scale)
                elif needs_weight:
                    grad_weight += grad @ (x * scale.to(dtype))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.grad_scale = grad_scale
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        factor = grad_output if ctx.grad_scale is None else grad_output / ctx.grad_scale
        for grad in (grad_hidden, grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(factor)  # in place: each is used once
        return grad_hidden, grad_weight, grad_bias, None, None, None
