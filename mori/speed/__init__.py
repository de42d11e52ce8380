"""What makes mori faster. Each module is called from one or two places and can be replaced by plain PyTorch.

On a CPU only: `matmul.py` (oneDNN and split matmuls, `--cpu_matmul torch` switches oneDNN off), `startup.keep_freed_memory`, and
the measured peaks in `peak.py` and `precision.py`. On every device: `replay.py` (decoding without the model's Python), `startup.imports`.
Outside this package only details depend on a CPU: weights copied out of their file (`model/loading.py`), the size of a chunk of
logits (`model/loss.py`), the sampler's window (`generation/sampler.py`), and gloo instead of NCCL (`distributed/ranks.py`).
"""
