"""Where a number first went bad: what is told when a run is stopped because its gradient is never finite."""

import torch

from mori.distributed import Runtime
from mori.model.loading import CausalLMLoss


def first_bad_tensor(
    module: CausalLMLoss,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    n_targets: torch.Tensor,
    runtime: Runtime,
) -> str | None:
    """The first tensor that is not finite when `micro_batches`, each `input_ids` and `labels` `(B, T)`, are trained on;
    they have `n_targets` labels.

    Weights come first, then the outputs of the modules in the order in which they are computed, then the loss, then the
    gradients, those nearest to the loss first. None where all are finite (a loss scale may overflow what alone does not).
    The gradients are zeroed afterwards.
    """
    for name, parameter in module.model.named_parameters():
        if _bad(parameter):
            return f"the weight {name}"
    found: list[str] = []

    def watch(name: str):
        def look(_module, _inputs, output) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if not found and any(isinstance(tensor, torch.Tensor) and _bad(tensor) for tensor in tensors):
                found.append(f"the output of {name}")

        return look

    # A module ends after those inside it, so the first to be seen is the innermost that went bad.
    compiled, module._compiled = module._compiled, []  # a compiled model calls no hooks
    hooks = [inner.register_forward_hook(watch(name)) for name, inner in module.model.named_modules() if name]
    try:
        for input_ids, labels in micro_batches:
            with runtime.autocast():
                loss = module(input_ids.to(runtime.device), labels.to(runtime.device), n_targets.to(runtime.device))
            if found or _bad(loss):
                return found[0] if found else "the loss"
            loss.backward()
        for name, parameter in reversed(list(module.model.named_parameters())):
            if parameter.grad is not None and _bad(parameter.grad):
                return f"the gradient of {name}"
        return None
    finally:
        module._compiled = compiled
        for hook in hooks:
            hook.remove()
        module.zero_grad()


def _bad(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
