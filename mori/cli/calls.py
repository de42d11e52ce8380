"""Commands as calls from Python: `mori.train(model="mini", max_steps=50)`."""

import gc
import sys
from collections.abc import Callable
from types import ModuleType

from mori.cli.errors import Interrupted, RunFailed, UserError
from mori.cli.flags import Config, config_from


def run_with(cls: type[Config], action: Callable, positional: tuple[str, ...], values: tuple, settings: dict):
    """Return `action(config)`, with a config of class `cls` from the arguments of a call.

    Args:
        positional: the settings that the call may give without their names, in this order.
        values: what the call gives without names: those settings, or a single config.
        settings: what it gives with names.

    Raises UserError for invalid arguments, and what the action raises.
    """
    if len(values) == 1 and isinstance(values[0], Config) and not settings:
        [config] = values
    else:
        if len(values) > len(positional):
            raise UserError(
                f"only {' and '.join(positional)} may stand without a name; write name=value for the others"
            )
        by_position = dict(zip(positional, values, strict=False))
        if twice := by_position.keys() & settings.keys():
            raise UserError(f"{', '.join(twice)} is given twice, with its name and without")
        config = config_from(cls, by_position | settings)
    try:
        return action(config)
    except (UserError, RunFailed, Interrupted, KeyboardInterrupt) as error:
        # A notebook keeps the last error: its frames would keep the model in memory.
        error.__context__ = None
        raise error.with_traceback(None) from None
    finally:
        gc.collect()  # reference cycles keep the model


def callable_module(name: str, cls: type[Config], action: Callable) -> None:
    """Let the module `name` be called with the fields of `cls` as keywords: the call returns `action(config)`.

    So `mori.train` is the module and the command, in any order of imports (Python's data model, "Customizing module
    attribute access").
    """

    class CallableModule(ModuleType):
        def __call__(self, *values, **settings):
            return run_with(cls, action, ("model", "corpus"), values, settings)

    sys.modules[name].__class__ = CallableModule
