"""What makes a training step faster or smaller: chosen for the model at hand, checked against its own loss, and said in a line."""

import torch
from torch import nn

from .config import TrainConfig, UserError
from .model import CausalLMLoss, attends_to_all_before, fuse_activations, head_is_plain
from .runtime import Runtime

_CHECKED_TOKENS = 32


def training_module(
    model: nn.Module, config: TrainConfig, input_ids: torch.Tensor, labels: torch.Tensor, where: Runtime
) -> tuple[CausalLMLoss, str]:
    """The model with its loss, in the best form that is safe for this model and device, and what that is in words.

    Every choice can be switched off in `config`. The loss of the beginning of the batch `input_ids`, `labels` `(B, T)` must
    be the model's own; where it is not, the model stays as it is. Raises UserError for a model without gradient
    checkpointing where that is asked for.
    """
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"{type(model).__name__} cannot do gradient checkpointing; leave --gradient_checkpointing out"
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = ["activations recomputed in the backward pass"] if config.gradient_checkpointing else []
    module = CausalLMLoss(model)
    input_ids, labels = (tensor[:1, :_CHECKED_TOKENS].to(where.device) for tensor in (input_ids, labels))
    own = _loss(module, input_ids, labels, where)
    if config.fused_activations and fuse_activations(model):
        chosen.append("fused GELU")
    if config.mask_free_attention and attends_to_all_before(model, config.block_size):
        module.mask_free = True
        chosen.append("causal attention without a mask")
    if config.chunked_loss and where.precision != "fp16" and head_is_plain(model):
        module.chunked_loss = True
        chosen.append("loss in chunks")
    if abs(_loss(module, input_ids, labels, where) - own) > (1e-4 if where.precision == "fp32" else 1e-2) * abs(own):
        module.mask_free = module.chunked_loss = False
        chosen = ["nothing: this model's loss would be another"]
    if config.torch_compile:
        module.compile_trunk(config.per_device_train_batch_size)
        chosen.append("compiled")
    return module, ", ".join(chosen) or "nothing"


@torch.no_grad()
def _loss(module: CausalLMLoss, input_ids: torch.Tensor, labels: torch.Tensor, where: Runtime) -> float:
    module.eval()
    with where.autocast():
        found = module(input_ids, labels).item()
    module.train()
    return found
