"""Text -> token ids: short texts in one call, many short texts at once, a long text in parts, with the ids of one call."""

import functools
import itertools
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

import numpy

from mori.cli import UserError, guarded, interruptible
from mori.data.cuts import Cutter, Piece
from mori.data.files import memory_bytes
from mori.data.words import Part, WordEncoder, encode_batch

PIECE_CHARACTERS = 1 << 15
PIECES_PER_PART = 16
# For a shorter text, finding the cut points takes longer than one call.
LONG_CHARACTERS = PIECES_PER_PART * PIECE_CHARACTERS


def encode(tokenizer, text: str) -> list[int]:
    """All the ids of `text`, in one call: nothing is truncated and no special token is added.

    Raises UserError if the tokenizer fails; one without an unknown token may.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return guarded(
            "cannot tokenize the corpus",
            lambda: interruptible(
                lambda: tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            ),
        )
    disable_truncation(backend)
    return guarded(
        "cannot tokenize the corpus", lambda: interruptible(lambda: backend.encode(text, add_special_tokens=False)).ids
    )


def encode_each(tokenizer, texts: list[str]) -> Iterator[numpy.ndarray]:
    """The ids of each text, `(N,)` uint32, as of `encode`; all cores are used. Raises UserError as `encode` does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        all_ids = (encode(tokenizer, text) for text in texts)
    else:
        disable_truncation(backend)
        all_ids = (encoding.ids for encoding in encode_batch(backend, texts))
    return (numpy.array(ids, dtype="uint32") for ids in all_ids)


def join(chunks: Iterable[str]) -> str:
    """The chunks of a text that has to be tokenized in one call, as one text.

    Raises UserError if that needs more memory than there is: the encoding takes about 50 times as much as the text.
    """
    parts, limit = [], memory_bytes() // 64
    n_characters = 0
    for chunk in chunks:
        parts.append(chunk)
        n_characters += len(chunk)
        if n_characters > limit:
            raise UserError(
                f"this model's tokenizer needs a text whole, and memory is enough for {limit >> 20:,} MiB of text here: "
                "cut the corpus into several files"
            )
    return "".join(parts)


def special_ids(tokenizer) -> set[int]:
    """The ids that are special to the tokenizer: they are no text, and decoding can leave them out."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special.union(tokenizer.all_special_ids)


def lost_characters(
    tokenizer, chunks: Callable[[], Iterator[str]], parts: Iterator[numpy.ndarray], unknown: int | None
) -> Counter[str]:
    """The characters of a corpus that do not come back when its ids are decoded, each with its number.

    What a tokenizer changes without losing text does not count: blanks but for line ends, and its normalization, such as
    lower case or NFKC.

    Args:
        chunks: called for the text in chunks, as often as needed.
        parts: the ids of the text in parts that begin and end between characters.
        unknown: the id that stands for text that the tokenizer does not know, if the ids hold it.
    """
    plain = _without_form(tokenizer)
    if unknown is None and _expresses(tokenizer, _alphabet(chunks()), plain):
        return Counter()
    lost: Counter[str] = Counter()
    for chunk in chunks():
        lost.update(plain(chunk))
    for ids in parts:
        lost.subtract(plain(_decode(tokenizer, ids[ids != unknown] if unknown is not None else ids)))
    return +lost


def _decode(tokenizer, ids: numpy.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _alphabet(chunks: Iterator[str]) -> set[str]:
    """The characters of a text."""
    characters, ascii_characters = set(), b""
    for chunk in chunks:
        rest = chunk.encode().translate(None, ascii_characters)  # much faster than a set of every chunk
        characters.update(rest.decode())
        ascii_characters = "".join(filter(str.isascii, characters)).encode()
    return characters


def _expresses(tokenizer, characters: set[str], plain: Callable[[str], str]) -> bool:
    """Whether the tokenizer can express each of these characters."""
    text = " ".join(2 * character for character in sorted(characters))
    try:
        return not Counter(plain(text)) - Counter(plain(_decode(tokenizer, numpy.array(encode(tokenizer, text)))))
    except UserError:  # a tokenizer without an unknown token fails on a word that it does not know
        return False


def _without_form(tokenizer) -> Callable[[str], str]:
    """A function that removes from a text what tokenizers change without losing text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        normalize = lambda text: unicodedata.normalize("NFKC", text).casefold()  # noqa: E731
    else:
        normalize = backend.normalizer.normalize_str if backend.normalizer else str
    return lambda text: "\n".join("".join(line.split()) for line in normalize(text).replace("▁", " ").split("\n"))


def disable_truncation(backend) -> None:
    """Undo the truncation and the padding that a tokenizer's file may ask for."""
    backend.no_truncation()
    backend.no_padding()


class TextEncoder:
    """Tokenizes texts that come in chunks, on all cores, in memory that does not grow with them."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)

    @functools.cached_property
    def cutter(self) -> Cutter:
        """The cut points that the tokenizer allows."""
        return Cutter(self._backend)

    def encode(self, chunks: Iterable[str]) -> Iterator[tuple[numpy.ndarray, int]]:
        """The ids of a text, equal to those of `encode` on all of it.

        Yields, piece after piece, ids `(N,)` uint32 and the number of the first of their characters. A text without cut
        points is one piece. Raises CannotCut if the ids themselves contradict the cut points, RunFailed if a process that
        tokenizes is killed, and UserError as `encode` does.
        """
        chunks, beginning, n_characters = iter(chunks), [], 0
        while n_characters < LONG_CHARACTERS and (chunk := next(chunks, None)) is not None:
            beginning.append(chunk)
            n_characters += len(chunk)
        chunks = itertools.chain(beginning, chunks)
        if self._backend is None or n_characters < LONG_CHARACTERS or not self.cutter.separators:
            yield numpy.array(encode(self._tokenizer, join(chunks)), dtype="uint32"), 0
            return
        self.cutter.suit("".join(beginning))
        pieces = self.cutter.pieces(chunks, PIECE_CHARACTERS)
        first = next(pieces)
        if first.is_last:
            yield numpy.array(encode(self._tokenizer, first.text), dtype="uint32"), 0
            return
        disable_truncation(self._backend)
        yield from self._encode_pieces(itertools.chain([first], pieces))

    def _encode_pieces(self, pieces: Iterator[Piece]) -> Iterator[tuple[numpy.ndarray, int]]:
        starts: deque[int] = deque()

        def parts() -> Iterator[Part]:
            for number in itertools.count():
                if not (group := list(itertools.islice(pieces, PIECES_PER_PART))):
                    return
                starts.extend(piece.start for piece in group)
                texts = [piece.text for piece in group]
                yield Part(texts, group[0].start == 0, group[-1].is_last, verify=number % 8 == 0)

        encoder = WordEncoder(self._backend, self.cutter.word, next(iter(self.cutter.separators)))
        for ids_of_part in encoder.encode_all(parts()):
            for ids in ids_of_part:
                yield numpy.frombuffer(ids, dtype="uint32"), starts.popleft()
