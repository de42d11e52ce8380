"""The progress of a run on the screen: a bar where one can be drawn, else a line at each log."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from mori.cli import bar_class, clock, plural

_SHORTEST_BAR = 2  # columns


class Progress:
    """A progress bar that shows the newest figures, or a line of text at each log if no bar can be drawn.

    Args:
        first_step, total_steps: the ends of the bar.
        seconds_left: called for the seconds until the run ends; None while they are unknown.
    """

    def __init__(self, first_step: int, total_steps: int, seconds_left: Callable[[], float | None]):
        self.total_steps, self._seconds_left = total_steps, seconds_left
        self._figures: list[str] = []
        self._bar = None
        # Standard error may be on a full disk.
        with contextlib.suppress(OSError):
            self._bar = self._new_bar(first_step)

    def move(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)

    def log(self, step: int, values: dict[str, float]) -> str | None:
        """Show `values`, keyed by tag (`train/loss`): beside the bar, or in the line of text that is returned."""
        self._figures = figures(values)
        if self._bar is not None:
            self.move(step)
            with contextlib.suppress(OSError):
                self._bar.refresh()
            return None
        left = [f"{clock(seconds)} left"] if (seconds := self._seconds_left()) is not None else []
        epoch = f" (epoch {values['train/epoch']:.3g})" if "train/epoch" in values else ""
        return f"step {step:,}/{self.total_steps:,}{epoch}: {', '.join(self._figures + left)}"

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """The context in which text is printed above the bar."""
        with self._bar.external_write_mode(file=sys.stdout) if self._bar is not None else contextlib.nullcontext():
            yield

    def close(self) -> None:
        """Leave the bar on the screen, without the time that was left."""
        self._seconds_left = lambda: None
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def _new_bar(self, first_step: int):
        bar = bar_class()
        if bar is None:
            return None

        def layout(step: int, columns: int | None) -> str:
            left = self._seconds_left()
            return bar_layout(step, self.total_steps, left, self._figures, columns)

        class Bar(bar):
            @property
            def format_dict(self):
                values = super().format_dict
                columns = values["ncols"] and values["ncols"] - 1  # the terminal shows Ctrl-C as ^C behind the bar
                return {**values, "ncols": columns, "bar_format": layout(self.n, columns)}

        options = {"total": self.total_steps, "initial": first_step, "dynamic_ncols": True, "file": sys.stderr}
        return Bar(**options)


def figures(values: dict[str, float]) -> list[str]:
    """The figures of a log that a person follows, the most wanted first."""
    texts = {
        "train/loss": "loss {:.4f}",
        "train/learning_rate": "lr {:.3g}",
        "train/grad_norm": "grad norm {:.3g}",
        "perf/tokens_per_second": "{:,.0f} tokens/s",
        "perf/mfu": "MFU {:.0%}",
    }
    shown = [text.format(values[tag]) for tag, text in texts.items() if tag in values]
    skipped = int(values.get("train/skipped_steps", 0))
    return shown + [f"{plural(skipped, 'step')} skipped"] * bool(skipped)


def bar_layout(step: int, total_steps: int, seconds_left: float | None, figures: list[str], columns: int | None) -> str:
    """tqdm's `bar_format` for `columns` columns (None: as many as it takes): figures that do not fit are left out."""
    start, shown = f"step {step:,}/{total_steps:,} |", []
    left = [] if seconds_left is None else [f"{clock(seconds_left)} left"]
    for figure in left + figures:
        width = len(start) + _SHORTEST_BAR + len("| ") + len(", ".join([*shown, figure]))
        if columns is not None and width >= columns:
            break
        shown.append(figure)
    return f"{start}{{bar}}| {', '.join(shown)}"
