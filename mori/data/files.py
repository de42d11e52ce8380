"""`--corpus` -> the files to read: folders, globs, named files, standard input; and the links that are refused."""

import atexit
import functools
import glob
import json
import os
import shutil
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path

from mori.cli import UserError, print_error
from mori.data.formats import FORMATS, check, has_format

SHIPPED = Path(__file__).parent.parent / "transcripts"
STANDARD_INPUT = "-"
_WANTED = "a text file, a folder, a glob, or - for standard input"


def find_files(corpus: list[str]) -> list[Path]:
    """The files that the values of `--corpus` name, in a fixed order, each once; the shipped transcripts for an empty list.

    A folder gives every file in it and in its subfolders whose format is known (`formats`), except hidden ones, models and
    runs; a glob gives every file that it matches; both are sorted by path; `-` gives a temporary copy of standard input.
    Raises UserError for a value that gives no file, for a file that no format reads, and for a link in a folder that leads
    out of it: a file elsewhere is read only when it is named.
    """
    paths = []
    for name in corpus or [str(SHIPPED)]:
        try:
            paths += _files_of(name)
        except (OSError, RuntimeError) as error:  # a name that is too long, no permission, a link to itself
            raise UserError(f"corpus {name[:200]} cannot be read: {getattr(error, 'strerror', error)}") from None
    unique: dict[Path, Path] = {}
    for path in paths:
        check(path)
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _files_of(name: str) -> list[Path]:
    if not name:
        raise UserError(f"corpus is an empty string; give {_WANTED}")
    if name == STANDARD_INPUT:
        return [_copy_of_standard_input()]
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"corpus {name} is neither a file nor a folder; text from a pipe is read with --corpus -")
    if not glob.has_magic(name):
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        nearest = "".join(
            f"; did you mean {path.with_name(name)}?" for name in get_close_matches(path.name, siblings, 1)
        )
        raise UserError(f"corpus {name} does not exist{place}{nearest or f'; give {_WANTED}'}")
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise UserError(f"corpus pattern {name} matches no file")
    return files


def _files_in(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if has_format(path) and path.is_file() and not _is_hidden(path, folder))
    inside = {
        path: [parent for parent in path.parents if parent != folder and folder in parent.parents] for path in paths
    }
    written = {parent for parents in inside.values() for parent in parents if _is_of_a_run(parent)}
    files = sorted(path for path, parents in inside.items() if written.isdisjoint(parents))
    for file in files:
        if leads_out(file, folder):
            raise UserError(
                f"{file} is a link that leads out of the corpus folder; to read it, name the file itself: {file.resolve()}"
            )
    if not files:
        raise UserError(
            f"corpus folder {folder} holds no file of a known format ({' '.join(FORMATS)}, plain, compressed or in a .zip); a file of "
            "plain text with another suffix has to be named"
        )
    return files


@functools.cache
def _copy_of_standard_input() -> Path:
    """Standard input as a temporary file, because a corpus is read more than once; removed when the process ends."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "corpus - is standard input, which only one process can read; name a file when there are several ranks"
        )
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise UserError("corpus - is standard input, which is not open here; name a file")
    if stream.isatty():
        print_error("reading the corpus from the terminal; Ctrl-D on an empty line ends it")
    folder = Path(tempfile.mkdtemp(prefix="mori-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "standard-input.txt"
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
    except OSError as error:
        raise UserError(
            f"cannot copy standard input to {folder}: {error.strerror}; TMPDIR names another folder"
        ) from None
    _check_plain_text(path)
    return path


def _check_plain_text(path: Path) -> None:
    """Raise UserError for JSON lines on standard input, which has no suffix that would tell its format."""
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        is_row = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return
    if is_row:
        raise UserError(
            "standard input is read as plain text, and this is JSON; save it as a file with the suffix .jsonl, and name that"
        )


def _is_of_a_run(folder: Path) -> bool:
    """Whether `folder` holds a model, a run or a comparison: its JSON files are settings and no corpus."""
    return any(
        (folder / name).is_file() for name in ("config.json", "adapter_config.json", "metrics.jsonl", "compare.json")
    )


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def leads_out(path: Path, *folders: Path) -> bool:
    """True if `path`, with all links followed, lies in none of the folders."""
    target = Path(os.path.realpath(path))
    return not any(target.is_relative_to(os.path.realpath(folder)) for folder in folders)


def memory_bytes() -> int:
    """The physical memory of this machine; 8 GiB where the system does not tell, as on Windows."""
    if not hasattr(os, "sysconf"):
        return 8 << 30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
