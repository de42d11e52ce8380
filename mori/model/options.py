"""What makes a training step faster or smaller: chosen for the model at hand, checked against its own loss, and said in a line.

And how near to the machine's limit a step comes.
"""

import contextlib
import importlib.util
import inspect

import torch
from torch import nn

from mori.config import TrainConfig, UserError
from mori.data.windows import IGNORE_INDEX
from mori.distributed import BatchSize, Runtime
from mori.model.loading import CausalLMLoss, attends_to_all_before, fuse_activations, head_watched
from mori.speed.matmul import fastest, race

_CHECKED_TOKENS = 16  # so few that reading the weights is what takes time
# Compiling takes a minute or two, and is to give a tenth of the run at least. The share of the peak is what is usual, and the
# peak of a GPU that is not known is taken for the largest: then only a run that is long in any case is compiled.
_WORTH_COMPILING = 1200  # seconds
_USUAL_SHARE = 0.4
# Dense 16-bit matrix products, in 1e12 operations a second, by the name of the GPU: NVIDIA's data sheets.
_GPU_PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "V100": 125,
    "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def training_module(
    model: nn.Module,
    config: TrainConfig,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    where: Runtime,
    separator: int | None = None,
    steps: int = 0,
    products: str | None = None,
) -> tuple[CausalLMLoss, str]:
    """The model with its loss, in the best form that is safe for this model and device, and what that is in words.

    Every choice can be switched off in `config`. The loss of the beginning of the batch `input_ids`, `labels` `(B, T)` must
    be the model's own; where it is not, the model stays as it is. `separator` is the token that ends each document, `steps`
    the length of the run, `products` the name of what `module.products` was in a run that goes on. Raises UserError for a
    model without gradient checkpointing where that is asked for, or one that cannot keep documents apart where it should,
    RunFailed where memory does not hold one window.
    """
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"{type(model).__name__} cannot do gradient checkpointing; leave --gradient_checkpointing out"
            )
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
        again = {"use_reentrant": False}
        if not config.torch_compile:  # whose compiler takes no such contexts; the second is that of computing again
            again["context_fn"] = lambda: (contextlib.nullcontext(), module.fast_products())
        (enable or model.gradient_checkpointing_enable)(again)
    chosen = ["activations recomputed in the backward pass"] if config.gradient_checkpointing else []
    if config.tf32 and where.device.type == "cuda" and where.precision == "fp32":
        torch.set_float32_matmul_precision("high")
        chosen.append("TF32")
    module = CausalLMLoss(model)
    input_ids, labels = (tensor[:1, :_CHECKED_TOKENS].to(where.device) for tensor in (input_ids, labels))
    if config.document_mask:
        module.separator = separator
        if not _keeps_documents_apart(module, config.block_size, input_ids, where):
            raise UserError(
                f"document_mask: documents cannot be kept apart in {type(model).__name__} with this tokenizer; leave it out"
            )
        chosen.append("documents kept apart")
    with head_watched(model) as plain:
        own = _loss(module, input_ids, labels, where)
    if config.fused_activations and fuse_activations(model):
        chosen.append("fused GELU")
    safe = list(chosen)
    if config.mask_free_attention and not config.document_mask and attends_to_all_before(model, config.block_size):
        module.mask_free = True
        chosen.append("causal attention without a mask")
    if config.chunked_loss and where.precision != "fp16" and all(plain):
        module.chunked_loss = True
        chosen.append("loss in chunks")
    rows = config.per_device_train_batch_size * config.block_size
    if (
        config.fast_products
        and where.device.type == "cpu"
        and where.precision == "fp32"
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        and not config.torch_compile
        and (found := where.on_main(lambda: fastest(rows, products)))
    ):
        module.products = found
        chosen.append(found.words)
    if abs(_loss(module, input_ids, labels, where) - own) > _close(where) * abs(own):
        module.mask_free, module.chunked_loss, module.products = False, False, None
        chosen = [*safe, "nothing more: this model's loss would be another"]
    if config.torch_compile or config.torch_compile is None and _compiling_pays(module, config, where, steps):
        module.compile_trunk(config.per_device_train_batch_size)
        chosen.append("compiled")
    return module, ", ".join(chosen) or "nothing"


def _compiling_pays(module: CausalLMLoss, config: TrainConfig, where: Runtime, steps: int) -> bool:
    """Whether the run is long enough, on a GPU that PyTorch's compiler knows, and the model and the choices are the usual ones.

    With several ranks a compiled backward pass gives all gradients at its end, and none is sent while others are computed.
    """
    if where.device.type != "cuda" or where.world_size > 1 or not module.mask_free or config.gradient_checkpointing:
        return False
    if not importlib.util.find_spec("triton") or torch.cuda.get_device_capability(where.device) < (7, 0):
        return False
    tokens = steps * config.gradient_accumulation_steps * config.per_device_train_batch_size * config.block_size
    peak = peak_flops(where) or max(_GPU_PEAKS.values()) * 1e12
    return tokens * flops_per_token(module.model, config.block_size) > _WORTH_COMPILING * _USUAL_SHARE * peak


def _keeps_documents_apart(module: CausalLMLoss, block_size: int, input_ids: torch.Tensor, where: Runtime) -> bool:
    """Whether a document's loss behind another one, in `input_ids` `(1, T)`, is the loss that it has alone."""
    takes = inspect.signature(module.model.base_model.forward).parameters
    if module.separator is None or "position_ids" not in takes or not attends_to_all_before(module.model, block_size):
        return False
    middle = input_ids.size(1) // 2
    input_ids = input_ids.clone()
    input_ids[:, middle] = module.separator
    labels = input_ids.clone()
    labels[:, :middle] = IGNORE_INDEX
    together = _loss(module, input_ids, labels, where)
    alone = _loss(module, input_ids[:, middle:], labels[:, middle:], where)
    return abs(together - alone) <= _close(where) * abs(alone)


def _close(where: Runtime) -> float:
    """How far two ways to the same loss may be apart."""
    return 1e-4 if where.precision == "fp32" else 1e-2


@torch.no_grad()
def _loss(module: CausalLMLoss, input_ids: torch.Tensor, labels: torch.Tensor, where: Runtime) -> float:
    module.eval()
    with BatchSize(1), where.autocast():
        found = module(input_ids, labels).item()
    module.train()
    return found


def flops_per_token(model: nn.Module, block_size: int) -> float:
    """Operations that a token costs in forward and backward pass: 6 for each weight, 12 T D for each layer's attention.

    Chowdhery et al., 2022, PaLM (arXiv:2204.02311), appendix B; recomputed activations are not counted. Embeddings that
    are looked up only are left out, a head that shares them counts.
    """
    config = model.config.get_text_config()
    weights = sum(parameter.numel() for parameter in model.parameters())
    looked_up = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    weights -= sum(weight.numel() for key, weight in looked_up.items() if head is None or key != id(head.weight))
    return 6.0 * weights + 12.0 * block_size * config.hidden_size * config.num_hidden_layers


def peak_flops(where: Runtime) -> float | None:
    """Operations per second that the device can do: a GPU's by its name, in 16 bits; a CPU's as a product of matrices has it now.

    None for a device whose peak is not known.
    """
    if where.device.type == "cuda":
        name = torch.cuda.get_device_name(where.device)
        found = [peak for part, peak in _GPU_PEAKS.items() if f" {part}" in f" {name.replace('-', ' ')}"]
        return found[0] * 1e12 if found and where.precision != "fp32" else None
    if where.device.type != "cpu":
        return None
    found = race()
    return found.operations / found.best
