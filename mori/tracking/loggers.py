"""Where a run's numbers go. A new logger is one class and one entry in `mori.config.logging.LOGGERS`."""

import contextlib
import html
import json
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mori.cli import UserError, guarded, one_line, optional, record


class Logger:
    """Writes scalars and texts of a run; `Monitor` calls it on the main rank.

    Args:
        run_dir: the run's folder.
        first_lost_step: earlier attempts may have logged this step and later ones; that work was lost, so a logger drops
            those entries.
        about: what is known before the first step: tables of names and values, by title ("config", "environment", "ledger").

    A logger opens its output at the first write: importing a client does not delay the first step, and a disk or a server
    that fails is tried again at the next write. Errors may leave every method; `Monitor` reports the first.

    Attributes:
        in_background: whether a thread calls the methods, so that one that hangs does not delay the training; True except
            for files that must be on disk before a checkpoint is.
        notes: lines to print on the screen, each once.
    """

    name, in_background = "the log", True

    def __init__(self, run_dir: Path, first_lost_step: int, about: dict[str, dict]):
        self.run_dir, self.first_lost_step, self.about = run_dir, first_lost_step, about
        self.notes: list[str] = []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write `values`, keyed by tag (`train/loss`), at `step`."""
        raise NotImplementedError

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Write a text, such as a sample, at `step`; `marked` are the spans of it to highlight, `(start, end)` in characters."""

    def histogram(self, step: int, tag: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Write a histogram at `step`: `counts[i]` values lie between `edges[i]` and `edges[i + 1]`."""

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""

    def close(self) -> None:
        """Flush and close."""


class MetricsFile(Logger):
    """`metrics.jsonl`: one JSON object a line, with `step` and the scalars."""

    name, in_background = "metrics.jsonl", False
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
        if path.is_file() and path.read_bytes() != lines.encode():
            staged = path.with_suffix(".tmp")
            staged.write_text(lines, encoding="utf-8")
            _sync(staged)
            staged.replace(path)
            _sync(path.parent)
        self._cut = True


class WandbRun(Logger):
    """A run of Weights & Biases; a resumed run continues the same one.

    Without a login, or if the server cannot be reached, everything is kept in the run's folder for `wandb sync`.
    """

    name = "wandb"
    _run, _started = None, False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values` over the axis `step`. wandb's own step cannot go back to where a killed run resumes."""
        self._log(step, values)

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Show a text word for word, with the `marked` spans highlighted."""
        import wandb

        parts = [(html.escape(part), is_marked) for part, is_marked in spans(text, marked)]
        page = "".join(f"<mark>{part}</mark>" if is_marked else part for part, is_marked in parts)
        self._log(step, {tag: wandb.Html(f'<pre style="white-space: pre-wrap">{page}</pre>')})

    def histogram(self, step: int, tag: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Log a histogram."""
        import wandb

        self._log(step, {tag: wandb.Histogram(np_histogram=(list(counts), list(edges)))})

    def close(self) -> None:
        """Send what is left; this may take long."""
        if self._run:
            self._run.finish()

    def _log(self, step: int, values: dict) -> None:
        if not self._started:
            self._started = True  # a second start, after an error, would take as long
            self._run = self._start()
        if self._run:
            self._run.log({"step": step, **values})

    def _start(self):
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=20, login_timeout=1)
        options = {
            "project": os.environ.get("WANDB_PROJECT", "mori"), "name": self.run_dir.name, "dir": str(self.run_dir),
            "id": self._identity(), "resume": "allow", "config": self.about, "settings": settings,
        }  # fmt: skip
        later = f"wandb sync {self.run_dir / 'wandb'}/offline-run-* uploads it"
        run = None
        if os.environ.get("WANDB_MODE", "online") != "online":
            run = wandb.init(**options)
        elif not _logged_in_to(wandb.setup(settings).settings):
            self.notes.append(f"wandb: not logged in (wandb login), so the run is kept in its folder; {later}")
        else:
            try:
                run = guarded("wandb", lambda: wandb.init(**options))
                self.notes.append(f"wandb: {run.url}")
            except UserError as error:
                self.notes.append(f"WARNING: {error}; the run is kept in its folder; {later}")
                wandb.teardown()  # frees the id
        run = run or wandb.init(mode="offline", **options)
        run.define_metric("*", step_metric="step")
        return run

    def _identity(self) -> str:
        """The id of this run at wandb: kept in its folder, so that a resumed run has it and a run that starts over does not."""
        path = self.run_dir / "wandb_id"
        identity = path.read_text(encoding="ascii") if path.exists() else ""
        if not identity:
            identity = secrets.token_hex(4)
            path.write_text(identity, encoding="ascii")
        return identity


def _logged_in_to(settings) -> bool:
    """Whether wandb has a key, as its documentation says: it would ask for one on the terminal otherwise."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(urlsplit(settings.base_url).hostname or ""):
                return True
    return False


def spans(text: str, marked: Iterable[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The parts of `text` in their order, each with whether it is in one of the `marked` spans."""
    parts, position = [], 0
    for start, end in sorted(marked):
        start = max(start, position)
        if start < min(end, len(text)):
            parts += [(text[position:start], False), (text[start:end], True)]
            position = end
    return [part for part in [*parts, (text[position:], False)] if part[0]]


class Background:
    """A logger whose methods a thread calls, so that nothing waits for it. If it does not keep up, calls are dropped.

    Args:
        make: the logger's constructor, without arguments.
    """

    _LONGEST_QUEUE = 1000  # calls

    def __init__(self, name: str, make: Callable[[], Logger]):
        self.name, self.notes = name, []
        self._calls: queue.Queue[tuple[str, tuple]] = queue.Queue(self._LONGEST_QUEUE)
        self._errors: list[str] = []
        self._thread = threading.Thread(target=self._work, args=[make], daemon=True)
        self._thread.start()

    def call(self, method: str, *values) -> None:
        """Queue a call. Raises RuntimeError for the first error of an earlier one, or if the queue is full."""
        try:
            self._calls.put_nowait((method, values))
        except queue.Full:
            self._errors.append("it does not keep up, and calls are dropped")
            if method == "close":  # make room for it
                self._calls.get()
                self._calls.put((method, values))
        self._raise()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the thread after `close` is called. Raises RuntimeError for an error, or if it takes longer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._errors.append("it does not end, and is left behind")
        self._raise()

    def _raise(self) -> None:
        if self._errors:
            raise RuntimeError(self._errors[0])

    def _work(self, make: Callable[[], Logger]) -> None:
        logger, method = None, ""
        while method != "close":
            method, values = self._calls.get()
            result = Future()
            if logger is None:
                record(result, make)
                if result.exception() is None:
                    logger, result = result.result(), Future()
                    logger.notes = self.notes
            if logger is not None:
                record(result, partial(getattr(logger, method), *values))
            if error := result.exception():
                self._errors.append(one_line(error))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`, without those that a kill, a full disk or a bad disk damaged."""
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
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
