"""The optimizers and their parameter groups, and the learning rate as a pure function of the step."""

import math
import re

import torch
from torch import nn

# The names that `transformers.Trainer.get_decay_parameter_names` keeps from decaying, so that the same weights decay.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_SLICE = 1 << 22  # weights of which `RoundingAdamW` makes its intermediate values at a time


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
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    name: str = "adamw_torch_fused",
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) in PyTorch's fused kernel.

    The fused kernel also skips its update where `optimizer.found_inf` is 1, without asking the host. Where weights are in
    bf16 it is `RoundingAdamW`; as "adamw_bnb_8bit" it is bitsandbytes' (see `eight_bit_adamw`). These two ask the host.
    """
    groups, how = parameter_groups(model, weight_decay), {"lr": lr, "betas": betas, "eps": eps}
    if name == "adamw_bnb_8bit":
        return eight_bit_adamw(model, groups, **how)
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return RoundingAdamW(groups, how)
    return torch.optim.AdamW(groups, **how, fused=True)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW for weights in bf16: moments and arithmetic are in fp32, and the new weight is rounded up or down at random.

    An update that is smaller than a weight's last bit is so done now and then, and is not lost each time (Zamirai et al.,
    2020, arXiv:2010.06192). The random numbers come from the number of the step alone: the same on every rank, and after
    a resume. A parameter in fp32 is not rounded.
    """

    found_inf: torch.Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step, or nothing where `found_inf` is 1."""
        if self.found_inf:
            return
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
                step = int(state["step"])
                whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                rows = max(1, _SLICE * len(torch.atleast_1d(parameter)) // max(1, parameter.numel()))
                for part, grad, exp_avg, exp_avg_sq in zip(
                    *(torch.atleast_1d(t).split(rows) for t in whole), strict=True
                ):
                    grad = grad.float()
                    exp_avg.lerp_(grad, 1 - beta1)
                    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                    scale = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
                    weight = part.float() * (1 - lr * group["weight_decay"])
                    weight.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**step))
                    if part.dtype == torch.bfloat16:
                        if part.device not in generators:
                            generators[part.device] = torch.Generator(part.device).manual_seed(step)
                        weight = rounded_at_random(weight, generators[part.device])
                    part.copy_(weight)

    def load_state_dict(self, state_dict: dict) -> None:
        """As PyTorch does, which would round the moments to the type of the weights."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, values in state_dict["state"].items():
            device = parameters[index].device
            for name, value in values.items():
                self.state[parameters[index]][name] = value.clone() if name == "step" else value.to(device, copy=True)


def rounded_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 `values` in bf16, each one of its two neighbours, the nearer the likelier, so that the mean is kept.

    The 16 bits that bf16 leaves off are carried into it by a random number of as many (Zamirai et al., 2020,
    arXiv:2010.06192, section 3).
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def eight_bit_adamw(model: nn.Module, groups: list[dict], **how) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments of 8 bits (Dettmers et al., 2022, arXiv:2110.02861), those of embeddings of 32.

    As Trainer sets it up for `optim="adamw_bnb_8bit"`.
    """
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    class EightBitAdamW(AdamW8bit):
        found_inf: torch.Tensor | float = 0.0

        def step(self, closure=None) -> None:
            if not self.found_inf:
                super().step()

        def state_dict(self) -> dict:
            """With tensors alone, and none of them wrapped."""
            made = torch.optim.Optimizer.state_dict(self)
            state = {
                index: {name: torch.as_tensor(value) for name, value in values.items()}
                for index, values in made["state"].items()
            }
            return {**made, "state": state}

        def load_state_dict(self, state_dict: dict) -> None:
            state = {index: {**values, "step": int(values["step"])} for index, values in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": state})

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return EightBitAdamW(groups, **how)


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
