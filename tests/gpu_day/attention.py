"""PyTorch's attention kernels on this GPU: dropout, masks, growing texts, speed; and what they do in a step of `mori`."""

import contextlib
import functools
import math
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.gpu_day.common import Task, attempt, say, seconds_per_call, synchronize
from tests.gpu_day.step import Step

_KERNELS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def correctness(task: Task) -> None:
    """What each kernel does to dropout, to masks and to a growing text; and that a step of `mori` is right."""
    attempt("step_with_dropout", _step_with_dropout, task)
    attempt("step_with_documents", _step_with_documents, task)
    for p in (0.1, 0.0625, 0.5):
        say(**{f"dropout_{p}": {name: _or_error(_mean_output, task, name, p) for name in _names(task)}})
    for length in (64, 128, 192, 704):
        say(
            **{f"masked_{length}": {name: _or_error(_nonfinite_gradients, task, name, length) for name in _names(task)}}
        )
    for name in _names(task):
        say(**{f"growing_text_{name}": _or_error(_growing_text, task, name)})


def speed(task: Task) -> None:
    """Milliseconds of one layer's attention, forward and backward, by kernel, without dropout and with."""
    shapes = ((2, 2, 32, 16),) if task.dry else ((16, 12, 1024, 64), (4, 12, 128, 64), (4, 32, 2048, 64))
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for shape in shapes:
        for precision, dropout in (("bf16", 0.0), ("bf16", 0.1), ("fp16", 0.0)):
            name = f"{'x'.join(map(str, shape))} {precision}, dropout {dropout}"
            times = {
                kernel: _or_error(_milliseconds, task, kernel, shape, types[precision], dropout)
                for kernel in _names(task)
                if kernel != "math" or task.dry
            }
            say(**{name: times})


def _names(task: Task) -> list[str]:
    return ["default", "math"] if task.dry else list(_KERNELS)


def _or_error(function, task: Task, kernel: str, *arguments):
    """The result with this kernel, or why it refuses."""
    backend = _KERNELS[kernel]
    try:
        with contextlib.nullcontext() if backend is None else sdpa_kernel([backend]):
            return function(task, *arguments)
    except Exception as error:
        return str(error)[:90] or repr(error)


def _random(shape: tuple, task: Task, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(shape, device=task.device, dtype=dtype) for _ in range(3)]


def _mean_output(task: Task, p: float) -> float:
    """With values of one, an output is the sum of the weights that dropout kept, over 1 - p: its mean must be 1."""
    q, k, v = _random((4, 8, 64 if task.dry else 512, 64), task)
    out = F.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=p, is_causal=True)
    return round(out.float().mean().item(), 4)


def _nonfinite_gradients(task: Task, length: int) -> int:
    """How many gradients of the queries are not finite with an explicit causal mask and very small scores (pytorch #196678)."""
    q, k, v = (0.1 * tensor for tensor in _random((1, 1, length, 64), task))
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device=task.device).tril()[None, None]
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float().sum().backward()
    return int((~torch.isfinite(q.grad)).sum())


def _growing_text(task: Task) -> dict:
    """Milliseconds a token while the keys grow by one at each, for the first text and for the next of the same lengths."""
    lengths, times = range(20, 24 if task.dry else 60), []
    with torch.no_grad():
        for _ in range(2):
            synchronize()
            started = time.perf_counter()
            for length in lengths:
                q, k, v = (
                    torch.randn(1, 12, n, 64, device=task.device, dtype=torch.bfloat16) for n in (1, length, length)
                )
                F.scaled_dot_product_attention(q, k, v)
            synchronize()
            times.append(round(1e3 * (time.perf_counter() - started) / len(lengths), 3))
    return {"first_ms": times[0], "again_ms": times[1]}


def _milliseconds(task: Task, shape: tuple, dtype: torch.dtype, dropout: float) -> float:
    q, k, v = (tensor.requires_grad_() for tensor in _random(shape, task, dtype))
    grad = torch.randn(shape, device=task.device, dtype=dtype)

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).backward(grad)

    return round(1e3 * seconds_per_call(both, times=2 if task.dry else 20), 3)


def _calls_of(step: Step, steps: int) -> list[dict]:
    """What attention is called with in `steps` steps, and the mean of its outputs for values of one."""
    attention, calls = F.scaled_dot_product_attention, []

    @functools.wraps(attention)
    def watched(query, key, value, *arguments, **options):
        calls.append(
            {
                "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
                "mask": options.get("attn_mask") is not None,
                "dropout": options.get("dropout_p", 0.0),
                "mean": attention(query, key, torch.ones_like(value), *arguments, **options).float().mean().item(),
            }
        )
        return attention(query, key, value, *arguments, **options)

    F.scaled_dot_product_attention = watched
    try:
        for _ in range(steps):
            step()
    finally:
        F.scaled_dot_product_attention = attention
    return calls


def _step_with_dropout(task: Task) -> dict:
    """The preset has a dropout of 0.1: in its own steps the mean weight that dropout leaves must be 1."""
    # A CPU computes attention in bf16 itself.
    with Step(task, "mini", 4, 32 if task.dry else 128, "fp32" if task.dry else "bf16") as step:
        calls = _calls_of(step, 2 if task.dry else 5)
    mean = sum(call["mean"] for call in calls) / max(1, len(calls))
    dropout = {call["dropout"] for call in calls}
    ok = bool(calls) and abs(mean - 1) < (0.05 if task.dry else 0.01) and dropout == {0.1}
    return {"ok": ok, "mean": mean, "calls": len(calls), "dropout": list(dropout), "cudnn": calls and calls[0]["cudnn"]}


def _step_with_documents(task: Task) -> dict:
    """With a mask cuDNN must be off, and the gradients finite at T % 128 == 64."""
    with Step(task, "mini", 4, 64 if task.dry else 192, document_mask=True) as step:
        calls = _calls_of(step, 3)
        skipped = int(step.state.skipped[0])
    by_cudnn = sum(call["mask"] and call["cudnn"] for call in calls)
    ok = bool(calls) and skipped == 0 and (task.dry or by_cudnn == 0)
    return {"ok": ok, "calls": len(calls), "masked_calls_cudnn_may_take": by_cudnn, "skipped_steps": skipped}
