"""Token ids -> text, as soon as each piece is certain; stop strings."""

import codecs
import itertools
import re

from mori.data.tokenize import special_ids

OVERLAP = 64  # tokens that are decoded again with the next ones, because a token's text depends on those before it


class TextStream:
    """The text of tokens that arrive one by one: `add` returns the piece that has become certain, `finish` the rest.

    Together the pieces are the text that the tokenizer makes of all tokens at once, up to the first of `stop_strings`.
    Withheld are incomplete UTF-8 characters and a possible beginning of a stop string. A run of byte tokens (`<0xE2>`, as in
    SentencePiece's tokenizers) is withheld to its end, because it is decoded as a whole.

    A stop string may be, or hold, the name of a special token, which is no part of the text; and it may begin in the prompt,
    as in transformers.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], stop_strings: list[str] = ()):
        self.tokenizer = tokenizer
        self.ids, self._prompt_length = list(prompt_ids), len(prompt_ids)
        self._byte_ids = _byte_token_ids(tokenizer)
        self._special_ids = special_ids(tokenizer) if stop_strings else set()
        self._stop = StopFinder(stop_strings, decode_text(tokenizer, self.ids, special=True) if stop_strings else "")
        self._restart()

    @property
    def stopped(self) -> bool:
        """Whether the text has ended with a stop string."""
        return self._stop.stopped

    def add(self, token: int) -> str:
        """Append a token; returns the text that is certain now."""
        if len(self.ids) == self._prompt_length:
            self.ids = before_answer(self.tokenizer, self.ids, [token])
            self._restart()
            self._prompt_length = -1
        self.ids.append(token)
        if token in self._byte_ids:
            return ""
        new_text = self._new_text()
        certain = new_text.rstrip("\ufffd")
        piece, self._returned = certain[self._returned :], max(self._returned, len(certain))
        if len(self.ids) - self._start > 2 * OVERLAP and len(certain) == len(new_text):
            self._restart()
        text = self._stop.add(piece)
        if token in self._special_ids:
            text += self._stop.add(decode_text(self.tokenizer, [token], special=True), shown=False)
        return text

    def finish(self) -> str:
        """The text that was withheld; no token follows."""
        piece = self._new_text()[self._returned :]
        self._returned += len(piece)
        return self._stop.add(piece) + self._stop.finish()

    def _restart(self) -> None:
        """Decode only the last tokens from now on. The first of them must not be a part of a character."""
        self._start = max(0, len(self.ids) - OVERLAP)
        while self._start and (
            self.ids[self._start] in self._byte_ids
            or "\ufffd" in decode_text(self.tokenizer, self.ids[self._start : self._start + 1])
        ):
            self._start -= 1
        self._overlap_length = len(decode_text(self.tokenizer, self.ids[self._start :]))
        self._returned = 0  # characters of the text after the overlap

    def _new_text(self) -> str:
        return decode_text(self.tokenizer, self.ids[self._start :])[self._overlap_length :]


class StopFinder:
    """Passes on a text that comes in pieces, up to the first of `stop_strings`; withholds what may begin one.

    A stop string may begin in `prompt`, the text before the first piece.
    """

    def __init__(self, stop_strings: list[str], prompt: str = ""):
        self.stop_strings, self.stopped = list(stop_strings), False
        self._text, self._shown = "", []  # what is withheld, and whether each of its characters is passed on
        self._n_prompt = 0  # the first of its characters that belong to the prompt
        longest = max(map(len, self.stop_strings), default=1)
        self._withhold(prompt[len(prompt) - min(len(prompt), longest - 1) :], shown=False)
        self._n_prompt = len(self._text)

    def add(self, piece: str, shown: bool = True) -> str:
        """Append a piece, which may complete a stop string; it is passed on if `shown`. Returns what is certain."""
        if self.stopped or not piece:
            return ""
        self._withhold(piece, shown)
        # A stop string ends behind the prompt.
        ends = [self._text.find(stop, max(0, self._n_prompt - len(stop) + 1)) for stop in self.stop_strings]
        positions = [position for position in ends if position >= 0]
        if positions:
            self.stopped = True
            return self._pass_on(min(positions))
        n_certain = len(self._text)
        for stop in self.stop_strings:
            for length in range(min(len(self._text), len(stop) - 1), 0, -1):
                if stop.startswith(self._text[-length:]):
                    n_certain = min(n_certain, len(self._text) - length)
                    break
        return self._pass_on(n_certain)

    def finish(self) -> str:
        """What was withheld, unless the text has ended with a stop string."""
        return "" if self.stopped else self._pass_on(len(self._text))

    def _withhold(self, piece: str, shown: bool) -> None:
        self._text += piece
        self._shown += [shown] * len(piece)

    def _pass_on(self, length: int) -> str:
        text = "".join(itertools.compress(self._text[:length], self._shown))
        self._text, self._shown = self._text[length:], self._shown[length:]
        self._n_prompt = max(0, self._n_prompt - length)
        return text


def decode_text(tokenizer, ids: list[int], special: bool = False) -> str:
    """The text of `ids`, with or without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def before_answer(tokenizer, prompt_ids: list[int], answer_ids: list[int]) -> list[int]:
    """The ids of the prompt that the answer's ids are decoded after: without the byte tokens in which both meet.

    A run of byte tokens is decoded as a whole: one byte of the answer that completes nothing would spoil the prompt's
    characters. The run stays if it ends within a character, which the answer may complete.
    """
    end = len(prompt_ids)
    if not answer_ids or _byte(tokenizer, answer_ids[0]) is None:
        return prompt_ids
    while end and _byte(tokenizer, prompt_ids[end - 1]) is not None:
        end -= 1
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(_byte(tokenizer, token) for token in prompt_ids[end:]))
    incomplete, _ = decoder.getstate()
    return prompt_ids if incomplete else prompt_ids[:end]


def _byte(tokenizer, token: int) -> int | None:
    """The byte that a byte token stands for."""
    match = re.fullmatch("<0x([0-9A-F]{2})>", tokenizer.convert_ids_to_tokens(token) or "")
    return int(match[1], 16) if match else None


def _byte_token_ids(tokenizer) -> set[int]:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = tokenizer.convert_tokens_to_ids(names)
    return {
        token for token, name in zip(ids, names, strict=True) if tokenizer.convert_ids_to_tokens(token or 0) == name
    }
