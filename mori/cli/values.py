"""Values of settings that do not come as words: their types and ranges, and the files of `--config`."""

import dataclasses
import importlib.util
import json
import math
import numbers
import operator
import os
import re
from pathlib import Path

from mori.cli.aliases import translated
from mori.cli.errors import UserError, guarded


def json_list(text: str) -> list:
    """Parse a JSON list; raises ValueError for any other JSON value."""
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def json_object(text: str) -> dict:
    """Parse a JSON object; raises ValueError for any other JSON value."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def escaped_text(text: str) -> str:
    r"""The text with \n for a line break, \t for a tab and \\ for a backslash; any other backslash stays."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


# The types of fields whose flags are read by a function.
_TYPES = {json_list: list, json_object: dict, escaped_text: str}
TYPE_NAMES = {
    str: ("text", "text or a list of texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", ""),
    list: ("a list", ""),
    dict: ("a table of names and values", ""),
}


def fitted(f: dataclasses.Field, value):
    """`value` as the field's type: a path as text, a whole number as a float, a single item as a list.

    A value that does not fit stays as it is, for `value_mistakes` to name.
    """
    return _fit(f, value) if fits(f, value) else value


def fits(f: dataclasses.Field, value) -> bool:
    """Whether `value` has the field's type, or can be given it."""
    try:
        _fit(f, value)
    except TypeError:
        return False
    return True


def value_mistakes(f: dataclasses.Field, value) -> list[str]:
    """What is wrong with the value of one field: its type, or its range by the rules of its declaration."""
    if not fits(f, value):
        return [f"{f.name} is {_shown(value)}, must be {TYPE_NAMES[_type(f)][f.metadata['is_list']]}"]
    return _range_mistakes(f, _fit(f, value))


def _type(f: dataclasses.Field) -> type:
    return _TYPES.get(f.metadata["type"], f.metadata["type"])


def _fit(f: dataclasses.Field, value):
    """`value` as the field's type. Raises TypeError if it is of another type."""
    if value is None and f.default is None:
        return None
    if f.metadata["is_list"]:
        return [_fit_item(_type(f), item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return _fit_item(_type(f), value)


def _fit_item(kind: type, value):
    if isinstance(value, bool) and kind is not bool:  # Python counts with True as with 1
        raise TypeError
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif kind is list and isinstance(value, tuple):
        value = list(value)
    elif kind is int:
        value = operator.index(value)
    elif kind is float and isinstance(value, numbers.Real):
        value = _float(value)
    if not isinstance(value, kind):
        raise TypeError
    return value


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _shown(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _range_mistakes(f: dataclasses.Field, value) -> list[str]:
    """What is wrong with a value of the right type, by the rules of its field's declaration."""
    rules = f.metadata
    if value is None:
        return []
    if "choices" in rules:
        wrong = [item for item in (value if rules["is_list"] else [value]) if item not in rules["choices"]]
        return [f"{f.name} is {item!r}, must be one of {', '.join(rules['choices'])}" for item in wrong]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{f.name} is {value}, must be a finite number"]
    lower = f"above {rules['above']}" if "above" in rules else f"{rules['min']} or more" if "min" in rules else ""
    upper = f"below {rules['below']}" if "below" in rules else f"at most {rules['max']}" if "max" in rules else ""
    in_range = (
        ("above" not in rules or value > rules["above"])
        and ("min" not in rules or value >= rules["min"])
        and ("below" not in rules or value < rules["below"])
        and ("max" not in rules or value <= rules["max"])
    )
    if not in_range:
        return [f"{f.name} is {value}, must be {' and '.join(filter(None, (lower, upper)))}"]
    if rules.get("share") and value > 1 and value % 1:
        return [f"{f.name} is {value}, must be a whole number, or a share below 1"]
    return []


def read_settings(path: str, cls) -> dict:
    """The settings in a TOML or JSON file, by the names of the fields of the config class `cls`; `-` and `_` are the same.

    Raises UserError for a file that cannot be read, and for a key or value that is not valid.
    """
    declared = {f.name: f for f in dataclasses.fields(cls)}
    given: dict = {}
    for key, value in _read_table(path).items():
        name = key.replace("-", "_")
        if isinstance(value, dict) and name not in declared:
            raise UserError(f"config {path}: [{key}] is a table; settings stand at the top level, without tables")
        if name in given:
            raise UserError(f"config {path}: {name} stands twice")
        given[name] = value
    try:
        settings = dict(translated(cls, given.items()))
    except UserError as mistake:
        raise UserError(f"config {path}: {mistake}") from None
    if mistakes := [mistake for name, value in settings.items() for mistake in value_mistakes(declared[name], value)]:
        raise UserError(f"config {path}: {'; '.join(mistakes)}")
    return settings


def _read_table(path: str) -> dict:
    """The top level of a TOML or JSON file."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".toml", ".json"):
        what = "YAML is not read; write it" if suffix in (".yaml", ".yml") else "its settings must be written"
        raise UserError(f"config {path}: {what} as TOML, in a .toml file, or as JSON, in a .json file")
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not UTF-8 text") from None
    if suffix == ".toml":
        table = guarded(f"config {path} is not TOML", lambda: _toml().loads(text))
    else:
        table = guarded(f"config {path} is not JSON", lambda: json.loads(text, object_pairs_hook=_without_repeats))
    if not isinstance(table, dict):
        raise UserError(f"config {path} must hold one JSON object: names and values in braces")
    return table


def _toml():
    """The TOML parser of Python 3.11 and newer, or the package that it comes from."""
    name = "tomllib" if importlib.util.find_spec("tomllib") else "tomli"
    if not importlib.util.find_spec(name):
        raise UserError("to read TOML, Python 3.10 needs a package: pip install tomli; or write the file as JSON")
    return importlib.import_module(name)


def _without_repeats(pairs: list[tuple]) -> dict:
    """A JSON object. Raises ValueError for a key that stands twice, of which Python would keep the last in silence."""
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} stands twice")
    return dict(pairs)
