"""Files -> documents -> a token file on disk, and the ledger that accounts for all of it."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy

from .config import UserError
from .foreign import guarded, leads_out, memory_bytes

SHIPPED = Path(__file__).parent / "transcripts"
_MAGIC, _VERSION = b"moritok\0", 2
_HEADER_BYTES = 64 << 20  # the places of five million documents
_DATA_ALIGNMENT = 64


@dataclass
class Document:
    """One file's text, without its byte order mark and with line ends as `\\n`; `bytes` is the file's size."""

    path: str
    text: str
    bytes: int


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
    path = Path(name).expanduser()
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
    """Read UTF-8 text, with or without byte order mark. Blank files are left out.

    Raises UserError for a file that cannot be read, that is binary or not UTF-8 (with the byte's offset), for more text
    than this machine's memory takes, and when all files are blank.
    """
    documents, blank = [], []
    room = memory_bytes() // 4  # the text, and its tokens beside it
    for path in files:
        try:
            room -= path.stat().st_size
            if room < 0:
                raise UserError(
                    f"{path} has {path.stat().st_size / 2**30:,.1f} GiB, and the corpus is read whole: "
                    f"all of it may be {memory_bytes() / 4 / 2**30:,.1f} GiB here; bring a part of it"
                )
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
        if b"\0" in raw:
            raise UserError(f"{path} looks binary: a NUL byte at offset {raw.index(0)}; the corpus must be UTF-8 text")
        try:
            text = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; save it as UTF-8"
            ) from None
        if text.strip():
            documents.append(Document(str(path), text, len(raw)))
        else:
            blank.append(str(path))
    if not documents:
        raise UserError(f"the corpus is empty: {', '.join(blank[:3])} hold(s) no text")
    return documents


def corpus_hash(documents: list[Document]) -> str:
    """SHA-256 over the documents' texts and their borders."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.text.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 over all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{described}|{separator(tokenizer)}".encode()).hexdigest()


def separator(tokenizer) -> int | None:
    """The token that ends each document: end-of-text, or where there is none the beginning-of-text."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def encode(tokenizer, text: str) -> list[int]:
    """All the ids of `text`: nothing is truncated and no special token is added.

    Raises UserError where the tokenizer fails over the text: one without an unknown token may.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return guarded(
            "cannot tokenize the corpus",
            lambda: tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"],
        )
    backend.no_truncation()
    backend.no_padding()
    return guarded("cannot tokenize the corpus", lambda: backend.encode(text, add_special_tokens=False).ids)


class TokenFile:
    """The token ids of a corpus, memory-mapped: a magic word, a JSON header, then the ids.

    Attributes:
        ids: `(N,)`, uint16 or uint32 by the largest id, read-only.
        header: `version`, `dtype`, `count`, `max_id`, `first_tokens` (of each document), and the SHA-256 of the corpus, of
            the tokenizer, and of the rest of the header with the ids.
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
        self.ids = numpy.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))
        if header.pop("sha256", None) != _sha256(header, [self.ids]):
            raise ValueError(f"{path} is damaged")
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
        end = separator(tokenizer)
        parts, first_tokens, count = [], [], 0
        for document in documents:
            ids = encode(tokenizer, document.text) + ([end] if end is not None else [])
            first_tokens.append(count)
            parts.append(numpy.asarray(ids, dtype="uint32"))
            count += len(ids)
        if not count:
            raise UserError("the tokenizer makes no token of this corpus; tokenizer and text do not belong together")
        max_id = max(int(part.max()) for part in parts if len(part))
        dtype = numpy.dtype("uint16" if max_id < 1 << 16 else "uint32")
        parts = [part.astype(dtype) for part in parts]
        header = {
            "version": _VERSION,
            "dtype": dtype.name,
            "count": count,
            "max_id": max_id,
            **hashes,
            "first_tokens": first_tokens,
        }
        _write(path, {**header, "sha256": _sha256(header, parts)}, parts)
        return cls(path)


def _data_start(header_length: int) -> int:
    return -(-(16 + header_length) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT


def _sha256(header: dict, parts: list[numpy.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def _write(path: Path, header: dict, parts: list[numpy.ndarray]) -> None:
    text = json.dumps(header).encode()
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            file.write(bytes(_data_start(len(text)) - 16 - len(text)))
            for part in parts:
                file.write(part.data)  # numpy's tofile() does not notice a full disk
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise UserError(f"cannot write the token file {path}: {error.strerror}") from None


def text_bytes_from(token: int, tokens: TokenFile, documents: list[Document], tokenizer) -> int:
    """How many bytes of the original text stand from token number `token` to the end of the corpus.

    The document that holds the token is tokenized once more, for the place of every token in its text.
    """
    firsts = tokens.header["first_tokens"]
    index = int(numpy.searchsorted(firsts, token, side="right")) - 1
    later = sum(len(document.text.encode()) for document in documents[index + 1 :])
    text, inside = documents[index].text, token - firsts[index]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return later + len(tokenizer.decode(encode(tokenizer, text)[inside:]).encode())
    offsets = backend.encode(text, add_special_tokens=False).offsets
    return later + (len(text[offsets[inside][0] :].encode()) if inside < len(offsets) else 0)
