"""The commands through every door: `mori`, `python -m mori`, scripts; and the settings that come from a file."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT, flags, run_script

from mori import __version__
from mori.__main__ import COMMANDS, Group, main
from mori.cli import UserError, parse
from mori.config import EvaluateConfig, GenerateConfig, TrainConfig

SCRIPTS = ("train", "generate", "evaluate", "compare", "bench")


def mori(*words: object, **options) -> subprocess.CompletedProcess:
    """Run `python -m mori` as a user does."""
    command = [sys.executable, "-m", "mori", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **{"cwd": ROOT, **options})


def in_process(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """What `main` does with the words: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["mori", *words])
    monkeypatch.setattr("mori.cli.errors._open_closed_streams", lambda: None)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_main_lists_the_commands(monkeypatch, capsys, words):
    code, out, _ = in_process(monkeypatch, capsys, *words)
    assert code == 0
    for name, command in COMMANDS.members.items():
        assert f"  {name} " in out and command.help in out


def test_bench_help_lists_the_benchmarks(monkeypatch, capsys):
    for words in (["bench"], ["bench", "--help"]):
        code, out, _ = in_process(monkeypatch, capsys, *words)
        assert code == 0 and all(f"  {name} " in out for name in COMMANDS.members["bench"].members)


@pytest.mark.parametrize(
    "words, line",
    [
        (["trian"], "mori: error: 'trian' is no command; did you mean train?"),
        (["eval"], "mori: error: 'eval' is no command; did you mean evaluate?"),
        (["xyz"], f"mori: error: 'xyz' is no command; the commands are {', '.join(COMMANDS.members)}"),
        (["--corpus", "x"], "mori: error: '--corpus' comes before a command; type: mori train --corpus ..."),
        (["bench", "decod"], "mori bench: error: 'decod' is no command; did you mean decode?"),
        (["train", "--max_steps", "0"], "mori train: error: max_steps is 0, must be above 0, or -1 to count epochs"),
        (
            ["train", "--corpus", "gone.txt"],
            f"mori train: error: corpus gone.txt does not exist in {Path.cwd()}; give a text file, ",
        ),
        (["chat", "--json"], "mori chat: error: interactive contradicts json and prompt_file"),
    ],
)
def test_main_reports_a_mistake_in_one_line(monkeypatch, capsys, words, line):
    code, out, err = in_process(monkeypatch, capsys, *words)
    assert code == 2 and err.startswith(line) and err.count("\n") == 1 and not out


def test_main_shows_the_version(monkeypatch, capsys):
    for words in (["--version"], ["train", "--version"], ["bench", "decode", "--version"]):
        assert in_process(monkeypatch, capsys, *words)[:2] == (0, f"mori {__version__}\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_the_command_and_names_itself(name):
    done = run_script(f"{name}.py", "--nonsense" if name != "bench" else "nonsense")
    assert done.returncode == 2 and done.stderr.startswith(f"{name}.py: error: ")


def test_every_command_has_a_script_or_is_known_without_one():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert set(COMMANDS.members) - scripts == {"chat"} and isinstance(COMMANDS.members["bench"], Group)


def test_module_shows_the_commands_without_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "mori"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "  train " in done.stdout
    assert not re.findall(r"\| +(torch|numpy|transformers|tqdm)$", done.stderr, re.M)


@pytest.mark.parametrize("words", [["-m", "mori.train"], ["-mmori.evaluate"], ["-u", "-m", "mori.data.files", "--x"]])
def test_module_that_is_no_command_says_so(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "python -m mori train" in done.stderr and done.stderr.count("\n") == 1


def test_train_through_the_module_trains_from_any_folder(settings, tmp_path):
    """The default folders are those of the current folder."""
    words = {name: value for name, value in settings.items() if name not in ("logging_dir", "output_dir")}
    done = mori("train", *flags(words | {"max_steps": 1}), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "run" / "summary.json").is_file() and (tmp_path / "mori_brain_final").is_dir()


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_config_file_gives_the_settings_of_its_keys(tmp_path):
    toml = write(
        tmp_path / "run.toml",
        'max-steps = 7\nlearning_rate = 1\ncorpus = "a.txt"\nprompt = ["a", "b"]\ndocument_mask = true\nstop_strings = ["\\n"]\nlr_scheduler_type = "cosine_with_restarts"\n'
        "[lr_scheduler_kwargs]\nnum_cycles = 2\n",
    )
    config = parse(TrainConfig, "", ["--config", toml])
    assert (config.max_steps, config.learning_rate, config.corpus, config.prompt) == (7, 1.0, ["a.txt"], ["a", "b"])
    assert type(config.learning_rate) is float and config.document_mask is True and config.stop_strings == ["\n"]
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert config.given == {
        "max_steps", "learning_rate", "corpus", "prompt", "document_mask", "stop_strings", "lr_scheduler_type",
        "lr_scheduler_kwargs",
    }  # fmt: skip


def test_config_file_may_use_the_names_of_other_programs(tmp_path):
    config = parse(TrainConfig, "", ["--config", write(tmp_path / "a.json", '{"lr": 0.5, "epochs": 2, "bf16": true}')])
    assert (config.learning_rate, config.num_train_epochs, config.precision) == (0.5, 2.0, "bf16")
    assert config.given == {"learning_rate", "num_train_epochs", "precision"}


def test_config_file_yields_to_flags_and_to_later_files(tmp_path):
    first = write(tmp_path / "a.toml", 'top_k = 3\ntop_p = 0.5\nseed = 1\nprompt = ["a", "b"]')
    second = write(tmp_path / "b.json", '\ufeff{"top-p": 0.25, "seed": 2}')
    config = parse(GenerateConfig, "", ["--seed=9", "--config", first, f"--config={second}", "--prompt", "c"])
    assert (config.top_k, config.top_p, config.seed, config.prompt) == (3, 0.25, 9, ["c"])
    assert config.given == {"top_k", "top_p", "seed", "prompt"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.toml", "max_step = 5", "unknown flag --max_step; did you mean --max_steps?"),
        ("a.toml", "max-step = 5", "unknown flag --max_step; did you mean --max_steps?"),
        ("a.toml", "zzzzz = 5", "unknown flag --zzzzz; --help lists the flags"),
        ("a.toml", 'max_steps = "many"', "max_steps is 'many', must be a whole number"),
        ("a.toml", "max_steps = 5.0", "max_steps is 5.0, must be a whole number"),
        ("a.toml", "max_steps = true", "max_steps is True, must be a whole number"),
        ("a.toml", 'document_mask = "maybe"', "document_mask is 'maybe', must be True or False"),
        ("a.toml", "max_stepz = 5\nlr = 1", "unknown flag --max_stepz; did you mean --max_steps?"),
        ("a.toml", "lr = 1e-4\nlearning_rate = 2e-4", "lr and learning_rate give learning_rate different values"),
        ("a.toml", "document_mask = 1", "document_mask is 1, must be true or false"),
        ("a.toml", "learning_rate = false", "learning_rate is False, must be a number"),
        ("a.toml", "learning_rate = nan", "learning_rate is nan, must be a finite number"),
        ("a.toml", "learning_rate = -1", "learning_rate is -1.0, must be above 0"),
        ("a.toml", 'precision = "int8"', "precision is 'int8', must be one of auto, fp32, bf16, fp16"),
        ("a.toml", "prompt = 5", "prompt is 5, must be text or a list of texts"),
        ("a.toml", "corpus = [1]", r"corpus is \[1\], must be text or a list of texts"),
        ("a.toml", "run_name = 1979-05-27", "run_name is datetime.date"),
        ("a.toml", "lr_scheduler_kwargs = 3", "lr_scheduler_kwargs is 3, must be a table of names and values"),
        ("a.toml", "bad_words_ids = 3", "bad_words_ids is 3, must be a list"),
        ("a.toml", "seed = 1\n[training]\nmax_steps = 5", r"\[training\] is a table; settings stand at the top level"),
        ("a.toml", "max_steps = 1\nmax-steps = 2", "max_steps stands twice"),
        ("a.toml", "seed = 'x'\nblock_size = 0", "seed is 'x', must be a whole number; block_size is 0, must be above 0"),
        ("a.toml", "max_steps = ", r"is not TOML: Invalid value \(at "),
        ("a.json", '{"max_steps": }', "is not JSON: Expecting value: line 1"),
        ("a.json", '{"seed": 1, "seed": 2}', "is not JSON: seed stands twice"),
        ("a.json", '["max_steps"]', "must hold one JSON object"),
        ("a.json", '{"max_steps": null}', "max_steps is None, must be a whole number"),
        ("a.json", "[" * 100_000, "is not JSON: "),
        ("a.yaml", "max_steps: 5", "YAML is not read; write it as TOML, in a .toml file, or as JSON, in a .json file"),
        ("a.txt", "max_steps: 5", "must be written as TOML, in a .toml file, or as JSON, in a .json file"),
    ],
)  # fmt: skip
def test_config_file_is_checked_as_flags_are(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=f"^config {re.escape(path)}.*{message}") as error:
        parse(TrainConfig, "", ["--config", path])
    assert "\n" not in str(error.value)


def test_config_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.json").mkdir()
    for name, reason in (("gone.toml", "No such file"), ("bytes.toml", "not UTF-8"), ("folder.json", "Is a directory")):
        with pytest.raises(UserError, match=f"^config .*{name}.*{reason}"):
            parse(TrainConfig, "", ["--config", str(tmp_path / name)])


def test_config_file_of_another_command_names_the_foreign_setting(tmp_path):
    with pytest.raises(UserError, match="unknown flag --max_steps"):
        parse(EvaluateConfig, "", ["--config", write(tmp_path / "a.toml", "max_steps = 5")])


def test_config_of_a_run_is_the_same_run(run_train, settings, tmp_path):
    """The file in the run's folder is a `--config`: the run is finished; with a longer one it goes on."""
    run_train(max_steps=2, resume_from_checkpoint="none")
    path = tmp_path / "runs" / "run" / "config.json"
    config = parse(TrainConfig, "", ["--config", str(path)])
    resolved = TrainConfig(**settings | {"max_steps": 2}).resolve()
    assert asdict(config) == asdict(resolved)
    assert set(json.loads(path.read_text())) == {f.name for f in fields(TrainConfig)} - {
        "resume_from_checkpoint",
        "extend",
        "dry_run",
    }
    longer = mori("train", "--config", path, "--max_steps", "4", "--extend")
    assert longer.returncode == 0 and "step-00000002" in longer.stdout, longer.stderr
    assert mori("train", "--config", path).returncode == 0
