"""What the parts share: their task, how they report, the scripts as a user runs them, curves, timing."""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Task:
    """What a part is given.

    Attributes:
        place: a folder of its own. `out` is the folder of the results.
        limit: the seconds after which it is killed.
        device: "cuda", or "cpu" in a dry run, whose sizes are tiny.
        stories, corpus: the folder of the model stories260K and a text file; empty if they are not at hand.
    """

    place: Path
    out: Path
    limit: float
    device: str
    dry: bool
    stories: str = ""
    corpus: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.limit - (time.monotonic() - self.started)

    @property
    def cuda(self) -> bool:
        """Whether the part runs on a GPU."""
        return self.device.startswith("cuda")


def say(**values) -> None:
    """Report results at once: the runner keeps them even if the part fails later. `{"ok": False}` marks a failed check."""
    print("@@ " + json.dumps(values, default=str), flush=True)


def attempt(name: str, function: Callable, *arguments, **keywords):
    """Report the result of a call as `name`, or why it failed; returns the result, None after a failure."""
    try:
        value = function(*arguments, **keywords)
        say(**{name: value})
        return value
    except Exception as error:
        traceback.print_exc()
        say(**{name: {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}})
    free_memory()  # the error is gone, and with it the tensors of its frames
    return None


def run_script(script: str, *words, timeout: float) -> subprocess.CompletedProcess:
    """Run `scripts/<script>` as a user does, and print its command and output to the part's log."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        done = subprocess.CompletedProcess(command, 124, output, f"not done after {timeout:.0f} s")
    printed = f"{done.stdout[-6000:]}\n{without_bars(done.stderr)[-6000:]}"
    print(f"$ {script} {' '.join(map(str, words))}\n{printed}\n-> {done.returncode}", flush=True)
    return done


def without_bars(text: str) -> str:
    """The text with only the last state of each progress bar."""
    return "\n".join(line.split("\r")[-1] for line in text.split("\n"))


def read_json(path: Path) -> dict:
    """The content of a JSON file; empty if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def curve(path: Path, tag: str = "train/loss") -> dict[int, float]:
    """The values of `tag` by step in a `metrics.jsonl`; a resumed run repeats steps, the last counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.strip()]
    return {entry["step"]: entry[tag] for entry in entries if tag in entry}


def largest_gap(one: dict[int, float], other: dict[int, float]) -> float | None:
    """The largest relative difference of two curves at the steps that both have; None if there are none."""
    return max((abs(one[s] - other[s]) / max(1e-9, abs(other[s])) for s in one.keys() & other.keys()), default=None)


def seconds_per_call(function: Callable, times: int, warm: int = 3) -> float:
    """Median seconds of a call: on a GPU by its events, so that the host's work between them counts only if the GPU waits."""
    for _ in range(warm):
        function()
    if not torch.cuda.is_available():
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for before, after in events:
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1000


def deterministic(warn_only: bool) -> None:
    """Make PyTorch take deterministic kernels; call it before the first CUDA operation."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=warn_only)


def synchronize() -> None:
    """Wait until the GPU has finished, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    """The most GPU memory in use since the last reset; None on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def free_memory() -> None:
    """Return unused memory to the GPU, and start a new peak."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # of an earlier failure on the device
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def keep_report(task: Task, name: str, report: dict) -> None:
    """Add a report, in the form of the files in `runs/bench`, to `bench.json`."""
    path = task.out / "bench.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**read_json(path), name: report}, indent=1), encoding="utf-8")
    partial.replace(path)
