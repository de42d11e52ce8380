"""The operations of a training step, and the peak of the device: what model FLOPs utilization (MFU) is made of."""

import re

import torch
from torch import nn

from mori.speed.matmul import cpu_peak_flops

# Dense 16-bit matmuls, in 1e12 operations per second, by the GPU's name: NVIDIA's data sheets.
_GPU_PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "V100": 125,
    "T4": 65, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def flops_per_token(model: nn.Module, block_size: int) -> float:
    """Operations per token of a forward and backward pass: 6 per weight, and 12 T D per layer for the attention.

    Chowdhery et al., 2022, PaLM (arXiv:2204.02311), appendix B. A frozen weight takes 4, and 2 before the first layer that
    trains, where the backward pass ends; attention there takes a third. Recomputed activations do not count, nor do embeddings
    that are only looked up; a head that shares them does.
    """
    head, weights = model.get_output_embeddings(), 0
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in looked_up]
    if head is not None and id(head.weight) in looked_up:
        named.append(("head", head.weight))
    embeddings_train = any(p.requires_grad for p in model.parameters() if id(p) in looked_up)
    first = 0 if embeddings_train else next((n for n, (_, p) in enumerate(named) if p.requires_grad), len(named))
    for number, (_, parameter) in enumerate(named):
        weights += _elements(parameter) * (6 if parameter.requires_grad else 4 if number >= first else 2)
    config = model.config.get_text_config()
    # A model made of several transformers describes its layers elsewhere; its attention is not counted.
    width, layers = (getattr(config, name, 0) for name in ("hidden_size", "num_hidden_layers"))
    layer = re.search(r"\.(\d+)\.", named[first][0] if 0 < first < len(named) else "")
    below = int(layer[1]) if layer else layers if first == len(named) else 0
    return weights + (12.0 * (layers - below) + 4.0 * below) * block_size * width


def _elements(parameter: nn.Parameter) -> int:
    """The number of weights; bitsandbytes packs two into a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return quantized.shape.numel() if quantized else parameter.numel()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak operations per second in that precision: a GPU's by its name, a CPU's measured on a matmul now; None if unknown."""
    if device.type == "cuda":
        name = f" {torch.cuda.get_device_name(device).replace('-', ' ')}"
        peaks = [peak for part, peak in _GPU_PEAKS.items() if f" {part}" in name]
        return peaks[0] * 1e12 if peaks and precision != "fp32" else None
    return cpu_peak_flops(precision) if device.type == "cpu" and precision != "fp16" else None
