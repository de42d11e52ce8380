"""`--profile_steps`: a trace of some steps, and the operations that take longest."""

import contextlib
import json
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType

_HEAVIEST = 10
TRACE = "profile.pt.trace.json.gz"  # TensorBoard's plugin looks for names with this end
TABLE = "profile.json"


class Profiler:
    """Records the steps from `first` to `last` with PyTorch's profiler; costs nothing in the others.

    `close` writes what was recorded into the run's folder: a trace that Perfetto (ui.perfetto.dev), chrome://tracing and
    TensorBoard's profiler plugin open, and `profile.json` with the ten heaviest operations.

    Args:
        steps: the first and the last step, counted from 1; None records nothing.
    """

    name = "the profile"

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None, device: torch.device):
        self._run_dir, self._device = run_dir, device
        self._first, self._last = steps or (0, 0)
        self._profile: torch.profiler.profile | None = None
        self._recorded: list[int] = []
        self.notes: list[str] = []

    def begin(self, step: int) -> None:
        """Start recording if `step` is to be recorded."""
        if self._profile is None and self._first <= step <= self._last:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints lines about itself otherwise
            activity = torch.profiler.ProfilerActivity
            gpu = [activity.CUDA] * (self._device.type == "cuda")
            self._profile = torch.profiler.profile(activities=[activity.CPU, *gpu])
            self._profile.start()

    def mark(self, step: int) -> contextlib.AbstractContextManager:
        """The context of a step, which has a name in the trace."""
        if self._profile is None:
            return contextlib.nullcontext()
        self._recorded.append(step)
        return torch.profiler.record_function(f"ProfilerStep#{step}")

    def is_over(self, step: int) -> bool:
        """Whether `step` is the last one to record."""
        return self._profile is not None and step >= self._last

    def close(self) -> dict | None:
        """Stop, and write the files; returns what `profile.json` holds, or None if nothing was recorded. Raises OSError."""
        if self._profile is None:
            return None
        profile, self._profile, self._last = self._profile, None, 0
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profile.stop()
        table = heaviest(profile.events(), self._recorded, self._device)
        with self._staged(TRACE) as path:
            profile.export_chrome_trace(str(path))
        with self._staged(TABLE) as path:
            path.write_text(json.dumps(table, indent=2), encoding="utf-8")
        self.notes.append(f"profiled {steps_in_words(table)}: {self._run_dir / TRACE} (open it in ui.perfetto.dev)")
        return table

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        """A path to write to; the file has its name once it is whole."""
        path = self._run_dir / f"unfinished.{name}"
        try:
            yield path
            path.replace(self._run_dir / name)
        finally:
            path.unlink(missing_ok=True)


def steps_in_words(table: dict) -> str:
    """The steps of a profile: "step 3", or "steps 3 to 5"."""
    first, last = table["steps"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def heaviest(events, steps: list[int], device: torch.device) -> dict:
    """The operations with the most time of their own, without the operations that they call, from the profiler's `events()`.

    Only the steps count: an evaluation or a save between two of them is in the trace alone. Times are those of the kernels on a
    GPU, and of the calls on a CPU, in milliseconds; `share` is the part of the time of all.
    """
    gpu = device.type == "cuda"
    # On a GPU, each kernel's time is also that of the CPU's operation that launched it, and marks count as kernels.
    events = [event for event in events if (event.device_type != DeviceType.CPU) == gpu]
    marks = sorted((e.time_range.start, e.time_range.end) for e in events if e.key.startswith("ProfilerStep"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        place = bisect_right(marks, (event.time_range.start, float("inf"))) - 1
        inside = place >= 0 and event.time_range.start <= marks[place][1]
        if inside and not event.key.startswith("ProfilerStep") and not (gpu and event.is_user_annotation):
            times[event.key].append((event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000)
    sums = {key: sum(values) for key, values in times.items()}
    total = sum(sums.values())
    order = sorted(sums, key=sums.get, reverse=True)[:_HEAVIEST]
    operations = [
        {"name": key, "calls": len(times[key]), "ms": round(sums[key], 3), "share": round(sums[key] / total, 4)}
        for key in order
        if sums[key] > 0
    ]
    return {
        "steps": [steps[0], steps[-1]],
        "device": device.type,
        "total_ms": round(total, 3),
        "operations": operations,
    }


def as_text(table: dict) -> str:
    """The heaviest operations in aligned columns."""
    lines = [f"{steps_in_words(table)}, on {table['device']}: {table['total_ms']:,.1f} ms in operations, of which", ""]
    lines += [
        f"{o['share']:6.1%} {o['ms']:12,.1f} ms {o['calls']:9,} calls  {o['name'][:70]}" for o in table["operations"]
    ]
    return "\n".join(lines)
