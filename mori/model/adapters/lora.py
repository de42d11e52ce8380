"""LoRA: trainable low-rank matrices beside frozen layers (Hu et al., 2021, arXiv:2106.09685)."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mori.cli import UserError
from mori.speed.matmul import library_in_use, matmul_context


@dataclass(frozen=True)
class LoRASettings:
    """The shape of the adapters; the names of PEFT's `LoraConfig`.

    Attributes:
        r, lora_alpha, use_rslora: the rank, and what the scale is computed from.
        lora_dropout: the dropout in front of the adapters.
        target_modules: ends of layers' names, or regular expressions; empty for all linear layers but the head.
        modules_to_save: ends of the names of modules that train whole.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()


class LoRA(nn.Module):
    """The adapter of one linear layer: y + B(A(dropout(x))) * scale, in fp32. B starts at zero, so nothing changes at first.

    Args:
        layer: an `nn.Linear`, or GPT-2's `Conv1D`, whose weight is transposed.
        settings: rank, scale and dropout.

    Attributes:
        fused: compute the adapter in one autograd function (`_LowRank`); the last bits may differ from PEFT's.
    """

    def __init__(self, layer: nn.Module, settings: LoRASettings):
        super().__init__()
        inputs, outputs = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
        options = {"bias": False, "device": layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(inputs, settings.r, **options)
        self.lora_B = nn.Linear(settings.r, outputs, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(settings.lora_dropout) if settings.lora_dropout else nn.Identity()
        self.scale = settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)
        self.settings, self.fused = settings, False
        self.hook = layer.register_forward_hook(lambda layer, args, output: layer.lora(args[0], output))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The layer's output `y` `(..., outputs)` with the adapter's added, for its input `x` `(..., inputs)`."""
        if self.fused:
            p = self.settings.lora_dropout if self.training else 0.0
            rows = x.flatten(0, -2), y.flatten(0, -2)
            return _LowRank.apply(*rows, self.lora_A.weight, self.lora_B.weight, self.scale, p).view(y.shape)
        down = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))  # (..., r)
        return (y + self.lora_B(down) * self.scale).to(y.dtype)

    def delta(self) -> torch.Tensor:
        """What the adapter adds to the weight `(outputs, inputs)`."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scale


class _LowRank(torch.autograd.Function):
    """y + B(A(dropout(x))) * scale, for x `(N, I)`, y `(N, O)`, A `(r, I)` and B `(O, r)`, in the type of y.

    It keeps x, which the layers that share an input have in common, and a mask of one byte an element, where autograd would
    keep several products of both.
    """

    @staticmethod
    def forward(ctx, x, y, a, b, scale, p):
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p) if p else None
        ctx.scale, ctx.library = scale / (1 - p), library_in_use()
        with torch.autocast(x.device.type, enabled=False):
            down = torch.mm(_masked(x, mask, y.dtype), a.to(y.dtype).t()) * ctx.scale  # (N, r)
            ctx.save_for_backward(x, mask, down, a, b)
            return torch.mm(down, b.to(y.dtype).t()).add_(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, mask, down, a, b = ctx.saved_tensors
        grad_x = None
        with matmul_context(ctx.library):
            grad_down = torch.mm(grad, b.to(grad.dtype)) * ctx.scale  # (N, r)
            grad_a = torch.mm(grad_down.t(), _masked(x, mask, grad.dtype))
            grad_b = torch.mm(down.t(), grad).t()
            if ctx.needs_input_grad[0]:
                grad_x = _masked(torch.mm(grad_down, a.to(grad.dtype)), mask, x.dtype)
        return grad_x, grad, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None


def _masked(x: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if mask is None else x.to(dtype) * mask.to(dtype)


def add(model: nn.Module, settings: LoRASettings, called: Iterable[str] | None = None) -> list[str]:
    """Freeze `model` and give its target layers adapters; returns the names of these layers.

    An adapter is the submodule `lora` of its layer and works in a forward hook, so the model's own tensors keep their names.

    Args:
        called: the names of the layers that a forward pass calls (`called_layers`); a model may read a layer's weight without
            calling the layer, and an adapter there would never train. None counts every layer as called.

    Raises UserError if a target, or a module to save, matches nothing, and for a target that is tied to the embeddings.
    """
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    names = _targets(model, layers, settings.target_modules, set(layers if called is None else called))
    trained = [name for name, _ in model.named_modules() if _matches(name, settings.modules_to_save)]
    _check_matched(settings.modules_to_save, [name for name, _ in model.named_modules()], "lora_modules_to_save")
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    for name in names:
        layer = layers[name]
        layer.lora = LoRA(layer, settings).train(model.training)
    return names


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(getattr(module, "lora", None), LoRA)}


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter may stand beside `module`."""
    return isinstance(module, (nn.Linear, Conv1D))


@torch.no_grad()
def called_layers(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """The names of the linear layers that `run()`, a forward pass, calls."""
    names: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return names


def _targets(model: nn.Module, layers: dict[str, nn.Module], targets: tuple[str, ...], called: set[str]) -> list[str]:
    """The names of the layers that get adapters."""
    head = model.get_output_embeddings()
    if not targets:
        return [name for name, layer in layers.items() if layer is not head and name in called]
    names = [name for name in layers if _matches(name, targets)]
    _check_matched(targets, list(layers), "lora_target_modules")
    if (
        head is not None
        and any(layers[name] is head for name in names)
        and head.weight is model.get_input_embeddings().weight
    ):
        raise UserError(
            "lora_target_modules: the head shares its weight with the embeddings, so an adapter there could not be merged; "
            "leave it out, or name the embeddings in --lora_modules_to_save"
        )
    silent = [name for name in names if name not in called]
    if silent:
        raise UserError(
            f"lora_target_modules: {silent[0]} would never train, because the model reads its weight directly; leave it out"
        )
    return names


def _matches(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") or _fullmatch(end, name) for end in ends)


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _check_matched(ends: Iterable[str], names: list[str], flag: str) -> None:
    """Raise UserError for the first of `ends` that matches no name."""
    for end in ends:
        if not any(_matches(name, [end]) for name in names):
            known = ", ".join(
                sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""})
            )
            raise UserError(f"{flag}: {end} matches no layer of this model; its layers are named {known}")


def merged_state_dict(model: nn.Module, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """The `state_dict(keep_vars)` of the model with its adapters merged into the weights; tied tensors stay tied."""
    state = {
        name: tensor for name, tensor in model.state_dict(keep_vars=keep_vars).items() if ".lora.lora_" not in name
    }
    return state | {f"{name}.weight": merged_weight(layer).detach() for name, layer in adapted(model).items()}


def merge(model: nn.Module) -> nn.Module:
    """Merge the adapters of `model` into its weights and remove them; a model without adapters stays as it is."""
    for layer in adapted(model).values():
        layer.weight.data = merged_weight(layer).detach()
        layer.lora.hook.remove()
        del layer.lora
    return model


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of `layer` with its adapter's part added, in the layer's own shape and type."""
    delta = layer.lora.delta()
    return (layer.weight + (delta.t() if isinstance(layer, Conv1D) else delta)).to(layer.weight.dtype)
