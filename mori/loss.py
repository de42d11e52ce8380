"""The loss: cross-entropy summed over the tokens, on labels that the dataset has already shifted."""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


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
    """How many labels count towards the loss."""
    return int((labels != IGNORE_INDEX).sum())
