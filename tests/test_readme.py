"""The README's commands, flags, paths, figures and code are those of the project.

A measured figure is a link to the file in runs/bench/ that holds it; the link's title is the path of the entry in that file.
`python -m tests.test_readme` writes the figures, and the training step, into the README.
"""

import inspect
import json
import re
import runpy
import shlex
import textwrap
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from mori.__main__ import COMMANDS
from mori.cli import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "runs" / "README.md").read_text(encoding="utf-8")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FIGURE = re.compile(r'\[([^][]+)\]\((runs/bench/[\w/.-]+\.json) "([^"]+)"\)')
NUMBER = re.compile(r"\d[\d,]*(?:\.(\d+))?(e[-+]\d+)?")
TRAINING_STEP = re.compile(
    r"(<!-- training step: begin -->\n```python\n)(.*?)(\n```\n<!-- training step: end -->)", re.S
)

BENCHMARKS = {name: command.config for name, command in COMMANDS.members["bench"].members.items()}
CONFIGS = {name: command.config for name, command in COMMANDS.members.items() if name != "bench"}
CONFIGS["sweep"] = runpy.run_path(str(ROOT / "scripts" / "sweep.py"))["SweepConfig"]
TORCHRUN = {action.dest for action in get_args_parser()._actions}
SLURM = {"nodes", "ntasks_per_node", "gpus_per_node"}
OTHER_PROGRAMS_FLAGS = {"help", "version", "config", "logdir", "full", "jobs"} | TORCHRUN | SLURM
LAUNCHERS = ([], ["python"], ["python", "-m"])


def commands(page: str) -> list[str]:
    """The shell commands of a page: the lines of its bash blocks, and the code spans that run Python."""
    lines = [line for language, block in CODE_BLOCK.findall(page) if language == "bash" for line in block.splitlines()]
    spans = [
        span
        for span in CODE_SPAN.findall(CODE_BLOCK.sub("", page))
        if re.match(r"(python|torchrun) .*\.py |mori \w+ -", span)
    ]
    return list(dict.fromkeys(part.strip() for line in lines + spans for part in line.split("&&")))


def figure_entry(path: str, keys: str):
    """The entry of a JSON file at a path such as `ratios.trainer / mori`; a list gives the sum over its items."""

    def lookup(value, keys):
        if isinstance(value, list):
            return sum(lookup(item, keys) for item in value)
        return lookup(value[keys[0]], keys[1:]) if keys else value

    return lookup(json.loads((ROOT / path).read_text(encoding="utf-8")), keys.replace("\\|", "|").split("."))


def write_figure(link: re.Match) -> str:
    """The link with its numbers replaced by those of its file, printed to the same number of decimals."""
    text, path, keys = link.groups()
    entry = figure_entry(path, keys)
    values = iter([entry["median"], entry["min"], entry["max"]] if isinstance(entry, dict) else [entry])

    def write_number(number: re.Match) -> str:
        decimals, exponent = number.groups()
        return f"{next(values):,.{len(decimals or '')}{'e' if exponent else 'f'}}"

    return f'[{NUMBER.sub(write_number, text)}]({path} "{keys}")'


def training_step_source() -> str | None:
    """The source of `train_step` and `accumulate_gradients`; None while they do not exist."""
    from mori import train

    functions = [getattr(train, name, None) for name in ("train_step", "accumulate_gradients")]
    if None in functions:
        return None
    return "\n\n\n".join(textwrap.dedent(inspect.getsource(function)).strip() for function in functions)


def test_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_pages_name_every_script():
    assert [path.name for path in (ROOT / "scripts").glob("*.py") if f"python scripts/{path.name}" not in PAGES] == []


def test_readme_has_the_commands_that_ci_takes_from_it():
    """Each is a line of a block, not a part of a sentence."""
    patterns = re.findall(r"grep -m1 '(.+)' README.md", (ROOT / ".ci/run").read_text())
    assert len(patterns) == 2
    for pattern in patterns:
        line = next(line for line in README.splitlines() if re.search(pattern, line))
        assert line in [command for block in CODE_BLOCK.findall(README) for command in block[1].splitlines()], line


@pytest.mark.parametrize("command", commands(PAGES))
def test_command_parses(command):
    words = shlex.split(command)
    if words[:4] == ["python", "-m", "pip", "install"]:
        assert words[4] == "-e" and words[5] in (".", ".[test]", ".[compare]")
    elif words[:3] == ["python", "-m", "pytest"] or words == ["tensorboard", "--logdir", "runs"]:
        pass  # the first is the command that runs this test
    elif words[:3] == ["python", "-m", "tests.faults"]:
        assert set(words[3:]) <= {"--full", "--jobs", "4"}
    else:
        place = next(n for n, word in enumerate(words) if word == "mori" or word.startswith("scripts/"))
        if words[0] == "torchrun":
            get_args_parser().parse_args(words[1 : place + 1])
        else:
            assert words[:place] in LAUNCHERS
        name, *arguments = (
            words[place + 1 :] if words[place] == "mori" else [Path(words[place]).stem, *words[place + 1 :]]
        )
        config = BENCHMARKS[arguments.pop(0)] if name == "bench" else CONFIGS[name]
        if arguments != ["--help"]:
            parse(config, "", arguments)


@pytest.mark.parametrize("span", sorted({span for span in CODE_SPAN.findall(PAGES) if "--" in span}))
def test_flags_and_their_choices_exist(span):
    fields = {}
    for config in (*CONFIGS.values(), *BENCHMARKS.values()):
        fields |= config.__dataclass_fields__
    for no, flag, value in re.findall(r"--(no-)?([a-z][\w-]*)(?:[ =]([\w.]+))?", span):
        name = flag.replace("-", "_")
        assert name in fields or name in OTHER_PROGRAMS_FLAGS, flag
        choices = fields[name].metadata.get("choices") if name in fields else None
        assert not (choices and value) or value in choices, f"--{flag} {value}"
        assert not no or fields[name].metadata["type"] is bool, flag


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:mori|scripts|tests|runs)/[\w/.-]+\.(?:py|md|png|json)", PAGES)))
)
def test_named_file_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("link", FIGURE.finditer(README), ids=lambda link: f"{Path(link[2]).parent.name}/{link[3]}")
def test_figure_equals_its_benchmark_file(link):
    assert write_figure(link) == link[0], "python -m tests.test_readme writes the figures"


def test_every_measured_figure_has_a_file():
    prose = CODE_SPAN.sub("", FIGURE.sub("", CODE_BLOCK.sub("", README))).replace("Python 3.10", "")
    assert re.findall(r"\d+\.\d+|\d+ ?(?:×|%|times\b)", prose) == []


def test_ledger_example_is_that_of_the_shipped_transcripts():
    [example] = re.findall(r"`([^`]+ dropped)`", README)
    ledger = figure_entry("runs/bench/compare-mini-200.json", "ledger")
    assert sorted(int(number[0].replace(",", "")) for number in NUMBER.finditer(example)) == sorted(ledger.values())


def test_training_step_equals_its_source():
    source = training_step_source()
    if source is None:
        pytest.skip("mori.train has no train_step and accumulate_gradients yet")
    assert TRAINING_STEP.search(README)[2] == source, "python -m tests.test_readme writes the step"


def test_tree_lists_every_module_of_the_front_row_and_every_package():
    [tree] = [block for language, block in CODE_BLOCK.findall(README) if language == "text"]
    listed = re.findall(r"^    (\S+) ", tree, re.M)
    modules = [path.name for path in (ROOT / "mori").glob("*.py") if path.name != "__init__.py"]
    packages = [f"{path.parent.name}/" for path in (ROOT / "mori").glob("*/__init__.py")]
    assert sorted(listed) == sorted(modules + packages)


if __name__ == "__main__":
    page = FIGURE.sub(write_figure, README)
    if source := training_step_source():
        page = TRAINING_STEP.sub(lambda block: block[1] + source + block[3], page)
    (ROOT / "README.md").write_text(page, encoding="utf-8")
