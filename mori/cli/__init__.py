"""Flags, errors and exit codes: how a config is declared, checked, and read from the command line.

Only the standard library is imported here, so that `--help` and flag errors appear immediately.
"""

from mori.cli.calls import callable_module, run_with
from mori.cli.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_OK,
    UNSUPPORTED,
    Interrupted,
    RunFailed,
    UserError,
    guarded,
    interruptible,
    one_line,
    optional,
    print_error,
    record,
    run_script,
)
from mori.cli.flags import Config, checked, config_from, flag, parse, same_flag
from mori.cli.screen import bar_class, clock, plural, printable, progress_bar
from mori.cli.values import escaped_text, json_list, json_object

__all__ = [
    "EXIT_FAILURE",
    "EXIT_INTERRUPTED",
    "EXIT_MISTAKE",
    "EXIT_OK",
    "UNSUPPORTED",
    "Config",
    "Interrupted",
    "RunFailed",
    "UserError",
    "bar_class",
    "callable_module",
    "checked",
    "clock",
    "config_from",
    "escaped_text",
    "flag",
    "guarded",
    "interruptible",
    "json_list",
    "json_object",
    "one_line",
    "optional",
    "parse",
    "plural",
    "print_error",
    "printable",
    "progress_bar",
    "record",
    "run_script",
    "run_with",
    "same_flag",
]
