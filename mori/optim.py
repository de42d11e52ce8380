"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

import math
import re

import torch
from torch import nn

# The names that `transformers.Trainer.get_decay_parameter_names` keeps from decaying, so that the same weights decay.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights that decay, and those that do not (biases, norms), the latter with weight decay 0."""
    in_layer_norm = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = _NO_DECAY.search(name.lower()) or id(parameter) in in_layer_norm
            (no_decay if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) in PyTorch's fused kernel.

    The fused kernel also skips its update where `optimizer.found_inf` is 1, without asking the host.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of the optimizer step number `step`, counted from 0.

    It rises linearly from 0 over `warmup_steps`; then `linear` falls to 0 at `total_steps`, `cosine` falls along half
    a cosine wave (Loshchilov and Hutter, 2017, arXiv:1608.03983), and `constant` stays. The operations stand in the
    order of `transformers.get_scheduler`, so that the values are equal to the last bit.
    """
    if step < warmup_steps:
        return peak * (step / max(1, warmup_steps))
    after = total_steps - warmup_steps
    if schedule == "linear":
        return peak * max(0.0, (total_steps - step) / max(1, after))
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, after)
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def skip_unless_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> torch.Tensor:
    """Make the optimizer's next step do nothing where `grad_norm` is NaN or infinite; returns 1.0 there and else 0.0.

    The choice stays on the device: fused optimizers read `found_inf` in their kernel, as for `torch.amp.GradScaler`. (Its
    `step` would put its own there, which looks at single gradients and not at their norm: call the optimizer's.)
    """
    optimizer.grad_scale = None
    optimizer.found_inf = grad_norm.isfinite().logical_not().float()
    return optimizer.found_inf
