"""Compressed files and archives, as streams: `.gz`, `.bz2`, `.xz`, `.zst` and `.zip`."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from mori.cli import UserError, guarded, one_line

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

_BUFFER_BYTES = 1 << 17
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, *([zstd.ZstdError] if zstd else []))
_ENCRYPTED = 1  # a bit of a zip member's flags


def _open_zst(file: BinaryIO) -> BinaryIO:
    # Large data sets are packed with `zstd --long=31`, which the library refuses by default.
    return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})


COMPRESSIONS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zst,
}


class _Checked(io.RawIOBase):
    """A decompressed stream. Its damage raises UserError with the name of the file and the offset in the text."""

    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self._name, self._offset = stream, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            block = self._stream.read(len(buffer))
        except (OSError, *_DAMAGE) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise UserError(
                f"{self._name} is damaged or cut off, {self._offset:,} bytes into its content: {one_line(error)}"
            ) from None
        buffer[: len(block)] = block
        self._offset += len(block)
        return len(block)


def _stream(stream: BinaryIO, name: str) -> BinaryIO:
    return io.BufferedReader(_Checked(stream, name), _BUFFER_BYTES)


def decompressed(file: io.BufferedReader, suffix: str, name: str) -> BinaryIO:
    """The content of a compressed file as a stream; several compressed parts in a row are one.

    Raises UserError, at once or while it is read, if the file is empty, damaged or cut off.
    """
    if not file.peek(1):  # gzip takes an empty file for an empty content
        raise UserError(f"{name} is empty: no {suffix} file")
    return _stream(COMPRESSIONS[suffix](file), name)


def seekable(file: BinaryIO) -> BinaryIO:
    """The file itself, or a temporary copy of it on disk if it can only be read from its beginning to its end."""
    if file.seekable():
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(file, copy, _BUFFER_BYTES)
    copy.seek(0)
    return copy


def members(file: BinaryIO, name: str, is_wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[str, BinaryIO]]:
    """The name and the stream of each wanted file in a `.zip`, sorted by path; hidden ones are left out, as in a folder.

    Raises UserError for a damaged archive, a wanted member that is encrypted or an archive itself, and if none is wanted.
    """
    archive = guarded(f"{name} is damaged or no .zip archive", lambda: zipfile.ZipFile(file))
    infos = sorted(archive.infolist(), key=lambda info: PurePosixPath(info.filename).parts)
    n_wanted = 0
    for info in infos:
        path = PurePosixPath(info.filename)
        if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in path.parts) or not is_wanted(path):
            continue
        label = f"{name}: {info.filename}"
        if path.suffix.lower() == ".zip":
            raise UserError(f"{label} is an archive in an archive; unpack {name}, and name the folder")
        if info.flag_bits & _ENCRYPTED:
            raise UserError(f"{label} is encrypted; unpack {name} with its password, and name the folder")
        n_wanted += 1
        with guarded(f"{label} cannot be read", lambda info=info: archive.open(info)) as member:
            yield info.filename, _stream(member, label)
    if not n_wanted:
        raise UserError(f"{name} holds no file of a known format; unpack it, and name the files")
