"""Corpus formats: a file's suffix decides which function reads its documents.

To add a format, write a function like those below and enter it in FORMATS under its suffix, in lower case. Folders, globs,
archives and named files then find it, compressed or not.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from mori.cli import UserError
from mori.data.formats import archives
from mori.data.formats.parquet import read_parquet
from mori.data.formats.rows import read_csv, read_json, read_json_lines, read_tsv
from mori.data.formats.subtitles import read_subtitles
from mori.data.formats.text import DEFAULT_OPTIONS, ReadOptions, read_text

# From an open file, its name for messages, and the options to its documents, each in chunks of text.
FORMATS: dict[str, Callable[[BinaryIO, str, ReadOptions], Iterator[Iterable[str]]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".text": read_text,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".srt": read_subtitles,
    ".vtt": read_subtitles,
}

_MARKUP = "is markup, not plain text: convert it (pandoc -t plain {name} -o {stem}.txt), or rename it to .txt to train on the markup"
_OFFICE = "is no plain text: save it as .txt from the program that wrote it, or convert it (pandoc -t plain {name} -o {stem}.txt)"
_SHEET = "is a spreadsheet: save it as .csv"
_ARCHIVE = "is an archive: unpack it and name the folder, or pack it as .zip"
_SOUND = "is a recording: transcribe it (with whisper, say) and name the .srt, .vtt or .txt"
_CAPTIONS = "is a subtitle format that is not read: convert it (ffmpeg -i {name} {stem}.srt)"
_DATASET = "is not read: save the data set with to_parquet() or to_json()"
_ADVICE = {
    ".pdf": "is no plain text: extract it (pdftotext {name} {stem}.txt), and look at the result",
    **dict.fromkeys((".html", ".htm", ".xhtml", ".rtf"), _MARKUP),
    **dict.fromkeys((".doc", ".docx", ".odt", ".epub", ".mobi", ".pptx"), _OFFICE),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), _SHEET),
    **dict.fromkeys((".tar", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".mp3", ".wav", ".m4a", ".mp4", ".mkv", ".webm"), _SOUND),
    **dict.fromkeys((".ass", ".ssa", ".sbv", ".ttml"), _CAPTIONS),
    **dict.fromkeys((".arrow", ".pkl", ".npy"), _DATASET),
}


def has_format(path: PurePath) -> bool:
    """True if a folder of the corpus gives this file; a file of any other suffix must be named and is read as text."""
    suffix = path.suffix.lower()
    return (
        suffix == ".zip" or suffix in FORMATS or (suffix in archives.COMPRESSIONS and has_format(path.with_suffix("")))
    )


def check(path: PurePath) -> None:
    """Raise UserError, before anything is read, for a file that no format reads, or whose package is not installed."""
    inner = path
    while (suffix := inner.suffix.lower()) in archives.COMPRESSIONS:
        if suffix == ".zst" and archives.zstd is None:
            raise UserError(f'{path} needs backports.zstd: pip install "mori[zstd]"')
        inner = inner.with_suffix("")
    if advice := _ADVICE.get(suffix):
        raise UserError(f"{path} {advice.format(name=inner.name, stem=inner.stem)}")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f'{path} needs pyarrow: pip install "mori[parquet]"')


def read_documents(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> Iterator[Iterable[str]]:
    """The documents of a file, each as chunks of text (about a MiB at most), read by the function of its format.

    A plain text or subtitle file is one document; each row of a table is one, and a row without text has no chunks. Consume
    the chunks of a document before you ask for the next. Raises UserError for a file that cannot be read or is damaged.
    """
    check(path)
    for document in _with_errors_of(path, _open(path, options)):
        yield _with_errors_of(path, document)


def _with_errors_of(path: Path, items: Iterable) -> Iterator:
    try:
        yield from items
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path, options: ReadOptions) -> Iterator[Iterable[str]]:
    with path.open("rb") as file:
        yield from _documents(file, str(path), path, options)


def _documents(file: BinaryIO, name: str, path: PurePath, options: ReadOptions) -> Iterator[Iterable[str]]:
    """The documents of an open file, whose format is that of `path`; messages call it `name`."""
    suffix = path.suffix.lower()
    if suffix in archives.COMPRESSIONS:
        with archives.decompressed(file, suffix, name) as content:
            yield from _documents(content, name, path.with_suffix(""), options)
    elif suffix == ".zip":
        with archives.seekable(file) as archive:
            for member, content in archives.members(archive, name, has_format):
                check(path / member)
                yield from _documents(content, f"{name}: {member}", PurePath(member), options)
    else:
        yield from FORMATS.get(suffix, read_text)(file, name, options)
