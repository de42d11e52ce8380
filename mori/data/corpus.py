"""Files -> documents -> a token file on disk, and the ledger that accounts for all of it."""

import codecs
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from tqdm import tqdm

from mori.config import UserError
from mori.data.pieces import CUT_FROM, PieceEncoder, encode, encode_each, whole
from mori.data.words import CannotCut
from mori.model.files import leads_out, memory_bytes

SHIPPED = Path(__file__).parent.parent / "transcripts"
_MAGIC, _VERSION = b"moritok\0", 3
_HEADER_BYTES = 64 << 20  # the places of four million documents
_DATA_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 20  # what is read at once
_MARK_CHARACTERS = 1 << 18  # how far apart the marks of a token file are at least; there are a million at most
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class Document:
    """One file's text, without its byte order mark and with line ends as `\\n`, read anew each time it is asked for.

    `bytes` is the size of the file, `text_bytes` that of the text in UTF-8.
    """

    path: str
    bytes: int
    text_bytes: int

    def chunks(self) -> Iterator[str]:
        """The text, a part at a time. Raises UserError as `read_documents` does."""
        return _chunks(Path(self.path))

    @property
    def text(self) -> str:
        """The text as a whole. Raises UserError where it is more than this machine's memory takes."""
        room = memory_bytes() // 4  # its tokens, or what is learned from it, stand beside it
        if self.text_bytes > room:
            raise UserError(
                f"{self.path} has {self.bytes / 2**30:,.1f} GiB, and must be taken whole here (to learn a tokenizer from it, "
                f"or for one that cannot be given it in parts), which {room / 2**30:,.1f} GiB may be; bring a part of it"
            )
        return "".join(self.chunks())


@dataclass
class Ledger:
    """Every token of the corpus, accounted for: tokens = train_tokens + held_out_tokens + dropped_tokens."""

    bytes: int
    documents: int
    tokens: int
    train_tokens: int
    held_out_tokens: int
    dropped_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.documents} document(s), {self.bytes:,} bytes -> {self.tokens:,} tokens = "
            f"{self.train_tokens:,} to train on + {self.held_out_tokens:,} held out + {self.dropped_tokens:,} dropped"
        )


def find_files(corpus: list[str]) -> list[Path]:
    """The files that the words of `--corpus` name, in a fixed order, none twice.

    A folder gives its `*.txt`, folders inside it too; a glob what it matches; both sorted by path. An empty list is the
    transcripts that ship with mori. Raises UserError for what is missing or holds no text, and for a link in a folder that
    leads out of it: what lies elsewhere is read only when it is named.
    """
    found = []
    for name in corpus or [str(SHIPPED)]:
        try:
            found += _files_of(name)
        except (OSError, RuntimeError) as error:  # too long a name, no permission, a link to itself
            raise UserError(f"corpus {name[:200]} cannot be found: {getattr(error, 'strerror', error)}") from None
    first: dict[Path, Path] = {}
    for path in found:
        first.setdefault(path.resolve(), path)
    return list(first.values())


def _files_of(name: str) -> list[Path]:
    if not name:
        raise UserError("corpus is an empty word; give a text file, a folder of *.txt, or a glob")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.[tT][xX][tT]") if p.is_file() and not _hidden(p.relative_to(path)))
        for file in files:
            if leads_out(file, path):
                raise UserError(
                    f"{file} is a link that leads out of the corpus folder; to read it, name the file itself: {file.resolve()}"
                )
        if not files:
            raise UserError(
                f"corpus folder {name} holds no *.txt file; put the transcripts there as .txt, or name the files"
            )
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise UserError(f"corpus {name} is neither a file nor a folder")
    elif glob.has_magic(name):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise UserError(f"corpus pattern {name} matches no file")
    else:
        raise UserError(f"corpus {name} does not exist; give a text file, a folder of *.txt, or a glob")
    return files


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def read_documents(files: Iterable[Path]) -> list[Document]:
    """Look through UTF-8 text, with or without byte order mark. Blank files are left out.

    Raises UserError for a file that cannot be read, that is binary or not UTF-8 (with the byte's offset), for more text
    than this machine can train on, and when all files are blank.
    """
    documents, blank = [], []
    total, room = 0, 16 * memory_bytes()  # the order of the windows is kept in memory: some 8 bytes for 500 of text
    for path in files:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        total += size
        if total > room:
            raise UserError(
                f"{path} has {size / 2**30:,.1f} GiB, and the whole corpus may have {room / 2**30:,.1f} GiB here; "
                "bring a part of it"
            )
        text_bytes, has_text = 0, False
        for chunk in _chunks(path):
            text_bytes += len(chunk.encode())
            has_text = has_text or bool(chunk.strip())
        if has_text:
            documents.append(Document(str(path), size, text_bytes))
        else:
            blank.append(str(path))
    if not documents:
        raise UserError(f"the corpus is empty: {', '.join(blank[:3])} hold(s) no text")
    return documents


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file, decoded and with line ends as `\n`, some megabyte at a time."""
    raw, offset, held = b"", 0, ""  # bytes not decoded yet and where they begin; a carriage return not given away yet
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(_BLOCK_BYTES)
                raw += block
                if offset == 0 and raw[:2] in _UTF_16:
                    raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
                if b"\0" in raw:
                    at = offset + raw.index(0)
                    raise UserError(f"{path} looks binary: a NUL byte at offset {at}; the corpus must be UTF-8 text")
                try:
                    text, decoded = codecs.utf_8_decode(raw, "strict", not block)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; save it as UTF-8"
                    ) from None
                text = held + (text.removeprefix("\ufeff") if offset == 0 else text)
                raw, offset = raw[decoded:], offset + decoded
                held = "\r" if block and text.endswith("\r") else ""
                if text := text[: len(text) - len(held)]:
                    yield text.replace("\r\n", "\n") if "\r" in text else text
                if not block:
                    return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def corpus_hash(documents: list[Document]) -> str:
    """SHA-256 over the documents' texts and their borders."""
    digest = hashlib.sha256()
    for document in documents:
        for _ in _hashed(document, digest):
            pass
    return digest.hexdigest()


def _hashed(document: Document, digest, bar: tqdm | None = None) -> Iterator[str]:
    """The document's chunks, on their way put into the hash of the corpus, and counted when they are done with."""
    digest.update(document.text_bytes.to_bytes(8, "little"))
    for chunk in document.chunks():
        encoded = chunk.encode()
        digest.update(encoded)
        yield chunk
        if bar:
            bar.update(len(encoded))


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 over all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{described}|{separator(tokenizer)}".encode()).hexdigest()


def separator(tokenizer) -> int | None:
    """The token that ends each document: end-of-text, or where there is none the beginning-of-text."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


class TokenFile:
    """The token ids of a corpus, memory-mapped: a magic word, a JSON header, then the ids.

    Attributes:
        ids: `(N,)`, uint16 or uint32 by the vocabulary's largest id, read-only.
        header: `version`, `dtype`, `count`, `max_id`, `first_tokens` (of each document), `marks` (a token's number and that
            of the character in its document at which it begins, some in each long document), and the SHA-256 of the corpus,
            of the tokenizer, and of the rest of the header with the ids.
    """

    def __init__(self, path: Path):
        """Open a token file. Raises ValueError where it is not a whole one of ours."""
        self.path = path
        if not path.is_file():  # a pipe would block
            raise ValueError(f"{path} is not a token file")
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(8) != _MAGIC:
                raise ValueError(f"{path} is not a token file")
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _HEADER_BYTES):
                raise ValueError(f"{path} is cut short")
            try:
                header = json.loads(file.read(length))
            except RecursionError:
                raise ValueError(f"{path} is damaged") from None
        if not isinstance(header, dict) or header.get("version") != _VERSION:
            raise ValueError(f"{path} is not a token file of this mori")
        start, dtype, count = _data_start(length), header.get("dtype"), header.get("count")
        if dtype not in ("uint16", "uint32") or type(count) is not int or count < 1:
            raise ValueError(f"{path} is damaged")
        if size != start + count * numpy.dtype(dtype).itemsize:
            raise ValueError(f"{path} is cut short")
        if header.pop("sha256", None) != _sha256(header, _blocks(path, start)):
            raise ValueError(f"{path} is damaged")
        self.ids = numpy.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))
        self.header = header

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def make(cls, documents: list[Document], tokenizer, cache_dir: Path) -> "TokenFile":
        """Tokenize the documents, each followed by the end-of-text token, or reuse the file that holds just that.

        Raises UserError where the tokenizer makes no token at all, or the file cannot be written.
        """
        hashes = {"corpus_sha256": corpus_hash(documents), "tokenizer_sha256": tokenizer_hash(tokenizer)}
        path = cache_dir / f"tokens-{hashes['corpus_sha256'][:16]}-{hashes['tokenizer_sha256'][:16]}.bin"
        try:
            made = cls(path)
            if hashes.items() <= made.header.items():
                return made
        except (OSError, ValueError):
            pass
        _write(path, documents, tokenizer, hashes)
        return cls(path)


def _data_start(header_length: int) -> int:
    return -(-(16 + header_length) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def _sha256(header: dict, parts: Iterable) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK_BYTES):
            yield block


def _write(path: Path, documents: list[Document], tokenizer, hashes: dict[str, str]) -> None:
    """Tokenize the documents into a token file: the ids as they come, then the header into the room before them."""
    dtype = _dtype(tokenizer)
    spacing = _spacing(documents)
    header_length = 1024 + 16 * len(documents) + 40 * sum(document.text_bytes // spacing for document in documents)
    start = _data_start(header_length)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.seek(start)
            header = _write_ids(file, documents, tokenizer, dtype, hashes)
            file.flush()
            header["sha256"] = _sha256(header, _blocks(staged, start))
            file.seek(0)
            file.write(_MAGIC + header_length.to_bytes(8, "little") + json.dumps(header).encode().ljust(header_length))
        staged.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the token file {path}: {error.strerror}") from None
    finally:
        staged.unlink(missing_ok=True)


def _write_ids(file, documents: list[Document], tokenizer, dtype: numpy.dtype, hashes: dict[str, str]) -> dict:
    """Write the ids of all documents; returns the header."""
    end, encoder, digest = separator(tokenizer), PieceEncoder(tokenizer), hashlib.sha256()
    ends = numpy.array([] if end is None else [end], dtype="uint32")
    first_tokens, marks, count, max_id = [], [], 0, 0
    begin, limit, spacing = file.tell(), numpy.iinfo(dtype).max, _spacing(documents)

    def write(ids: numpy.ndarray) -> None:
        nonlocal count, max_id
        if len(ids):
            count, max_id = count + len(ids), max(max_id, int(ids.max()))
            if max_id > limit:
                raise UserError(f"the tokenizer gives token id {max_id}, which is not in its own vocabulary")
            file.write(ids.astype(dtype).data)  # numpy's tofile() does not notice a full disk

    with _progress(documents) as bar:
        for group in _together(documents):
            if len(group) > 1:
                for ids in encode_each(tokenizer, ["".join(_hashed(document, digest, bar)) for document in group]):
                    first_tokens.append(count)
                    write(ids)
                    write(ends)
                continue
            [document] = group
            first_tokens.append(count)
            before, marked = digest.copy(), 0
            try:
                for ids, place in encoder.encode(_hashed(document, digest, bar)):
                    if place >= marked + spacing:
                        marks.append((count, place))
                        marked = place
                    write(ids)
            except CannotCut:
                count, digest = first_tokens[-1], before
                marks = [mark for mark in marks if mark[0] < count]
                file.seek(begin + count * dtype.itemsize)
                file.truncate()
                write(numpy.array(encode(tokenizer, whole(_hashed(document, digest))), dtype="uint32"))
            write(ends)
    if not count:
        raise UserError("the tokenizer makes no token of this corpus; tokenizer and text do not belong together")
    if digest.hexdigest() != hashes["corpus_sha256"]:
        raise UserError("the corpus has changed while it was read; run it again")
    layout = {"version": _VERSION, "dtype": dtype.name, "count": count, "max_id": max_id}
    return {**layout, **hashes, "first_tokens": first_tokens, "marks": marks}


def _together(documents: list[Document]) -> Iterator[list[Document]]:
    """A long document by itself, short ones as many at a time as make a long one."""
    group, held = [], 0
    for document in documents:
        if group and held + document.text_bytes >= CUT_FROM:
            yield group
            group, held = [], 0
        group.append(document)
        held += document.text_bytes
    yield group


def _spacing(documents: list[Document]) -> int:
    return max(_MARK_CHARACTERS, sum(document.text_bytes for document in documents) >> 20)


def _dtype(tokenizer) -> numpy.dtype:
    largest = max(tokenizer.get_vocab().values(), default=0)
    return numpy.dtype("uint16" if max(largest, separator(tokenizer) or 0) < 1 << 16 else "uint32")


def _progress(documents: list[Document]) -> tqdm:
    """A bar on standard error, where that is a terminal and it takes more than a moment."""
    total = sum(document.text_bytes for document in documents)
    shape = {"total": total, "unit": "B", "unit_scale": True, "dynamic_ncols": True, "delay": 1}
    return tqdm(**shape, desc="tokenizing", disable=None, leave=False, file=sys.stderr)


def text_bytes_from(token: int, tokens: TokenFile, documents: list[Document], tokenizer) -> int:
    """How many bytes of the original text stand from token number `token` to the end of the corpus.

    The text around the token, from mark to mark, is tokenized once more, for the place of every token in it.
    """
    firsts = tokens.header["first_tokens"]
    index = int(numpy.searchsorted(firsts, token, side="right")) - 1
    document, later = documents[index], sum(document.text_bytes for document in documents[index + 1 :])
    end = firsts[index + 1] if index + 1 < len(firsts) else len(tokens)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = encode(tokenizer, document.text)
        return later + len(tokenizer.decode(ids[token - firsts[index] :]).encode())
    marks = [(firsts[index], 0), *(tuple(m) for m in tokens.header["marks"] if firsts[index] < m[0] < end), (end, None)]
    number = max(n for n, (first, _) in enumerate(marks) if first <= token and n < len(marks) - 1)
    # One mark more on either side: what stands at the very edges of the text might be tokenized differently there.
    (first, begin), (_, start), (_, stop) = (
        marks[number],
        marks[max(number - 1, 0)],
        marks[min(number + 2, len(marks) - 1)],
    )
    text, behind = _part(document, start, stop)
    encoding = backend.encode(text, add_special_tokens=False)
    at = begin - start
    skipped = encoding.char_to_token(at) or encoding.char_to_token(at + 1) if at else 0
    place = skipped + token - first
    return later + behind + (len(text[encoding.token_to_chars(place)[0] :].encode()) if place < len(encoding) else 0)


def _part(document: Document, start: int, stop: int | None) -> tuple[str, int]:
    """The characters from number `start` to `stop` of a document, and how many bytes of it stand behind them."""
    parts, behind, at = [], 0, 0
    for chunk in document.chunks():
        low, high = max(start - at, 0), len(chunk) if stop is None else max(stop - at, 0)
        parts.append(chunk[low:high])
        behind += len(chunk[high:].encode())
        at += len(chunk)
    return "".join(parts), behind
