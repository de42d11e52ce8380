"""Faster and smaller variants of a training step, each verified against the model's own loss."""

import contextlib
import importlib.util
import inspect

import torch
from torch import nn

from mori.cli import UserError, one_line
from mori.config import TrainConfig
from mori.data.windows import IGNORE_INDEX
from mori.model.lm import CausalLMLoss, attends_to_all_before, watch_head
from mori.speed.fused import fuse_activations, fuse_layers
from mori.speed.matmul import choose_library

_CHECKED_TOKENS = 16  # so few that reading the weights dominates
# Compilation takes one or two minutes and saves a tenth to a fifth of the rest of the run.
WORTH_COMPILING_SECONDS = 1200


def build_module(
    model: nn.Module | CausalLMLoss,
    config: TrainConfig,
    batch: tuple[torch.Tensor, torch.Tensor],
    runtime,
    *,
    separators: tuple[int, ...] = (),
    cpu_matmul: str = "torch",
    compiled: bool = False,
) -> tuple[CausalLMLoss, str]:
    """The model with its loss in the fastest form that is safe for it, and a description of that form.

    Each variant has a flag in `config`. A short pass over the batch must give the model's own loss; otherwise attention, loss
    and matmuls stay the model's own.

    Args:
        model: a model of transformers; with its loss already, if it is sharded.
        batch: `input_ids` and `labels`, `(B, T)`, on the host.
        runtime: the `distributed.Runtime`.
        separators: the tokens at which a document begins.
        cpu_matmul: the library that `config.cpu_matmul` resolves to.
        compiled: whether to compile the model even if `config.torch_compile` is unset.

    Raises UserError if the model has no gradient checkpointing, or cannot keep documents apart, and the config asks for it.
    """
    module = model if isinstance(model, CausalLMLoss) else CausalLMLoss(model)
    model, chosen = module.model, []
    if config.gradient_checkpointing:
        _enable_gradient_checkpointing(module, config)
        chosen.append("activations recomputed in the backward pass")
    if config.tf32 and runtime.device.type == "cuda" and runtime.precision == "fp32":
        torch.set_float32_matmul_precision("high")
        chosen.append("TF32")
    input_ids, labels = (tensor[:1, :_CHECKED_TOKENS].to(runtime.device) for tensor in batch)
    if config.document_mask:
        module.separators = separators
        if not _keeps_documents_apart(module, config.block_size, input_ids, runtime):
            raise UserError(
                f"document_mask: {type(model).__name__} cannot keep documents apart with this tokenizer; remove the flag"
            )
        chosen.append("documents kept apart")
    with watch_head(model) as plain_head:
        own_loss = _loss(module, input_ids, labels, runtime)
    if config.fused_activations:
        chosen += ["fused GELU"] * bool(fuse_activations(model)) + fuse_layers(
            model, recompute=not config.gradient_checkpointing
        )
    safe = list(chosen)
    if config.mask_free_attention and not config.document_mask and attends_to_all_before(model, config.block_size):
        module.use_mask_free_attention()
        chosen.append("mask-free causal attention")
    if config.chunked_loss and all(plain_head):
        module.chunked_loss = True
        chosen.append("chunked loss")
    if cpu_matmul == "onednn":
        module.cpu_matmul = cpu_matmul
        chosen.append("matmuls by oneDNN")
    if not abs(_loss(module, input_ids, labels, runtime) - own_loss) <= _tolerance(runtime) * abs(own_loss):  # or NaN
        module.use_own_attention()
        module.chunked_loss, module.cpu_matmul = False, "torch"
        chosen = [*safe, "other variants disabled: the loss check failed"]
    if runtime.device.type == "cuda" and config.mask_free_attention and not _suits_cudnn_attention(module):
        torch.backends.cuda.enable_cudnn_sdp(False)
        chosen.append("attention without cuDNN")
    if config.torch_compile or compiled:
        chosen.append(compile_module(module, config.per_device_train_batch_size, batch, runtime))
    return module, ", ".join(chosen) or "nothing"


def takes_onednn(model: nn.Module, config: TrainConfig, runtime) -> bool:
    """Whether oneDNN may compute this run's matmuls: on a CPU, everything in fp32, and not compiled."""
    return (
        runtime.device.type == "cpu"
        and runtime.precision == "fp32"
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        and not config.torch_compile
    )


def choose_cpu_matmul(model: nn.Module, config: TrainConfig, runtime, saved: dict) -> str:
    """The library of large matmuls on a CPU. A resumed run keeps that `saved` in its checkpoint: libraries differ in the last bits."""
    if not takes_onednn(model, config, runtime):
        return "torch"
    # "products" is the name in checkpoints of earlier versions.
    setting = saved.get("cpu_matmul") or saved.get("products", config.cpu_matmul)
    setting = setting if setting in ("auto", "onednn") else "torch"
    return runtime.on_main(lambda: choose_library(setting))


def _enable_gradient_checkpointing(module: CausalLMLoss, config: TrainConfig) -> None:
    model = module.model
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no gradient checkpointing; remove --gradient_checkpointing")
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
    options = {"use_reentrant": False}
    if not config.torch_compile:  # torch.compile does not support context_fn; the second context is for recomputation
        options["context_fn"] = lambda: (contextlib.nullcontext(), module.matmul_context())
    (enable or model.gradient_checkpointing_enable)(options)


def compile_module(module: CausalLMLoss, rows: int, batch: tuple[torch.Tensor, torch.Tensor], runtime) -> str:
    """Compile the model for `rows` windows and try one step; if the compiler fails, run without it. Returns what happened."""
    errors, on_failure, stats = [], module.on_compile_failure, torch._dynamo.utils.counters["stats"]
    module.compile_trunk(rows)
    module.on_compile_failure, graphs_before = errors.append, stats["unique_graphs"]
    input_ids, labels = (tensor[:rows].to(runtime.device) for tensor in batch)
    try:
        with runtime.unchanged_random_state(), runtime.autocast():
            module(input_ids, labels).backward()
    except torch._dynamo.exc.TorchDynamoException as error:  # of the backward pass
        errors.append(error)
    except torch.OutOfMemoryError:
        return "compiled"  # the first step halves the micro-batch
    finally:
        module.on_compile_failure = on_failure
        module.zero_grad()
    graphs = stats["unique_graphs"] - graphs_before
    if errors or not graphs:  # code that the compiler cannot trace runs without an error
        module.compiled = False
        return f"not compiled: {one_line(errors[0]) if errors else 'the compiler cannot trace the model'}"
    return "compiled" if graphs == 1 else f"compiled in {graphs} parts"


def may_compile(module: CausalLMLoss, config: TrainConfig, runtime) -> bool:
    """Whether the model may be compiled unasked: on one GPU that PyTorch's compiler knows, with the usual variants.

    Under DDP, a compiled backward pass produces all gradients at its end, so communication cannot overlap.
    """
    if runtime.device.type != "cuda" or runtime.world_size > 1 or not module.mask_free or config.gradient_checkpointing:
        return False
    return bool(importlib.util.find_spec("triton")) and torch.cuda.get_device_capability(runtime.device) >= (7, 0)


def _suits_cudnn_attention(module: CausalLMLoss) -> bool:
    """Whether cuDNN's attention, PyTorch's first choice on some GPUs, is sound for the model: no mask and no dropout.

    In PyTorch 2.11 it rounds the dropout probability to a multiple of 1/16, and a mask can give it NaN gradients.
    """
    config = module.model.config.get_text_config().to_dict()
    dropout = any(value for name, value in config.items() if "att" in name and "drop" in name)
    return module.mask_free and not dropout


def _keeps_documents_apart(module: CausalLMLoss, block_size: int, input_ids: torch.Tensor, runtime) -> bool:
    """Whether a document has the same loss after another document, in `input_ids` `(1, T)`, as on its own."""
    parameters = inspect.signature(module.model.base_model.forward).parameters
    if not module.separators or "position_ids" not in parameters or not attends_to_all_before(module.model, block_size):
        return False
    middle = input_ids.size(1) // 2
    input_ids = input_ids.clone()
    input_ids[:, middle] = module.separators[0]
    labels = input_ids.clone()
    labels[:, :middle] = IGNORE_INDEX
    behind = _loss(module, input_ids, labels, runtime)
    alone = _loss(module, input_ids[:, middle:], labels[:, middle:], runtime)
    return abs(behind - alone) <= _tolerance(runtime) * abs(alone)


def _tolerance(runtime) -> float:
    """The largest relative difference between two ways to compute the same loss."""
    return 1e-4 if runtime.precision == "fp32" else 1e-2


@torch.no_grad()
def _loss(module: CausalLMLoss, input_ids: torch.Tensor, labels: torch.Tensor, runtime) -> float:
    module.eval()
    with runtime.autocast():
        loss = module(input_ids, labels).item()
    module.train()
    return loss
