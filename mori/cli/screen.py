"""What a person at a screen sees: numbers with their nouns, times, progress bars."""

import os
import re
import sys
import warnings
from typing import TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def plural(count: int, noun: str, nouns: str = "") -> str:
    """The number and its noun: `1 document`, `1,234 documents`; `nouns` is the plural if it is not formed by an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def printable(text: str, stream: TextIO) -> str:
    r"""The text as `stream` may show it: control characters, which would move a terminal's cursor, as `\x1b` and the like."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text) if stream.isatty() else text


def clock(seconds: float) -> str:
    """A duration as a clock shows it: `0:07`, `3:20`, `51:03:20`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bar_class() -> type | None:
    """The class of progress bars: tqdm's for a terminal, or its widget in a notebook; None if no bar can be drawn.

    A bar overwrites its line, which files, pipes and dumb terminals keep. It goes to standard error, and lines of text to
    standard output: both must be the terminal.
    """
    from tqdm import tqdm as terminal_bar

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm asks for ipywidgets
        from tqdm.autonotebook import tqdm as bar
    if bar is not terminal_bar:
        return bar
    streams = (sys.stdout, sys.stderr)
    return bar if os.environ.get("TERM") != "dumb" and all(stream.isatty() for stream in streams) else None


def progress_bar(name: str, total: int):
    """A tqdm bar over `total` bytes that disappears when it is closed; every half minute a line of text if none can be drawn."""
    from tqdm import tqdm

    options = {"desc": name, "total": total, "unit": "B", "unit_scale": True, "delay": 1, "leave": False}
    if bar := bar_class():
        return bar(**options, dynamic_ncols=True, file=sys.stderr)
    layout = "{desc}: {n_fmt}B of {total_fmt}B, {remaining} left"
    return tqdm(**options, bar_format=layout, mininterval=30, maxinterval=30, file=_Lines())


class _Lines:
    """A stream that prints what tqdm draws as lines of text."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, flush=True)

    def flush(self) -> None:
        pass
