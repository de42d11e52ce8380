"""What a report says, before it is written as HTML or as Markdown."""

import math
from dataclasses import dataclass, field

from mori.tracking.report.charts import Chart


class Code(str):
    """A text in the letters of a program: a path, a hash, a command."""


@dataclass
class Link:
    """A text that leads to a file beside the page; `target` is quoted as in a URL, `colour` that of its line in the charts."""

    text: str
    target: str
    colour: str = "rest"


@dataclass
class Headline:
    """The figure that the page is about: `before` -> `after`."""

    label: str
    before: str
    after: str
    note: str


@dataclass
class Figure:
    """A figure with its name, and a note below."""

    label: str
    value: str
    note: str = ""


@dataclass
class Table:
    """Rows of cells. Columns whose name begins with `#` hold numbers, and stand at the right.

    Attributes:
        marked: the index of the row that stands out.
    """

    title: str
    columns: list[str]
    rows: list[list]
    note: str = ""
    marked: int | None = None
    folded: bool = False


@dataclass
class Sample:
    """A text of the model: its prompt, and then parts, each with whether it is copied from the training text."""

    prompt: str
    parts: list[tuple[str, bool]]

    @classmethod
    def cut(cls, sample: str, prompts: list[str], ranges: list[tuple[int, int]]) -> "Sample":
        """A text cut behind the longest of the prompts with which it begins, and at the ends of the copied ranges."""
        prompt = max((p for p in prompts if sample.startswith(p)), key=len, default="")
        parts, position = [], len(prompt)
        for start, end in ranges:
            start, end = max(start, position), min(end, len(sample))
            if start < end:
                parts += [(sample[position:start], False)] * (start > position) + [(sample[start:end], True)]
                position = end
        return cls(prompt, [*parts, (sample[position:], False)] if position < len(sample) else parts)


def copied_ranges(copied, index: int) -> list[tuple[int, int]]:
    """The ranges of characters of one sample that are copied, in order and apart; malformed ones are left out."""
    listed = copied[index] if isinstance(copied, list) and index < len(copied) else []
    ranges = [r for r in listed if isinstance(r, list) and len(r) == 2] if isinstance(listed, list) else []
    merged: list[tuple[int, int]] = []
    for start, end in sorted((a, b) for a, b in ranges if type(a) is type(b) is int and 0 <= a < b):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    return merged


@dataclass
class Page:
    """A report.

    Attributes:
        kind: the small line above the title.
        pairs: the samples before and after the training; None where there is none.
        commands: what each does, and the command.
    """

    title: str
    kind: str
    summary: str
    headline: Headline | None = None
    figures: list[Figure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    sample_titles: tuple[str, str] = ("Before", "After")
    sample_note: str = ""
    pairs: list[tuple[Sample | None, Sample | None]] = field(default_factory=list)
    shares: list[tuple[str, int]] = field(default_factory=list)  # of the tokens of the corpus
    tables: list[Table] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)
    end: str = ""


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; a dash if there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    return f"{value:,.{digits}f}" if abs(value) < 1e15 else f"{value:.3e}"


def count(value: float | None) -> str:
    """A whole number with its thousands; a dash if there is none."""
    return fixed(value, 0)


def compact(value: float | None) -> str:
    """A number of parameters or tokens in a few letters: `5.2 M`."""
    if value is None or not math.isfinite(value):
        return fixed(value, 0)
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= size:
            return f"{value / size:,.1f}{letter}"
    return fixed(value, 0)


def memory(value: float | None) -> str:
    """Bytes of memory as MiB or GiB; a dash if they are unknown."""
    if not value or not math.isfinite(value):
        return "–"
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def change(before: float | None, after: float | None) -> str:
    """How much lower or higher `after` is, in percent; "" if that cannot be said."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)) or not before:
        return ""
    percent = (after - before) / before * 100
    return f"{abs(percent):.1f}% {'lower' if percent < 0 else 'higher'}"
