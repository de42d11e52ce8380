"""Measures arms: each repeat in a new process, the arms in turn; medians, ranges, ratios of pairs, and JSON."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mori.cli import RunFailed, UserError
from mori.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
# Losses that differ by more than this (relative) come from different work; the timing is then void.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


def in_turn(arms: list[str], repeats: int, run: Callable[[str], dict]) -> dict[str, list[dict]]:
    """Call `run(arm)` `repeats` times for every arm; return the results of each arm.

    The arms take turns, in reverse order in every second repeat, so that a change in clock speed or load affects all
    of them. Each result has `seconds`, which are printed on standard error.
    """
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            result = run(arm)
            results[arm].append(result)
            print(f"{repeat + 1}/{repeats} {arm:18} {result['seconds']:8.3f} s", file=sys.stderr, flush=True)
    return results


def run_process(arm: str, command: list[str], threads: int = 0, log: Path | None = None, **environment: str) -> str:
    """Run `command` with this Python in a new process that can import `mori`; return its standard output.

    With `log`, both output streams go to that file instead and the result is empty. `threads` of 0 is PyTorch's default.
    Raises RunFailed with the last line of the error output if the process fails.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with log.open("w") if log else contextlib.nullcontext(subprocess.PIPE) as output:
        errors = subprocess.STDOUT if log else subprocess.PIPE
        process = subprocess.run(
            [sys.executable, *command], stdout=output, stderr=errors, text=True, errors="replace", env=environment
        )
    if process.returncode < 0:
        raise RunFailed(f"{arm} was killed by signal {-process.returncode} (out of memory?)")
    if process.returncode:
        printed = log.read_text(encoding="utf-8", errors="replace") if log else process.stderr
        last_line = (printed.strip().splitlines() or [f"exit code {process.returncode}, no message"])[-1]
        raise RunFailed(f"{arm} failed: {last_line[:500]}")
    return process.stdout or ""


def run_arm(
    arm: str,
    config: TrainConfig,
    folder: Path,
    *,
    threads: int,
    warm_up_steps: int,
    log: Path | None = None,
    **environment,
) -> dict:
    """Do the training run `config` as `arm` in a new process; return the result of `mori.bench.arms.run_arm`.

    The run leaves its model and metrics in `folder`.
    """
    job = {
        "arm": arm,
        "config": asdict(config),
        "folder": str(folder),
        "started": time.time(),
        "warm_up_steps": warm_up_steps,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    run_process(arm, ["-m", "mori.bench.arms", str(folder / "job.json")], threads, log, **environment)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of the repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """The spread of the ratios, repeat by repeat: the two runs of a repeat are close in time."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def require(package: str, arm: str) -> None:
    """Raise UserError if `package`, which `arm` needs and `mori` does not, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the arm {arm} needs {package}: pip install {package}, or leave it out with --arms")


def check_writable(output_dir: str) -> None:
    """Create the folder `output_dir`; raise UserError if no file can be written into it."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {output_dir}: {error.strerror}") from None


def write(
    output_dir: str,
    name: str,
    report: dict,
    packages: tuple[str, ...] = (),
    device: torch.device | None = None,
    threads: int = 0,
) -> None:
    """Print the ratios, and write the results with versions, device and commit to `<output_dir>/<name>.json`.

    `report` has `bench`, `model`, `shape`, `arms` and `ratios`; the versions of `packages` are recorded beside those of
    PyTorch and transformers.
    """
    complete = {
        **report,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: importlib.metadata.version(package) for package in ("transformers", *packages)},
        },
        "device": torch.cuda.get_device_name(device) if device and device.type == "cuda" else str(device or "cpu"),
        "threads": threads or torch.get_num_threads(),
        "commit": _commit(),
    }
    path = Path(output_dir) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
    for pair, values in report["ratios"].items():
        print(f"{pair:34} {values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})")
    print(f"results written to {path}")


def _commit() -> str | None:
    """The commit of the source, or None without git or outside a repository."""
    try:
        process = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return process.stdout.strip() or None
