"""What the training loop calls to show and log its progress: the loggers, the progress, lines of text."""

import contextlib
import importlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from mori.cli import UserError, guarded, printable
from mori.config.logging import LOGGERS
from mori.tracking.loggers import Background, Logger, MetricsFile
from mori.tracking.profiler import Profiler, as_text
from mori.tracking.progress import Progress
from mori.tracking.report.write import Reporter

_CLOSE_SECONDS = 30  # that the end of a run waits for loggers in the background


class Monitor:
    """Passes one run's numbers to every logger and shows the progress. Numbers arrive already reduced over ranks.

    `metrics.jsonl` is always written. A logger that fails or hangs is reported once and never stops the training.

    Args:
        run_dir: the run's folder.
        report_to: further loggers, by their names in `LOGGERS`.
        about: what is known before the first step: tables of names and values, by title.
        profiler: records the steps that the user wants to look at.
        first_step: the step that the run starts or resumes from; entries of later steps belong to lost work.
        total_steps: the last step of the run.
        seconds_left: called for the seconds until the run ends; None while they are unknown.
        enabled: False on ranks above 0, where every method does nothing.
        resumed: False if the run starts over, so all entries of an earlier attempt are dropped.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        report_to: Sequence[str] = ("tensorboard",),
        about: Mapping[str, dict] = types.MappingProxyType({}),
        profiler: Profiler | None = None,
        first_step: int,
        total_steps: int,
        seconds_left: Callable[[], float | None] = lambda: None,
        enabled: bool,
        resumed: bool = False,
    ):
        self.enabled, self._run_dir = enabled, run_dir
        self._reported: set[str] = set()
        first_lost_step = first_step + 1 if resumed else 0
        self._loggers: list[Logger | Background] = []
        for name in ["metrics.jsonl", *report_to] if enabled else []:
            make = partial(_logger_class(name), run_dir, first_lost_step, dict(about))
            self._loggers.append(Background(name, make) if make.func.in_background else make())
        self._progress = Progress(first_step, total_steps, seconds_left) if enabled else None
        self._reporter, self._profiler = Reporter(run_dir), profiler if enabled else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values`, keyed by tag (`train/loss`), at `step`."""
        self._each("scalars", step, values)

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Log a text, such as a sample, at `step`; `marked` are the spans of it to highlight, `(start, end)` in characters."""
        self._each("text", step, tag, text, marked)

    def histogram(self, step: int, tag: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Log a histogram at `step`: `counts[i]` values lie between `edges[i]` and `edges[i + 1]`. Without counts there is none."""
        if counts:
            self._each("histogram", step, tag, edges, counts)

    def sync(self) -> None:
        """Wait until everything logged is on disk, because a checkpoint must not outlive the lines before it."""
        self._each("sync")

    def move(self, step: int) -> None:
        """Move the progress bar to `step`, which is done; write the profile if it ends there."""
        if self._progress:
            self._progress.move(step)
        if self._profiler and self._profiler.is_over(step):
            self._end_profile()

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Show the newest figures, keyed by tag: beside the bar, or in a line of text where there is none."""
        if self._progress and (line := self._progress.log(step, values)):
            self.say(line)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._progress:
            with contextlib.suppress(OSError), self._progress.interrupted():
                say(message)

    @contextlib.contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """The context of a training step, which the profiler records if the user asked for it."""
        if self._profiler is None:
            yield
            return
        self._attempt(self._profiler, partial(self._profiler.begin, step))
        with self._profiler.mark(step):
            yield

    def _end_profile(self) -> None:
        """Write what was recorded; the heaviest operations are a text, too."""

        def write() -> None:
            if table := self._profiler.close():
                self.text(table["steps"][-1], "profile/heaviest_operations", as_text(table))

        self._attempt(self._profiler, write)

    def report(self, results: dict, finished: bool = False) -> None:
        """Write the report of the run so far, so that a killed run has one; `results` has the fields of summary.json."""
        if self.enabled:
            self._attempt(self._reporter, partial(self._reporter.write, results, finished))

    def close(self) -> None:
        """Close the bar and every logger; what is logged later is dropped."""
        if self._profiler:  # a run that is shorter than what should be recorded
            self._end_profile()
        if self._progress:
            self._progress.close()
        self._each("close")
        deadline = time.monotonic() + _CLOSE_SECONDS
        for logger in self._loggers:
            if isinstance(logger, Background):
                self._attempt(logger, partial(logger.wait, max(0.0, deadline - time.monotonic())))
        self._loggers = []

    def _each(self, method: str, *values) -> None:
        """Call a method of every logger."""
        for logger in self._loggers:
            call = partial(logger.call, method) if isinstance(logger, Background) else getattr(logger, method)
            self._attempt(logger, partial(call, *values))

    def _attempt(self, logger: "Logger | Background | Reporter | Profiler", action: Callable[[], object]) -> None:
        """Call `action`; say the first error of a logger, and its notes."""
        try:
            guarded(f"{logger.name} in {self._run_dir} cannot be written", action)
        except UserError as error:
            if logger.name not in self._reported:
                self._reported.add(logger.name)
                self.say(f"WARNING: {error}; training goes on without it")
        while logger.notes:
            self.say(logger.notes.pop(0))


def _logger_class(name: str) -> type[Logger]:
    """The class of a logger by its name."""
    if name == "metrics.jsonl":
        return MetricsFile
    module, _, cls = LOGGERS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def say(message: str) -> None:
    """Print a line at once. Ignores a closed pipe and a full disk."""
    try:
        print(printable(message, sys.stdout), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
