import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import pytest
from conftest import ROOT, run_script

from mori.cli import Config, UserError, checked, flag, parse
from mori.config import ExportConfig, GenerateConfig, SamplingConfig, TrainConfig, steps_of


def test_help_shows_every_flag_with_its_default_and_imports_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for f in fields(TrainConfig):
        assert f"--{f.name}" in done.stdout
    assert done.stdout.count("(default: ") == len(fields(TrainConfig))
    for group in ("model:", "corpus:", "training:", "speed and memory:", "device:", "logging:", "sampling:", "output:"):
        assert f"\n{group}\n" in done.stdout


def test_parse_treats_dashes_and_underscores_alike():
    words = ["--max-steps", "3", "--per_device-train_batch-size=2", "--prompt", "a-b", "c_d"]
    config = parse(TrainConfig, "", words)
    assert (config.max_steps, config.per_device_train_batch_size, config.prompt) == (3, 2, ["a-b", "c_d"])


def test_checked_reports_every_mistake_at_once():
    with pytest.raises(UserError) as error:
        checked(
            TrainConfig(
                block_size=0, top_p=2.0, learning_rate=-1.0, seed=-3, max_steps=0, device="gpu", warmup_steps=1.5
            )
        )
    for name in ("block_size", "top_p", "learning_rate", "seed", "max_steps", "device", "warmup_steps"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"max_steps": 5, "warmup_steps": 9}, "warmup_steps"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"run_name": "a/b"}, "run_name"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"precision": "int8"}, "precision"),
    ],
)
def test_checked_names_contradictions(changed, named):
    with pytest.raises(UserError, match=named):
        checked(TrainConfig(**changed))


def test_parse_suggests_the_nearest_flag():
    done = run_script("train.py", "--learning-rat", "1")
    assert done.returncode == 2
    assert done.stderr == "train.py: error: unknown flag --learning_rat; did you mean --learning_rate?\n"


def test_parse_reports_a_wrong_value_in_one_line():
    for words in (["--max_steps", "many"], ["--precision", "int8"], ["--corpus"]):
        done = run_script("train.py", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_parse_extends_lists_and_negates_switches():
    config = parse(TrainConfig, "", ["--corpus", "a", "b", "--corpus", "c", "--no-trust-remote-code"])
    assert config.corpus == ["a", "b", "c"] and config.trust_remote_code is False
    assert parse(GenerateConfig, "", ["--no_json"]).json is False


@pytest.mark.parametrize(
    "words, named",
    [
        (["--foo"], "--help lists"),
        (["--max_steps", "3", "4"], "'4' belongs to no flag"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--run_name", "a" * 300], "100 letters"),
        (["--num_train_epochs", "1e308"], "at most 1000000"),
    ],
)
def test_parse_refuses_odd_words(words, named):
    with pytest.raises(UserError, match=named):
        parse(TrainConfig, "", words)


def test_differences_ignores_fields_that_do_not_shape_the_weights():
    a = TrainConfig(max_steps=7, logging_steps=3)
    assert a.differences(TrainConfig(max_steps=7, logging_steps=4, output_dir="x")) == {}
    assert a.differences(TrainConfig(max_steps=8)) == {"max_steps": "(7, 8)"}
    assert a.differences(TrainConfig(max_steps=8, seed=1), extending=True) == {"seed": "(42, 1)"}
    names = {f.name for f in fields(SamplingConfig)} - {"top_k"}
    changed = {name: None for name in names}  # any value: samples do not shape the weights
    assert a.differences(replace(a, **changed)) == {}


def test_resolve_fills_in_defaults():
    assert TrainConfig().resolve().learning_rate == 1e-3
    assert TrainConfig(model="some/name").resolve().learning_rate == 5e-5
    assert TrainConfig(model="some/name", corpus=["dir/mori_corpus.txt"]).resolve().run_name == "name-mori_corpus"
    assert TrainConfig().resolve().run_name == "mini-transcripts"
    assert TrainConfig(corpus=["a/d.jsonl.gz", "v1.2/e.f.txt"]).resolve().run_name == "mini-d-e.f"


def test_steps_of_takes_a_share():
    assert [steps_of(0.1, 195), steps_of(7, 195), steps_of(1, 195), steps_of(0.0, 5)] == [20, 7, 1, 0]


def test_generate_config_sets_no_control_by_default():
    config = GenerateConfig()
    assert (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (1.0, 0, 1.0, 1.0)


@pytest.mark.parametrize(
    "rules, allowed, refused, phrase",
    [
        ({"above": 0}, 0.1, 0.0, "must be above 0"),
        ({"min": 0, "below": 1}, 0.0, 1.0, "must be 0 or more and below 1"),
        ({"above": 0, "max": 1}, 1.0, 0.0, "must be above 0 and at most 1"),
        ({"min": 0, "share": True}, 0.5, 1.5, "must be a whole number, or a share below 1"),
        ({"min": 0}, 0.0, float("nan"), "must be a finite number"),
    ],
)
def test_flag_checks_its_declared_range(rules, allowed, refused, phrase):
    @dataclass
    class Example(Config):
        group = "example"
        value: float = flag(allowed, "a number", **rules)

    assert Example().mistakes() == [] and Example(allowed).mistakes() == []
    assert Example(refused).mistakes() == [f"value is {refused}, {phrase}"]


@pytest.mark.parametrize(
    "text", ["--- Title", "---", "--", "-5 degrees", "--my-flag like text", "- item", "\ufeffa\x0cb\u2028"]
)
def test_parse_leaves_a_text_that_begins_with_a_dash_as_it_is(text):
    for words in (["--prompt", text], [f"--prompt={text}"], ["--prompt", "a", text]):
        assert parse(GenerateConfig, "", [*words, "--top-k", "3"]).prompt[-1] == text
    assert parse(GenerateConfig, "", ["--prompt=--top-k", "--frequency-penalty", "-1.5"]).frequency_penalty == -1.5


def test_parse_shows_a_wrong_value_as_it_was_typed():
    with pytest.raises(UserError, match="^top_k is '- 3', must be a whole number$"):
        parse(GenerateConfig, "", ["--top_k", "- 3"])
    with pytest.raises(UserError, match="^num_train_epochs is 'tiga', must be a number$"):
        parse(TrainConfig, "", ["--num_train_epochs", "tiga"])
    with pytest.raises(UserError, match="^unknown flag --foo_bar"):
        parse(GenerateConfig, "", ["--foo-bar"])


@pytest.mark.parametrize("name", ["stop_strings", "dry_sequence_breakers"])
def test_parse_reads_escapes_in_texts_that_are_looked_for(name):
    words = [r"\n", r"a\tb", r"\\n", r"\d", "\n"]
    assert getattr(parse(GenerateConfig, "", [f"--{name}", *words]), name) == ["\n", "a\tb", r"\n", r"\d", "\n"]
    assert parse(GenerateConfig, "", ["--prompt", r"a\nb"]).prompt == [r"a\nb"]  # a prompt is never altered


@pytest.mark.parametrize(
    "redirection, code", [(">&-", 0), ("2>&-", 2), ("<&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 1)]
)
def test_run_script_ends_in_a_line_whatever_the_streams_are(redirection, code, tmp_path):
    """A file that the script opens must not get the descriptor of a closed stream, where prints would go into it."""
    program = (
        "import sys; from mori.cli import UserError, run_script\n"
        "def main():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2\n"
        "    file.write('kept'); file.close(); print('text'); print('a note', file=sys.stderr)\n"
        f"    if {code == 2}: raise UserError('wrong')\n"
        "run_script('x.py', main)\n"
    )
    shell = f'exec "$0" -c "$1" {redirection}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    if code == 1:
        assert done.stderr.splitlines()[-1].startswith("x.py: failed: standard output") and "No space" in done.stderr


@pytest.mark.parametrize("ending, code", [("pass", 0), ("raise UserError('wrong')", 2)])
def test_rank_ends_with_its_code_although_threads_still_hold_tensors(ending, code, tmp_path):
    """As Gloo's do. They abort an interpreter that is taken apart, and torchrun starts the run again. Other exit hooks are called."""
    program = (
        "import atexit, sys, threading, time\n"
        "from mori.cli import UserError, run_script\n"
        "def main():\n"
        "    import torch\n"
        "    def loop():\n"
        "        tensor = torch.ones(100_000)\n"
        "        while True: tensor + tensor\n"
        "    for _ in range(3): threading.Thread(target=loop, daemon=True).start()\n"
        "    atexit.register(lambda: open(sys.argv[1], 'w').write('called'))\n"
        "    print('the end', end='')\n"
        f"    {ending}\n"
        "run_script('x.py', main)\n"
    )
    words = [sys.executable, "-c", program, tmp_path / "hook"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout == "the end" and (tmp_path / "hook").read_text() == "called"


@pytest.mark.parametrize(
    "classes, package", [(TrainConfig, "train"), (GenerateConfig, "generate"), (ExportConfig, "export")]
)
def test_advice_names_only_flags_that_the_command_has(classes, package):
    """Of the modules that a command reaches, but not of those whose messages only another command shows."""
    modules = {path.relative_to(ROOT / "mori").as_posix() for path in (ROOT / "mori").rglob("*.py")}
    of_export = {name for name in modules if name.startswith("export/")}
    of_others = {"generation/chat.py"} | of_export - {"export/hub.py"} | {m for m in modules if m.startswith("bench/")}
    reached = {"train": modules - of_others, "export": of_export}
    reached["generate"] = {name for name in modules if name.startswith("generation/")}
    known = {f.name for f in fields(classes)} | {"help", "config", "logdir", "no"}
    for path in (ROOT / "mori" / name for name in sorted(reached[package])):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                for flag_name in re.findall(r"--([a-z]\w+)", ast.unparse(node)):
                    assert flag_name in known, f"{path}: --{flag_name}"


def test_run_script_in_a_deleted_folder_is_one_line(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    program = "import os; os.rmdir(os.getcwd()); from mori.cli import run_script; run_script('x.py', print)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("x.py: error: the current folder no longer exists")


def test_resolve_gives_no_warm_up_to_a_schedule_without_one():
    """The preset warms up by default; a schedule of Trainer without a warm-up is not refused for that."""
    assert TrainConfig().resolve().warmup_steps == 0.05
    for name in ("constant", "reduce_lr_on_plateau", "greedy"):
        assert checked(TrainConfig(lr_scheduler_type=name).resolve()).warmup_steps == 0
        with pytest.raises(UserError, match="has no warm-up"):
            checked(TrainConfig(lr_scheduler_type=name, warmup_steps=3))
