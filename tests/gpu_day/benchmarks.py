"""`scripts/bench.py train` as a user runs it: tokens per second and memory of `mori` beside Trainer; the machine itself."""

import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time

import torch

from tests.gpu_day.common import ROOT, Task, attempt, keep_report, read_json, say, seconds_per_call

_PACKAGES = (
    "torch transformers tokenizers accelerate triton numpy safetensors tensorboard matplotlib pytest bitsandbytes peft "
    "nvidia-cudnn-cu13 nvidia-cudnn-cu12"
).split()


def machine(task: Task) -> None:
    """Versions, the GPU, and what its matmuls and its memory reach."""

    def shell(command: str) -> str:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20)
        return (done.stdout + done.stderr).strip()[:1500]

    queries = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,pstate"
    say(
        gpu=shell(f"nvidia-smi --query-gpu={queries} --format=csv,noheader"),
        cpu=shell("nproc; free -g | sed -n 2p; uname -r; lscpu | grep 'Model name'"),
        tools=shell("which gcc g++ git nvcc ptxas; ldconfig -p | grep -m1 libcuda.so.1; df -h /tmp | tail -1"),
        libcuda=os.environ.get("TRITON_LIBCUDA_PATH"),
        python=sys.version.split()[0],
    )
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cuda = torch.cuda.is_available()
    say(versions=versions, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    if not task.dry:
        say(available={"ok": cuda})
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        say(name=properties.name, memory_gib=round(properties.total_memory / 2**30, 1))
        say(capability=torch.cuda.get_device_capability(), bf16=torch.cuda.is_bf16_supported(including_emulation=False))
        attempt("ceilings", _ceilings)
    started = time.perf_counter()
    from mori import train  # noqa: F401

    say(import_seconds=round(time.perf_counter() - started, 1))


def _ceilings() -> dict:
    size = 8192
    x, y = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = seconds_per_call(lambda: x @ y, 10)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = seconds_per_call(lambda: target.copy_(source), 10)
    return {"bf16_tflops": round(2 * size**3 / matmul / 1e12), "copy_tb_s": round(2 * source.nbytes / copy / 1e12, 2)}


def training(task: Task, arms: str, batch: int, block: int, precision: str = "bf16", suffix: str = "") -> None:
    """Tokens per second and peak memory of each arm; each is reported as soon as it is done."""
    steps, uncounted = (6, 2) if task.dry else (40, 10)
    shape, batch, block = ("tiny", 2, 32) if task.dry else ("124m", batch, block)
    precision = "bf16" if task.dry and precision == "fp16" else precision  # Trainer has no fp16 on a CPU
    flags = ["--shape", shape, "--block_size", block, "--per_device_train_batch_size", batch, "--precision", precision]
    flags += ["--arms", arms, "--repeats", 1, "--max_steps", steps, "--uncounted_steps", uncounted]
    flags += ["--logging_steps", uncounted, "--device", task.device, "--output_dir", task.place / "bench"]
    command = [sys.executable, str(ROOT / "scripts/bench.py"), "train", *map(str, flags)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", "cwd": ROOT}
    process, rates = subprocess.Popen(command, **options), {}
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.match(r"\d+/\d+ (\S+)\s+([\d.]+) s", line):
            rates[match[1]] = round((steps - uncounted) * batch * block / float(match[2]))
            say(tokens_per_second=rates)
    say(command={"ok": process.wait() == 0, "code": process.returncode})
    for path in (task.place / "bench").glob("*.json"):
        report = read_json(path)
        say(
            tokens_per_second={arm: round(figures["tokens_per_second"][0]) for arm, figures in report["arms"].items()},
            peak_gib={
                arm: round(figures["training_peak_memory_bytes"][0] / 2**30, 3)
                for arm, figures in report["arms"].items()
            },
            mfu={arm: round(figures["share_of_peak"][0] or 0, 4) for arm, figures in report["arms"].items()},
            loss_gaps={arm: figures["max_relative_loss_diff"] for arm, figures in report["arms"].items()},
        )
        keep_report(task, path.stem + suffix, report)
