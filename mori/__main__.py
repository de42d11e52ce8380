"""The commands: `mori train`, `python -m mori train` and `scripts/train.py` are the same.

Only the standard library is imported before the flags are right, and torch, which takes seconds, after the files are found.
"""

import difflib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mori import __version__
from mori.bench import options
from mori.cli import Config, UserError, parse, print_error, run_script
from mori.config import ChatConfig, EvaluateConfig, ExportConfig, GenerateConfig, ReportConfig, TrainConfig
from mori.data.files import find_files
from mori.speed.startup import imports


@dataclass
class Command:
    """A command: its flags, what it does with them, and its line in --help."""

    config: type[Config]
    action: Callable[[Config], object]
    help: str


@dataclass
class Group:
    """Commands by name, and the line of --help above them."""

    members: "dict[str, Command | Group]"
    help: str


def train(config: TrainConfig) -> None:
    """Train, after a look at the names of the files."""
    find_files(config.corpus)
    _announce(f"reading {', '.join(config.corpus) or 'the transcripts that ship with mori'}")
    with imports():
        from mori.train import train
    train(config)


def generate(config: GenerateConfig) -> None:
    """Answer the prompts, or open the prompt line. Without prompts, each line of a pipe is one."""
    if not (config.interactive or config.given & {"prompt", "prompt_file"} or sys.stdin.isatty()):
        config.prompt = _piped_prompts() or config.prompt
    _announce(f"loading {config.model}")
    with imports():
        from mori.distributed import start
        from mori.generation.chat import answer
    answer(config, start(config.device).device)


def _piped_prompts() -> list[str]:
    """The lines of standard input. After a second it says that it waits, because an open pipe may never end."""
    notice = "waiting for prompts on standard input, one on each line, until it ends; --prompt TEXT needs none"
    timer = threading.Timer(1, print_error, [notice])
    timer.daemon = True
    timer.start()
    try:
        return [line for line in sys.stdin.read().split("\n") if line.strip()]
    finally:
        timer.cancel()


def evaluate(config: EvaluateConfig) -> None:
    """Score a text, after a look at the names of its files."""
    find_files(config.corpus)
    _announce(f"loading {config.model}")
    with imports():
        from mori.evaluate import print_evaluation
    print_evaluation(config)


def _announce(work: str) -> None:
    """Say what begins now, on one rank: the imports take seconds."""
    if os.environ.get("RANK") in (None, "", "0"):
        print_error(f"mori {__version__}: {work}")


def compare(config: options.CompareConfig) -> None:
    """Compare with Trainer, after a look at the names of the files."""
    find_files(config.corpus)
    with imports():
        from mori.bench.compare import compare
    compare(config)


def export(config: ExportConfig) -> None:
    """Write a file for other programs, after a look at the names of the files, or upload the model's folder."""
    find_files(config.corpus)
    if config.push_to_hub:
        with imports():
            from mori.export.hub import push_folder
        push_folder(config)
        return
    if config.merge:
        with imports():
            from mori.export.merged import export_merged
        export_merged(config)
        return
    if not importlib.util.find_spec("gguf"):
        raise UserError("format gguf needs the package gguf: python -m pip install gguf")
    with imports():
        from mori.export.gguf_file import export_gguf
    export_gguf(config)


def report(config: ReportConfig) -> None:
    """Write the reports of runs, from their files alone."""
    from mori.tracking.report.write import report

    report(config)


def bench(name: str, config: options.BenchConfig) -> None:
    """Run the benchmark `name`."""
    if name == "decode":
        from mori.bench.decode import decode as benchmark
    elif name == "tokenize":
        from mori.bench.tokenize import tokenize as benchmark
    else:
        from mori.bench import train as benchmarks

        benchmark = getattr(benchmarks, name)
    benchmark(config)


BENCHMARKS = Group(
    {
        name: Command(config, partial(bench, name), options.DESCRIPTIONS[name])
        for name, config in options.COMMANDS.items()
    },
    "Benchmarks. Each arm runs in new processes, in turn.",
)
COMMANDS = Group(
    {
        "train": Command(TrainConfig, train, "Fine-tune a causal language model on your own text."),
        "generate": Command(GenerateConfig, generate, "Continue a prompt with a trained model."),
        "chat": Command(ChatConfig, generate, "Open a prompt line: type, and a trained model continues."),
        "evaluate": Command(
            EvaluateConfig, evaluate, "How well a model predicts a text: loss, perplexity, bits per byte."
        ),
        "compare": Command(
            options.CompareConfig,
            compare,
            "Run the same training with mori and with transformers.Trainer; report their differences, speed and memory.",
        ),
        "export": Command(
            ExportConfig,
            export,
            "Write a trained model as a file for other programs, such as llama.cpp, or upload its folder to the hub.",
        ),
        "report": Command(ReportConfig, report, "Write the report of a run, or compare all runs of a folder."),
        "bench": BENCHMARKS,
    },
    "mori fine-tunes causal language models on your own text.",
)


def run_command(name: str, program: str, words: list[str] | None = None) -> None:
    """Run the command `name` with the `words` of the command line behind it, and exit with its code.

    `program` is what the user typed to run it; messages begin with it.
    """
    _run(COMMANDS.members[name], program, sys.argv[1:] if words is None else words)


def main() -> None:
    """Run the command that the first word of the command line names, and exit with its code."""
    _run(COMMANDS, "mori", sys.argv[1:])


def _run(command: Command | Group, program: str, words: list[str]) -> None:
    while isinstance(command, Group) and words and words[0] in command.members:
        command, program, words = command.members[words[0]], f"{program} {words[0]}", words[1:]
    if isinstance(command, Group):
        run_script(program, lambda: _show(command, program, words))
    else:
        run_script(program, lambda: _start(command, program, words))


def _start(command: Command, program: str, words: list[str]) -> None:
    command.action(parse(command.config, command.help, words, program))


def _show(group: Group, program: str, words: list[str]) -> None:
    """Print the version, or the commands. Raises UserError if the words are no request for them."""
    if words == ["--version"]:
        print(f"mori {__version__}")
    elif not words or words[0] in ("-h", "--help"):
        width = max(map(len, group.members))
        lines = [f"  {name:{width}}  {command.help}" for name, command in group.members.items()]
        print("\n".join([group.help, "", f"usage: {program} COMMAND [--flag VALUE ...]", "", *lines, ""]))
        print(f"{program} COMMAND --help lists the flags of a command.")
    elif words[0].startswith("-"):
        raise UserError(
            f"{words[0]!r} comes before a command; type: {program} {next(iter(group.members))} {words[0]} ..."
        )
    else:
        close = difflib.get_close_matches(words[0], group.members, 1, 0.6)
        advice = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(group.members)}"
        raise UserError(f"{words[0]!r} is no command; {advice}")


if __name__ == "__main__":
    main()
