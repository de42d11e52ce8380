"""Flags: how a config is declared, checked, and read from the command line."""

import argparse
import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar

from mori import __version__
from mori.cli.aliases import is_boolean, translated, unknown
from mori.cli.drive import unmounted
from mori.cli.errors import UserError
from mori.cli.values import TYPE_NAMES, fits, fitted, json_list, read_settings, value_mistakes


def flag(default, help: str, *, kind=None, **rules):
    """Declare a dataclass field that is also a command-line flag.

    Args:
        default: the value if the flag is omitted. None means computed from other fields.
        kind: the type of the value, or of a list's items; derived from `default` if omitted. `json_list` reads a whole list
            from one JSON text.
        rules: the range, checked by `Config.mistakes`: `min`, `max` (inclusive), `above`, `below` (exclusive), `choices`,
            `share` (a whole number, or a share below 1), `path` (not on a Drive that is not mounted). `loose` fields take the
            words that belong to no flag. `pretrained`, `scratch` and `adapters` are the values that None stands for.
            `may_change` and `extends` say whether a resumed run, or an extended one, may change the field; `inexact`, that
            a resumed run may, but then no longer equals a run that never stopped to the bit.
    """
    is_list = isinstance(default, list)
    kind = kind or (str if is_list else float if default is None else type(default))
    metadata = {"help": help, "type": kind, "is_list": is_list and kind is not json_list, **rules}
    if is_list:
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def same_flag(cls, name: str, default):
    """Declare the flag `name` of the config class `cls` with another default."""
    meta = cls.__dataclass_fields__[name].metadata
    return flag(
        default, **{key: value for key, value in meta.items() if key not in ("type", "is_list")}, kind=meta["type"]
    )


@dataclass
class Config:
    """The base of all configs. A subclass declares fields with `flag()` and overrides `contradictions`."""

    given: ClassVar[frozenset] = frozenset()  # the flags that were given on the command line
    group: ClassVar[str] = ""  # the heading of the class's fields in --help
    may_change: ClassVar[bool] = False  # the rules of the class's fields, see `flag`
    inexact: ClassVar[bool] = False

    def __new__(cls, *values, **settings):
        """Raises UserError for an unknown keyword, with the nearest one that there is."""
        known = [f.name for f in fields(cls)]
        for name in settings.keys() - set(known):
            raise UserError(unknown(known, name))
        return super().__new__(cls)

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, fitted(f, getattr(self, f.name)))

    def mistakes(self) -> list[str]:
        """Everything that is wrong with the values, one phrase each."""
        declared = [f for members in self.groups().values() for f in members]
        wrong = [mistake for f in declared for mistake in value_mistakes(f, getattr(self, f.name))]
        # Values of other types cannot be compared.
        return wrong + (self.contradictions() if all(fits(f, getattr(self, f.name)) for f in declared) else [])

    def contradictions(self) -> list[str]:
        """What is wrong between fields whose own values are in range, one phrase each."""
        values = [getattr(self, f.name) for f in fields(self) if f.metadata.get("path")]
        return unmounted([path for value in values for path in (value if isinstance(value, list) else [value]) if path])

    @classmethod
    def declaring_class(cls, name: str) -> type["Config"]:
        """The class that first declares the field `name`: it gives the field's group."""
        return next(base for base in reversed(cls.__mro__) if name in inspect.get_annotations(base))

    @classmethod
    def rule(cls, f: dataclasses.Field, name: str) -> bool:
        """Whether `may_change` or `inexact` holds for the field, by its declaration or that of its class."""
        return f.metadata.get(name, getattr(cls.declaring_class(f.name), name))

    @classmethod
    def groups(cls) -> dict[str, list[dataclasses.Field]]:
        """The fields of each group, in the order of the base classes."""
        order = [base for base in cls.__mro__ if issubclass(base, Config) and base.group]
        by_group: dict[str, list[dataclasses.Field]] = {base.group: [] for base in order}
        for f in fields(cls):
            by_group[cls.declaring_class(f.name).group].append(f)
        return {group: members for group, members in by_group.items() if members}


def checked(config):
    """Return `config` if its values are valid; raises UserError with every mistake in one line otherwise."""
    mistakes = config.mistakes()
    if mistakes:
        raise UserError("; ".join(dict.fromkeys(mistakes)))
    return config


def parse(cls: type[Config], description: str, argv: list[str] | None = None, program: str | None = None):
    """Read a config of class `cls` from the command line (`sys.argv` by default) and the files that `--config` names.

    Flags are the names of the fields, or what other programs call them (`mori.cli.aliases`); `-` and `_` are the same. A file
    without a flag is part of the corpus, or of the field that takes `loose` words. All invalid values are reported together.
    A flag takes precedence over a file of `--config`, a later file over an earlier one. `program` is the name that --help shows.
    Raises UserError for an unknown flag, with our way of doing it or the nearest existing flag, and for invalid values.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any("\udc80" <= letter <= "\udcff" for word in argv for letter in word):
        raise UserError("the command line is not UTF-8")
    words, loose = _own_words(cls, argv)
    flags, settings = vars(_parser(cls, description, program).parse_args(words)), {}
    for path in flags.pop("config", []):
        settings |= read_settings(path, cls)
    settings |= flags
    if loose:
        taker = next((f.name for f in fields(cls) if f.metadata.get("loose")), None)
        loose, taker = (loose, taker) if taker else (_texts(cls, loose), "corpus")
        settings[taker] = [*flags.get(taker, []), *loose]
    return _config(cls, settings)


def config_from(cls: type[Config], settings: dict):
    """The config of class `cls` with these settings, whose names may be those of other programs (`mori.cli.aliases`).

    Raises UserError for unknown names and invalid values.
    """
    return _config(cls, dict(translated(cls, settings.items())))


def _config(cls: type[Config], settings: dict):
    config = cls(**settings)
    config.given = frozenset(settings)
    return checked(config)


_FLAG = re.compile(r"--?[A-Za-z][\w-]*(?:=|$)")
_OF_EVERY_COMMAND = ("-h", "help", "version", "config")  # flags that are no fields
_VALUE = "\0"  # marks a value that begins with a dash; no command line holds this character


def _own_words(cls: type[Config], argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line as argparse reads it, in this command's own flags, and the words that belong to no flag."""
    members = {f.name: f for f in fields(cls)}
    switches = {name for name, member in members.items() if member.metadata["type"] is bool}
    given, words, loose = [], [], []
    for word in argv:
        match = _FLAG.match(word)
        if match:
            name = match[0].rstrip("=")
            name = name[2:].replace("-", "_") if name.startswith("--") else name
            given.append((name, [word[match.end() :]] if "=" in match[0] else []))
        else:
            (given[-1][1] if given else loose).append(word)
    for name, values in given:
        if name in _OF_EVERY_COMMAND:
            words += [f"--{name}".replace("---", "-"), *values]
        elif name.removeprefix("no_") in switches:
            end = 1 if name in switches and values and is_boolean(values[0]) else 0
            loose += values[end:]
            values[end:] = []
    given = [(name, values) for name, values in given if name not in _OF_EVERY_COMMAND]
    for name, value in translated(cls, ((name, _value(values)) for name, values in given)):
        if isinstance(value, bool) and name in switches:
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        if not members[name].metadata["is_list"]:
            loose += values[1:]
            values = values[:1]
        words += [f"--{name}", *(_VALUE + str(v) if str(v).startswith("-") else str(v) for v in values)]
    return words, loose


def _value(values: list[str]):
    """The values of a flag as `translated` takes them."""
    return True if not values else values[0] if len(values) == 1 else values


def _texts(cls: type[Config], words: list[str]) -> list[str]:
    """The words that belong to no flag, which are files to read if they look like that. Raises UserError for any other."""
    for word in words:
        if word.lower().endswith((".toml", ".yaml", ".yml", ".py")):
            raise UserError(
                f"{word!r} belongs to no flag: settings are read with --config FILE, text with --corpus FILE"
            )
        names_a_file = os.path.exists(word) or re.search(r"[/\\*]|\.[A-Za-z]\w*$", word)
        names = {f.name for f in fields(cls)}
        if not names_a_file or "corpus" not in names:
            hint = (
                "a text to continue follows --prompt, in quotes; "
                if "prompt" in names and "corpus" not in names
                else ""
            )
            raise UserError(f"{word!r} belongs to no flag; {hint}--help lists the flags")
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = message.replace(_VALUE, "").replace(repr(_VALUE)[1:-1], "")
        if wrong := re.fullmatch(r"argument --(\w+): invalid (int|float) value: (.*)", message):
            message = f"{wrong[1]} is {wrong[3]}, must be {TYPE_NAMES[{'int': int, 'float': float}[wrong[2]]][0]}"
        raise UserError(message)


def _reader(kind: Callable) -> Callable:
    """The function that reads a value of type `kind`; argparse shows its name."""
    return functools.wraps(kind, updated=())(lambda text: kind(text.removeprefix(_VALUE)))


_CONFIG_HELP = """TOML or JSON file of settings, as flags without their dashes: max_steps = 100; a run's config.json is one.
Flags take precedence, and later files over earlier ones. Paths in it start from the current folder"""


def _parser(cls: type[Config], description: str, program: str | None) -> _Parser:
    parser = _Parser(
        prog=program,
        description=description,
        usage="%(prog)s [--flag VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
        epilog="The names of TrainingArguments, run_clm.py, TRL, nanoGPT, generate() and llama.cpp for the same things are understood too.",
    )
    parser._optionals.title = "help"
    parser.add_argument("--version", action="version", version=f"mori {__version__}")
    parser.add_argument(
        "--config", action="append", default=argparse.SUPPRESS, type=_reader(str), metavar="FILE", help=_CONFIG_HELP
    )
    for title, members in cls.groups().items():
        group = parser.add_argument_group(title)
        for f in members:
            rules = f.metadata
            options = {
                "help": f"{rules['help']}\n(default: {_shown_default(f)})".replace("%", "%%"),
                "default": argparse.SUPPRESS,
            }
            if rules["type"] is bool:
                group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
                continue
            group.add_argument(
                f"--{f.name}",
                type=_reader(rules["type"]),
                choices=rules.get("choices"),
                nargs="+" if rules["is_list"] else None,
                action="extend" if rules["is_list"] else "store",  # a list flag may be repeated
                metavar=None if "choices" in rules else rules["type"].__name__.upper(),
                **options,
            )
    return parser


def _shown_default(f: dataclasses.Field) -> str:
    """The default of a field as `--help` shows it."""
    if "pretrained" in f.metadata:
        adapters = f"; {f.metadata['adapters']:g} for adapters" if "adapters" in f.metadata else ""
        return f"{f.metadata['pretrained']:g}; {f.metadata['scratch']:g} for a model made from scratch{adapters}"
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if f.metadata["type"] is bool:
        return "unset" if default is None else "on" if default else "off"
    if default in (None, "", []):
        return "unset"
    return " ".join(map(repr, default)) if isinstance(default, list) else str(default)
