"""A JSON document as a stream of its rows, in memory that does not grow with the file."""

import json
import re
from collections.abc import Iterator

from mori.cli import UserError, one_line
from mori.data.formats.text import MAX_LINE_CHARACTERS

_BLANKS = re.compile(r"[ \t\n\r]*")
_NEAR_END = 16  # characters: in a value that is only cut short, the decoder fails this near to the end, or in a string


class JsonValues:
    """The values of a JSON text in chunks: the items of its list, or its values one after the other.

    Attributes:
        is_list: whether the text is one list. It is known after the first value.
    """

    def __init__(self, chunks: Iterator[str], name: str):
        self._chunks, self._name = chunks, name
        self._text, self._position = "", 0
        self._line, self._counted = 1, 0  # the number of the line at the position `_counted`
        self._decoder = json.JSONDecoder()
        self.is_list = False

    def __iter__(self) -> Iterator[tuple[int, object]]:
        """Each value with the number of its line. Raises UserError for what is not JSON, with the number of the line."""
        first = self._peek()
        if not first:
            raise UserError(f"{self._name} is empty: no JSON")
        self.is_list = first == "["
        if not self.is_list:
            while self._peek():
                yield self._value()
            return
        self._position += 1
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._position += 1
                self._peek()
                yield self._value()
        if (letter := self._peek()) != "]":
            raise self._error(f"{letter!r} after an item" if letter else "the list does not end; the file is cut off")
        self._position += 1
        if self._peek():
            raise self._error("text after the end of the list")

    def _peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            self._position = _BLANKS.match(self._text, self._position).end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more(1):
                return ""

    def _read_more(self, n_characters: int) -> bool:
        """Replace what was used of the text by at least `n_characters` more; False at the end, with nothing replaced."""
        parts, n_read = [], 0
        while n_read < n_characters and (chunk := next(self._chunks, None)) is not None:
            parts.append(chunk)
            n_read += len(chunk)
        if not parts:
            return False
        self._line, self._counted = self._line_at(self._position), 0
        self._text, self._position = self._text[self._position :] + "".join(parts), 0
        return True

    def _line_at(self, position: int) -> int:
        return self._line + self._text.count("\n", self._counted, position)

    def _value(self) -> tuple[int, object]:
        self._line, self._counted = self._line_at(self._position), self._position
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_END
                length = len(self._text) - self._position
                if is_cut and length > MAX_LINE_CHARACTERS:
                    raise self._error(f"a value of more than {MAX_LINE_CHARACTERS >> 20} MiB") from None
                if is_cut and self._read_more(length):  # twice as much each time
                    continue
                raise self._error(f"{error.msg}{'; the file is cut off' if is_cut else ''}", error.pos) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
                raise self._error(one_line(error)) from None
            if end == len(self._text) and self._read_more(1):  # a number may go on in the next chunk
                continue
            self._position = end
            return self._line, value

    def _error(self, message: str, position: int | None = None) -> UserError:
        line = self._line_at(self._position if position is None else position)
        return UserError(f"{self._name} line {line} is not JSON: {message}")
