"""Where a run's numbers go. A new logger is one class here and one entry in `LOGGERS`."""

import contextlib
import json
import os
import textwrap
from pathlib import Path


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

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text, such as a sample, at `step`."""

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard(Logger):
    """TensorBoard events in the run's folder."""

    name = "TensorBoard"
    _writer = None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write `values` at `step` and flush."""
        for tag, value in values.items():
            self._open().add_scalar(tag, value, step)
        self._open().flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Show `text` word for word, as an indented block with long lines folded (a Markdown code fence does not fold)."""
        folded = [part for line in text.splitlines() for part in textwrap.wrap(line, 110) or [""]]
        self._open().add_text(tag, "\n".join("    " + line for line in folded), step)
        self._open().flush()

    def close(self) -> None:
        """Close the events file."""
        if self._writer:
            self._writer.close()

    def _open(self):
        if not self._writer:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run_dir), purge_step=self.first_lost_step)
        return self._writer


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
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
