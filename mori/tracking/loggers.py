"""Where a run's numbers go. A new logger is one class here and one entry in `LOGGERS`."""

import contextlib
import html
import json
import os
import re
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from mori.cli import optional

_EVENTS_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\b")


class Logger:
    """Writes scalars and texts of a run; `Monitor` calls it on the main rank.

    Args:
        run_dir: the run's folder.
        first_lost_step: earlier attempts may have logged this step and later ones; that work was lost, so a logger drops
            those entries.

    A logger opens its output at the first write: importing a client does not delay the first step, and a disk or a server
    that fails is tried again at the next write. Errors may leave every method; `Monitor` reports the first.
    """

    name = "the log"

    def __init__(self, run_dir: Path, first_lost_step: int):
        self.run_dir, self.first_lost_step = run_dir, first_lost_step

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write `values`, keyed by tag (`train/loss`), at `step`."""
        raise NotImplementedError

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Write a text, such as a sample, at `step`; `marked` are the spans of it to highlight, `(start, end)` in characters."""

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard(Logger):
    """TensorBoard events in the run's folder."""

    name = "TensorBoard"
    _records = None
    _started = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write `values` at `step` and flush."""
        from torch.utils.tensorboard.summary import scalar

        self._write(step, [scalar(tag, value) for tag, value in values.items()])

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Show `text` word for word, with long lines folded and the `marked` spans in bold."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._write(step, [text_summary(tag, preformatted(text, marked))])

    def close(self) -> None:
        """Close the events file."""
        if self._records:
            self._records.close()

    def _write(self, step: int, summaries: list) -> None:
        """Append an event for each summary. After an error, the next write starts a new file: this one may end in a part."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [Event(step=step, summary=summary) for summary in summaries]
        if not self._records:
            first = [Event(file_version="brain.Event:2")]
            if not self._started:  # TensorBoard forgets the events of this step and later ones that it has read before
                first.append(Event(step=self.first_lost_step, session_log=SessionLog(status=SessionLog.START)))
            events = first + events
            self._records = RecordWriter((self.run_dir / self._new_name()).open("xb"))
        try:
            for event in events:
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._records.flush()
            self._started = True
        except OSError:
            self._records = None
            raise

    def _new_name(self) -> str:
        """The name of a file that TensorBoard reads after those present: it sorts them by name, and a clock may go back."""
        times = [int(name[1]) for path in self.run_dir.glob("events*") if (name := _EVENTS_NAME.match(path.name))]
        return f"events.out.tfevents.{max([int(time.time()), *(latest + 1 for latest in times)]):010d}.mori"


class MetricsFile(Logger):
    """`metrics.jsonl`: one JSON object a line, with `step` and the scalars."""

    name = "metrics.jsonl"
    _cut = _incomplete = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append a line. If the write before failed, a line break ends the part of it that may be in the file."""
        self._cut_lost_lines()
        line = "\n" * self._incomplete + json.dumps({"step": step, **values}) + "\n"
        self._incomplete = True
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(line)
        self._incomplete = False

    def sync(self) -> None:
        """Wait until the lines are on disk."""
        self._cut_lost_lines()
        if self._path.exists():
            _sync(self._path)

    @property
    def _path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def _cut_lost_lines(self) -> None:
        if self._cut:
            return
        path = self._path
        lines = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] < self.first_lost_step)
        if path.exists() and path.read_bytes() != lines.encode():
            staged = path.with_suffix(".tmp")
            staged.write_text(lines, encoding="utf-8")
            _sync(staged)
            staged.replace(path)
            _sync(path.parent)
        self._cut = True


LOGGERS: list[type[Logger]] = [TensorBoard, MetricsFile]


_BOLD = {
    "\ufdd0": "<strong>",
    "\ufdd1": "</strong>",
}  # noncharacters of Unicode, which stand for the tags until the text is escaped


def preformatted(text: str, marked: Iterable[tuple[int, int]] = ()) -> str:
    """`text` as HTML that shows it word for word: escaped, folded at 110 columns, the `marked` spans in bold."""
    begin, end = _BOLD
    text, parts, position = text.replace(begin, "\ufffd").replace(end, "\ufffd"), [], 0
    for first, last in sorted(marked):
        first = max(first, position)
        if first < last:
            parts += [text[position:first], begin, text[first:last], end]
            position = last
    text = "".join([*parts, text[position:]])
    folded = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, 110) or [""])
    escaped = html.escape(folded, quote=False)
    return f"<pre>{escaped.translate(str.maketrans(_BOLD))}</pre>"


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`, without those that a kill, a full disk or a bad disk damaged."""
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                metrics.append(values)
    return metrics


def _sync(path: Path) -> None:
    with optional("fsync", "a power cut may lose the newest files"):
        handle = os.open(path, os.O_RDWR if hasattr(os, "O_BINARY") else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
