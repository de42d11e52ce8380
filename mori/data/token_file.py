"""Documents -> a file of token ids, memory-mapped and reused, and the text bytes after any of its tokens."""

import bisect
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy

from mori.cli import UserError, optional, progress_bar
from mori.data.corpus import Document, corpus_hash, hashed_chunks
from mori.data.tokenize import (
    LONG_CHARACTERS,
    TextEncoder,
    disable_truncation,
    encode,
    encode_each,
    join,
    lost_characters,
    special_ids,
)
from mori.data.words import CannotCut

_MAGIC, _VERSION = b"moritok\0", 4
_MAX_HEADER_BYTES = 64 << 20  # enough for four million documents
_DATA_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 20
_HEADER_BYTES = 1 << 14  # of a header without its lists
_ACCOUNT = {"special_tokens": dict, "unknown_tokens": int, "lost_bytes": int, "lost_characters": dict}  # in the header
_NAMES, _NAME_CHARACTERS = 20, 40  # of special tokens, in a header
_MARK_CHARACTERS = 1 << 18  # at least this far apart are the marks of a token file; there are a million at most


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 over everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{settings}|{separator(tokenizer)}".encode()).hexdigest()


def separator(tokenizer) -> int | None:
    """The token that ends each document: end-of-text, or beginning-of-text if the tokenizer has no end-of-text."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


class TokenFile:
    """The token ids of a corpus, memory-mapped: a magic word, a JSON header, then the ids.

    Attributes:
        ids: `(N,)`, uint16 or uint32 by the vocabulary's largest id, read-only.
        header: `version`, `dtype`, `count`, `max_id`, `first_tokens` (the index of each document's first token), `marks`
            (pairs: the index of a token, and of its first character in its document; several in each long document),
            `begin`, `end` and `final` (the ids before and after each document, and at the end of the corpus), `parsed`
            (whether the text may name special tokens), `text` (fields of the ledger), and the SHA-256 of the corpus, of the
            tokenizer, and of the rest of the header with the ids.
    """

    def __init__(self, path: Path):
        """Open a token file. Raises ValueError if it is damaged, incomplete or of another version."""
        self.path = path
        if not path.is_file():  # opening a pipe would block
            raise ValueError(f"{path} is not a token file")
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(8) != _MAGIC:
                raise ValueError(f"{path} is not a token file")
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"{path} is cut short")
            try:
                header = json.loads(file.read(length))
            except RecursionError:
                raise ValueError(f"{path} is damaged") from None
        if not isinstance(header, dict) or header.get("version") != _VERSION:
            raise ValueError(f"{path} is not a token file of this mori")
        start, dtype, count = data_start(length), header.get("dtype"), header.get("count")
        if dtype not in ("uint16", "uint32") or type(count) is not int or count < 1:
            raise ValueError(f"{path} is damaged")
        if size != start + count * numpy.dtype(dtype).itemsize:
            raise ValueError(f"{path} is cut short")
        if header.pop("sha256", None) != header_hash(header, _blocks(path, start)):
            raise ValueError(f"{path} is damaged")
        text = header.get("text")
        if not isinstance(text, dict) or {name: type(value) for name, value in text.items()} != _ACCOUNT:
            raise ValueError(f"{path} is damaged")
        self.ids = _mapped(path, dtype, start, count)
        self.header = header

    def __len__(self) -> int:
        return len(self.ids)

    def begin_positions(self) -> numpy.ndarray:
        """The indices `(N,)` of the tokens that begin documents and are nothing else: no text makes a model predict them."""
        if self.header["final"]:  # they also end documents
            return numpy.array([], dtype=numpy.int64)
        offsets = numpy.arange(len(self.header["begin"]))
        return (numpy.array(self.header["first_tokens"])[:, None] + offsets).ravel()

    @classmethod
    def make(cls, documents: list[Document], tokenizer, cache_dir: Path, begin: Iterable[int] = ()) -> "TokenFile":
        """Tokenize the documents, or reuse the file in `cache_dir` that holds their ids.

        Each document stands between the ids `begin` and its `separator`. If both are the same token, one of it stands in
        front of each document and one at the end of the corpus.

        Raises UserError if the tokenizer gives no token, if the corpus changes meanwhile, or if the file cannot be written.
        """
        hashes = {"corpus_sha256": corpus_hash(documents), "tokenizer_sha256": tokenizer_hash(tokenizer)}
        begin, end = list(begin), [token for token in [separator(tokenizer)] if token is not None]
        layout = (
            {"begin": begin, "end": [], "final": end} if begin == end else {"begin": begin, "end": end, "final": []}
        )
        identity = {**hashes, **layout, "parsed": not getattr(tokenizer, "split_special_tokens", False)}
        digests = (hashes["corpus_sha256"], hashlib.sha256(json.dumps(identity).encode()).hexdigest())
        path = cache_dir / f"tokens-{digests[0][:16]}-{digests[1][:16]}.bin"
        try:
            cached = cls(path)
            if identity.items() <= cached.header.items():
                return cached
        except (OSError, ValueError):
            pass
        _create(path, documents, tokenizer, identity)
        return cls(path)


def data_start(header_length: int) -> int:
    """The offset of the ids in a token file."""
    return -(-(16 + header_length) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def header_hash(header: dict, blocks: Iterable) -> str:
    """SHA-256 over the header (without its own hash) and the blocks of the ids."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _mapped(path: Path, dtype: str, start: int, count: int) -> numpy.ndarray:
    """`count` ids from the offset `start` of a file, `(N,)`: mapped, or read if the file system refuses that."""
    with optional("mmap", "files are read whole into memory"):
        return numpy.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))
    return numpy.fromfile(path, dtype=dtype, count=count, offset=start)


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK_BYTES):
            yield block


def _create(path: Path, documents: list[Document], tokenizer, identity: dict) -> None:
    """Write the ids behind space for the header, then the header; the file gets its name when it is complete."""
    spacing = max(_MARK_CHARACTERS, sum(document.text_bytes for document in documents) >> 20)
    n_marks = sum(document.text_bytes // spacing for document in documents)
    header_length = _HEADER_BYTES + 16 * len(documents) + 40 * n_marks
    start = data_start(header_length)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.seek(start)
            writer = _Writer(file, _dtype(tokenizer), spacing)
            corpus_sha256 = _write_documents(writer, documents, tokenizer, identity)
            n_added = len(documents) * len(identity["begin"] + identity["end"]) + len(identity["final"])
            if writer.count == n_added:
                raise UserError(
                    "the tokenizer gives no token for this corpus; use the tokenizer of a model of its language"
                )
            if corpus_sha256 != identity["corpus_sha256"]:
                raise UserError("the corpus has changed while it was read; run again")
            file.flush()
            header = {"version": _VERSION, **writer.header(), **identity}
            ids = _mapped(temporary, header["dtype"], start, writer.count)
            header["text"] = _account(ids, header, documents, tokenizer)
            header["sha256"] = header_hash(header, _blocks(temporary, start))
            file.seek(0)
            file.write(_MAGIC + header_length.to_bytes(8, "little") + json.dumps(header).encode().ljust(header_length))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the token file {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _account(ids: numpy.ndarray, header: dict, documents: list[Document], tokenizer) -> dict:
    """What the text became: the fields of `corpus.Ledger` that are about its tokens."""

    def chunks() -> Iterator[str]:
        return itertools.chain.from_iterable(document.chunks() for document in documents)

    special = _count(ids, {token for token in special_ids(tokenizer) if token <= header["max_id"]})
    for token in header["begin"] + header["end"]:
        special[token] -= len(documents)
    special.subtract(header["final"])
    unknown, name = tokenizer.unk_token_id, tokenizer.unk_token
    n_unknown, n_named = max(0, special.pop(unknown, 0)), 0
    if n_unknown and header["parsed"]:  # the text may hold the unknown token's name, as some data sets do
        n_named = min(n_unknown, _occurrences(name, chunks()))
        special[unknown], n_unknown = n_named, n_unknown - n_named
    lost = lost_characters(
        tokenizer,
        lambda: (chunk.replace(name, "") for chunk in chunks()) if n_named else chunks(),
        _text_parts(ids, header),
        unknown if n_unknown else None,
    )
    named = (+special).most_common()
    names = {tokenizer.convert_ids_to_tokens(token)[:_NAME_CHARACTERS]: count for token, count in named[:_NAMES]}
    return {
        "special_tokens": {**names, **({"others": sum(n for _, n in named[_NAMES:])} if named[_NAMES:] else {})},
        "unknown_tokens": n_unknown,
        "lost_bytes": sum(len(character.encode()) * count for character, count in lost.items()),
        "lost_characters": dict(lost.most_common(5)),
    }


def _count(ids: numpy.ndarray, wanted: set[int]) -> Counter[int]:
    """How often each of the wanted ids is in `ids`."""
    counts = Counter()
    for start in range(0, len(ids), _BLOCK_BYTES):
        block = ids[start : start + _BLOCK_BYTES]
        counts.update(block[numpy.isin(block, numpy.array(sorted(wanted), dtype=ids.dtype))].tolist())
    return counts


def _text_parts(ids: numpy.ndarray, header: dict) -> Iterator[numpy.ndarray]:
    """The ids of the text alone, in parts that begin and end between characters."""
    marks = [token for token, _ in header["marks"]]
    for first, end in itertools.pairwise([*header["first_tokens"], len(ids) - len(header["final"])]):
        first, end = first + len(header["begin"]), end - len(header["end"])
        inner = marks[bisect.bisect(marks, first) : bisect.bisect_left(marks, end)]
        for start, stop in itertools.pairwise([first, *inner, end]):
            yield ids[start:stop]


def _occurrences(name: str, chunks: Iterator[str]) -> int:
    count, tail = 0, ""
    for chunk in chunks:
        text = tail + chunk
        count += text.count(name)
        tail = text[len(text) - len(name) + 1 :] if len(name) > 1 else ""
    return count


class _Writer:
    """Appends ids to an open file, and collects the fields of the header."""

    def __init__(self, file, dtype: numpy.dtype, spacing: int):
        self._file, self._dtype, self._spacing = file, dtype, spacing
        self._start, self._limit = file.tell(), numpy.iinfo(dtype).max
        self._first_tokens, self._marks, self._marked = [], [], 0
        self.count = self._max_id = 0

    def begin_document(self, begin: numpy.ndarray) -> None:
        self._first_tokens.append(self.count)
        self._marked = 0
        self.write(begin)

    def write(self, ids: numpy.ndarray) -> None:
        if not len(ids):
            return
        self.count, self._max_id = self.count + len(ids), max(self._max_id, int(ids.max()))
        if self._max_id > self._limit:
            raise UserError(f"the tokenizer gives token id {self._max_id}, which is not in its own vocabulary")
        self._file.write(ids.astype(self._dtype).data)  # numpy's tofile() ignores a full disk

    def mark(self, character: int) -> None:
        """The next token begins at this character of the document."""
        if character >= self._marked + self._spacing:
            self._marks.append((self.count, character))
            self._marked = character

    def restart_document(self) -> None:
        """Remove what was written of the current document."""
        self.count = self._first_tokens.pop()
        self._marks = [mark for mark in self._marks if mark[0] < self.count]
        self._file.seek(self._start + self.count * self._dtype.itemsize)
        self._file.truncate()

    def header(self) -> dict:
        layout = {"dtype": self._dtype.name, "count": self.count, "max_id": self._max_id}
        return {**layout, "first_tokens": self._first_tokens, "marks": self._marks}


def _write_documents(writer: _Writer, documents: list[Document], tokenizer, layout: dict) -> str:
    """Write the ids of all documents; returns the hash of the corpus as it was read."""
    encoder, digest = TextEncoder(tokenizer), hashlib.sha256()
    begin, end, final = (numpy.array(layout[name], dtype="int64") for name in ("begin", "end", "final"))
    with progress_bar("tokenizing", sum(document.text_bytes for document in documents)) as bar:
        for group in _grouped(documents):
            if len(group) == 1:
                digest = _write_document(writer, group[0], tokenizer, encoder, digest, bar, begin)
                writer.write(end)
                continue
            for ids in encode_each(tokenizer, ["".join(hashed_chunks(document, digest, bar)) for document in group]):
                writer.begin_document(begin)
                writer.write(ids)
                writer.write(end)
    writer.write(final)
    return digest.hexdigest()


def _write_document(writer: _Writer, document: Document, tokenizer, encoder: TextEncoder, digest, bar, begin):
    """Write the ids of one document, in one call if they contradict its cut points; returns the updated digest."""
    writer.begin_document(begin)
    digest_before = digest.copy()
    try:
        for ids, character in encoder.encode(hashed_chunks(document, digest, bar)):
            writer.mark(character)
            writer.write(ids)
    except CannotCut:
        digest = digest_before
        writer.restart_document()
        writer.begin_document(begin)
        writer.write(numpy.array(encode(tokenizer, join(hashed_chunks(document, digest))), dtype="uint32"))
    return digest


def _grouped(documents: list[Document]) -> Iterator[list[Document]]:
    """A long document alone, short ones in groups about as long."""
    group, n_bytes = [], 0
    for document in documents:
        if group and n_bytes + document.text_bytes >= LONG_CHARACTERS:
            yield group
            group, n_bytes = [], 0
        group.append(document)
        n_bytes += document.text_bytes
    yield group


def _dtype(tokenizer) -> numpy.dtype:
    largest = max(tokenizer.get_vocab().values(), default=0)
    return numpy.dtype("uint16" if max(largest, separator(tokenizer) or 0) < 1 << 16 else "uint32")


def text_bytes_from(token: int, tokens: TokenFile, documents: list[Document], tokenizer) -> int:
    """The number of bytes of text from the token with index `token` to the end of the corpus.

    Only the text between the marks around the token is tokenized again, to get the offsets of its tokens.
    """
    first_tokens = tokens.header["first_tokens"]
    index = int(numpy.searchsorted(first_tokens, token, side="right")) - 1
    document, first_token = documents[index], first_tokens[index] + len(tokens.header["begin"])
    token = max(token, first_token)  # the ids that begin a document have no bytes
    later_documents = sum(document.text_bytes for document in documents[index + 1 :])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = encode(tokenizer, document.text)
        return later_documents + len(tokenizer.decode(ids[token - first_token :]).encode())
    end = first_tokens[index + 1] if index + 1 < len(first_tokens) else len(tokens)
    inner = [(t, character) for t, character in tokens.header["marks"] if first_token < t < end]
    marks = [(first_token, 0), *inner, (end, None)]
    number = max(n for n, (marked_token, _) in enumerate(marks[:-1]) if marked_token <= token)
    # One mark more on each side, because the ids at the very ends of a part may differ.
    start, stop = marks[max(number - 1, 0)][1], marks[min(number + 2, len(marks) - 1)][1]
    marked_token, marked_character = marks[number]
    text, bytes_after = _text_between(document, start, stop)
    disable_truncation(backend)
    encoding = backend.encode(text, add_special_tokens=False)
    offset = marked_character - start
    skipped = encoding.char_to_token(offset) or encoding.char_to_token(offset + 1) if offset else 0
    number = skipped + token - marked_token
    in_text = len(text[encoding.token_to_chars(number)[0] :].encode()) if number < len(encoding) else 0
    return in_text + bytes_after + later_documents


def _text_between(document: Document, start: int, stop: int | None) -> tuple[str, int]:
    """The characters `start` to `stop` of a document, and the number of bytes after them."""
    parts, bytes_after, position = [], 0, 0
    for chunk in document.chunks():
        low, high = max(start - position, 0), len(chunk) if stop is None else max(stop - position, 0)
        parts.append(chunk[low:high])
        bytes_after += len(chunk[high:].encode())
        position += len(chunk)
    return "".join(parts), bytes_after
