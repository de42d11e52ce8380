"""Figures for decisions that are open: other ways to compute the head, and a compiler that may choose freely."""

from unittest.mock import patch

import torch
import torch.nn.functional as F

from mori.model.loss import chunked_cross_entropy_sum
from tests.gpu_day.common import Task, attempt, free_memory, peak_gib, seconds_per_call
from tests.gpu_day.step import Step, sizes


def head(task: Task) -> None:
    """Forward and backward pass of the head and the loss at 16,384 tokens: as it is, all logits at once, compiled."""
    tokens, width, vocabulary = (64, 32, 97) if task.dry else (16_384, 768, 50_257)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(task.device).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(task.device)

    def chunked(layer: torch.nn.Linear) -> torch.Tensor:
        return chunked_cross_entropy_sum(hidden[None], layer, labels[None])

    def whole(layer: torch.nn.Linear) -> torch.Tensor:
        return F.cross_entropy(layer(hidden), labels, reduction="sum")

    def measured(function, columns: int, dtype: torch.dtype) -> dict:
        free_memory()
        layer = torch.nn.Linear(width, columns, bias=False, device=task.device)
        torch.nn.init.normal_(layer.weight, std=0.02)

        def once() -> None:
            hidden.grad = layer.weight.grad = None
            with torch.autocast(task.device, dtype=dtype):
                result = function(layer)
            result.backward()

        seconds = seconds_per_call(once, times=2 if task.dry else 10)
        teraflops = 6 * tokens * width * columns / seconds / 1e12
        return {"ms": round(1e3 * seconds, 2), "tflops": round(teraflops, 1), "peak_gib": peak_gib()}

    padded = -(-vocabulary // 128) * 128
    bf16, fp16 = torch.bfloat16, torch.float16
    attempt("chunked", measured, chunked, vocabulary, bf16)
    attempt("chunked, vocabulary a multiple of 128", measured, chunked, padded, bf16)
    attempt("chunked, fp16", measured, chunked, vocabulary, fp16)
    attempt("all logits", measured, whole, vocabulary, bf16)
    attempt("all logits, vocabulary a multiple of 128", measured, whole, padded, bf16)
    attempt("all logits, compiled", measured, torch.compile(whole, dynamic=False), vocabulary, bf16)
    if not task.dry:
        attempt("one chunk", _one_chunk, task, vocabulary, width)


def _one_chunk(task: Task, vocabulary: int, width: int) -> dict:
    """Milliseconds of each pass over a chunk of 2,048 tokens, and of two ways to add up the weight's gradient."""
    chunk = 2048
    logits = torch.randn(vocabulary, chunk, device=task.device, dtype=torch.bfloat16)
    hidden = torch.randn(chunk, width, device=task.device, dtype=torch.bfloat16)
    wide, total = torch.empty(logits.shape, device=task.device), torch.zeros(vocabulary, width, device=task.device)
    calls = {
        "amax": lambda: logits.amax(0),
        "sub": lambda: torch.sub(logits, 1.0, out=wide),
        "exp": lambda: wide.exp_(),
        "sum": lambda: wide.sum(0),
        "div": lambda: torch.div(wide, 2.0, out=logits),
        "matmul, then sum": lambda: total.add_(logits @ hidden),
        "matmul into fp32": lambda: torch.addmm(total, logits, hidden, out_dtype=torch.float32),
    }
    times = {}
    for name, call in calls.items():
        try:
            times[name] = round(1e3 * seconds_per_call(call, times=10), 3)
        except (RuntimeError, TypeError) as error:
            times[name] = str(error)[:90]
    return times


def free_compiler(task: Task) -> None:
    """A compiled step whose compiler may choose any kernel; `mori` asks for deterministic choices, because runs resume."""
    compile_module = torch.nn.Module.compile

    def without_options(self, *arguments, options=None, **keywords):
        return compile_module(self, *arguments, **keywords)

    def measured() -> dict:
        with (
            patch.object(torch.nn.Module, "compile", without_options),
            Step(task, *sizes(task, "124m", 16, 1024), torch_compile=True) as step,
        ):
            return step.measured(2 if task.dry else 20)

    attempt("free", measured)
