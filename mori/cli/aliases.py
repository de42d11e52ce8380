"""What other programs call our flags: TrainingArguments, run_clm.py, TRL, Unsloth, axolotl, LLaMA-Factory, nanoGPT, llama.cpp.

The names themselves stand in `mori.cli.words`; here is how they are looked up.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from fnmatch import fnmatchcase

from mori.cli.errors import UserError, print_error
from mori.cli.words import ANSWERS, CHANGES, NEEDLESS, OFF, SAME, VALUES, Otherwise, boolean, is_boolean

__all__ = ["is_boolean", "nearest", "note", "translated", "unknown"]
_FIELD_OF = {name: ours for ours, names in SAME.items() for name in names.split()}


def translated(cls, given: Iterable[tuple[str, object]]) -> list[tuple[str, object]]:
    """The fields of the config class `cls` that the names and values of other programs stand for.

    Values are words of a command line (True for a flag without one, a list for several), or values of Python or JSON. A name of
    ours stays, but its value may have another program's name. A note says what is taken although it changes nothing.

    Raises UserError for a name that has no counterpart, with our way of doing it, or the nearest name; and for two names of one
    field with different values.
    """
    known = {f.name: f for f in fields(cls)}
    result: list[tuple[str, object]] = []
    origins: dict[str, list[tuple[str, object]]] = {}
    fallbacks: list[tuple[str, str, Otherwise]] = []
    for name, value in given:
        for field_name, ours in _fields_set(known, name, value).items():
            if isinstance(ours, Otherwise):
                fallbacks.append((name, field_name, ours))
                continue
            for origin, before in origins.get(field_name, []):
                if origin != name and not _equal(known[field_name], before, ours):
                    raise UserError(
                        f"{origin} and {name} give {field_name} different values ({_shown(before)}, {_shown(ours)}); leave one out"
                    )
            origins.setdefault(field_name, []).append((name, ours))
            result.append((field_name, ours))
    for name, field_name, fallback in fallbacks:
        for origin, value in origins.get(field_name, []):
            if value == fallback.excluded and origin != name:
                raise UserError(f"{origin} and {name} contradict each other; leave one out")
        if field_name not in origins:
            origins[field_name] = []
            result.append((field_name, fallback.value))
    return result


def _fields_set(known: dict, name: str, value) -> dict[str, object]:
    """The fields that one name and its value stand for."""
    positive = _FIELD_OF.get(name.removeprefix("no_"), name.removeprefix("no_"))
    if name.startswith("no_") and not (name in known or name in CHANGES or _answers(known, name)):
        is_switch = positive in known and known[positive].metadata["type"] is bool
        if is_switch or positive in CHANGES or _answers(known, positive):
            name, value = positive, not boolean(name, value)
    if name in known:
        return {name: _own_value(known[name], name, value)}
    if name in CHANGES:
        changed = {} if value is None else CHANGES[name](known, name, value)
        if changed.keys() <= known.keys():
            return {field_name: _own_value(known[field_name], name, ours) for field_name, ours in changed.items()}
    if _FIELD_OF.get(name) in known:
        return {} if value is None else {_FIELD_OF[name]: _own_value(known[_FIELD_OF[name]], name, value)}
    for holds, sentence in _answers(known, name):
        if not _is_among(value, holds):
            raise UserError(f"{name.lstrip('-')}: {sentence}")
        return {}
    for names, sentence in NEEDLESS.items():
        if any(fnmatchcase(name, pattern) for pattern in names.split()):
            if not _is_among(value, OFF):
                note(f"{name} changes nothing here: {sentence}")
            return {}
    raise UserError(unknown(known, name))


def _answers(known: dict, name: str) -> list[tuple[frozenset, str]]:
    """The answers to a name, of which each speaks of flags that this command has."""
    return [
        (holds, sentence)
        for names, holds, sentence in ANSWERS
        if any(fnmatchcase(name, pattern) for pattern in names.split())
        and all(flag in known for flag in re.findall(r"--(\w+)", sentence))
    ]


def _own_value(field, name: str, value):
    """The value of one of our own fields, which other programs may spell otherwise."""
    if isinstance(value, Otherwise):
        return value
    spellings = VALUES.get(field.name, {})
    if field.metadata["is_list"] and "choices" in field.metadata and value is not True:  # also a,b and None
        words = value if isinstance(value, list) else str(value or "none").split(",")
        return [spellings.get(str(word).lower(), str(word).lower()) for word in words]
    spelled = spellings.get(str(value).lower(), value)
    if field.metadata["type"] is bool and isinstance(spelled, str):
        return boolean(name, spelled)
    return spelled


def _is_among(value, holds: frozenset) -> bool:
    return value is None or str(value).lower() in holds


def _equal(field, a, b) -> bool:
    """Whether two values of a field are the same, though one is written `1e-4` and the other `0.0001`."""
    try:
        kind = field.metadata["type"]
        return a == b or not isinstance(a, list) and kind(a) == kind(b)
    except (TypeError, ValueError):
        return False


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def unknown(known: Iterable[str], name: str) -> str:
    """That a name is none of the `known` ones, and the nearest by spelling."""
    if name in _FIELD_OF:
        return f"unknown flag --{name}: this command has no --{_FIELD_OF[name]}"
    near = nearest(known, name)
    return f"unknown flag {name if name.startswith('-') else '--' + name}; " + (
        f"did you mean --{near}?" if near else "--help lists the flags"
    )


def nearest(known: Iterable[str], name: str) -> str | None:
    """The name among `known` whose spelling, or that of one of its aliases, is nearly `name`; None if there is none."""
    spellings = {
        **{alias: ours for alias, ours in _FIELD_OF.items() if ours in known},
        **{ours: ours for ours in known},
    }
    matches = difflib.get_close_matches(name.lstrip("-"), spellings, 1, 0.8)
    return spellings[matches[0]] if matches else None


def note(line: str) -> None:
    """Print a note on standard error, once for all ranks."""
    if os.environ.get("RANK") in (None, "", "0"):
        print_error(f"note: {line}")
