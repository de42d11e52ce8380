"""Activations, gates and norms that keep fewer tensors for the backward pass than those written out in Python.

A layer is recognized by what it computes: its output and its gradients for a few random rows must be those of the replacement.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import activations

_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative, of a replacement; else 1e-5
_MIN_RECOMPUTED = 1 << 21  # elements; fewer are not missed, and computing them again takes 1 to 3 % of a step
_aten = torch.ops.aten
# The activations of MLPs: the function, and its gradient from that of its output and its input.
_ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "tanh": (partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
}
_KINDS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    nn.GELU: "gelu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "tanh",
    activations.NewGELUActivation: "tanh",
}


def fuse_activations(model: nn.Module) -> int:
    """Replace Python tanh-GELU modules by PyTorch's kernel; returns their number.

    It is the same function (Hendrycks and Gimpel, 2016, arXiv:1606.08415) up to the last bits, and keeps one MLP-sized tensor for
    the backward pass instead of several. Saved files do not change.
    """
    modules = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) in (activations.NewGELUActivation, activations.FastGELUActivation)
    ]
    for module, name in modules:
        setattr(module, name, nn.GELU(approximate="tanh"))
    return len(modules)


def fuse_layers(model: nn.Module, recompute: bool = True) -> list[str]:
    """Give MLPs and RMS norms a forward pass, used while gradients are computed, that keeps fewer tensors.

    With `recompute`, the backward pass computes the input of an MLP's last layer again; not with gradient checkpointing, which
    keeps nothing there. Returns what was replaced, in words. A gate is `activation(gate) * up` (Shazeer, 2020, arXiv:2002.05202),
    a norm that of Zhang and Sennrich, 2019, arXiv:1910.07467.
    """
    replaced, verdicts = set(), {}
    for module in model.modules():
        for number, (name, fused, width) in enumerate(_candidates(module, recompute)):
            settings = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
            key = type(module), name, width, str(settings)
            if key not in verdicts:
                verdicts[key] = _agrees(module, number, recompute)
            if verdicts[key]:
                module.forward = partial(_with_gradients, fused, module.forward)
                replaced.add(name.split()[0])
                break
    return [f"fused {name}" for name in sorted(replaced)]


def _candidates(module: nn.Module, recompute: bool) -> list[tuple[str, Callable, int]]:
    """The replacements that may compute what `module` does: a name, a forward pass, and the width of its input."""
    children = dict(module.named_children())
    kind = next((_kind_of(child) for child in children.values() if type(child) in _KINDS), None)
    if kind and {"gate_proj", "up_proj", "down_proj"} <= children.keys():
        width = getattr(module.gate_proj, "in_features", 0)
        return [(f"gates {kind}", partial(_gated, module, kind, recompute), width)]
    if kind and {"gate_up_proj", "down_proj"} <= children.keys():
        width = getattr(module.gate_up_proj, "in_features", 0)
        return [(f"gates {kind}", partial(_gated_from_one_projection, module, kind, recompute), width)]
    projections = [name for name, child in children.items() if _inputs_of(child)]
    if kind and len(projections) == 2 and recompute:
        return [
            (f"MLPs {kind}", partial(_two_layers, module, *projections, kind), _inputs_of(children[projections[0]]))
        ]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if children or not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return []
    # Gemma's weights are the difference from 1.
    return [(f"norms {offset}", partial(_normalized, module, eps, offset), len(weight)) for offset in (0, 1)]


def _kind_of(activation: nn.Module) -> str:
    return "tanh" if getattr(activation, "approximate", "none") == "tanh" else _KINDS[type(activation)]


def _inputs_of(layer: nn.Module) -> int:
    """The width of a linear layer's input, of `nn.Linear` or GPT-2's `Conv1D`; 0 for any other module."""
    return getattr(layer, "in_features", getattr(layer, "nx", 0))


def _with_gradients(fused: Callable, own: Callable, *args, **kwargs) -> torch.Tensor:
    """The fused forward pass if gradients are computed; the compiler fuses the layer's own better."""
    is_usual = len(args) == 1 and not kwargs and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return (fused if is_usual else own)(*args, **kwargs)


def _agrees(module: nn.Module, number: int, recompute: bool) -> bool:
    """Whether candidate `number` gives the output and the gradient of `module` for random rows `(1, 2, width)`.

    A module whose weights are sharded is tried with random ones.
    """
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        module = _with_random_weights(module)
    _, fused, width = _candidates(module, recompute)[number]
    weight = next(module.parameters())
    generator, is_training = torch.Generator().manual_seed(0), module.training
    x, direction = (torch.randn(1, 2, width, generator=generator).to(weight) for _ in range(2))
    module.train()
    results = []
    try:
        for forward in (module, fused):
            row = x.clone().requires_grad_()
            with torch.enable_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
                torch.manual_seed(0)  # of dropout
                y = forward(row)
                results.append((y, torch.autograd.grad(y, row, direction[..., : y.size(-1)])[0]))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        module.train(is_training)
    tolerance = _TOLERANCE.get(weight.dtype, 1e-5)
    return all(
        bool((actual - expected).norm() <= tolerance * expected.norm())
        for expected, actual in zip(*results, strict=True)
    )


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy of `module` with whole weights, of the magnitude of trained ones."""
    twin = copy.deepcopy(module)
    for owner in twin.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.to_local().device)
            values.normal_(std=0.02, generator=torch.Generator(values.device).manual_seed(0))
            setattr(owner, name, nn.Parameter(values))
    return twin


def _gated(module: nn.Module, kind: str, recompute: bool, x: torch.Tensor) -> torch.Tensor:
    return _projected(module.down_proj, module.gate_proj(x), module.up_proj(x), kind, recompute)


def _gated_from_one_projection(module: nn.Module, kind: str, recompute: bool, x: torch.Tensor) -> torch.Tensor:
    return _projected(module.down_proj, *module.gate_up_proj(x).chunk(2, -1), kind, recompute)


def _projected(layer: nn.Module, gate: torch.Tensor, up: torch.Tensor, kind: str, recompute: bool) -> torch.Tensor:
    """`layer(activation(gate) * up)`."""
    product = _Gate.apply(gate, up, kind)
    if not recompute:
        return layer(product)
    gate, up = gate.detach(), up.detach()
    return _without_its_input(layer, product, lambda: _ACTIVATIONS[kind][0](gate).mul_(up))


def _two_layers(module: nn.Module, first: str, second: str, kind: str, x: torch.Tensor) -> torch.Tensor:
    activation, inner, last = _ACTIVATIONS[kind][0], getattr(module, first)(x), getattr(module, second)
    if inner.numel() < _MIN_RECOMPUTED:
        y = last(activation(inner))
    else:
        y = _without_its_input(last, activation(inner), partial(activation, inner.detach()))
    for child in module.children():
        y = child(y) if isinstance(child, nn.Dropout) else y
    return y


def _without_its_input(layer: nn.Module, x: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`layer(x)`, of which `x` is not kept for the backward pass: `compute()` returns it again."""
    place, size = x.data_ptr(), x.numel()

    def pack(tensor: torch.Tensor) -> torch.Tensor | torch.Size:
        is_x = tensor.data_ptr() == place and tensor.numel() == size and tensor.is_contiguous()
        return tensor.shape if is_x else tensor

    def unpack(packed: torch.Tensor | torch.Size) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else compute().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(x)


class _Gate(torch.autograd.Function):
    """`activation(gate) * up`; the backward pass computes the activation again."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _ACTIVATIONS[kind][0](gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        function, gradient = _ACTIVATIONS[ctx.kind]
        return gradient(grad * up, gate), function(gate).mul_(grad), None


def _normalized(module: nn.Module, eps: float, offset: int, x: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(x, module.weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * (weight + offset), in fp32 or wider, for x `(..., D)`; it keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            scale = torch.linalg.vecdot(wide, wide).div_(x.size(-1)).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (wide * scale).mul_(weight + offset if offset else weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normalized = x.to(scale.dtype) * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad.to(scale.dtype) * (weight + ctx.offset if ctx.offset else weight)
        mean = torch.linalg.vecdot(grad, normalized).div_(x.size(-1))[..., None]
        return grad.sub_(normalized.mul_(mean)).mul_(scale).to(x.dtype), grad_weight, None, None
