"""A file of the token ids of a corpus, memory-mapped and reused, and the text bytes after any of its tokens."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy

from mori.cli import optional
from mori.data.corpus import Corpus, load_sealed, store_sealed
from mori.data.tokenize import disable_truncation, encode
from mori.data.windows import Positions

MAGIC, VERSION = b"moritok\0", 5
HEADER_BYTES = 1 << 14  # of a new file
_MAX_HEADER_BYTES = 1 << 20
_DATA_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 20
_ACCOUNT = {"special_tokens": dict, "unknown_tokens": int, "lost_bytes": int, "lost_characters": dict}  # in the header


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 over everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{settings}|{separator(tokenizer)}".encode()).hexdigest()


def separator(tokenizer) -> int | None:
    """The token that ends each document: end-of-text, or beginning-of-text if the tokenizer has no end-of-text."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


class TokenFile:
    """The token ids of a corpus: a magic word, a JSON header, then the arrays `ids`, `first_tokens` and `marks`.

    Attributes:
        ids: `(N,)`, uint16 or uint32 by the vocabulary's largest id. All arrays are memory-mapped and read-only.
        first_tokens: `(D,)` int64, the index of each document's first token.
        marks: `(M, 2)` int64, the index of a token and of its first character in its document; several in each long document.
        header: `version`, `dtype`, `count` (of ids), `documents`, `marks` (their numbers), `max_id`, `begin`, `end` and `final`
            (the ids before and after each document, and at the end of the corpus), `parsed` (whether the text may name special
            tokens), `text` (fields of the ledger), and the SHA-256 of the corpus, of the tokenizer, and of the arrays with the
            rest of the header.
    """

    def __init__(self, path: Path):
        """Open a token file. Raises ValueError if it is damaged, incomplete or of another version."""
        self.path = path
        if not path.is_file():  # opening a pipe would block
            raise ValueError(f"{path} is not a token file")
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(8) != MAGIC:
                raise ValueError(f"{path} is not a token file")
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"{path} is cut short")
            try:
                header = json.loads(file.read(length))
            except RecursionError:
                raise ValueError(f"{path} is damaged") from None
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise ValueError(f"{path} is not a token file of this mori")
        start, dtype = data_start(length), header.get("dtype")
        counts = [header.get(name) for name in ("count", "documents", "marks")]
        if dtype not in ("uint16", "uint32") or any(type(n) is not int or n < 0 for n in counts) or not all(counts[:2]):
            raise ValueError(f"{path} is damaged")
        sizes = [counts[0] * numpy.dtype(dtype).itemsize, 8 * counts[1], 16 * counts[2]]
        if size != start + sum(sizes):
            raise ValueError(f"{path} is cut short")
        if header.pop("sha256", None) != header_hash(header, _blocks(path, start)):
            raise ValueError(f"{path} is damaged")
        text = header.get("text")
        if not isinstance(text, dict) or {name: type(value) for name, value in text.items()} != _ACCOUNT:
            raise ValueError(f"{path} is damaged")
        self.header = header
        offsets = [start, start + sizes[0], start + sizes[0] + sizes[1]]
        self.ids = mapped(path, dtype, offsets[0], counts[0])
        self.first_tokens = mapped(path, "int64", offsets[1], counts[1])
        self.marks = mapped(path, "int64", offsets[2], 2 * counts[2]).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.ids)

    def begin_positions(self, start: int = 0) -> Positions:
        """The positions, counted from `start`, of the tokens that begin documents and are nothing else: no text makes a model
        predict them.
        """
        if self.header["final"]:  # they also end documents
            return Positions(self.first_tokens[:0])
        return Positions(self.first_tokens, len(self.header["begin"]), start)


def data_start(header_length: int) -> int:
    """The offset of the ids in a token file."""
    return -(-(16 + header_length) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def header_hash(header: dict, blocks: Iterable) -> str:
    """SHA-256 over the blocks of the arrays and the header (without its own hash)."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    digest.update(json.dumps(header, sort_keys=True).encode())
    return digest.hexdigest()


def mapped(path: Path, dtype: str, start: int, count: int) -> numpy.ndarray:
    """`count` numbers from the offset `start` of a file, `(N,)`: mapped, or read if the file system refuses that."""
    if not count:
        return numpy.empty(0, dtype)
    with optional("mmap", "files are read whole into memory"):
        return numpy.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))
    return numpy.fromfile(path, dtype=dtype, count=count, offset=start)


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK_BYTES):
            yield block


def text_bytes_from(token: int, tokens: TokenFile, corpus: Corpus, tokenizer) -> int:
    """The number of bytes of text from the token with index `token` to the end of the corpus.

    The corpus is read up to that token, so the result is kept beside the token file.
    """
    path = tokens.path.with_suffix(".text_bytes.json")
    results = load_sealed(path) or {}
    if type(results.get(str(token))) is not int:
        results[str(token)] = _text_bytes_from(token, tokens, corpus, tokenizer)
        store_sealed(path, results)
    return results[str(token)]


def _text_bytes_from(token: int, tokens: TokenFile, corpus: Corpus, tokenizer) -> int:
    index = int(numpy.searchsorted(tokens.first_tokens, token, side="right")) - 1
    first_token = int(tokens.first_tokens[index]) + len(tokens.header["begin"])
    token = max(token, first_token)  # the ids that begin a document have no bytes
    documents = corpus.documents()
    bytes_before = sum(_n_bytes(chunk) for chunks in itertools.islice(documents, index) for chunk in chunks)
    later_bytes = corpus.measures.text_bytes - bytes_before
    document = next(documents)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = "".join(document)
        ids = encode(tokenizer, text)
        return later_bytes - _n_bytes(text) + len(tokenizer.decode(ids[token - first_token :]).encode())
    # Only the text between the marks around the token is tokenized again, to get the offsets of its tokens. One mark more on
    # each side, because the ids at the very ends of a part may differ.
    low, high = numpy.searchsorted(tokens.marks[:, 0], [first_token, token], side="right").tolist()
    marked_token, marked_character = tokens.marks[high - 1].tolist() if high > low else (first_token, 0)
    start = int(tokens.marks[high - 2, 1]) if high - 2 >= low else 0
    after = tokens.marks[high + 1].tolist() if high + 1 < len(tokens.marks) else None
    is_last = index + 1 == len(tokens.first_tokens)
    stop = after[1] if after and (is_last or after[0] < tokens.first_tokens[index + 1]) else None
    text, bytes_before = _text_between(document, start, stop)
    disable_truncation(backend)
    encoding = backend.encode(text, add_special_tokens=False)
    offset = marked_character - start
    skipped = encoding.char_to_token(offset) or encoding.char_to_token(offset + 1) if offset else 0
    number = skipped + token - marked_token
    skipped_text = text[: encoding.token_to_chars(number)[0]] if number < len(encoding) else text
    return later_bytes - bytes_before - _n_bytes(skipped_text)


def _text_between(chunks: Iterable[str], start: int, stop: int | None) -> tuple[str, int]:
    """The characters `start` to `stop` of a text, and the number of bytes before them."""
    parts, n_bytes, position = [], 0, 0
    for chunk in chunks:
        low, high = max(start - position, 0), len(chunk) if stop is None else stop - position
        n_bytes += _n_bytes(chunk[:low])
        parts.append(chunk[low:high])
        position += len(chunk)
        if stop is not None and position >= stop:
            break
    return "".join(parts), n_bytes


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
