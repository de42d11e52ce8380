"""Rows as documents: `.jsonl`, `.json`, `.csv` and `.tsv`, and the column of a table that holds its text."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from mori.cli import UserError, one_line, plural
from mori.data.formats.json_values import JsonValues
from mori.data.formats.text import MAX_LINE_CHARACTERS, ReadOptions, decoded, in_chunks, lines

_PEEKED_ROWS = 20  # which columns are text is decided by the first rows
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_DELIMITERS = ",;\t"  # spreadsheets write ; where the comma is a decimal mark
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
_TEXT_KINDS = ("text", "digits", "empty")

Row = tuple[int, object]  # the number of its line, and a dictionary or the text itself


def read_json_lines(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """A document for each line: an object, or a string. Blank lines are no rows."""
    return documents_of(_json_lines(file, name, options), name, options)


def _json_lines(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Row]:
    for number, line in enumerate(lines(decoded(file, name, options), name), start=1):
        if not line or line.isspace():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} line {number} is not JSON: {error.msg} (character {error.pos + 1})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
            raise UserError(f"{name} line {number} is not JSON: {one_line(error)}") from None


def read_json(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """A document for each item of a list, or for each of the values that stand one after the other; one object is one row."""
    values = JsonValues(decoded(file, name, options), name)
    rows = iter(values)
    beginning = list(itertools.islice(rows, 2))
    if len(beginning) == 1 and not values.is_list and isinstance(beginning[0][1], dict):
        _check_single_object(beginning[0][1], name, options)
    return documents_of(itertools.chain(beginning, rows), name, options)


def _check_single_object(row: dict, name: str, options: ReadOptions) -> None:
    """Raise UserError if the only object of a file is no row but holds the rows: its only text is a version, say."""
    holders = [column for column, value in row.items() if isinstance(value, (list, dict))]
    if holders and (options.text_column or "text") not in row and not set(holders) & set(_CHAT_COLUMNS):
        raise UserError(
            f"{name} is one object with {_listed(row)}, not a list of rows; save {holders[0]!r} alone, as .json or .jsonl"
        )


def read_csv(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """A document for each row below the header, whose fields stand between commas, semicolons or tabs, as its header shows."""
    return documents_of(_csv_rows(file, name, options, _DELIMITERS), name, options)


def read_tsv(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """A document for each row below the header, whose fields stand between tabs."""
    return documents_of(_csv_rows(file, name, options, "\t"), name, options)


def _csv_rows(file: BinaryIO, name: str, options: ReadOptions, delimiters: str) -> Iterator[Row]:
    """Rows as RFC 4180 has them. Raises UserError for a quote that is not closed and a row of another length than the header."""
    csv.field_size_limit(MAX_LINE_CHARACTERS)
    numbered = (line + "\n" for line in lines(decoded(file, name, options), name))
    first = next(numbered, "")
    reader = csv.reader(itertools.chain([first], numbered), delimiter=max(delimiters, key=first.count), strict=True)
    header, line = None, 1
    try:
        for fields in reader:
            if not fields:
                pass
            elif header is None:
                header = fields
            elif len(fields) == len(header):
                yield line, dict(zip(header, fields, strict=True))
            else:
                raise UserError(
                    f"{name} line {line} has {plural(len(fields), 'field')}, the header {len(header)}; put a text with "
                    f"{reader.dialect.delimiter!r} in it between double quotes, as spreadsheets and pandas do"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name} line {line} is no row: {error}; the file is damaged, cut off or quoted otherwise"
        ) from None


def documents_of(rows: Iterable[Row], name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """The texts of rows: strings, or the text column of dictionaries. Raises UserError for a row without that column."""
    rows = iter(rows)
    beginning = list(itertools.islice(rows, _PEEKED_ROWS))
    tables = [row for _, row in beginning if isinstance(row, dict)]
    column = None
    for line, row in itertools.chain(beginning, rows):
        value = row
        if isinstance(row, dict):
            if column is None:
                column = text_column(_kinds(tables or [row]), f"{name} line {line}", options)
            if column not in row:
                raise UserError(f"{name} line {line} has no column {column!r}, it has {_listed(row)}")
            value = row[column]
        if value is None:
            yield ()
        elif isinstance(value, str):
            yield in_chunks(_checked(value, name, line))
        elif isinstance(row, dict):
            raise UserError(f"{name} line {line}: {column!r} is {_KINDS[type(value)]}, must be text")
        else:
            raise UserError(f"{name} line {line} is {_KINDS[type(value)]}, must be an object or a string")


def _checked(text: str, name: str, line: int) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name} line {line} holds half a character, {text[error.start]!r}; write the text again without it"
            ) from None
    return text


def _kinds(tables: list[dict]) -> dict[str, str]:
    """What each column of some rows holds: `text` if one of its values is, unless all are numbers, as the ids in a .csv."""
    kinds = {}
    for column in dict.fromkeys(itertools.chain(*tables)):
        values = [row.get(column) for row in tables]
        of_values = [
            _KINDS.get(type(value)) or ("digits" if _is_number(value) else "text")
            for value in values
            if value not in ("", None)
        ]
        kinds[column] = next((kind for kind in ("text", "digits", *of_values) if kind in of_values), "empty")
    return kinds


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def text_column(kinds: dict[str, str], place: str, options: ReadOptions) -> str:
    """The column of a table that holds its text: `options.text_column`, or `text`, or else the only one of text.

    Args:
        kinds: what each column holds: `text`, `digits` (numbers as text), `empty`, or the words for anything else.
        place: the file, as messages name it.

    Raises UserError if there is no such column, or several, or if it holds no text.
    """
    column = options.text_column or ("text" if "text" in kinds else "")
    if column and column not in kinds:
        raise UserError(f"{place} has no column {column!r}, it has {_listed(kinds)}")
    chat = next((name for name in _CHAT_COLUMNS if name in ([column] if column else kinds)), "")
    if chat and (not column or kinds[column] not in _TEXT_KINDS):
        raise UserError(
            f"{place} holds chats ({chat!r}); the corpus is plain text: write each conversation as one text, in a column 'text'"
        )
    if column:
        if kinds[column] not in _TEXT_KINDS:
            raise UserError(
                f"{place}: {column!r} is {kinds[column]}, must be text; choose with --text_column among {_listed(kinds)}"
            )
        return column
    candidates = [name for name in kinds if kinds[name] == "text"] or [
        name for name in kinds if kinds[name] == "digits"
    ]
    if len(candidates) != 1:
        advice = f"several of text: choose with --text_column among {_listed(candidates)}"
        raise UserError(
            f"{place} has no column 'text', and {advice if candidates else f'none of text: {_listed(kinds)}'}"
        )
    return candidates[0]


def _listed(names: Iterable[str]) -> str:
    names = [repr(name[:40]) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "no columns"
