"""Texts as rows, subtitles and archives, for the campaign of malformed and hostile inputs."""

import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path


def as_rows(text: str) -> dict[str, bytes]:
    """The lines of a text as rows and subtitles, by suffix."""
    lines = text.splitlines()
    table = io.StringIO()
    csv.writer(table).writerows([("id", "text"), *enumerate(lines)])
    cues = "".join(f"{n}\n00:{n:02}:00.000 --> 00:{n:02}:01.500\n<i>{line}</i>\n\n" for n, line in enumerate(lines))
    return {
        ".jsonl": "\n".join(json.dumps({"text": line}) for line in lines).encode(),
        ".json": json.dumps([{"text": line} for line in lines], indent=1).encode(),
        ".csv": table.getvalue().encode("utf-16"),
        ".tsv": ("text\n" + text.replace("\n", " ")).encode(),
        ".srt": cues.replace(".000", ",000").replace(".500", ",500").encode(),
        ".vtt": b"WEBVTT\n\n" + cues.encode(),
    }


def in_archive(raw: bytes, name: str) -> bytes:
    """A .zip with one file of this name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, raw)
    return buffer.getvalue()


PACKERS: dict[str, Callable[[bytes, str], bytes]] = {
    "": lambda raw, name: raw,
    ".gz": lambda raw, name: gzip.compress(raw),
    ".xz": lambda raw, name: lzma.compress(raw),
    ".zip": in_archive,
}


def _gzipped(path: Path, beginning: bytes, repeated: bytes, megabytes: int, end: bytes = b"") -> Path:
    block = repeated * ((1 << 20) // len(repeated))
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(beginning)
        for _ in range(megabytes):
            file.write(block)
        file.write(end)
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def hostile() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    """Names of files that are made to harm the reader, each with a function that writes it into a folder and returns its path."""
    yield "JSON line of a gigabyte", lambda f: _gzipped(f / "a.jsonl.gz", b'{"text": "', b"a", 1024, b'"}')
    yield "JSON line of many lists", lambda f: _gzipped(f / "a.jsonl.gz", b'{"text": [', b"[],", 1024, b"0]}")
    yield "JSON string of a gigabyte", lambda f: _gzipped(f / "a.json.gz", b'[{"text": "', b"a", 1024)
    yield "JSON list in lists", lambda f: _written(f / "a.json", b"[" * 10_000_000)
    yield "JSON number of many digits", lambda f: _written(f / "a.jsonl", b'{"text": ' + b"9" * 10_000_000 + b"}")
    yield "blanks of a gigabyte in JSON", lambda f: _gzipped(f / "a.json.gz", b"[", b" ", 1024)
    yield "field of a gigabyte", lambda f: _gzipped(f / "a.csv.gz", b'text\n"', b"a\n", 1024)
    yield "row of many fields", lambda f: _gzipped(f / "a.csv.gz", b"text,", b",", 1024)
    yield (
        "line of subtitles that is tags",
        lambda f: _written(f / "a.srt", b"1\n00:00:01,0 --> 00:00:02,0\n" + b"<c" * 50_000),
    )
    yield "line of subtitles that is digits", lambda f: _written(f / "a.vtt", b"1" * 10_000_000)
    yield (
        "subtitles with an endless entity",
        lambda f: _written(f / "a.srt", b"0:1 --> 0:2\n&#" + b"9" * 100_000 + b";"),
    )
    yield "archive with a name outside", lambda f: _written(f / "a.zip", in_archive(b"halo", "../elsewhere/secret.txt"))
    yield "archive in itself", lambda f: _written(f / "a.zip", in_archive(in_archive(b"halo", "a.txt"), "a.zip"))
    yield "compressed many times", lambda f: _many_times(f)


def _many_times(folder: Path) -> Path:
    raw = b"halo"
    for _ in range(60):
        raw = gzip.compress(raw)
    return _written(folder / ("a" + ".gz" * 60), raw)
