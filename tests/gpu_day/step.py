"""A run of `mori` that is ready for its first step, to call and time its steps one by one."""

import contextlib
import itertools
import time

import torch

from mori import run as runs
from mori.bench.options import TrainBenchConfig
from mori.bench.train import make_inputs
from mori.config import TrainConfig
from mori.train import train_step
from tests.gpu_day.common import Task, free_memory, peak_gib, seconds_per_call, synchronize

_NUMBERS = itertools.count()


class Step:
    """A run on a model of random weights, built as `scripts/train.py` builds it; a call is one optimizer step.

    Args:
        shape: a name in `mori.bench.options.CONTEXTS`, or the preset "mini" with its dropout.
        batch, block: windows in a step, and their length.
        changed: other fields of `TrainConfig`.

    A context manager: at its end the memory is free again.
    """

    def __init__(self, task: Task, shape: str, batch: int, block: int, precision: str = "bf16", **changed):
        inputs: dict = {"model": "mini"}
        if shape != "mini":
            folder = task.place / shape
            if not folder.exists():
                folder.mkdir()
                make_inputs(TrainBenchConfig(shape=shape), folder, tokens=20_000 if task.dry else 400_000)
            inputs = {"model": str(folder / "model"), "corpus": [str(folder / "corpus.txt")]}
        number = next(_NUMBERS)
        values = {
            "block_size": block, "per_device_train_batch_size": batch, "precision": precision, "device": task.device,
            "max_steps": 1_000_000, "held_out_fraction": 1e-9, "torch_compile": False,
            "logging_dir": str(task.place / "runs"), "output_dir": str(task.place / f"brain-{number}"),
            "run_name": f"step-{number}",
        }  # fmt: skip
        self.batch, self.block, self.locks = batch, block, contextlib.ExitStack()
        # A run whose model does not suit cuDNN's attention switches it off for the whole process.
        self.locks.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        self.run = runs.check(TrainConfig(**{**inputs, **values, **changed}), self.locks)
        torch.ones(8, 8, device=task.device).matmul(torch.ones(8, 8, device=task.device)).sum().item()  # starts CUDA
        started = time.perf_counter()
        self.state = runs.build(self.run, self.locks)
        self.build_seconds = time.perf_counter() - started  # the compiler works here
        free_memory()

    def __call__(self) -> None:
        train_step(self.run, self.state)

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *_) -> None:
        self.run.monitor.close()
        self.locks.close()
        compiled = self.run.config.torch_compile
        self.__dict__.clear()
        if compiled:
            torch._dynamo.reset()
        free_memory()

    def measured(self, times: int, warm: int = 5) -> dict:
        """Milliseconds of a step, and of the host alone; tokens per second, MFU, peak memory, seconds before them, loss."""
        synchronize()
        started = time.perf_counter()
        for _ in range(warm):
            self()
        synchronize()
        warmed = time.perf_counter() - started
        seconds = seconds_per_call(self, times, warm=0)
        synchronize()
        started = time.perf_counter()
        for _ in range(5):
            self()
        host = (time.perf_counter() - started) / 5
        synchronize()
        tokens, peak = self.batch * self.block / seconds, self.run.peak_flops
        graph = {"graph_captured": self.run.step_graph.enabled} if self.run.config.cuda_graphs else {}
        return {
            **graph,
            "ms": round(1e3 * seconds, 2),
            "host_ms": round(1e3 * host, 2),
            "tokens_per_second": round(tokens),
            "mfu": round(tokens * self.run.flops_per_token / peak, 4) if peak else None,
            "peak_gib": peak_gib(),
            "start_seconds": round(self.build_seconds + warmed, 1),
            "loss": float(self.state.losses[-1]),
        }


def sizes(task: Task, shape: str, batch: int, block: int) -> tuple[str, int, int]:
    """The shape, batch and block as given, or tiny ones in a dry run."""
    return ("tiny", 2, 32) if task.dry else (shape, batch, block)
