"""Files -> documents; one pass over the text checks, hashes and measures it. The ledger accounts for every token."""

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy

from mori.cli import UserError, plural
from mori.data.formats import DEFAULT_OPTIONS, ReadOptions, read_documents

_ALWAYS_READ_BYTES = 64 << 20  # a smaller corpus is read at each start: that is quick, and certain to see a change
_SETTLED_SECONDS = 5  # a file that was written later may change again without a change of its time
_HASHES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Measures:
    """What one pass over the text of a corpus gives.

    Attributes:
        sha256: the identity of the corpus: SHA-256 over the SHA-256 of each document's text, so it depends on the text and its
            borders alone, not on formats and compression.
        bytes: size of the files.
        text_bytes: size of the documents' text in UTF-8.
        documents: those with text; the others are left out.
        empty_documents: without any text, such as rows without a value.
        blank_documents: with nothing but blanks.
        duplicate_documents: those whose text an earlier document has.
        alphabet: the characters of the text, sorted.
    """

    sha256: str
    bytes: int
    text_bytes: int
    documents: int
    empty_documents: int
    blank_documents: int
    duplicate_documents: int
    alphabet: str


@dataclass(frozen=True)
class Corpus:
    """The documents of some files. They are read from disk each time, so a corpus may be larger than memory."""

    files: tuple[Path, ...]
    options: ReadOptions
    measures: Measures

    def documents(self) -> Iterator[Iterator[str]]:
        """The documents with text, each in chunks that must be consumed before the next is asked for.

        Raises UserError for a file that cannot be read.
        """
        return _documents(self.files, self.options, Counter())

    def chunks(self) -> Iterator[str]:
        """The text of all documents, in chunks."""
        return itertools.chain.from_iterable(self.documents())

    def texts(self, limit: int | None = None) -> Iterator[str]:
        """The text of each document, whole; in total no more than about `limit` characters, if that is given."""
        n_characters = 0
        for chunks in self.documents():
            parts = []
            for chunk in chunks:
                parts.append(chunk)
                n_characters += len(chunk)
                if limit is not None and n_characters >= limit:
                    yield "".join(parts)
                    return
            yield "".join(parts)


@dataclass
class Ledger:
    """Every token of the corpus, accounted for: tokens = train_tokens + held_out_tokens + dropped_tokens.

    Attributes:
        bytes, text_bytes, documents, empty_documents, blank_documents, duplicate_documents: as in `Measures`.
        bos_tokens, eos_tokens: tokens that were added to begin and to end the documents. Where one token does both, it is
            counted in front of each document, and once at the end of the corpus.
        special_tokens: the special tokens that the text itself brought, by name, with their number.
        unknown_tokens: tokens that stand for text that the tokenizer does not know.
        lost_bytes: bytes of text that do not come back when the tokens are decoded; a tokenizer's normalization (lower case,
            NFKC) and blanks but for line ends do not count.
        lost_characters: the most frequent of the lost characters, with their number.
    """

    bytes: int
    documents: int
    tokens: int
    train_tokens: int
    held_out_tokens: int
    dropped_tokens: int
    bos_tokens: int = 0
    eos_tokens: int = 0
    special_tokens: dict[str, int] = field(default_factory=dict)
    unknown_tokens: int = 0
    lost_bytes: int = 0
    lost_characters: dict[str, int] = field(default_factory=dict)
    text_bytes: int = 0
    empty_documents: int = 0
    blank_documents: int = 0
    duplicate_documents: int = 0

    def __str__(self) -> str:
        size = plural(self.bytes, "byte")
        if self.text_bytes not in (0, self.bytes):
            size += f" ({self.text_bytes:,} of text)"
        notes = {
            "without text, left out": self.empty_documents,
            "blank, left out": self.blank_documents,
            "the same as an earlier one, trained on": self.duplicate_documents,
        }
        notes = "".join(f"; {count:,} {note}" for note, count in notes.items() if count)
        return (
            f"{plural(self.documents, 'document')}, {size} -> {plural(self.tokens, 'token')} = {self.train_tokens:,} to train "
            f"on + {self.held_out_tokens:,} held out + {self.dropped_tokens:,} dropped{notes}"
        )

    @property
    def loses_text(self) -> bool:
        """Whether the tokens do not hold the whole text."""
        return bool(self.unknown_tokens or self.lost_bytes)

    def warnings(self) -> list[str]:
        """What a user should know before the training, one line each."""
        lines = []
        if self.special_tokens:
            names = ", ".join(f"{name} ({count:,})" for name, count in self.special_tokens.items())
            lines.append(
                f"WARNING: the text itself holds {plural(sum(self.special_tokens.values()), 'special token')}: {names}. If they are markup "
                "and not the borders of documents, --no-parse_special_tokens keeps them as text"
            )
        if self.loses_text:
            names = ", ".join(f"{character!r} ({count:,})" for character, count in self.lost_characters.items())
            lines.append(
                f"WARNING: the tokenizer cannot express this text: {plural(self.unknown_tokens, 'unknown token')}, {self.lost_bytes:,} of "
                f"{self.text_bytes or self.bytes:,} bytes lost{f', such as {names}' if names else ''}. No bits per byte are shown; take a model of "
                "the text's language"
            )
        return lines


def read_corpus(files: Iterable[Path], options: ReadOptions = DEFAULT_OPTIONS, cache_dir: Path | None = None) -> Corpus:
    """Read every file once, to check and to measure its text.

    The measures of a large corpus are kept in `cache_dir`; it is read again once the size, the times or the inode of a file
    differ. Raises UserError for a file that cannot be read or is not text (as its format says), and if there is no text.
    """
    files = tuple(files)
    about = _about(files)
    path = cache_dir and cache_dir / f"corpus-{_digest([str(options), [str(file.absolute()) for file in files]])}.json"
    if path and _is_large(about) and (measures := _cached_measures(path, about)):
        return Corpus(files, options, measures)
    started = time.time()
    measures = _measure(files, options, sum(size for size, *_ in about))
    if path and _is_large(about):
        newest = max(changed for *_, changed in about) / 1e9
        if newest < started - _SETTLED_SECONDS:
            store_sealed(path, {"files": _digest(about), "measures": asdict(measures)})
    return Corpus(files, options, measures)


def check_expressed(measures: Measures, text: dict) -> None:
    """Raise UserError if more than half of the text is lost in its tokens; `text` has the ledger's fields about it."""
    lost = text["lost_bytes"]
    if 2 * lost > measures.text_bytes:
        raise UserError(
            f"the tokenizer cannot express this text: {lost:,} of {measures.text_bytes:,} bytes are lost, such as "
            f"{', '.join(map(repr, text['lost_characters']))}; take a model of the text's language"
        )


class CorpusHash:
    """The hash of a corpus, updated with the text of its documents, one part after the other."""

    def __init__(self):
        self._corpus, self._document = hashlib.sha256(), hashlib.sha256()

    def update(self, encoded: bytes) -> None:
        """Add text in UTF-8 to the current document."""
        self._document.update(encoded)

    def end_document(self) -> bytes:
        """End the current document; returns its SHA-256."""
        digest = self._document.digest()
        self._corpus.update(digest)
        self._document = hashlib.sha256()
        return digest

    def hexdigest(self) -> str:
        """The hash of all documents that have ended."""
        return self._corpus.hexdigest()

    def position(self) -> str:
        """A hash of all text so far, that of the current document included."""
        corpus = self._corpus.copy()
        corpus.update(self._document.digest())
        return corpus.hexdigest()


def _documents(files: Iterable[Path], options: ReadOptions, left_out: Counter) -> Iterator[Iterator[str]]:
    """The documents with text, each in chunks; counts those without any text and blank ones in `left_out`."""
    for path in files:
        for document in read_documents(path, options):
            chunks, blanks = iter(document), []
            for chunk in chunks:
                if chunk and not chunk.isspace():
                    yield itertools.chain(blanks, [chunk], chunks)
                    break
                blanks.append(blanks[-1] if blanks and blanks[-1] == chunk else chunk)  # endless blanks take no memory
            else:
                left_out["blank" if any(blanks) else "empty"] += 1


def _measure(files: tuple[Path, ...], options: ReadOptions, n_bytes: int) -> Measures:
    """Read all documents. Raises UserError for a file that cannot be read, and if there is no text."""
    digest, left_out = CorpusHash(), Counter()
    text_bytes = documents = 0
    is_in_alphabet = numpy.zeros(0x110000, bool)
    with _Duplicates() as duplicates:
        for chunks in _documents(files, options, left_out):
            for chunk in chunks:
                encoded = chunk.encode()
                digest.update(encoded)
                text_bytes += len(encoded)
                if chunk.isascii():
                    is_in_alphabet[numpy.frombuffer(encoded, numpy.uint8)] = True
                else:
                    is_in_alphabet[numpy.frombuffer(chunk.encode("utf-32-le"), "<u4")] = True
            duplicates.add(digest.end_document())
            documents += 1
        if not documents:
            names = ", ".join(map(str, files[:3]))
            raise UserError(f"the corpus is empty: {names} {'hold' if len(files) > 1 else 'holds'} no text")
        return Measures(
            sha256=digest.hexdigest(),
            bytes=n_bytes,
            text_bytes=text_bytes,
            documents=documents,
            empty_documents=left_out["empty"],
            blank_documents=left_out["blank"],
            duplicate_documents=duplicates.count(),
            alphabet="".join(map(chr, numpy.flatnonzero(is_in_alphabet).tolist())),
        )


class _Duplicates:
    """Counts documents whose text an earlier one has, in constant memory: 64 bits of each one's hash go to a temporary file."""

    def __enter__(self) -> "_Duplicates":
        self._file = tempfile.SpooledTemporaryFile(8 * _HASHES_AT_ONCE)  # noqa: SIM115
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, digest: bytes) -> None:
        """`digest`: a hash of the document's text."""
        self._file.write(digest[:8])

    def count(self) -> int:
        """The number of documents so far that are no first ones. Each pass over the file compares a share of the hashes."""
        size = self._file.tell() // 8
        n_shares = 1 + size // _HASHES_AT_ONCE
        distinct = 0
        for share in range(n_shares):
            self._file.seek(0)
            hashes = []
            while len(block := numpy.frombuffer(self._file.read(8 * _HASHES_AT_ONCE), "<u8")):
                hashes.append(block[block % n_shares == share])
            distinct += len(numpy.unique(numpy.concatenate(hashes)))
        return size - distinct


# ------------------------------------------------------------------------------------------------- what a cache may hold


def load_sealed(path: Path) -> dict | None:
    """What `store_sealed` has written; None if the file is missing or damaged."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        return sealed["value"] if sealed["sha256"] == _digest(sealed["value"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def store_sealed(path: Path, value: dict) -> None:
    """Write a JSON value with its hash; it is not written where that is impossible, because a cache only saves time."""
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({"value": value, "sha256": _digest(value)}), encoding="utf-8")
        staged.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _about(files: Iterable[Path]) -> list[tuple[int, ...]]:
    """What changes if a file changes: size in bytes, inode, device, and the later of its times in nanoseconds."""
    about = []
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        # Nobody can set ctime; on Windows it is the time of creation.
        times = (status.st_mtime_ns, status.st_ctime_ns)
        about.append((status.st_size, status.st_ino, status.st_dev, min(times), max(times)))
    return about


def _is_large(about: list[tuple[int, ...]]) -> bool:
    return sum(size for size, *_ in about) >= _ALWAYS_READ_BYTES


def _cached_measures(path: Path, about: list[tuple[int, ...]]) -> Measures | None:
    cached = load_sealed(path)
    if not cached or cached.get("files") != _digest(about) or cached.get("measures", {}).keys() != _NAMES:
        return None
    return Measures(**cached["measures"])


_NAMES = {each.name for each in fields(Measures)}
