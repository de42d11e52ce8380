"""Whether a CPU trains a model faster in bf16 than in fp32."""

import time

import torch

from mori.speed.matmul import best_of_five, one_thread

_LARGEST = 512, 1024  # rows and width of the matmul that is measured
_EVEN_WIDTH = 450  # of a layer whose matmuls take half of a step in fp32
_WORTHWHILE_GAIN = 1.3


def bf16_speedup(rows: int, width: int) -> float:
    """The time of an fp32 matmul of `rows` tokens and `width`, divided by that in bf16; 0.0 without a kernel, or if it cannot pay.

    Both are CPU times of one thread, by the faster library of each.
    """
    if not pays(width, float("inf")) or not _has_kernels():
        return 0.0
    rows, width = min(rows, _LARGEST[0]), min(width, _LARGEST[1])
    with one_thread():
        fp32, bf16 = (
            min(best_of_five((rows, width, width), time.thread_time, precision)) for precision in ("fp32", "bf16")
        )
    return fp32 / bf16


def pays(width: int, speedup: float) -> bool:
    """Whether a training step of a model of that width gains clearly from matmuls that are `speedup` times as fast.

    The work of a layer's matmuls grows with the square of its width, the other work with the width (Amdahl, 1967).
    """
    share = width / (width + _EVEN_WIDTH)  # of the matmuls, in the time of a step in fp32
    return speedup > 1 and 1 / (1 - share + share / speedup) >= _WORTHWHILE_GAIN


def _has_kernels() -> bool:
    """Whether oneDNN has bf16 kernels for this processor; they may be emulated, so the caller measures them."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False
