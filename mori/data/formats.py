"""Corpus formats: a file's suffix decides which function reads its text.

To add a format, write a function from a path to chunks of text and enter it in FORMATS under its suffix, in lower case.
Folders, globs and named files then find it.
"""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

from mori.cli import UserError

_BLOCK_BYTES = 1 << 20
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> Iterator[str]:
    r"""UTF-8 text, about a MiB at a time, without its byte order mark and with every `\r\n` as `\n`.

    Raises UserError for UTF-16, for a NUL byte and for a byte that is not UTF-8 (both with their offset).
    """
    raw, offset, carriage_return = b"", 0, ""  # bytes not yet decoded, and their offset in the file
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            raw += block
            if offset == 0 and raw[:2] in _UTF_16:
                raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
            if b"\0" in raw:
                raise UserError(
                    f"{path} looks binary: a NUL byte at offset {offset + raw.index(0)}; the corpus must be UTF-8 text"
                )
            try:
                text, n_decoded = codecs.utf_8_decode(raw, "strict", not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; save it as UTF-8"
                ) from None
            text = carriage_return + (text.removeprefix("\ufeff") if offset == 0 else text)
            raw, offset = raw[n_decoded:], offset + n_decoded
            carriage_return = "\r" if block and text.endswith("\r") else ""  # the next block may begin with \n
            if text := text[: len(text) - len(carriage_return)]:
                yield text.replace("\r\n", "\n") if "\r" in text else text
            if not block:
                return


FORMATS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": read_text}


def has_format(path: Path) -> bool:
    """True if a folder of the corpus gives this file; a file of any other suffix must be named and is read as text."""
    return path.suffix.lower() in FORMATS


def read_chunks(path: Path) -> Iterator[str]:
    """The text of a file in chunks, read by the function of its format.

    Raises UserError if the file cannot be read, and as that function does.
    """
    try:
        yield from FORMATS.get(path.suffix.lower(), read_text)(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
