"""What makes mori faster. Each module is called from one or two places and can be replaced by plain PyTorch.

On a CPU only: `matmul.py` (oneDNN and split matmuls, `--cpu_matmul torch` switches oneDNN off) and `startup.keep_freed_memory`.
On every device: `replay.py` (decoding without the model's Python), `peak.py` (FLOPs and the device's peak), `startup.imports`.
Elsewhere, `device.type == "cpu"` guards three details: copied weights (`model/loading.py`), the sampler's window
(`generation/sampler.py`), and gloo instead of NCCL (`distributed.py`).
"""
