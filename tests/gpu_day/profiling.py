"""Where a step's time goes: host syncs, kernels, compiled or not, small batches, chunk sizes, attention kernels."""

import collections
import contextlib
import gzip
import re
import shutil
import traceback
import warnings
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from mori.model import loss
from tests.gpu_day.common import ROOT, Task, attempt, say
from tests.gpu_day.step import Step, sizes

_KINDS = {  # the first that matches a kernel's name
    "triton": "^triton",
    "attention": "flash|fmha|sdpa|attention",
    "matmul": "gemm|nvjet|cutlass|xmma|wgmma|cublas",
    "optimizer": "adam|multi_tensor",
    "reduction": "reduce",
    "copy or cast": "copy|memcpy|memset",
    "other": "",
}

_ANNOTATIONS = ("ProfilerStep", "Torch-Compiled", "Optimizer", "aten::", "autograd::", "CompiledFunction")


def host_syncs(task: Task) -> None:
    """Which lines of `mori` wait for the device between two log points (torch.cuda.set_sync_debug_mode)."""
    cases = {
        "bf16": {"precision": "bf16"}, "fp32": {"precision": "fp32"}, "fp16": {"precision": "fp16"},
        "accumulation": {"gradient_accumulation_steps": 2}, "cuda_graphs": {"cuda_graphs": True},
    }  # fmt: skip
    for name, changed in cases.items():
        attempt(name, _count_syncs, task, changed)


def _count_syncs(task: Task, changed: dict) -> dict:
    waiting: collections.Counter = collections.Counter()

    def seen(message, category, filename, line, *_) -> None:
        if "synchroniz" in str(message):
            ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT / "mori"))]
            last = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else f"{filename}:{line}"
            waiting[last] += 1

    if task.dry:
        changed = {**changed, "logging_steps": 3}
    with Step(task, *sizes(task, "mini", 4, 128), **changed) as step, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        for _ in range(6):  # libraries initialize, graphs are captured
            step()
        while step.state.step % step.run.config.logging_steps:
            step()
        counted = 0
        if task.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(2 * step.run.config.logging_steps):
                step()
                if step.state.step % step.run.config.logging_steps:
                    step.run.log_is_due(step.state)
                counted += 1
        finally:
            if task.cuda:
                torch.cuda.set_sync_debug_mode("default")
    return {"ok": not waiting, "steps": counted, "syncs": sum(waiting.values()), "lines": dict(waiting)}


def one_shape(task: Task, shape: str, batch: int, block: int) -> None:
    """A step in eager mode and compiled: its time, its kernels, and after how many steps compiling has paid."""
    shape, batch, block = sizes(task, shape, batch, block)
    times, figures = 3 if task.dry else 20, {}
    for name, compiled in (("eager", False), ("compiled", True)):

        def measured(name=name, compiled=compiled) -> dict:
            counters.clear()
            with Step(task, shape, batch, block, torch_compile=compiled) as step:
                figures[name] = step.measured(times)
                say(**{name: figures[name]})
                title = f"{shape} {name} B{batch} x T{block}"
                kernels = attempt(f"{name}_kernels", _kernels, task, step, title, trace=not compiled)
                runs_compiled = step.run.module.compiled
            if not compiled:
                return figures[name]
            # The compiler may fail without an error: on a GPU there must be kernels of Triton.
            by_triton = not task.cuda or bool(kernels and kernels["ms_by_kind"]["triton"])
            graphs, breaks = counters["stats"].get("unique_graphs", 0), len(counters["graph_break"])
            ok = runs_compiled and graphs > 0 and by_triton
            return {"ok": ok, **figures[name], "graphs": graphs, "graph_breaks": breaks}

        attempt(name, measured)
    if len(figures) == 2:
        saved = (figures["eager"]["ms"] - figures["compiled"]["ms"]) / 1e3
        extra = figures["compiled"]["start_seconds"] - figures["eager"]["start_seconds"]
        steps = round(extra / saved) if saved > 0 else None
        ratio = round(figures["eager"]["ms"] / figures["compiled"]["ms"], 3)
        say(compiling={"speed_ratio": ratio, "extra_seconds": round(extra, 1), "pays_after_steps": steps})


def variants(task: Task) -> None:
    """The time and memory of a step in other sizes, precisions and forms."""
    big, small = sizes(task, "124m", 16, 1024), sizes(task, "124m", 4, 128)
    medium = sizes(task, "124m", 16, 512)
    exact = dict.fromkeys(("chunked_loss", "mask_free_attention", "fused_activations"), False)
    cases = {
        "small": (small, {}),
        "small, CUDA graph": (small, {"cuda_graphs": True}),
        "small, compiled": (small, {"torch_compile": True}),
        "small, compiled, CUDA graph": (small, {"torch_compile": True, "cuda_graphs": True}),
        "fp16 T512": (medium, {"precision": "fp16"}),
        "fp16 T512, all logits": (medium, {"precision": "fp16", "chunked_loss": False}),
        "exact": (big, exact),
        "all logits": (big, {"chunked_loss": False}),
        "CUDA graph": (big, {"cuda_graphs": True}),
        "tf32": (big, {"precision": "fp32"}),
        "B64": (sizes(task, "124m", 64, 1024), {}),
    }
    times = 2 if task.dry else 15

    def measured(size: tuple, changed: dict) -> dict:
        with Step(task, *size, **changed) as step:
            return step.measured(times, warm=6)

    for name, (size, changed) in cases.items():
        attempt(name, measured, size, changed)
    torch.set_float32_matmul_precision("highest")
    usual = loss.CHUNK
    for chunk in (64,) if task.dry else (128, 256, 1024, 2048):
        loss.CHUNK = chunk
        attempt(f"CHUNK {chunk} (usual {usual})", measured, big, {})
    loss.CHUNK = usual
    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for kernel in () if task.dry else kernels:
        with contextlib.suppress(Exception), sdpa_kernel([kernel]):
            attempt(f"attention by {kernel.name}", measured, big, {})


def _kernels(task: Task, step: Step, title: str, trace: bool) -> dict:
    """The GPU's time in a step by kind of kernel; the longest kernels and PyTorch's table go to profile.txt."""
    steps = 2 if task.dry else 8
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if task.cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        step.run.runtime.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        # Annotations of the host are drawn on the device's line too, above the kernels that they span.
        annotation = event.is_user_annotation or "#" in event.name or event.name.startswith(_ANNOTATIONS)
        if "CUDA" in str(event.device_type) and not annotation:
            times.setdefault(event.name, []).append(event.device_time or event.time_range.elapsed_us())
    total = sum(map(sum, times.values()))
    longest = sorted(times, key=lambda name: -sum(times[name]))[:45]
    lines = [
        f"{sum(times[name]) / steps / 1e3:9.3f} ms {100 * sum(times[name]) / total:5.1f} % {len(times[name]) / steps:7.1f} x  {name[:150]}"
        for name in longest
    ]
    key = "self_device_time_total" if task.cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=110)
    with (task.out / "profile.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join([f"\n##### {title}: {steps} steps, GPU {total / steps / 1e3:.2f} ms each", *lines, table]))
    if trace and task.cuda:
        with contextlib.suppress(OSError, RuntimeError):
            _keep_trace(task, profiler)
    kinds = dict.fromkeys(_KINDS, 0.0)
    for name, microseconds in times.items():
        kind = next(kind for kind, pattern in _KINDS.items() if re.search(pattern, name.lower()))
        kinds[kind] += sum(microseconds) / steps / 1e3
    return {
        "gpu_ms": round(total / steps / 1e3, 2),
        "kernels": round(sum(map(len, times.values())) / steps),
        "ms_by_kind": {kind: round(milliseconds, 2) for kind, milliseconds in kinds.items()},
        "longest": [line.strip()[:120] for line in lines[:10]],
    }


def _keep_trace(task: Task, profiler) -> None:
    """Write the trace, unless it is larger than 15 MiB."""
    profiler.export_chrome_trace(str(task.place / "trace.json"))
    packed = task.place / "trace.json.gz"
    with (task.place / "trace.json").open("rb") as source, gzip.open(packed, "wb", 6) as target:
        shutil.copyfileobj(source, target)
    if packed.stat().st_size <= 15 << 20:
        shutil.copy(packed, task.out / "trace.json.gz")
