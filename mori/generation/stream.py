"""Token ids -> text, as soon as each piece is certain; stop strings."""

OVERLAP = 64  # tokens that are decoded again with the next ones, because a token's text depends on those before it


class TextStream:
    """The text of tokens that arrive one by one: `add` returns the piece that has become certain, `finish` the rest.

    Together the pieces are the text that the tokenizer makes of all tokens at once, up to the first of `stop_strings`.
    Withheld are incomplete UTF-8 characters and a possible beginning of a stop string. A run of byte tokens (`<0xE2>`, as in
    SentencePiece's tokenizers) is withheld to its end, because it is decoded as a whole.

    `stopped` is true once a stop string was found.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], stop_strings: list[str] = ()):
        self.tokenizer, self.stop_strings, self.stopped = tokenizer, list(stop_strings), False
        self.ids = list(prompt_ids)
        self._byte_ids = _byte_token_ids(tokenizer)
        self._withheld = ""  # may begin a stop string
        self._restart()

    def add(self, token: int) -> str:
        """Append a token; returns the text that is certain now."""
        self.ids.append(token)
        if token in self._byte_ids:
            return ""
        new_text = self._new_text()
        certain = new_text.rstrip("\ufffd")
        piece, self._returned = certain[self._returned :], max(self._returned, len(certain))
        if len(self.ids) - self._start > 2 * OVERLAP and len(certain) == len(new_text):
            self._restart()
        return self._before_stop(piece)

    def finish(self) -> str:
        """The text that was withheld; no token follows."""
        piece = self._new_text()[self._returned :]
        self._returned += len(piece)
        return self._before_stop(piece, last=True)

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

    def _before_stop(self, piece: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        text, self._withheld = self._withheld + piece, ""
        before = cut_at_stop(text, self.stop_strings)
        if before is not None:
            self.stopped = True
            return before
        if not last:
            for length in range(min(len(text), max(map(len, self.stop_strings), default=1) - 1), 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self.stop_strings):
                    text, self._withheld = text[:-length], text[-length:]
                    break
        return text


def decode_text(tokenizer, ids: list[int]) -> str:
    """The text of `ids` without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut_at_stop(text: str, stop_strings: list[str]) -> str | None:
    """`text` before the first stop string in it; None if it has none."""
    positions = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(positions)] if positions else None


def _byte_token_ids(tokenizer) -> set[int]:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = tokenizer.convert_tokens_to_ids(names)
    return {
        token for token, name in zip(ids, names, strict=True) if tokenizer.convert_ids_to_tokens(token or 0) == name
    }
