"""Every command of the README is run, or parsed by the very parser that would run it."""

import json
import re
import runpy
import shlex

import pytest
from conftest import ROOT

from mori.bench.options import CompareConfig
from mori.config import GenerateConfig, TrainConfig, parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]
PARSERS = {
    "scripts/train.py": TrainConfig,
    "scripts/generate.py": GenerateConfig,
    "scripts/compare.py": CompareConfig,
}
BENCHMARKS = runpy.run_path(str(ROOT / "scripts" / "bench.py"))["COMMANDS"]


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [part.strip() for line in COMMANDS for part in line.split("&&")])
def test_every_command_is_one_we_know(command):
    words = shlex.split(command)
    if words[:4] == ["python", "-m", "pip", "install"]:
        assert words[4] == "-e" and words[5] in (".", ".[test]", ".[compare]")
    elif words[:3] == ["python", "-m", "pytest"] or words == ["tensorboard", "--logdir", "runs"]:
        pass  # the first is what runs this test
    elif words[:3] == ["python", "-m", "tests.faults"]:
        assert set(words[3:]) <= {"--full", "--jobs", "4"}  # what test_campaigns.py runs a few cases of
    else:
        script = next(word for word in words if word.startswith("scripts/"))
        assert words[: words.index(script)] in (["python"], ["torchrun", "--nproc-per-node=2"])
        rest = words[words.index(script) + 1 :]
        parser = BENCHMARKS[rest.pop(0)] if script == "scripts/bench.py" else PARSERS[script]
        if rest != ["--help"]:
            parse(parser, "", rest)


def test_every_flag_that_is_mentioned_exists():
    known = {name for cls in (*PARSERS.values(), *BENCHMARKS.values()) for name in cls.__dataclass_fields__} | {
        "help",
        "logdir",
        "nproc",
        "max",
        "full",
        "jobs",
    }
    for flag in re.findall(r"`[^`]*?--(?!no-)(\w+)", README):
        assert flag in known, flag
    for flag in re.findall(r"`[^`]*?--no-(\w+)", README):
        assert flag in known, flag


def test_every_file_that_is_named_is_there():
    for path in re.findall(r"(?:mori|scripts|tests|runs)/[\w/]+\.(?:py|md|png)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(
    "name, pair",
    [
        *[
            (where + name, pair)
            for where in ("", "zen5/")
            for name, pair in (
                ("train-124m-batch4-block128-fp32-cpu", "trainer / mori"),
                ("train-124m-batch4-block512-fp32-cpu", "trainer / mori"),
                ("train-124m-batch4-block512-fp32-cpu", "trainer-tuned / mori"),
                ("train-124m-batch4-block1024-fp32-cpu", "trainer / mori"),
                ("train-tiny-batch4-block64-fp32-cpu", "trainer / mori"),
                ("train-tiny-batch4-block64-fp32-cpu", "bare / mori"),
                ("memory-124m-batch4-block1024-fp32-cpu", "mori / trainer"),
                ("tokenize", "run_clm / mori"),
                ("startup-124m-batch4-block128-fp32-cpu", "trainer / mori"),
                ("startup-124m-batch4-block512-fp32-cpu", "trainer / mori"),
            )
        ],
        *[
            (f"decode-{model}", f"generate-{how} / mori-{how}")
            for model in ("124m-batch1", "124m-batch8", "small-batch1")
            for how in ("greedy", "sampled")
        ],
    ],
)
def test_the_figures_are_those_of_the_benchmarks(name, pair):
    found = json.loads((ROOT / "runs" / "bench" / f"{name}.json").read_text(encoding="utf-8"))["ratios"][pair]
    assert "{median:.2f} ({min:.2f} to {max:.2f})".format(**found) in README
