"""Subtitles, `.srt` and `.vtt`: the spoken text alone, as one document."""

import html
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mori.cli import UserError
from mori.data.formats.text import ReadOptions, decoded, lines

_TIME = r"(?:\d+:)?\d+:\d+(?:[.,]\d+)?"
_TIMES = re.compile(rf"\s*({_TIME})\s*-->\s*({_TIME})(?:\s.*)?")
_BLOCKS = re.compile(r"(?:NOTE|STYLE|REGION)(?:\s.*)?")
_TAGS = re.compile(r"</?(?:c|v|i|b|u|s|ruby|rt|lang|font)(?:[.\s][^<>]*)?>|<\d[\d:.]*>|\{\\[^{}]*\}", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,30});", re.IGNORECASE)
_SENTENCE_END = (".", "!", "?", "…", "。", "！", "？", "♪")
_CLOSING = "\"'”’»)]"
_FLASH_SECONDS = 0.1  # rolling captions repeat a line for a hundredth of a second before it moves up
_CHUNK_CHARACTERS = 1 << 16


@dataclass
class _Cue:
    start: float
    end: float
    lines: list[str] = field(default_factory=list)


def read_subtitles(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """The spoken text of a subtitle file: one document.

    Numbers, times, settings, tags and comments are left out, entities are replaced, and lines that roll (automatic captions
    show each a second time while the next one is spoken) are read once. Lines are joined by a blank, or by a line break after
    the end of a sentence. Format: https://www.w3.org/TR/webvtt1/. Raises UserError for text that stands in no cue.
    """
    yield _text(_cues(lines(decoded(file, name, options), name), name))


def _text(cues: Iterable[_Cue]) -> Iterator[str]:
    chunk, last = "", ""
    for line in _without_rolling(cues):
        separator = "" if not last else "\n" if last.rstrip(_CLOSING).endswith(_SENTENCE_END) else " "
        chunk, last = f"{chunk}{separator}{line}", line
        if len(chunk) > _CHUNK_CHARACTERS:
            yield chunk
            chunk = ""
    yield chunk


def _without_rolling(cues: Iterable[_Cue]) -> Iterator[str]:
    """The lines of the cues, but for those that a cue repeats from the one before it while it adds others or flashes up."""
    shown, shown_until = [], 0.0
    for cue in cues:
        spoken = [text for text in map(_spoken, cue.lines) if text]
        repeated = 0
        if cue.start <= shown_until + _FLASH_SECONDS:
            most = len(spoken) - (cue.end - cue.start >= _FLASH_SECONDS)
            repeated = next((n for n in range(min(most, len(shown)), 0, -1) if spoken[:n] == shown[-n:]), 0)
        yield from spoken[repeated:]
        if spoken:
            shown, shown_until = spoken, cue.end


def _spoken(line: str) -> str:
    """A line of a cue without tags, with its entities as characters and single blanks."""
    return " ".join(_ENTITY.sub(lambda match: html.unescape(match[0]), _TAGS.sub("", line)).split())


def _cues(texts: Iterable[str], name: str) -> Iterator[_Cue]:
    """The cues of a file, from its lines. An empty line inside the text of a cue, which some programs write, is left out."""
    cue, previous, in_block = None, "", False
    for number, (line, following) in enumerate(itertools.pairwise(itertools.chain(texts, [""])), start=1):
        may_be_outside = not previous.strip() and (cue is None or cue.lines)
        if times := _TIMES.fullmatch(line):
            if cue:
                yield cue
            cue, in_block = _Cue(*map(_seconds, times.groups())), False
        elif not line.strip():
            in_block = False
        elif in_block or _TIMES.fullmatch(following) and (line.strip().isdigit() or not previous.strip()):
            pass  # a comment, or the number or the name of the next cue
        elif (number == 1 and line.startswith("WEBVTT")) or (not previous and _BLOCKS.fullmatch(line)):
            in_block = True
        elif may_be_outside and (cue is None or _is_broken(line)):
            raise UserError(
                f"{name} line {number}: {line[:40]!r} stands in no cue: no times (00:00:01.000 --> 00:00:03.500) are above it, or "
                "the file is cut off"
            )
        else:
            cue.lines.append(line)
        previous = line
    if cue:
        yield cue


def _is_broken(line: str) -> bool:
    """Whether a line can only be the number of a cue, or times that are damaged."""
    return not line.strip("0123456789:.,>- ") and any(map(str.isdigit, line))


def _seconds(time: str) -> float:
    return sum(float(part.replace(",", ".")) * 60**power for power, part in enumerate(reversed(time.split(":"))))
