"""Documents -> a token file. What a killed process has tokenized stays in a folder beside it, and the next start continues."""

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy

from mori.cli import UserError, locks, optional, progress_bar
from mori.data.account import text_account
from mori.data.corpus import Corpus, CorpusHash, load_sealed, store_sealed
from mori.data.token_file import (
    HEADER_BYTES,
    MAGIC,
    VERSION,
    TokenFile,
    data_start,
    mapped,
    separator,
    tokenizer_hash,
)
from mori.data.tokenize import LONG_CHARACTERS, TextEncoder
from mori.data.words import CannotCut

_MARK_CHARACTERS = 1 << 18  # at least this far apart are the marks of a token file; there are a million at most
_SEGMENT_BYTES = 1 << 28  # of text, which a kill may cost
_BLOCK = 1 << 20
_OFFSETS = {"ids": data_start(HEADER_BYTES), "first_tokens": 0, "marks": 0}  # in the files of an incomplete token file


def make_token_file(corpus: Corpus, tokenizer, cache_dir: Path, begin: Iterable[int] = ()) -> TokenFile:
    """Tokenize the documents, or reuse the file in `cache_dir` that holds their ids.

    Each document stands between the ids `begin` and its `separator`. If both are the same token, one of it stands in front of
    each document and one at the end of the corpus.

    Raises UserError if the tokenizer gives no token, if the corpus changes meanwhile, or if the file cannot be written.
    """
    begin, end = list(begin), [token for token in [separator(tokenizer)] if token is not None]
    layout = {"begin": begin, "end": [], "final": end} if begin == end else {"begin": begin, "end": end, "final": []}
    identity = {
        "corpus_sha256": corpus.measures.sha256,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        **layout,
        "parsed": not getattr(tokenizer, "split_special_tokens", False),
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = cache_dir / f"tokens-{identity['corpus_sha256'][:16]}-{digest[:16]}.bin"
    try:
        cached = TokenFile(path)
        if identity.items() <= cached.header.items():
            return cached
    except (OSError, ValueError):
        pass
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _folder_for(path) as folder:
            _write(folder, path, corpus, tokenizer, identity)
    except OSError as error:
        raise UserError(f"cannot write the token file {path}: {error.strerror}") from None
    return TokenFile(path)


@contextlib.contextmanager
def _folder_for(path: Path) -> Iterator[Path]:
    """The folder of a token file that is not complete. It stays if the work is interrupted and can be continued.

    A process that finds another one at work takes a folder for itself, and leaves nothing in it.
    """
    with (path.parent / "tokens.lock").open("w") as lock:
        is_locked = _lock(lock)
        folder = path.with_suffix(".partial" if is_locked else f".{os.getpid()}.partial")
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            if not is_locked or not (folder / "journal.json").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _lock(file) -> bool:
    """Whether no other process has locked the file; it is locked until it is closed."""
    try:
        return locks.lock(file, "two processes that do the same work at once would not notice each other")
    except BlockingIOError:
        return False


def _write(folder: Path, path: Path, corpus: Corpus, tokenizer, identity: dict) -> None:
    """Write the arrays in `folder`, join them behind space for the header, then write that and give the file its name."""
    layout = [numpy.array(identity[name], dtype="int64") for name in ("begin", "end", "final")]
    spacing = max(_MARK_CHARACTERS, corpus.measures.text_bytes >> 20)
    with _Writer(folder, _dtype(tokenizer), spacing, identity) as writer:
        try:
            encoder = TextEncoder(tokenizer, cut=not writer.whole and corpus.measures.text_bytes >= LONG_CHARACTERS)
            corpus_sha256 = _write_documents(writer, corpus, encoder, *layout)
        except CannotCut:
            writer.restart(whole=True)
            corpus_sha256 = _write_documents(writer, corpus, TextEncoder(tokenizer, cut=False), *layout)
        documents = corpus.measures.documents
        if corpus_sha256 != identity["corpus_sha256"]:
            writer.restart()
            raise UserError("the corpus has changed while it was read; run again")
        if writer.count == documents * (len(layout[0]) + len(layout[1])) + len(layout[2]):
            writer.restart()
            raise UserError(
                "the tokenizer gives no token for this corpus; use the tokenizer of a model of its language"
            )
        header = {"version": VERSION, **writer.header(), **identity}
        header["text"] = text_account(writer, header, corpus, tokenizer)
        writer.finish(header)
    os.replace(folder / "ids", path)
    shutil.rmtree(folder)


def _write_documents(writer: "_Writer", corpus: Corpus, encoder: TextEncoder, begin, end, final) -> str:
    """Write the ids of all documents, or continue; returns the hash of the corpus as it was read.

    What an earlier process has written is skipped, if the text before that place still has the hash that it had.
    """
    pieces = _Pieces(corpus, encoder)
    stream = iter(pieces)
    for _ in range(writer.pieces):
        next(stream, None)
    if writer.pieces and pieces.position != writer.position:
        writer.restart()
        return _write_documents(writer, corpus, encoder, begin, end, final)
    written: deque = deque()

    def remembered() -> Iterator:
        for piece in stream:
            written.append((piece.start, piece.is_last, pieces.n_read, pieces.position))
            yield piece

    with progress_bar("tokenizing", corpus.measures.text_bytes) as bar:
        for ids in encoder.encode(remembered()):
            start, is_last, n_read, position = written.popleft()
            writer.begin(start, begin)
            writer.write(ids)
            if is_last:
                writer.write(end)
            if position:
                writer.keep(n_read, position)
            bar.update(pieces.n_bytes - bar.n)
    writer.write(final)
    return pieces.hash.hexdigest()


class _Pieces:
    """The pieces of all documents, in order.

    Attributes:
        n_read, n_bytes: the pieces so far, and their bytes.
        position: the hash of the text so far, if the latest piece ends a segment; else None.
        hash: that of the corpus, once all pieces were read.
    """

    def __init__(self, corpus: Corpus, encoder: TextEncoder):
        self._corpus, self._encoder = corpus, encoder
        self.n_read = self.n_bytes = 0
        self.position: str | None = None
        self.hash = CorpusHash()

    def __iter__(self) -> Iterator:
        segment_end = _SEGMENT_BYTES
        for chunks in self._corpus.documents():
            for piece in self._encoder.pieces(chunks):
                encoded = piece.text.encode()
                self.hash.update(encoded)
                if piece.is_last:
                    self.hash.end_document()
                self.n_read, self.n_bytes = self.n_read + 1, self.n_bytes + len(encoded)
                self.position = None
                if self.n_bytes >= segment_end:
                    segment_end = self.n_bytes + _SEGMENT_BYTES
                    self.position = self.hash.position()
                yield piece


class _Writer:
    """Appends ids, first tokens and marks to the files of a folder, and continues what an earlier process has kept there.

    Attributes:
        pieces: the number of pieces whose ids are on disk, and `position` the hash of their text.
        whole: documents are not cut, because their ids contradicted the cut points.
        count: the number of ids.
    """

    def __init__(self, folder: Path, dtype: numpy.dtype, spacing: int, identity: dict):
        self._folder, self._dtype, self._spacing, self._identity = folder, dtype, spacing, identity
        self._limit = numpy.iinfo(dtype).max
        self._check(max(identity["begin"] + identity["end"] + identity["final"], default=0))
        self._journal = folder / "journal.json"

    def __enter__(self) -> "_Writer":
        paths = {name: self._folder / name for name in ("ids", "first_tokens", "marks")}
        self._files = {name: path.open("r+b" if path.exists() else "w+b") for name, path in paths.items()}
        if not self._continue():
            self.restart()
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what a full disk has no room for
                file.close()

    def restart(self, whole: bool = False) -> None:
        """Remove what was written."""
        self._journal.unlink(missing_ok=True)
        self._set(
            {
                "pieces": 0,
                "position": None,
                "whole": whole,
                "count": 0,
                "max_id": 0,
                "documents": 0,
                "marks": 0,
                "marked": 0,
            }
        )
        for name, file in self._files.items():
            self._truncate(file, name, 0)

    def _continue(self) -> bool:
        """Whether the files hold what the journal says; what they hold beyond is cut off."""
        journal = load_sealed(self._journal)
        if not journal or (journal["version"], journal["identity"]) != (VERSION, self._identity):
            return False
        self._set(journal)
        for name, file in self._files.items():
            size = self._sizes()[name]
            self._truncate(file, name, min(size, file.seek(0, os.SEEK_END)))
            for block in _blocks(file, _OFFSETS[name]):
                self._hashes[name].update(block)
            if self._hashes[name].hexdigest() != journal["sha256"][name]:
                return False
        return True

    def _set(self, journal: dict) -> None:
        self.pieces, self.position, self.whole = (journal[name] for name in ("pieces", "position", "whole"))
        self.count, self._max_id, self._documents = (journal[name] for name in ("count", "max_id", "documents"))
        self._n_marks, self._marked = journal["marks"], journal["marked"]
        self._hashes = {name: hashlib.sha256() for name in self._files}
        self._buffer: list[bytes] = []
        self._n_buffered = 0

    def _sizes(self) -> dict[str, int]:
        ids_size = _OFFSETS["ids"] + self.count * self._dtype.itemsize
        return {"ids": ids_size, "first_tokens": 8 * self._documents, "marks": 16 * self._n_marks}

    def _truncate(self, file: IO, name: str, size: int) -> None:
        file.truncate(size)
        file.seek(max(size, _OFFSETS[name]))

    def begin(self, character: int, begin: numpy.ndarray) -> None:
        """The next token begins at this character of its document; the ids `begin` stand in front of a document."""
        if character == 0:
            self._append("first_tokens", self.count.to_bytes(8, "little"))
            self._documents, self._marked = self._documents + 1, 0
            self.write(begin)
        elif character >= self._marked + self._spacing:
            self._append("marks", self.count.to_bytes(8, "little") + character.to_bytes(8, "little"))
            self._n_marks, self._marked = self._n_marks + 1, character

    def write(self, ids: numpy.ndarray) -> None:
        """Append ids `(N,)`."""
        self._buffer.append(ids.astype("uint32", copy=False).tobytes())
        self.count, self._n_buffered = self.count + len(ids), self._n_buffered + len(ids)
        if self._n_buffered >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        ids, self._buffer, self._n_buffered = numpy.frombuffer(b"".join(self._buffer), "uint32"), [], 0
        self._max_id = max(self._max_id, int(ids.max(initial=0)))
        self._check(self._max_id)
        self._append("ids", ids.astype(self._dtype).tobytes())  # numpy's tofile() ignores a full disk
        for file in self._files.values():
            file.flush()

    def _append(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def _check(self, token: int) -> None:
        if token > self._limit:
            raise UserError(f"the tokenizer gives token id {token}, which is not in its own vocabulary")

    def keep(self, pieces: int, position: str) -> None:
        """Write everything to disk, then a journal from which a later process continues."""
        self._flush()
        for file in self._files.values():
            with optional("fsync", "a power cut may lose the newest files"):
                os.fsync(file.fileno())
        self.pieces, self.position = pieces, position
        journal = {
            "version": VERSION, "identity": self._identity, "pieces": pieces, "position": position, "whole": self.whole,
            "count": self.count, "max_id": self._max_id, "documents": self._documents, "marks": self._n_marks,
            "marked": self._marked, "sha256": {name: digest.hexdigest() for name, digest in self._hashes.items()},
        }  # fmt: skip
        store_sealed(self._journal, journal)

    def header(self) -> dict:
        """The fields of the header that tell of the arrays; everything is in the files now."""
        self._flush()
        return {
            "dtype": self._dtype.name,
            "count": self.count,
            "max_id": self._max_id,
            "documents": self._documents,
            "marks": self._n_marks,
        }

    def array(self, name: str) -> numpy.ndarray:
        """An array of a token file, memory-mapped."""
        dtype, count = {
            "ids": (self._dtype.name, self.count),
            "first_tokens": ("int64", self._documents),
            "marks": ("int64", 2 * self._n_marks),
        }[name]
        array = mapped(self._folder / name, dtype, _OFFSETS[name], count)
        return array.reshape(-1, 2) if name == "marks" else array

    def id_blocks(self) -> Iterator[numpy.ndarray]:
        """The ids, a part at a time."""
        for block in _blocks(self._files["ids"], _OFFSETS["ids"]):
            yield numpy.frombuffer(block, self._dtype)

    def finish(self, header: dict) -> None:
        """Put all arrays into the file of the ids, and the header in front."""
        file, digest = self._files["ids"], self._hashes["ids"]
        file.seek(self._sizes()["ids"])
        for name in ("first_tokens", "marks"):
            for block in _blocks(self._files[name], 0):
                file.write(block)
                digest.update(block)
        digest.update(json.dumps(header, sort_keys=True).encode())
        text = json.dumps({**header, "sha256": digest.hexdigest()}).encode().ljust(HEADER_BYTES)
        file.seek(0)
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        file.flush()


def _blocks(file: IO, start: int) -> Iterator[bytes]:
    file.seek(start)
    while block := file.read(_BLOCK):
        yield block


def _dtype(tokenizer) -> numpy.dtype:
    largest = max(tokenizer.get_vocab().values(), default=0)
    return numpy.dtype("uint16" if max(largest, separator(tokenizer) or 0) < 1 << 16 else "uint32")
