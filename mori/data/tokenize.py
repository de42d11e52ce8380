"""Text -> token ids: short texts in one call, many short texts at once, a long text in parts, with the ids of one call."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy

from mori.cli import UserError, guarded, interruptible
from mori.data.cuts import Cutter, Piece, check_length
from mori.data.files import memory_bytes
from mori.data.words import Part, WordEncoder, encode_batch, grouped

PIECE_CHARACTERS = 1 << 15
LONG_CHARACTERS = 1 << 19  # of a part; for a shorter corpus, finding the cut points takes longer than tokenizing it


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
    parts, limit = [], _longest_text()
    n_characters = 0
    for chunk in chunks:
        parts.append(chunk)
        n_characters += len(chunk)
        check_length(n_characters, limit)
    return "".join(parts)


def _longest_text() -> int:
    """The number of characters that one call can tokenize in this machine's memory."""
    return memory_bytes() // 64


def special_ids(tokenizer) -> set[int]:
    """The ids that are special to the tokenizer: they are no text, and decoding can leave them out."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special.union(tokenizer.all_special_ids)


def lost_characters(
    tokenizer, alphabet: str, chunks: Callable[[], Iterator[str]], parts: Iterator[numpy.ndarray], unknown: int | None
) -> Counter[str]:
    """The characters of a corpus that do not come back when its ids are decoded, each with its number.

    What a tokenizer changes without losing text does not count: blanks but for line ends, and its normalization, such as
    lower case or NFKC.

    Args:
        alphabet: the characters of the text.
        chunks: called for the text in chunks, if the tokenizer cannot express the alphabet.
        parts: the ids of the text in parts that begin and end between characters.
        unknown: the id that stands for text that the tokenizer does not know, if the ids hold it.
    """
    plain = _without_form(tokenizer)
    if unknown is None and _expresses(tokenizer, alphabet, plain):
        return Counter()
    lost: Counter[str] = Counter()
    for chunk in chunks():
        lost.update(plain(chunk))
    for ids in parts:
        lost.subtract(plain(_decode(tokenizer, ids[ids != unknown] if unknown is not None else ids)))
    return +lost


def _decode(tokenizer, ids: numpy.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _expresses(tokenizer, characters: str, plain: Callable[[str], str]) -> bool:
    """Whether the tokenizer can express each of these characters."""
    text = " ".join(2 * character for character in characters)
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
    """Tokenizes documents on all cores, piece after piece, in memory that does not grow with the text.

    Attributes:
        cutter: the cut points that the tokenizer allows; None if each document is one piece.
    """

    def __init__(self, tokenizer, cut: bool = True):
        """`cut`: cut documents at cut points; for little text, finding these takes longer than tokenizing."""
        self._tokenizer, self._backend = tokenizer, getattr(tokenizer, "backend_tokenizer", None)
        self.cutter = Cutter(self._backend) if cut and self._backend is not None else None
        if self.cutter and not self.cutter.separators:
            self.cutter = None

    def pieces(self, chunks: Iterable[str]) -> Iterator[Piece]:
        """The pieces of a document that comes in chunks, on which they do not depend.

        Raises UserError for a document that has to be tokenized in one call and needs more memory than there is.
        """
        if self.cutter:
            return self.cutter.pieces(chunks, PIECE_CHARACTERS, _longest_text())
        return iter([Piece(join(chunks), 0, is_last=True)])

    def encode(self, pieces: Iterator[Piece]) -> Iterator[numpy.ndarray]:
        """The ids of each piece of some documents, `(N,)` uint32; those of a document's pieces are those of one call on it.

        Raises CannotCut if the ids themselves contradict the cut points, RunFailed if a process that tokenizes is killed, and
        UserError as `encode` does.
        """
        groups = grouped(pieces, lambda piece: len(piece.text), LONG_CHARACTERS)
        if not self.cutter:
            for group in groups:
                yield from encode_each(self._tokenizer, [piece.text for piece in group])
            return
        disable_truncation(self._backend)
        parts = (
            Part(
                [piece.text for piece in group],
                [piece.start == 0 for piece in group],
                [piece.is_last for piece in group],
                verify=number % 8 == 0,
            )
            for number, group in enumerate(groups)
        )
        for ids_of_part in WordEncoder(self._backend, self.cutter).encode_all(parts):
            for ids in ids_of_part:
                yield numpy.frombuffer(ids, dtype="uint32")
