"""Write the report of a run, or of a folder of runs: `mori report`, and the end of every evaluation."""

import json
import os
import time
from pathlib import Path

from mori.cli import UserError, one_line, plural
from mori.config import ReportConfig
from mori.tracking.report import markdown, web
from mori.tracking.report.compare import folder_page
from mori.tracking.report.content import run_page
from mori.tracking.report.data import PROGRESS, RunFiles, is_run, read_run
from mori.tracking.report.page import Page

_SHARE = 0.01  # of a run's time, for its reports
_CHEAP_SECONDS = 0.05  # what a report may always take


class Reporter:
    """Writes the report of a run while it goes on. One that takes long has a hundredth of the run's time at most."""

    name = "the report"

    def __init__(self, run_dir: Path):
        self.run_dir, self.notes, self._next, self._cleaned = run_dir, [], 0.0, False

    def write(self, results: dict, finished: bool = False) -> None:
        """Write `results`, which has the fields of summary.json, and the report, unless the last one is too recent.

        Of a `finished` run summary.json alone tells, which must be there. Raises OSError.
        """
        if not self._cleaned:
            self._cleaned = True
            for leftover in self.run_dir.glob(".*.*.partial"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        path = self.run_dir / PROGRESS
        if finished:
            path.unlink(missing_ok=True)
        else:
            _replace(path, json.dumps(results, ensure_ascii=False))
        if time.monotonic() >= self._next or finished:
            began = time.thread_time()  # on a busy machine, a report takes no more work
            write_run(read_run(self.run_dir))
            took = time.thread_time() - began
            self._next = time.monotonic() + took / _SHARE * (took > _CHEAP_SECONDS)


def write_run(run: RunFiles) -> None:
    """Write the report of a run into its folder. Raises OSError."""
    _write(run.folder, run_page(run))


def report(config: ReportConfig) -> None:
    """Write the reports that `mori report` asks for, and say where they are.

    Raises UserError for a folder that is no run and holds none, and for a run whose files cannot be read.
    """
    for name in config.folder:
        print(_report(Path(name)))


def _report(folder: Path) -> str:
    """Write the report of a run, or those of a folder of runs; returns a line about it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, or one that holds runs")
    try:
        if is_run(folder):
            run = read_run(folder)
            if not run.config and not run.metrics:
                raise UserError(f"{folder} is a damaged run: {'; '.join(run.damage) or 'it has no config.json'}")
            write_run(run)
            return f"{folder / 'report.html'}, {folder / 'report.md'}"
        if (folder / "compare.json").is_file():
            raise UserError(f"{folder} is a comparison with Trainer, whose report is {folder / 'report.md'}")
        runs = [read_run(path) for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
        if not runs:
            raise UserError(f"{folder} holds no runs; give the folder of a run, or one that holds runs")
        for run in runs:
            if run.config or run.metrics:
                write_run(run)
        _write(folder, folder_page(folder, runs))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written: {error.strerror or one_line(error)}") from None
    return f"{folder / 'report.html'}, {folder / 'report.md'}: {plural(len(runs), 'run')}"


def _write(folder: Path, page: Page) -> None:
    _replace(folder / "report.md", markdown.page(page))
    _replace(folder / "report.html", web.page(page))


def _replace(path: Path, content: str) -> None:
    """Write a file and rename it into place, so a reader sees the old one or the new one. Two processes may do so at once."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        staged.write_text(content, encoding="utf-8", errors="replace", newline="\n")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
