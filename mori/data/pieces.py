"""One long text -> its token ids, a part at a time, on all cores: the very ids of one call on the whole text.

A text may be cut only where the ids cannot change. A *place* is a space, a line end, or an ideographic comma or full stop,
between two letters, which nothing of the tokenizer reaches across (`_is_local`): no added token, no pattern of its normalizer
or pre-tokenizer can hold the letter and the separator behind it, nor look further behind. So the pre-tokens on either side of a
place are a function of the text on that side. What is not known to be so is taken to reach across, and the text stays whole.

By words (`words`): where every space in a place begins a pre-token besides (`_is_border`), what stands between two places has
the same ids wherever it stands.

By pieces, otherwise: neighbours overlap as far as several places. Where both have the same two tokens, at the same characters,
to the left and to the right of a place, the whole text has this border of tokens too

- if there are two pre-tokens,
- or if the model is a plain BPE: a sequence of tokens is the encoding of its text exactly if each two neighbours are the
  encoding of theirs. (Merges go by rank, then from the left, so those inside a token do not depend on what stands beside
  it; the first merge across a border in the whole text would be made in the text of the two tokens as well.)

All ids between the first such border in the overlap and the last must be equal in both; if not, the text is not cut.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy
from tokenizers import Encoding, Regex
from tokenizers.pre_tokenizers import Split

from mori.config import UserError
from mori.data.words import CannotCut, Part, WordEncoder, encode_batch
from mori.model.files import guarded, memory_bytes

PIECE = 1 << 15  # characters: small beside the memory, large beside the overlap
OVERLAP = 1 << 10
BATCH = 16  # pieces; their encodings take some 50 times the memory of their texts
CUT_FROM = BATCH * PIECE  # characters: of less, to find out where to cut takes longer than to tokenize it
_SEPARATORS = " \n、。，"
# The pattern of Radford et al., 2019, which the byte-level pre-tokenizer has built in.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each of these looks at one character at a time, or at one composed character, and never composes across a separator
# (https://unicode.org/reports/tr15/#Concatenation). What it puts before a text, a piece's overlap takes.
_LOCAL_NORMALIZERS = "NFC NFD NFKC NFKD Lowercase StripAccents BertNormalizer Prepend Strip Nmt Precompiled".split()
_LOCAL_PRE_TOKENIZERS = (
    "Metaspace Whitespace WhitespaceSplit BertPreTokenizer Punctuation Digits CharDelimiterSplit".split()
)
# One item of a pattern: a class (with classes inside, one level deep), an escape of a character or of a set, a group, a look
# ahead, a bar, any plain character. What is none of these (anchors, looks behind, backreferences ...) is not understood.
_ITEM = re.compile(
    r"\[\^?\]?(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\]\\\[])*\]|\\[pP]\{\^?\w+\}|\\x[\da-fA-F]{2}|\\u[\da-fA-F]{4}|\\[sSdDwWnrtfv]|\\[^\w]"
    r"|\(\?i?:|\(\?[=!]|\((?!\?)|\)|\||[^\\\[\](){}|*+?^$]",
    re.DOTALL,
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*,?\d*\})[+?]*")
_LOOKS = ("(?=", "(?!")
_ONCE_AT_MOST = ("", "?", "??", "?+", "{1}", "{0,1}")


@dataclass
class _Piece:
    """A piece of a text, from its character number `start` on. The next one begins at `end`, and `places` are those that
    both hold.
    """

    text: str
    start: int
    end: int
    places: list[int]
    encoding: Encoding | None = None
    ids: numpy.ndarray | None = None


def encode(tokenizer, text: str) -> list[int]:
    """All the ids of `text`, in one call: nothing is truncated and no special token is added.

    Raises UserError where the tokenizer fails over the text: one without an unknown token may.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return guarded(
            "cannot tokenize the corpus",
            lambda: tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"],
        )
    _encode_all(backend)
    return guarded("cannot tokenize the corpus", lambda: backend.encode(text, add_special_tokens=False).ids)


def encode_each(tokenizer, texts: list[str]) -> Iterator[numpy.ndarray]:
    """The ids of each text, uint32, as of `encode`; the texts are shared out among the cores. Raises UserError as there."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = (encode(tokenizer, text) for text in texts)
    else:
        _encode_all(backend)
        found = (encoding.ids for encoding in encode_batch(backend, texts))
    return (numpy.array(ids, dtype="uint32") for ids in found)


def whole(chunks: Iterable[str]) -> str:
    """The chunks of a text that has to be tokenized in one call.

    Raises UserError for more than memory takes: the encodings are some 50 times as large as their text.
    """
    parts, room = [], memory_bytes() // 64
    for chunk in chunks:
        parts.append(chunk)
        room -= len(chunk)
        if room < 0:
            raise UserError(
                f"this model's tokenizer cannot be given a text in parts, and in one it may have {memory_bytes() // 64 >> 20:,} MiB "
                "here: cut the corpus into several files"
            )
    return "".join(parts)


def _encode_all(backend) -> None:
    backend.no_truncation()
    backend.no_padding()


class PieceEncoder:
    """Tokenizes texts that come in chunks, in memory that does not grow with them, on all cores."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    @functools.cached_property
    def _cutter(self) -> "_Cutter":
        return _Cutter(self._tokenizer.backend_tokenizer)

    def encode(self, chunks: Iterable[str]) -> Iterator[tuple[numpy.ndarray, int]]:
        """The ids of a text, which are those of `encode` on all of it.

        Yields, piece after piece, ids `(N,)`, uint32, and the number of the character at which they begin. A text that
        cannot be cut is one piece. Raises CannotCut where only the ids themselves tell, RunFailed where a process that
        tokenizes is killed, and UserError as `encode` does.
        """
        chunks, beginning, length = iter(chunks), [], 0
        while length < CUT_FROM and (chunk := next(chunks, None)) is not None:
            beginning.append(chunk)
            length += len(chunk)
        chunks = itertools.chain(beginning, chunks)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or length < CUT_FROM or not self._cutter.separators:
            yield numpy.array(encode(self._tokenizer, whole(chunks)), dtype="uint32"), 0
            return
        _encode_all(backend)
        pieces = self._cutter.pieces(chunks)
        first = next(pieces)
        if not first.places:  # nor is there another
            yield numpy.array(encode(self._tokenizer, first.text), dtype="uint32"), 0
            return
        pieces = itertools.chain([first], pieces)
        batches = iter(lambda: list(itertools.islice(pieces, BATCH)), [])
        yield from (self._by_words if self._cutter.word else self._by_pieces)(batches)

    def _by_pieces(self, batches: Iterator[list[_Piece]]) -> Iterator[tuple[numpy.ndarray, int]]:
        left, first, start = None, 0, 0
        for batch in batches:
            encodings = encode_batch(self._tokenizer.backend_tokenizer, [piece.text for piece in batch])
            for piece, encoding in zip(batch, encodings, strict=True):
                piece.encoding, piece.ids = encoding, numpy.array(encoding.ids, dtype="uint32")
                if left:
                    end, next_first, next_start = self._cutter.join(left, piece)
                    if end < first:
                        raise CannotCut
                    yield left.ids[first:end], start
                    first, start = next_first, next_start
                left = piece
        yield left.ids[first:], start

    def _by_words(self, batches: Iterator[list[_Piece]]) -> Iterator[tuple[numpy.ndarray, int]]:
        """Every place is a border of pre-tokens, so the pieces need not overlap, and are cut into words."""
        sent: deque[list[_Piece]] = deque()

        def parts() -> Iterator[Part]:
            for n, batch in enumerate(batches):
                sent.append(batch)
                texts = [piece.text[: piece.end - piece.start] for piece in batch]
                yield Part(texts, batch[0].start == 0, not batch[-1].places, verify=n % 8 == 0)

        encoder = WordEncoder(self._tokenizer.backend_tokenizer, self._cutter.word)
        for found in encoder.encode_all(parts()):
            for piece, ids in zip(sent.popleft(), found, strict=True):
                yield numpy.frombuffer(ids, dtype="uint32"), piece.start


class _Cutter:
    """Finds places in texts, and joins the pieces.

    Attributes:
        separators: those of `_SEPARATORS` which nothing of the tokenizer reaches across, and what its normalizer makes of
            each.
        word: a regular expression for what stands between two places, where every place is a border of pre-tokens.
    """

    def __init__(self, backend):
        self._normalizer = backend.normalizer
        described = json.loads(backend.to_str())
        self._plain_bpe = _is_plain_bpe(described["model"])
        self.separators = {}
        for separator in _SEPARATORS:
            before, whole = self._normalized("a"), self._normalized(f"a{separator}b")
            if len(whole) == len(before) + 2 and whole.startswith(before) and whole.endswith("b"):
                normalized = whole[-2]
                if not normalized.isalnum() and _is_local(described, separator, normalized, self._normalized):
                    self.separators[separator] = normalized
        self.word = self._place = None
        if self._separators_at_borders(described):
            self.separators = {" ": self.separators[" "]}
        if self.separators:
            letter = self._letter_class()
            self._place = re.compile(rf"(?<=[{letter}])[{''.join(self.separators)}](?=[{letter}])")
            if self._separators_at_borders(described):
                self.word = re.compile(rf" ?[^ ]*(?: [^ ]*)*?(?:(?<=[{letter}])(?= [{letter}])|\Z)")

    def _separators_at_borders(self, described: dict) -> bool:
        """Whether a space in a place always begins a pre-token, whatever stands around."""
        steps = _steps(described["pre_tokenizer"], "pretokenizers")
        return " " in self.separators and any(_is_border(step, self.separators[" "]) for step in steps)

    def _letter_class(self) -> str:
        """The letters that make a place, as the inside of a class of a regular expression."""
        separator = next(iter(self.separators))
        fit = [c for c in _letters() if self._is_place(c, separator, "a") and self._is_place("a", separator, c)]
        runs = []
        for character in fit:
            if runs and ord(character) == ord(runs[-1][1]) + 1:
                runs[-1][1] = character
            else:
                runs.append([character, character])
        return "".join(f"{first}-{last}" for first, last in runs)

    def _normalized(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def _is_place(self, before: str, separator: str, behind: str) -> bool:
        """Whether the two letters around a separator stay letters, each for itself."""
        first, whole = self._normalized(before), self._normalized(before + separator + behind)
        rest = whole[len(first) :]
        return (
            whole.startswith(first)
            and _is_letter(first[-1:])
            and rest[:1] == self.separators[separator]
            and _is_letter(rest[1:2])
        )

    def _places(self, text: str, begin: int, end: int) -> list[int]:
        return [match.start() for match in self._place.finditer(text, begin, end)]

    def pieces(self, chunks: Iterator[str]) -> Iterator[_Piece]:
        """Cut a text into pieces of about PIECE characters. Each goes on to the last of the places that it shares with the
        next, which begins at the first; where there are too few in OVERLAP characters, they are looked for further on.
        """
        text, at, start, overlap, more = "", 0, 0, OVERLAP, True  # text[at:] is not cut yet; text[0] is number `start`
        while True:
            end = at + PIECE + overlap
            if more and len(text) < end:
                parts, wanted = [text[at:]], end - len(text)
                while wanted > 0 and more:
                    chunk = next(chunks, None)
                    more = chunk is not None
                    parts.append(chunk or "")
                    wanted -= len(parts[-1])
                text, start, at = "".join(parts), start + at, 0
                end = PIECE + overlap
            if len(text) < end:
                yield _Piece(text[at:], start + at, start + len(text), [])
                return
            places = self._places(text, at + PIECE, end)
            if len(places) < 3:
                overlap *= 2
                continue
            places = [start + place for place in places]
            yield _Piece(text[at : places[-1] - start], start + at, places[0], places[1:-1])
            at, overlap = places[0] - start, OVERLAP

    def join(self, left: _Piece, right: _Piece) -> tuple[int, int, int]:
        """Where the two pieces meet: the number of tokens of `left` up to there, that of the first of `right`, and the place.

        Raises CannotCut where they agree on none.
        """
        first = next(filter(None, (self._border(place, left, right) for place in left.places)), None)
        last = next(filter(None, (self._border(place, left, right) for place in reversed(left.places))), None)
        if not first or not numpy.array_equal(left.ids[first[0] : last[0]], right.ids[first[1] : last[1]]):
            raise CannotCut
        return first

    def _border(self, place: int, left: _Piece, right: _Piece) -> tuple[int, int, int] | None:
        """As `join`, for one place; None where the whole text may have no border of tokens there."""
        numbers, seen = [], []
        for piece in (left, right):
            encoding, at = piece.encoding, place - piece.start
            number = encoding.char_to_token(at) or encoding.char_to_token(at + 1)  # the separator may be no token's
            if not number:
                return None
            before, behind = encoding.token_to_chars(number - 1), encoding.token_to_chars(number)
            if before is None or behind is None or before[1] != at or behind[0] < at:
                return None
            if encoding.token_to_word(number - 1) == encoding.token_to_word(number) and not self._plain_bpe:
                return None
            numbers.append(number)
            seen.append([piece.start + at for at in (*before, *behind)] + piece.ids[number - 1 : number + 1].tolist())
        return (*numbers, place) if seen[0] == seen[1] else None


def _is_plain_bpe(model: dict) -> bool:
    return model["type"] == "BPE" and not any(
        model.get(option) for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )


def _is_local(described: dict, separator: str, normalized: str, normalize) -> bool:
    """Whether nothing of the tokenizer holds, or looks beyond, a letter and the separator (`normalized` in its own eyes)."""
    if described["model"].get("dropout"):
        return False
    for token in described["added_tokens"]:
        for content in (token["content"], normalize(token["content"])):
            if any(a.isalpha() and b in (separator, normalized) for a, b in itertools.pairwise(content)):
                return False
            if token["rstrip"] and content[-1:].isalpha():
                return False
    normalizers = _steps(described["normalizer"], "normalizers")
    return all(
        _is_local_normalizer(step, separator + normalized) for step in normalizers
    ) and _are_local_pre_tokenizers(_steps(described["pre_tokenizer"], "pretokenizers"), normalized)


def _steps(described: dict | None, members: str) -> list[dict]:
    if described is None:
        return []
    if described["type"] == "Sequence":
        return [step for member in described[members] for step in _steps(member, members)]
    return [described]


def _is_local_normalizer(step: dict, separators: str) -> bool:
    if step["type"] == "Replace":
        return not any(_reaches_across(step["pattern"], _characters(), separator) for separator in separators)
    return step["type"] in _LOCAL_NORMALIZERS


def _are_local_pre_tokenizers(steps: list[dict], separators: str) -> bool:
    for step in steps:
        if step["type"] == "ByteLevel" and step.get("use_regex", True):
            # Its own pattern leaves no character out, so every place is a border, and what comes later acts on each side alone.
            return not any(_reaches_across({"Regex": _BYTE_LEVEL}, _letters(), separator) for separator in separators)
        if step["type"] == "ByteLevel":
            return step is steps[-1]  # all characters become others, which what comes later would see
        if step["type"] == "Split":
            if any(_reaches_across(step["pattern"], _letters(), separator) for separator in separators):
                return False
        elif step["type"] not in _LOCAL_PRE_TOKENIZERS:
            return False
        elif step["type"] == "Metaspace":
            separators += step["replacement"]
    return True


def _is_border(step: dict, separator: str) -> bool:
    """Whether a step of the pre-tokenizer that is local has a border at every place."""
    if step["type"] == "Split":
        keeps_apart = step["behavior"] == ("Removed" if step["invert"] else "Isolated")
        return keeps_apart and "Regex" in step["pattern"] and _begins_with(step["pattern"]["Regex"], separator)
    if step["type"] == "Metaspace":
        return step.get("split", True) and separator in (" ", step["replacement"])
    if step["type"] == "ByteLevel":
        return step.get("use_regex", True)
    return step["type"] in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer") and separator.isspace()


def _begins_with(pattern: str, separator: str) -> bool:
    """Whether a match of the pattern can always begin with the separator: an alternative asks for nothing else."""
    for items in _parsed(pattern) or ():
        needed = [(item, quantifier) for item, quantifier in items if not quantifier.startswith(("?", "*", "{0,"))]
        if len(needed) == 1:
            item, quantifier = needed[0]
            once = quantifier == "" or quantifier.startswith(("+", "{1}", "{1,"))
            if once and item not in _LOOKS and _can_match_exactly(item, separator):
                return True
    return False


def _reaches_across(pattern: dict, left: str, separator: str) -> bool:
    """Whether one match of a pattern may hold a character of `left` and the separator after it. In doubt, it may."""
    if "String" in pattern:
        return any(a in left and b == separator for a, b in itertools.pairwise(pattern["String"]))
    alternatives = _parsed(pattern["Regex"])
    if alternatives is None:
        return True
    for items in alternatives:
        seen = False
        for item, quantifier in items:
            if item in _LOOKS:
                continue
            repeated = quantifier not in _ONCE_AT_MOST
            holds_left, holds_separator = _can_match(item, left), _can_match(item, separator)
            if holds_separator and (seen or (repeated and holds_left)):
                return True
            seen = seen or holds_left
    return False


def _parsed(pattern: str) -> list[list[tuple[str, str]]] | None:
    """The alternatives of a regular expression: the items that may follow on one another, in order, with their quantifiers.

    None for what is not understood. Alternatives inside groups stand one after the other.
    """
    alternatives, at, depth = [[]], 0, 0
    while at < len(pattern):
        match = _ITEM.match(pattern, at)
        if not match:
            return None
        item, at = match.group(), match.end()
        if item in _LOOKS:  # at one character; it holds none
            match = _ITEM.match(pattern, at)
            if not match or match.group() in ("|", ")") or match.group().startswith("("):
                return None
            if pattern[match.end() : match.end() + 1] != ")":
                return None
            at = match.end() + 1
            if _QUANTIFIER.match(pattern, at):
                return None
            alternatives[-1].append((item, ""))
            continue
        if item == "|":
            if depth == 0:
                alternatives.append([])
            continue
        if item.startswith("("):
            depth += 1
            continue
        quantifier = _QUANTIFIER.match(pattern, at)
        quantifier = quantifier.group() if quantifier else ""
        at += len(quantifier)
        if item == ")":
            depth -= 1
            if depth < 0 or quantifier not in _ONCE_AT_MOST:
                return None
            continue
        alternatives[-1].append((item, quantifier))
    return alternatives if depth == 0 else None


@functools.cache
def _can_match(item: str, characters: str) -> bool:
    """Whether an item of a pattern matches one of the characters, in the eyes of the tokenizer's own engine."""
    whole = [(characters, (0, len(characters)))]
    return any(
        Split(Regex(regex), "removed").pre_tokenize_str(characters) != whole
        for regex in (f"(?:{item})+", f"(?i:{item})+")
    )


@functools.cache
def _can_match_exactly(item: str, character: str) -> bool:
    return Split(Regex(item), "removed").pre_tokenize_str(character) == []


def _is_letter(character: str) -> bool:
    """Whether it is a letter, and was one in Unicode 3.2, so that the tables of every library say so."""
    return character.isalpha() and character <= "\uffff" and unicodedata.ucd_3_2_0.category(character)[0] == "L"


@functools.cache
def _letters() -> str:
    return "".join(filter(_is_letter, map(chr, range(0x10000))))


@functools.cache
def _characters() -> str:
    """All characters that are no space."""
    numbers = itertools.chain(range(0xD800), range(0xE000, 0x110000))
    return "".join(character for character in map(chr, numbers) if not character.isspace())
