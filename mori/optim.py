"""Optimizers and learning-rate schedules by name.

A new optimizer is a function in `OPTIMIZERS` and its name among the choices of `config.optim`; a new schedule is a function in
`SCHEDULES` and its name among those of `config.lr_scheduler_type`. Checkpoints hold the `state_dict()` of any optimizer.
"""

import json
import math
import re
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mori.cli import UserError, one_line
from mori.config import TrainConfig

# As in `transformers.Trainer.get_decay_parameter_names`, so that the same weights decay.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_SAMPLED = 1 << 16  # weights from which the length of an update is estimated
_SLICE = 1 << 22  # weights that `RoundingAdamW` updates at once: bounds its fp32 temporaries


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer `config.optim` for the trainable parameters of `model`."""
    return OPTIMIZERS[config.optim](model, config)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights that decay, and biases and norms, which do not."""
    in_layer_norm = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = _NO_DECAY.search(name.lower()) or id(parameter) in in_layer_norm
            (no_decay if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) in PyTorch's fused kernel; `RoundingAdamW` for bf16 weights."""
    groups, options = parameter_groups(model, config.weight_decay), _adam_options(config)
    if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
        return RoundingAdamW(groups, options)
    return torch.optim.AdamW(groups, **options, fused=True)


def adamw_unfused(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW without the fused kernel, as Trainer's `optim="adamw_torch"`; the last bits differ."""
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), **_adam_options(config))


def _plain(optimizer: type[torch.optim.Optimizer], model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer of PyTorch with its own defaults, as Trainer sets up `sgd`, `rmsprop` and `adagrad`."""
    return optimizer(parameter_groups(model, config.weight_decay), lr=config.learning_rate)


def adamw_bitsandbytes(kind: str, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW by bitsandbytes, as Trainer sets it up; `kind` is its class there.

    With 8-bit moments (Dettmers et al., 2022, arXiv:2110.02861) embeddings keep 32-bit ones. On a GPU, the paged kinds move moments
    to host memory when memory runs out (Dettmers et al., 2023, arXiv:2305.14314); on a CPU they are the same as the others.
    """
    import bitsandbytes.optim

    class TensorStateAdamW(getattr(bitsandbytes.optim, kind)):
        def state_dict(self) -> dict:
            """Tensors only; bitsandbytes wraps some of them for FSDP and counts steps in an int."""
            own = torch.optim.Optimizer.state_dict(self)
            state = {
                index: {name: torch.as_tensor(value) for name, value in values.items()}
                for index, values in own["state"].items()
            }
            return {**own, "state": state}

        def load_state_dict(self, state_dict: dict) -> None:
            """Load the result of `state_dict`; paged moments are pages again."""
            state = {index: {**values, "step": int(values["step"])} for index, values in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": state})
            for parameter, values in self.state.items() if self.is_paged else ():
                for name in {"state1", "state2"} & values.keys():
                    values[name] = self.get_state_buffer(parameter, dtype=values[name].dtype).copy_(values[name])

        def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            with warnings.catch_warnings():  # one for each tensor on a CPU, which has no pages
                warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
                return super().get_state_buffer(p, dtype)

    for module in model.modules():
        if isinstance(module, nn.Embedding) and kind.endswith("8bit"):
            manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return TensorStateAdamW(parameter_groups(model, config.weight_decay), **_adam_options(config))


def adafactor(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235) with a fixed learning rate, as Trainer's `optim="adafactor"`."""
    from transformers.optimization import Adafactor

    groups = parameter_groups(model, config.weight_decay)
    return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)


def muon(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for the hidden matrices, AdamW for embeddings, head, biases and norms.

    Muon's update is scaled to the RMS of AdamW's (Liu et al., 2025, arXiv:2502.16982), so both share one learning rate.
    """
    head = model.get_output_embeddings()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        looked_up.add(id(head.weight))
    hidden, others = [], []
    for group in parameter_groups(model, config.weight_decay):
        matrices = [p for p in group["params"] if p.dim() == 2 and id(p) not in looked_up]
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in group["params"] if id(p) not in matrix_ids]
        hidden += [{**group, "params": matrices}] if matrices else []
        others += [{**group, "params": rest}] if rest else []
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        parts.append(torch.optim.Muon(hidden, **options))
    if others:
        parts.append(torch.optim.AdamW(others, **_adam_options(config), fused=True))
    return CombinedOptimizer(parts)


def _adam_options(config: TrainConfig) -> dict:
    return {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each for its own parameters, with one `param_groups` and one `state`."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """Give each part its slice of the shared groups, and the shared state."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state, start = self.param_groups[start:end], self.state, end

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of every part."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load state and groups, and share them with the parts again."""
        super().load_state_dict(state_dict)
        self._share()


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights: fp32 moments and arithmetic, and stochastic rounding of the new weight.

    An update smaller than a weight's last bit is applied with proportional probability instead of always being rounded away
    (Zamirai et al., 2020, arXiv:2010.06192). The generator is seeded with the step number, so ranks and resumed runs draw the
    same numbers. Parameters in fp32 are not rounded.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One AdamW step, a slice of each parameter at a time."""
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
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                rows = max(1, _SLICE * len(torch.atleast_1d(parameter)) // max(1, parameter.numel()))
                for part, grad, exp_avg, exp_avg_sq in zip(
                    *(torch.atleast_1d(t).split(rows) for t in tensors), strict=True
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
                        weight = round_stochastically(weight, generators[part.device])
                    part.copy_(weight)


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 `values` to one of the two neighbours in bf16, the nearer with the higher probability: the mean is kept.

    A random 16-bit number is added to the 16 bits that bf16 drops (Zamirai et al., 2020, arXiv:2010.06192, section 3).
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainConfig], torch.optim.Optimizer]] = {
    "adamw_torch_fused": adamw,
    "adamw_torch": adamw_unfused,
    "adamw_bnb_8bit": partial(adamw_bitsandbytes, "AdamW8bit"),
    "paged_adamw_8bit": partial(adamw_bitsandbytes, "PagedAdamW8bit"),
    "paged_adamw_32bit": partial(adamw_bitsandbytes, "PagedAdamW32bit"),
    "muon": muon,
    "adafactor": adafactor,
    "sgd": partial(_plain, torch.optim.SGD),
    "rmsprop": partial(_plain, torch.optim.RMSprop),
    "adagrad": partial(_plain, torch.optim.Adagrad),
}


def _after_warmup(factor: Callable[..., float]) -> Callable:
    """A schedule that rises linearly to the peak, and follows `factor(step, warmup_steps, total_steps)` from there."""

    def schedule(optimizer, num_warmup_steps: int, num_training_steps: int, scheduler_specific_kwargs: dict | None):
        keywords = scheduler_specific_kwargs or {}

        def of_step(step: int) -> float:
            if step < num_warmup_steps:
                return step / num_warmup_steps
            return factor(step, num_warmup_steps, num_training_steps, **keywords)

        return LambdaLR(optimizer, of_step)

    return schedule


def _linear(step: int, warmup: int, total: int) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    """Loshchilov and Hutter, 2017, arXiv:1608.03983."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * ((step - warmup) / max(1, total - warmup)))))


def _constant(optimizer, num_warmup_steps: int, num_training_steps: int, scheduler_specific_kwargs: dict | None):
    return _after_warmup(lambda step, warmup, total: 1.0)(optimizer, 0, num_training_steps, scheduler_specific_kwargs)


def _of_transformers(name: str, *arguments, **options):
    """A schedule of transformers, imported when it is used: its module imports peft and bitsandbytes if they are installed."""
    from transformers import get_scheduler

    return get_scheduler(name, *arguments, **options)


SCHEDULES: dict[str, Callable] = {
    "linear": _after_warmup(_linear),
    "cosine": _after_warmup(_cosine),
    "constant_with_warmup": _after_warmup(lambda step, warmup, total: 1.0),
    "constant": _constant,
} | {name: partial(_of_transformers, name) for name in (
    "cosine_with_restarts", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)}  # fmt: skip


class Schedule:
    """The learning rate of each step, equal to the schedules of transformers (`get_scheduler`) to the bit.

    Most are functions of the step. `reduce_lr_on_plateau` and `greedy` follow the losses of the evaluations instead.

    Args:
        config: names the schedule and its keywords, and the peak.
        warmup_steps, total_steps: the lengths of the warm-up and of the run, in steps.

    Raises UserError for keywords that the schedule does not take.
    """

    def __init__(self, config: TrainConfig, warmup_steps: int, total_steps: int):
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
        try:
            self._scheduler = SCHEDULES[config.lr_scheduler_type](
                self._optimizer,
                num_warmup_steps=warmup_steps,
                num_training_steps=total_steps,
                scheduler_specific_kwargs=config.lr_scheduler_kwargs,
            )
            self.learning_rate(total_steps - 1)
        except (TypeError, ValueError, ArithmeticError, KeyError) as error:
            keywords = json.dumps(config.lr_scheduler_kwargs or {})
            raise UserError(
                f"lr_scheduler_type {config.lr_scheduler_type} with lr_scheduler_kwargs {keywords}: {one_line(error)}"
            ) from None

    def learning_rate(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        if isinstance(self._scheduler, LambdaLR):
            return self._scheduler.base_lrs[0] * self._scheduler.lr_lambdas[0](step)
        return self._optimizer.param_groups[0]["lr"]

    def observe(self, loss: float) -> None:
        """Take the loss of an evaluation into account."""
        if not isinstance(self._scheduler, LambdaLR):
            self._scheduler.step(loss)

    def state_dict(self) -> dict:
        """What `observe` has changed, as JSON values; empty for a function of the step."""
        if isinstance(self._scheduler, LambdaLR):
            return {}
        return {"learning_rate": self.learning_rate(0), "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        """Restore the result of `state_dict`."""
        if saved:
            self._optimizer.param_groups[0]["lr"] = saved["learning_rate"]
            self._scheduler.load_state_dict(saved["scheduler"])


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> torch.Tensor:
    """Take an optimizer step unless `grad_norm` is NaN or infinite; returns 1.0 if the step was skipped, else 0.0.

    PyTorch's fused kernels read `found_inf` on the device, as for `torch.amp.GradScaler`; for any other optimizer the host
    reads the norm. (GradScaler's own `step` checks individual gradients, not the norm.)
    """
    nonfinite = grad_norm.isfinite().logical_not().float()
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, nonfinite
        optimizer.step()
    elif not nonfinite:
        optimizer.step()
    return nonfinite


def sampled_weights(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Every n-th of all weights in fp32, `(N,)` on the device; all of them in a small model, about 65,536 in a large one."""
    stride = max(1, sum(parameter.numel() for parameter in parameters) // _SAMPLED)
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:  # a divisor of the width would sample the same columns in every row
        stride += 1
    parts, position = [], 0
    for parameter in parameters:
        parts.append(parameter.detach().reshape(-1)[-position % stride :: stride])
        position += parameter.numel()
    return torch.cat([part.float() for part in parts])


def update_ratio(before: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """|w' - w| / |w|: the length of a step's change of the weights by their length before it, a scalar on the device.

    `before` is `sampled_weights` from before the step. Both lengths are L2 norms over the sample, so their ratio is exact for a
    small model and an estimate for a large one. It holds for every optimizer, with decay, and is 0 for a skipped step.
    """
    return (sampled_weights(parameters) - before).norm() / before.norm()
