"""Files -> documents, their hash, and the ledger that accounts for every token."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mori.cli import UserError, plural
from mori.data.files import memory_bytes
from mori.data.formats import DEFAULT_OPTIONS, ReadOptions, read_chunks


@dataclass
class Document:
    """The text of one file. It is read from disk each time, so that a corpus may be larger than memory.

    Attributes:
        path: the file.
        bytes: size of the file.
        text_bytes: size of the text in UTF-8.
        options: how the file is read.
    """

    path: str
    bytes: int
    text_bytes: int
    options: ReadOptions = DEFAULT_OPTIONS

    def chunks(self) -> Iterator[str]:
        """The text in chunks. Raises UserError as `read_documents` does."""
        return read_chunks(Path(self.path), self.options)

    @property
    def text(self) -> str:
        """The whole text. Raises UserError if it is larger than a quarter of this machine's memory."""
        limit = memory_bytes() // 4  # its token ids need memory too
        if self.text_bytes > limit:
            raise UserError(
                f"{self.path} has {self.bytes / 2**30:,.1f} GiB and is needed whole (to train a tokenizer on it, or because "
                f"this model's tokenizer takes no part of a text); the limit here is {limit / 2**30:,.1f} GiB: use a part of it"
            )
        return "".join(self.chunks())


@dataclass
class Ledger:
    """Every token of the corpus, accounted for: tokens = train_tokens + held_out_tokens + dropped_tokens.

    Attributes:
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

    def __str__(self) -> str:
        return (
            f"{plural(self.documents, 'document')}, {plural(self.bytes, 'byte')} -> {plural(self.tokens, 'token')} = "
            f"{self.train_tokens:,} to train on + {self.held_out_tokens:,} held out + {self.dropped_tokens:,} dropped"
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
                f"{self.bytes:,} bytes lost{f', such as {names}' if names else ''}. No bits per byte are shown; take a model of "
                "the text's language"
            )
        return lines


def read_documents(files: Iterable[Path], options: ReadOptions = DEFAULT_OPTIONS) -> list[Document]:
    """Read every file once, to check it and to measure its text. Blank files are left out.

    Raises UserError for a file that cannot be read or is not text (as its format says), for a corpus larger than this
    machine can train on, and if all files are blank.
    """
    documents, blank = [], []
    total, limit = 0, 16 * memory_bytes()  # the order of the windows stays in memory: about 8 bytes for 500 of text
    for path in files:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        total += size
        if total > limit:
            raise UserError(
                f"the corpus has {total / 2**30:,.1f} GiB or more (at {path}), the limit here is {limit / 2**30:,.1f} GiB: "
                "use a part of it"
            )
        text_bytes, has_text = 0, False
        for chunk in read_chunks(path, options):
            text_bytes += len(chunk.encode())
            has_text = has_text or bool(chunk.strip())
        if has_text:
            documents.append(Document(str(path), size, text_bytes, options))
        else:
            blank.append(str(path))
    if not documents:
        raise UserError(f"the corpus is empty: {', '.join(blank[:3])} {'hold' if len(blank) > 1 else 'holds'} no text")
    return documents


def check_expressed(documents: list[Document], text: dict) -> None:
    """Raise UserError if more than half of the text is lost in its tokens; `text` has the ledger's fields about it."""
    lost, total = text["lost_bytes"], sum(document.text_bytes for document in documents)
    if 2 * lost > total:
        raise UserError(
            f"the tokenizer cannot express this text: {lost:,} of {total:,} bytes are lost, such as "
            f"{', '.join(map(repr, text['lost_characters']))}; take a model of the text's language"
        )


def corpus_hash(documents: list[Document]) -> str:
    """SHA-256 over the documents' texts and their lengths."""
    digest = hashlib.sha256()
    for document in documents:
        for _ in hashed_chunks(document, digest):
            pass
    return digest.hexdigest()


def hashed_chunks(document: Document, digest, progress=None) -> Iterator[str]:
    """The document's chunks; each updates the hash of the corpus, and afterwards the progress bar (in bytes)."""
    digest.update(document.text_bytes.to_bytes(8, "little"))
    for chunk in document.chunks():
        encoded = chunk.encode()
        digest.update(encoded)
        yield chunk
        if progress:
            progress.update(len(encoded))
