"""What the training loop calls to show and log its progress: the loggers, the progress, lines of text."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mori.cli import UserError, guarded, printable
from mori.tracking import loggers
from mori.tracking.loggers import Logger
from mori.tracking.progress import Progress


class Monitor:
    """Passes one run's numbers to every logger and shows the progress. Numbers arrive already reduced over ranks.

    A logger that fails is reported once and never stops the training.

    Args:
        run_dir: the run's folder.
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
        first_step: int,
        total_steps: int,
        seconds_left: Callable[[], float | None] = lambda: None,
        enabled: bool,
        resumed: bool = False,
    ):
        self.enabled, self._run_dir = enabled, run_dir
        self._reported: set[str] = set()
        first_lost_step = first_step + 1 if resumed else 0
        self._loggers = [logger(run_dir, first_lost_step) for logger in loggers.LOGGERS] if enabled else []
        self._progress = Progress(first_step, total_steps, seconds_left) if enabled else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values`, keyed by tag (`train/loss`), at `step`."""
        self._each(lambda logger: logger.scalars(step, values))

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Log a text, such as a sample, at `step`; `marked` are the spans of it to highlight, `(start, end)` in characters."""
        self._each(lambda logger: logger.text(step, tag, text, marked))

    def sync(self) -> None:
        """Wait until everything logged is on disk, because a checkpoint must not outlive the lines before it."""
        self._each(lambda logger: logger.sync())

    def move(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self._progress:
            self._progress.move(step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Show the newest figures, keyed by tag: beside the bar, or in a line of text where there is none."""
        if self._progress and (line := self._progress.log(step, values)):
            self.say(line)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._progress:
            with contextlib.suppress(OSError), self._progress.interrupted():
                say(message)

    def close(self) -> None:
        """Close the bar and every logger; what is logged later is dropped."""
        if self._progress:
            self._progress.close()
        self._each(lambda logger: logger.close())
        self._loggers = []

    def _each(self, action: Callable[[Logger], None]) -> None:
        """Call `action` with every logger; the first error of each is reported."""
        for logger in self._loggers:
            try:
                guarded(f"{logger.name} in {self._run_dir} cannot be written", lambda logger=logger: action(logger))
            except UserError as error:
                if logger.name not in self._reported:
                    self._reported.add(logger.name)
                    self.say(f"WARNING: {error}; training goes on without it")


def say(message: str) -> None:
    """Print a line at once. Ignores a closed pipe and a full disk."""
    try:
        print(printable(message, sys.stdout), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
