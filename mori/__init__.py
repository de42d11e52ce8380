"""mori: fine-tune a causal language model on your own text, with a training loop you can read.

From Python, the commands are functions, and flags are keywords:

    mori.train(model="mini", corpus="my_text.txt", max_steps=50)    returns the summary of the run
    mori.generate("mori_brain_final", "Halo", top_k=50)             returns a list of texts
    mori.chat("mori_brain_final", temperature=0.9)                  opens a prompt line, in a notebook too
    mori.evaluate("mori_brain_final", "another.txt")                returns loss, perplexity, bits per byte
"""

import importlib
import sys

__version__ = "0.1.0"

# The names of the package, by the module that holds them. Nothing is imported before it is used.
_NAMES = {
    **dict.fromkeys(("UserError", "RunFailed", "Interrupted"), "mori.cli"),
    **dict.fromkeys(("TrainConfig", "GenerateConfig", "EvaluateConfig"), "mori.config"),
}
_MODULES = ("train", "evaluate")  # modules that can be called


def generate(*values, **settings) -> list[str]:
    """Continue one prompt or several with a model: `generate(model, prompt, **settings)`, as `mori generate` does.

    Settings are the fields of `GenerateConfig`. Returns the texts, each with its prompt, in the order of the prompts.
    Raises UserError for a mistake in them.
    """
    from mori.cli import run_with
    from mori.config import GenerateConfig
    from mori.distributed import start
    from mori.generation.chat import texts

    def action(config: GenerateConfig) -> list[str]:
        return texts(config, start(config.device).device)

    return run_with(GenerateConfig, action, ("model", "prompt"), values, settings)


def chat(*values, **settings) -> None:
    """Open a prompt line with a model: `chat(model, **settings)`, as `mori chat` does; a notebook asks below the cell.

    Settings are the fields of `ChatConfig`. Raises UserError for a mistake in them.
    """
    from mori.cli import run_with
    from mori.config import ChatConfig
    from mori.distributed import start
    from mori.generation.chat import answer

    run_with(ChatConfig, lambda config: answer(config, start(config.device).device), ("model",), values, settings)


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"mori.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'mori' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_MODULES})


def _refuse_to_run_modules() -> None:
    """Exit with a line that names the commands at `python -m mori.train`, which would define functions and end in silence."""
    if sys.argv[:1] != ["-m"]:  # what Python puts there while it looks for the module to run
        return
    module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m")
    if module.startswith("mori.") and not module.startswith(("mori.bench.", "mori.__main__")):
        print(
            f"{module}: error: a module is no command; type: python -m mori train, or --help for all", file=sys.stderr
        )
        sys.exit(2)


_refuse_to_run_modules()
