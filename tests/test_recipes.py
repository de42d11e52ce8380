"""Recipes, and the sweep that looks for a better one."""

import json
import re
import runpy
from dataclasses import fields

import pytest
import transformers
from conftest import ROOT, flags, run_script

import mori
from mori.cli import UserError, parse
from mori.config import RECIPES, TrainConfig
from mori.config.recipes import flags_of

# The course's script: TrainingArguments with its defaults, but for these.
COURSE = {"num_train_epochs": 5, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear", "warmup_steps": 0}
SAME_NAMES = (
    *COURSE, "learning_rate", "weight_decay", "max_grad_norm", "optim", "seed", "gradient_accumulation_steps",
)  # fmt: skip


@pytest.mark.parametrize("model", ["mini", "some/name"])
def test_recipe_modul_11_is_that_of_trainer(model, tmp_path):
    """For a model from scratch and a trained one; TrainingArguments gives what the course leaves out."""
    config = parse(TrainConfig, "", ["--recipe", "modul_11", "--model", model]).resolve()
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, **COURSE)
    assert {name: getattr(config, name) for name in SAME_NAMES} == {
        name: getattr(arguments, name) for name in SAME_NAMES
    }
    assert (config.block_size, config.top_k, config.top_p, config.temperature) == (128, 50, 0.95, 0.9)


@pytest.mark.parametrize("model", ["mini", "some/name"])
def test_recipe_gives_way_to_other_flags(model):
    words = ["--learning_rate", "2e-4", "--recipe", "modul_11", "--epochs", "1", "--model", model]
    config = parse(TrainConfig, "", words).resolve()
    assert (config.learning_rate, config.num_train_epochs, config.warmup_steps) == (2e-4, 1, 0)


def test_recipe_changes_only_what_is_unset():
    """A default that is a value, and not None, is that of every recipe: an explicit flag could not be told from it."""
    for recipe in RECIPES.values():
        for f in fields(TrainConfig):
            assert f.name not in recipe or f.default in (None, recipe[f.name]), f.name


def test_recipe_is_listed_in_help():
    shown = " ".join(run_script("train.py", "--help").stdout.split())
    assert flags_of("modul_11") in shown
    words = flags_of("modul_11").split()
    written = parse(TrainConfig, "", words)
    assert {name: getattr(written, name) for name in RECIPES["modul_11"]} == RECIPES["modul_11"]


def test_recipe_is_refused_by_name():
    with pytest.raises(UserError, match="recipe.*modul_12.*modul_11"):
        parse(TrainConfig, "", ["--recipe", "modul_12"])


def test_recipe_is_recorded_in_values(settings, tmp_path):
    """From Python; the flags that it stands for are the same run."""
    del settings["learning_rate"]
    summary = mori.train(**settings, recipe="modul_11")
    saved = json.loads((tmp_path / "runs/run/config.json").read_text())
    assert saved["recipe"] == "modul_11"
    given = RECIPES["modul_11"] | settings
    assert {name: saved[name] for name in given} == given
    assert mori.train(**RECIPES["modul_11"] | settings) == summary


@pytest.fixture
def sweep(settings, tmp_path):
    """Run `scripts/sweep.py` for a few steps in this process; returns its result."""
    script = runpy.run_path(str(ROOT / "scripts/sweep.py"))
    short = settings | {"max_steps": 2, "eval_steps": 1, "save_steps": 1000}

    def run(*words: str) -> dict:
        return script["sweep"](parse(script["SweepConfig"], "", [*flags(short), "--seeds", "1", *words]))

    return run


def test_sweep_script_equals_single_runs(settings, tmp_path):
    words = [*flags(settings), "--variations", "optim=sgd block_size=8", "--seeds", "1", "2"]
    done = run_script("sweep.py", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/sweep-run/sweep.json").read_text())
    rows = [(row["variation"], [run["seed"] for run in row["runs"]]) for row in result["rows"]]
    assert rows == [("", [1, 2]), ("optim=sgd block_size=8", [1, 2])]
    alone = settings | {"run_name": "alone", "seed": 2, "optim": "sgd", "block_size": 8}
    assert result["rows"][1]["runs"][1]["after"] == mori.train(**alone)["eval"]["after"]
    means = [sum(run["best"]["bits_per_byte"] for run in row["runs"]) / 2 for row in result["rows"]]
    table = (tmp_path / "runs/sweep-run/sweep.md").read_text().splitlines()[2:]
    assert [float(re.findall(r"\| (\d\.\d+) \(", line)[1]) for line in table] == pytest.approx(means, abs=1e-4)
    assert table[1].endswith(f"| {means[1] / means[0] - 1:+.1%} |") and all(line in done.stdout for line in table)


def test_sweep_reads_finished_runs(sweep, tmp_path):
    first = sweep("--variations", "learning_rate=1e-2")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")}
    again = sweep("--variations", "learning_rate=1e-2", "dropout=0.2")
    assert again["rows"][:2] == first["rows"] and len(again["rows"][2]["runs"]) == 1
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_sweep_gives_equal_time(sweep):
    """The steps are as the measured times of a step."""
    first, second = sweep("--equal_time", "--variations", "per_device_train_batch_size=64")["rows"]
    expected = max(1, round(2 * first["step_seconds"] / second["step_seconds"]))
    assert second["runs"][0]["steps"] == expected


@pytest.mark.parametrize(
    "variation, reason",
    [
        ("learning_rat=1", "did you mean --learning_rate"),
        ("learning_rate=-1", "must be above 0"),
        ("warmup_steps=9 max_steps=5", "is more than max_steps"),
        ("optim='muon", "quotation"),
        ("muon", "unknown flag"),
    ],
)
def test_sweep_refuses_a_variation_before_it_trains(sweep, variation, reason, tmp_path):
    with pytest.raises(UserError, match=f"variation.*{reason}"):
        sweep("--variations", variation)
    assert not (tmp_path / "runs").exists()


def test_sweep_goes_on_after_a_run_that_fails(sweep, capsys):
    result = sweep("--max_nonfinite_steps", "1", "--variations", "learning_rate=1e30", "dropout=0.2")
    assert "not finite" in result["rows"][1]["runs"][0]["error"] and "not finite" in capsys.readouterr().out
    assert [run["steps"] for run in result["rows"][2]["runs"]] == [2]
