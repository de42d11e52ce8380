"""The operations of a training step, and the peak of the device: what model FLOPs utilization (MFU) is made of."""

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

    Chowdhery et al., 2022, PaLM (arXiv:2204.02311), appendix B. Recomputed activations do not count, nor do embeddings that are
    only looked up; a head that shares them does.
    """
    config = model.config.get_text_config()
    weights = sum(parameter.numel() for parameter in model.parameters())
    looked_up = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    weights -= sum(weight.numel() for key, weight in looked_up.items() if head is None or key != id(head.weight))
    # A model made of several transformers describes its layers elsewhere; its attention is not counted.
    width, layers = (getattr(config, name, 0) for name in ("hidden_size", "num_hidden_layers"))
    return 6.0 * weights + 12.0 * block_size * width * layers


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak operations per second: a GPU's in 16 bits by its name, a CPU's measured on a matmul now; None if unknown."""
    if device.type == "cuda":
        name = f" {torch.cuda.get_device_name(device).replace('-', ' ')}"
        peaks = [peak for part, peak in _GPU_PEAKS.items() if f" {part}" in name]
        return peaks[0] * 1e12 if peaks and precision != "fp32" else None
    return cpu_peak_flops() if device.type == "cpu" else None
