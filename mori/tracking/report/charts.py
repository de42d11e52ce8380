"""Line charts as SVG that stretches to any width; labels are HTML beside it, so they keep their size on a phone."""

import html
import math
import re
from dataclasses import dataclass, field

_SIZE = 1000  # of the drawing, in both directions; the page stretches it
_MOST_POINTS = 500  # of a line: more are thinner than a pixel
_MOST_DOTS = 60
_SMOOTHED_FROM = 60  # points
_LOGARITHMIC_FROM = 30.0  # times the smallest value
_LETTERS = ((1e9, "G"), (1e6, "M"), (1e3, "K"))


def drawable(value: float) -> bool:
    """Whether a value is finite, and of a size with which an axis can be reckoned."""
    return abs(value) < 1e100


@dataclass
class Series:
    """A line: steps and values, in the order of the steps.

    Attributes:
        colour: a name of the page's style sheet.
        dots: mark every point, with its value as a tooltip.
        smooth: draw a moving mean over the values of a long line.
    """

    name: str
    points: list[tuple[int, float]]
    colour: str
    dots: bool = False
    smooth: bool = False


@dataclass
class Chart:
    """Lines over the steps.

    Attributes:
        digits: the format of the values.
        logarithmic: allow a logarithmic axis, which is taken if the values differ enough.
        crowded: of so many lines that only the moving mean of each is drawn, the first line above the others, without dots.
        lost: which values are not drawn, in words; "" if all are.
    """

    title: str
    series: list[Series]
    digits: str = ".4f"
    logarithmic: bool = False
    crowded: bool = False
    lost: str = ""
    axis: "Axis" = field(init=False)
    steps: "Axis" = field(init=False)

    def __post_init__(self):
        steps = sorted({step for series in self.series for step, value in series.points if not drawable(value)})
        if steps:
            self.lost = (
                f"Not finite, so not drawn: step {', '.join(f'{s:,}' for s in steps[:8])}{', …' * (len(steps) > 8)}"
            )
        self.series = [series for series in self.series if any(drawable(value) for _, value in series.points)]
        values = [value for series in self.series for _, value in self.drawn(series) if drawable(value)]
        steps = [step for series in self.series for step, _ in series.points]
        logarithmic = self.logarithmic and bool(values) and 0 < _LOGARITHMIC_FROM * min(values) < max(values)
        self.axis = Axis(min(values, default=0), max(values, default=1), logarithmic, percent=self.digits.endswith("%"))
        self.steps = Axis(min([0, *steps]), max(steps, default=1), tight=True)

    def drawn(self, series: Series) -> list[tuple[int, float]]:
        """The points of the line itself: in a crowded chart the moving mean of a long one."""
        return smoothed(series.points) if self.crowded and _is_smoothed(series) else series.points


class Axis:
    """A range of values, widened to round numbers, and where a value lies in it (0 to 1).

    Args:
        logarithmic: by the logarithm of the values.
        tight: keep the ends as they are.
        percent: the values are shares, from 0 to 1, and are written in percent.
    """

    def __init__(self, low: float, high: float, logarithmic: bool = False, tight: bool = False, percent: bool = False):
        self.logarithmic, self.percent = logarithmic, percent
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        if not high > low:
            low, high = (low, low + 1) if tight or not low else (low - abs(low) * 0.1, high + abs(high) * 0.1)
        self.step = 1 if logarithmic and high - low > 1 else _round_step(high / 5 - low / 5)
        if logarithmic:
            low, high = math.floor(low), math.ceil(high)
        elif not tight:
            low, high = math.floor(low / self.step) * self.step, math.ceil(high / self.step) * self.step
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        """Where a value lies in the range."""
        value = math.log10(value) if self.logarithmic else value
        return value / (self.high - self.low) - self.low / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Where the round values of the range lie, and how they are written."""
        step = max(1, math.ceil((self.high - self.low) / 5)) if self.logarithmic else self.step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        marks = [index * step for index in range(first, last + 1)]
        if self.logarithmic:
            return [(self(10.0**mark), f"{10.0**mark:g}") for mark in marks]
        return [(self(mark), self._label(mark)) for mark in marks]

    def _label(self, value: float) -> str:
        """A value with the digits in which its neighbours differ."""
        top, step = max(abs(self.low), abs(self.high)), self.step
        if self.percent:
            return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9) - 2)}%}"
        if top >= 1e12 or top < 0.01:
            digits = max(0, math.floor(math.log10(abs(value) or 1)) - math.floor(math.log10(step)))
            return (
                re.sub(r"e([-+])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.{digits}e}") if value else "0"
            )
        size, letter = next(((size, name) for size, name in _LETTERS if top >= 10 * size), (1, ""))
        digits = max(0, -math.floor(math.log10(step / size) + 1e-9))
        return f"{value / size:,.{digits}f}{letter}"


def _round_step(size: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `size`."""
    if not size > 0 or not math.isfinite(size):
        return 1.0
    power = 10.0 ** math.floor(math.log10(size))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= size), 10 * power)


def thinned(points: list[tuple[int, float]], most: int = _MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` of the points, or a few more: the first, the last, the lowest and the highest of each part of the line."""
    if len(points) <= most:
        return points
    size, kept = math.ceil(len(points) * 4 / most), []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [point for point in part if drawable(point[1])] or part
        ends = {part[0], part[-1], min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of the values around each point, over a thirtieth of the line."""
    finite = [(step, value) for step, value in points if drawable(value)]
    reach, sums = max(1, len(finite) // 60), [0.0]
    for _, value in finite:
        sums.append(sums[-1] + value)
    result = []
    for index, (step, _) in enumerate(finite):
        low, high = max(0, index - reach), min(len(finite), index + reach + 1)
        result.append((step, (sums[high] - sums[low]) / (high - low)))
    return result


def _is_smoothed(series: Series) -> bool:
    """Whether a moving mean of the line is drawn."""
    return series.smooth and len(series.points) >= _SMOOTHED_FROM


def svg(chart: Chart) -> str:
    """The chart as HTML: an inline SVG that fills its box, and the labels of its axes. The box has a size from the style sheet."""
    lines = [f'<path class="gridline" d="M0 {_y(place)}H{_SIZE}"/>' for place, _ in chart.axis.ticks()]
    for series in reversed(chart.series):
        lines += _line(chart, series)
    across = "".join(
        f'<span style="bottom:{place * 100:.2f}%">{label}</span>'
        for place, label in chart.axis.ticks()
        if place <= 1.001
    )
    along = "".join(
        f'<span style="left:{place * 100:.2f}%">{label}</span>' for place, label in chart.steps.ticks() if place < 0.85
    )
    end = f'<span class="end" style="left:100%">{int(chart.steps.high):,}</span>'
    return (
        f'<div class="plot"><svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(_in_words(chart))}">{"".join(lines)}</svg>'
        f'<div class="y" aria-hidden="true">{across}</div><div class="x" aria-hidden="true">{along}{end}</div></div>'
    )


def _in_words(chart: Chart) -> str:
    """What the picture shows, for those who cannot see it."""
    parts = []
    for series in chart.series:
        finite = [(step, value) for step, value in series.points if drawable(value)]
        (first, before), (last, after) = finite[0], finite[-1]
        parts.append(
            f"{series.name} from {before:{chart.digits}} at step {first} to {after:{chart.digits}} at step {last}"
        )
    return f"{chart.title}: {'; '.join(parts)}"


def _line(chart: Chart, series: Series) -> list[str]:
    """The paths of a series: its line, broken where values are not finite, and its dots with their values."""
    smooth = _is_smoothed(series) and not chart.crowded
    style = f'style="stroke:var(--{series.colour})"'
    paths = [
        f'<path class="line{" faint" if smooth else ""}" {style} d="{_path(chart, thinned(chart.drawn(series)))}"/>'
    ]
    if smooth:
        mean = thinned(smoothed(series.points))
        paths.append(f'<path class="line" {style} d="{_path(chart, mean)}"/>')
    dots = [(step, value) for step, value in series.points if drawable(value)]
    if series.dots:
        for step, value in thinned(dots, _MOST_DOTS):
            title = html.escape(f"{series.name}, step {step:,}: {value:{chart.digits}}")
            x, y = _x(chart, step), _y(chart.axis(value))
            paths.append(f'<path class="dot" {style} d="M{x} {y}h0"><title>{title}</title></path>')
    return paths


def _path(chart: Chart, points: list[tuple[int, float]]) -> str:
    parts, joined = [], False
    for step, value in points:
        drawn = drawable(value) and (value > 0 or not chart.axis.logarithmic)
        if drawn:
            parts.append(f"{'L' if joined else 'M'}{_x(chart, step)} {_y(chart.axis(value))}{'' if joined else 'h0'}")
        joined = drawn
    return "".join(parts)


def _x(chart: Chart, step: int) -> str:
    return f"{chart.steps(step) * _SIZE:.1f}".removesuffix(".0")


def _y(place: float) -> str:
    return f"{_SIZE - min(max(place, 0), 1) * _SIZE:.1f}".removesuffix(".0")


def sparkline(points: list[tuple[int, float]], width: int = 40) -> str:
    """The values of a line as block characters; "" for fewer than two."""
    values = [value for _, value in points if drawable(value)]
    if len(values) < 2:
        return ""
    parts = (
        [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
        if len(values) > width
        else [[v] for v in values]
    )
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) / (high - low) * 7) if high > low else 3] for mean in means)
