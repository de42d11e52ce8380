"""What people look at during a run: TensorBoard, `metrics.jsonl`, the progress bar. Numbers arrive already reduced."""

import contextlib
import json
import os
import resource
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm


class Monitor:
    """Writes the numbers of one run; a silent one (`enabled=False`, for ranks above 0) has the same methods.

    Args:
        run_dir: the run's folder; TensorBoard's events and `metrics.jsonl` go there.
        first_step: the step the run goes on from. What was logged after it belongs to work that was lost, and is cut.
        resumed: whether there is something to go on from; if not, all that an earlier attempt has logged is cut.
        total_steps: the length of the progress bar.
    """

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, enabled: bool, resumed: bool = False):
        self.enabled = enabled
        if not enabled:
            return
        self._path = run_dir / "metrics.jsonl"
        self._failed = False
        self._events = None
        self._first_lost = first_step + 1 if resumed else 0
        shape = {"total": total_steps, "initial": first_step, "unit": "step", "dynamic_ncols": True}
        try:
            self._bar = tqdm(**shape, file=sys.stderr)
        except OSError:  # standard error may be a file on a full disk
            self._bar = tqdm(**shape, disable=True)
        with self._survive():
            _cut_from(self._path, self._first_lost)

    @property
    def _board(self):
        """TensorBoard's writer, imported and begun with the first that is written: a first step need not wait for it."""
        if not self._events:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._path.parent), purge_step=self._first_lost)
        return self._events

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values`, keyed by TensorBoard tag (`train/loss`), at `step`."""
        if not self.enabled:
            return
        with self._survive():
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()
        # Opened anew for each line: a disk that was full, or a folder that was gone, is tried again. What it may have
        # cut short then is ended by a line break of its own.
        with self._survive(), self._path.open("a", encoding="utf-8") as lines:
            lines.write("\n" * self._failed + json.dumps({"step": step, **values}) + "\n")

    def text(self, step: int, tag: str, text: str) -> None:
        """Show a text in TensorBoard, word for word, its long lines folded (a Markdown code block would not fold them)."""
        if not self.enabled:
            return
        with self._survive():
            folded = [part for line in text.splitlines() for part in textwrap.wrap(line, 110) or [""]]
            self._board.add_text(tag, "\n".join("    " + line for line in folded), step)
            self._board.flush()

    def progress(self, step: int, **shown) -> None:
        """Move the bar to `step`, with a few figures beside it."""
        if self.enabled:
            with contextlib.suppress(OSError):  # standard error may be a file on a full disk
                self._bar.set_postfix(shown, refresh=False)
                self._bar.update(step - self._bar.n)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            with contextlib.suppress(OSError), self._bar.external_write_mode(file=sys.stdout):
                say(message)

    def sync(self) -> None:
        """Wait until what was logged is on disk: a checkpoint must not outlive the lines before it."""
        if self.enabled and self._path.exists():
            with self._survive():
                _sync(self._path)

    def close(self) -> None:
        """Flush and close everything."""
        if self.enabled:
            with contextlib.suppress(OSError):
                self._bar.close()
            if self._events:
                with self._survive():
                    self._events.close()

    @contextlib.contextmanager
    def _survive(self):
        """A log that cannot be written is told once, and never stops a training."""
        try:
            yield
        # TensorBoard's writer thread hands its OSError on as a RuntimeError; TensorBoard itself may be missing.
        except (OSError, RuntimeError, ImportError) as error:
            if not self._failed:
                self._failed = True
                self.say(
                    f"WARNING: the log in {self._path.parent} cannot be written: {error}; training goes on without"
                )


def say(message: str) -> None:
    """Print a line at once. That nobody reads any more (`| head`), or a full disk, is no reason to stop a training."""
    try:
        print(message, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a `metrics.jsonl`; one that a kill, a full disk or a bad disk spoiled is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
    return found


def _cut_from(path: Path, step: int) -> None:
    kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] < step)
    if path.exists() and path.read_bytes() != kept.encode():
        staged = path.with_suffix(".tmp")
        staged.write_text(kept, encoding="utf-8")
        _sync(staged)
        staged.replace(path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Throughput:
    """Tokens per second of training alone: the clock stops while something else (evaluation, saving) has the machine."""

    def __init__(self, tokens: int = 0, seconds: float = 0.0):
        self.tokens, self.seconds, self.waited = tokens, seconds, 0.0
        self._mark = tokens, seconds, 0.0
        self._started = None

    def start(self) -> None:
        """Training begins or goes on."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Training pauses."""
        self.seconds += time.perf_counter() - self._started
        self._started = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The device may have nothing to do meanwhile, as its next batch is being made ready."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def since_last(self) -> tuple[float, float]:
        """Tokens per second since the last call, and the share of that time spent `waiting`."""
        if self._started is not None:
            self.stop()
            self.start()
        now = self.tokens, self.seconds, self.waited
        tokens, seconds, waited = (one - other for one, other in zip(now, self._mark, strict=True))
        self._mark = now
        return (tokens / seconds, waited / seconds) if seconds else (0.0, 0.0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU where we run on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss begins with the peak of the process that started this one, and not at 0.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
