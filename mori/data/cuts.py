"""Where a long text may be cut so that its parts, each tokenized alone, give the ids of the whole text.

A *cut point* lies in front of a separator (a space, a line end, an ideographic comma or full stop) between two letters. A
tokenizer finds added tokens, normalizes, splits the text into pre-tokens, and its model turns each pre-token into tokens.
Cutting changes no id if two conditions hold.

1. No step before the model reaches across a cut point: no added token and no match of the normalizer or the pre-tokenizer
   holds a letter and the separator after it, and none looks behind or more than one character ahead. What each side
   becomes is then a function of that side.
2. A token ends at every cut point. This holds if a pre-token ends there, because models work on one pre-token at a time. It
   also holds for a plain BPE whose vocabulary has the separator, and has it in longer tokens only at their beginning: each
   merge makes a token of the vocabulary, so no merge joins the two sides; and merges go by rank, then from the left, so the
   merges on one side are the same without the other.

So the text between two cut points, a *word*, has the same ids everywhere. A step that is not listed here counts as reaching
across, and such a tokenizer gets every text in one call.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mori.cli import UserError

_SEPARATORS = " \n、。，"
# These act on one character at a time, or on one composed character, and compose nothing across a separator
# (https://unicode.org/reports/tr15/#Concatenation). Text that they put in front is cut off again (`words`).
_NORMALIZERS = "NFC NFD NFKC NFKD Lowercase StripAccents BertNormalizer Prepend Strip Nmt Precompiled".split()
_BLANK_PATTERNS = (" {2,}", r"\s+", r"\s{2,}|[\n\r\t]", r"[\n\r\t]", r"\n")  # of normalizers that replace
_PRE_TOKENIZERS = "Metaspace Punctuation Digits CharDelimiterSplit".split()
_SPLIT_AT_BLANKS = "Whitespace WhitespaceSplit BertPreTokenizer".split()
# Pre-tokenizers with a pattern: the alternatives of the patterns of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen 2 to 3.5, DeepSeek,
# Mistral, BLOOM, GLM-4 and their kin. None holds a letter and a separator after it. Those of words match every letter, so
# a pattern with one of them ends a pre-token after every letter that a separator follows.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
WORD_ALTERNATIVES = (
    r"\p{L}+", r" ?\p{L}+", r"\s?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[^(\s|[.,!?…。，、।۔،])]+",
    *(f"{_CASED}{_UPPER}*{_LOWER}+{end}|{_CASED}{_UPPER}+{_LOWER}*{end}" for end in ("", f"{_CONTRACTION}?")),
)  # fmt: skip
OTHER_ALTERNATIVES = (
    _CONTRACTION, "'s|'t|'re|'ve|'m|'ll|'d", "'(?i:[sdmt]|ll|ve|re)", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"\p{N}", r"\p{N}+", r"\p{N}{1}", r"\p{N}{1,2}", r"\p{N}{1,3}", r" ?\p{N}+", r"[0-9]", r"[0-9][0-9][0-9]", r"[一-龥぀-ゟ゠-ヿ]+",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+", r" ?[\p{P}\p{S}]+[\r\n]*", r"\s?\p{P}+",
    r"\s*[\r\n]+", r"\s*[\r\n]", r"[\r\n]", r"\s+(?!\S)", r"\s+",
)  # fmt: skip


def _one_of(alternatives) -> str:
    return f"(?:{'|'.join(map(re.escape, alternatives))})"


_ANY = _one_of((*WORD_ALTERNATIVES, *OTHER_ALTERNATIVES))
_KNOWN_PATTERN = re.compile(rf"{_ANY}(?:\|{_ANY})*")
_WORD_PATTERN = re.compile(rf"(?:{_ANY}\|)*{_one_of(WORD_ALTERNATIVES)}(?:\|{_ANY})*")


@dataclass
class Piece:
    """A part of a text between two cut points, or an end of the text. `start` is the number of its first character."""

    text: str
    start: int
    is_last: bool


class Cutter:
    """The cut points that a tokenizer allows.

    Attributes:
        separators: each separator that makes a cut point, and its normalized form; empty if the tokenizer allows none.
        first: the first of them.
    """

    def __init__(self, backend):
        """`backend`: a tokenizer of the library `tokenizers`."""
        self._normalizer = backend.normalizer
        settings = json.loads(backend.to_str())
        self.separators = {}
        for separator in _SEPARATORS:
            normalized = self._normalized_separator(separator)
            if normalized and _allows_cuts(settings, separator, normalized, self._normalize):
                self.separators[separator] = normalized
        if self.separators:
            self.first, self._letters = next(iter(self.separators)), f"[{self._letter_ranges()}]"
            self._cut_point = re.compile(f"(?<={self._letters})[{''.join(self.separators)}](?={self._letters})")
            self._all_words, self._first_words = self._pattern("".join(self.separators)), self._pattern(self.first)

    def _pattern(self, characters: str) -> re.Pattern:
        """A pattern that finds the words of a text between some of the separators, and an empty one at the end."""
        letters, separators, others = self._letters, f"[{characters}]", f"[^{characters}]"
        return re.compile(
            rf"{separators}?{others}*(?:{separators}{others}*)*?(?:(?<={letters})(?={separators}{letters})|\Z)"
        )

    def words(self, text: str) -> list[str]:
        """The words of a piece, in order. Of a text that has the first separator often, a word may hold other cut points."""
        has_first = text.count(self.first) * 1000 >= len(text)  # searching for one separator is faster than for all
        words = (self._first_words if has_first else self._all_words).findall(text)
        return words if words[-1] else words[:-1]

    def pieces(self, chunks: Iterable[str], n_characters: int, limit: int) -> Iterator[Piece]:
        """Cut a text that comes in chunks at the first cut point after each `n_characters`.

        The pieces do not depend on the chunks. Raises UserError if one has more than `limit` characters.
        """
        text, start, begin = "", 0, 0  # text[0] is character `start`, text[begin:] is not yet cut
        searched = n_characters
        for chunk in chunks:
            if begin:
                text, start, searched, begin = text[begin:], start + begin, searched - begin, 0
            text += chunk
            while match := self._cut_point.search(text, searched):
                yield Piece(text[begin : match.start()], start + begin, is_last=False)
                begin = match.start()
                searched = begin + n_characters
            searched = max(searched, len(text) - 1)
            check_length(len(text) - begin, limit)
        yield Piece(text[begin:], start + begin, is_last=True)

    def _normalize(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def _normalized_separator(self, separator: str) -> str | None:
        before, text = self._normalize("a"), self._normalize(f"a{separator}b")
        is_one_character = len(text) == len(before) + 2 and text.startswith(before) and text.endswith("b")
        return text[-2] if is_one_character and not text[-2].isalnum() else None

    def _letter_ranges(self) -> str:
        """The letters that stay letters beside a separator when normalized, as the inside of a character class."""
        separator = next(iter(self.separators))
        ranges = []
        for letter in _letters():
            if self._stay_letters(letter, separator, "a") and self._stay_letters("a", separator, letter):
                if ranges and ord(letter) == ord(ranges[-1][1]) + 1:
                    ranges[-1][1] = letter
                else:
                    ranges.append([letter, letter])
        return "".join(f"{first}-{last}" for first, last in ranges)

    def _stay_letters(self, before: str, separator: str, after: str) -> bool:
        left, text = self._normalize(before), self._normalize(before + separator + after)
        right = text[len(left) :]
        return (
            text.startswith(left)
            and _is_letter(left[-1:])
            and right[:1] == self.separators[separator]
            and _is_letter(right[1:2])
        )


def check_length(n_characters: int, limit: int) -> None:
    """Raise UserError for a text that has to be tokenized in one call and needs more memory than there is."""
    if n_characters > limit:
        raise UserError(
            f"this model's tokenizer needs a text whole, and memory is enough for {limit >> 20:,} MiB of text here: "
            "cut the corpus into several files"
        )


def _allows_cuts(settings: dict, separator: str, normalized: str, normalize: Callable[[str], str]) -> bool:
    """The two conditions above, for a separator that the normalizer turns into `normalized`."""
    if settings["model"].get("dropout"):
        return False
    normalizers, pre_tokenizers = _steps(settings["normalizer"]), _steps(settings["pre_tokenizer"])
    if not all(_is_local(step, separator + normalized) for step in normalizers):
        return False
    for token in settings["added_tokens"]:
        contents = (token["content"], normalize(token["content"]))
        if any(_holds_pair(content, str.isalpha, separator + normalized) for content in contents):
            return False
        if any(content[-1:].isalpha() for content in contents) and (
            token["rstrip"] or _changes_beginning(normalizers, pre_tokenizers, token, normalized)
        ):
            return False
    pre_token_ends = _pre_token_ends(pre_tokenizers, normalized)
    if pre_token_ends is None:
        return False
    return pre_token_ends or _bpe_token_ends(settings["model"], pre_tokenizers, normalized)


def _steps(step: dict | None) -> list[dict]:
    if step is None:
        return []
    members = step.get("normalizers", step.get("pretokenizers", []))
    return [s for member in members for s in _steps(member)] if step["type"] == "Sequence" else [step]


def _changes_beginning(normalizers: list[dict], pre_tokenizers: list[dict], token: dict, normalized: str) -> bool:
    """True if text right after an added token is changed at its beginning, as the beginning of a text is."""
    if not token["normalized"] and any(step["type"] in ("Prepend", "Strip") for step in normalizers):
        return True
    return any(
        (step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never")
        and normalized not in (" ", step.get("replacement"))
        for step in pre_tokenizers
    )


def _holds_pair(text: str, is_left: Callable[[str], bool], separators: str) -> bool:
    return any(is_left(a) and b in separators for a, b in itertools.pairwise(text))


def _is_local(normalizer: dict, separators: str) -> bool:
    """True if no match of this step of the normalizer holds a character and a separator after it."""
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _NORMALIZERS
    pattern = normalizer["pattern"]
    if "String" in pattern:
        return not _holds_pair(pattern["String"], lambda character: not character.isspace(), separators)
    return pattern["Regex"] in _BLANK_PATTERNS


def _pre_token_ends(steps: list[dict], separator: str) -> bool | None:
    """True if a pre-token ends at every cut point, False if one may go on; None if a step may reach across a cut point."""
    for step in steps:
        name = step["type"]
        if name == "ByteLevel" and step.get("use_regex", True):  # the pattern of GPT-2 (Radford et al., 2019)
            return True
        if name == "ByteLevel":  # letters become bytes, which a later step would see
            return False if step is steps[-1] else None
        if name in _SPLIT_AT_BLANKS:
            if separator.isspace():
                return True
        elif name == "Split" and "String" in step["pattern"]:
            if _holds_pair(step["pattern"]["String"], str.isalpha, separator):
                return None
        elif name == "Split":
            pattern = step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
            keeps_matches = step["behavior"] == ("Removed" if step["invert"] else "Isolated")
            if separator not in _SEPARATORS or not keeps_matches or not _KNOWN_PATTERN.fullmatch(pattern):
                return None
            if _WORD_PATTERN.fullmatch(pattern):
                return True
        elif name not in _PRE_TOKENIZERS:
            return None
        elif name == "Metaspace" and separator in (" ", step["replacement"]):
            if step.get("split", True):
                return True
            separator = step["replacement"]
    return False


def _bpe_token_ends(model: dict, pre_tokenizers: list[dict], normalized: str) -> bool:
    """True if the model is a plain BPE, and the separator stands in its tokens only at their beginning."""
    if model["type"] != "BPE" or any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        return False
    if any(map(model.get, ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))):
        return False
    replacements = [step["replacement"] for step in pre_tokenizers if step["type"] == "Metaspace"]
    separator = replacements[0] if replacements and normalized == " " else normalized
    return separator in model["vocab"] and not any(separator in token.lstrip(separator) for token in model["vocab"])


def _is_letter(character: str) -> bool:
    """True for a letter of Unicode 3.2, which the tables of every library know."""
    return character.isalpha() and character <= "\uffff" and unicodedata.ucd_3_2_0.category(character)[0] == "L"


@functools.cache
def _letters() -> str:
    return "".join(filter(_is_letter, map(chr, range(0x10000))))
