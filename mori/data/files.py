"""`--corpus` -> the files to read: folders, globs, named files; and the links that are refused."""

import glob
import os
from pathlib import Path

from mori.cli import UserError
from mori.data.formats import FORMATS, has_format

SHIPPED = Path(__file__).parent.parent / "transcripts"


def find_files(corpus: list[str]) -> list[Path]:
    """The files that the values of `--corpus` name, in a fixed order, each once; the shipped transcripts for an empty list.

    A folder gives every file in it and in its subfolders whose format is known (`formats`), except hidden ones; a glob
    gives every file that it matches; both are sorted by path. Raises UserError for a value that gives no file, and for a
    link in a folder that leads out of it: a file elsewhere is read only when it is named.
    """
    paths = []
    for name in corpus or [str(SHIPPED)]:
        try:
            paths += _files_of(name)
        except (OSError, RuntimeError) as error:  # a name that is too long, no permission, a link to itself
            raise UserError(f"corpus {name[:200]} cannot be read: {getattr(error, 'strerror', error)}") from None
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _files_of(name: str) -> list[Path]:
    if not name:
        raise UserError("corpus is an empty string; give a text file, a folder of *.txt, or a glob")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"corpus {name} is neither a file nor a folder")
    if not glob.has_magic(name):
        raise UserError(f"corpus {name} does not exist; give a text file, a folder of *.txt, or a glob")
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise UserError(f"corpus pattern {name} matches no file")
    return files


def _files_in(folder: Path) -> list[Path]:
    files = sorted(
        path for path in folder.rglob("*") if has_format(path) and path.is_file() and not _is_hidden(path, folder)
    )
    for file in files:
        if leads_out(file, folder):
            raise UserError(
                f"{file} is a link that leads out of the corpus folder; to read it, name the file itself: {file.resolve()}"
            )
    if not files:
        wildcards = " or ".join(f"*{suffix}" for suffix in FORMATS)
        raise UserError(
            f"corpus folder {folder} holds no {wildcards} file; put the transcripts there as .txt, or name the files"
        )
    return files


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def leads_out(path: Path, *folders: Path) -> bool:
    """True if `path`, with all links followed, lies in none of the folders."""
    target = Path(os.path.realpath(path))
    return not any(target.is_relative_to(os.path.realpath(folder)) for folder in folders)


def memory_bytes() -> int:
    """The physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
