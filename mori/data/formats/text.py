r"""Bytes -> text: encodings, byte order marks, and `\r\n`; plain text is the simplest format."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mori.cli import UserError

BLOCK_BYTES = 1 << 20
CHUNK_CHARACTERS = 1 << 20
MAX_LINE_CHARACTERS = 1 << 25  # a longer line, row or field is damage, or filled to take all memory
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class ReadOptions:
    """How the files of a corpus are read: the flags `--text_column` and `--encoding`."""

    text_column: str = ""
    encoding: str = ""


DEFAULT_OPTIONS = ReadOptions()


def read_text(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """A plain text file: one document."""
    yield decoded(file, name, options)


def decoded(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[str]:
    r"""The text of a file, about a MiB at a time, with every `\r\n` as `\n`.

    A byte order mark decides the encoding and is removed; without one it is `options.encoding`, or UTF-8. Raises UserError
    for a byte that does not decode and for a NUL, both with their offset.
    """
    head = file.read(max(len(mark) for mark, _ in _MARKS))
    mark, encoding = next(((m, e) for m, e in _MARKS if head.startswith(m)), (b"", options.encoding or "utf-8"))
    encoding = codecs.lookup(encoding).name
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, block, is_last, carriage_return = len(mark), head[len(mark) :], not head, ""
    while True:
        _check_binary(block, encoding, offset, name)
        before = offset - len(decoder.getstate()[0])  # the decoder keeps the beginning of a character
        try:
            text = decoder.decode(block, is_last)
            if encoding != "utf-8":
                text.encode()  # codecs of Python's own escapes give half characters, which no tokenizer takes
        except UnicodeDecodeError as error:
            raise UserError(_cannot_decode(name, encoding, error, before + error.start)) from None
        except UnicodeError as error:
            raise UserError(f"{name} is not {encoding} near offset {offset}: {error}; name its encoding") from None
        text = carriage_return + text
        carriage_return = "\r" if text.endswith("\r") and not is_last else ""  # the next block may begin with \n
        if text := text[: len(text) - len(carriage_return)]:
            yield unix_lines(text)
        if is_last:
            return
        offset += len(block)
        block = file.read(BLOCK_BYTES)
        is_last = not block


def _check_binary(block: bytes, encoding: str, offset: int, name: str) -> None:
    """Raise UserError if the block holds a NUL; in UTF-16 and UTF-32 every Latin letter has NUL bytes."""
    if b"\0" not in block or encoding.startswith(("utf-16", "utf-32")):
        return
    raise UserError(
        f"{name} looks binary: a NUL byte at offset {offset + block.index(0)}; the corpus must be text. UTF-16 without a "
        "byte order mark needs --encoding utf-16-le"
    )


def _cannot_decode(name: str, encoding: str, error: UnicodeDecodeError, offset: int) -> str:
    advice = "save it as UTF-8, or name its encoding, such as --encoding latin-1"
    if encoding != "utf-8":
        advice = "name its encoding with --encoding"
    label = "UTF-8" if encoding == "utf-8" else encoding
    return f"{name} is not {label}: byte 0x{error.object[error.start]:02x} at offset {offset}; {advice}"


def unix_lines(text: str) -> str:
    r"""The text with every `\r\n` as `\n`, so that the ids of a text do not depend on the format that carries it."""
    return text.replace("\r\n", "\n") if "\r" in text else text


def lines(chunks: Iterable[str], name: str) -> Iterator[str]:
    """The lines of a text in chunks, without their ends. Raises UserError for one that is too long to keep in memory."""
    parts, n_characters, number = [], 0, 1
    for chunk in chunks:
        first, *others = chunk.split("\n")
        parts.append(first)
        n_characters += len(first)
        if n_characters > MAX_LINE_CHARACTERS:
            raise UserError(f"{name} line {number} has more than {MAX_LINE_CHARACTERS >> 20} MiB; cut the row in parts")
        if others:
            yield "".join(parts)
            yield from others[:-1]
            number += len(others)
            parts, n_characters = [others[-1]], len(others[-1])
    if n_characters:
        yield "".join(parts)


def in_chunks(text: str) -> list[str]:
    r"""A row's text in chunks, with every `\r\n` as `\n`; none for an empty text."""
    text = unix_lines(text)
    return [text[at : at + CHUNK_CHARACTERS] for at in range(0, len(text), CHUNK_CHARACTERS)]
