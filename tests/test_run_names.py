"""Which folder a run without a name takes, and which folders no run may write into."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, flags, run_script, stop_after

from mori.cli import UserError, checked, drive
from mori.config import EvaluateConfig, GenerateConfig, TrainConfig
from mori.train import train


@pytest.fixture
def unnamed(settings):
    """Train with `settings` and no name for the run, in 2 steps; returns the name that the run took."""
    base = {**settings, "run_name": "", "max_steps": 2, "eval_on_start": False, "eval_steps": 99, "save_steps": 1}
    return lambda **changed: train(TrainConfig(**{**base, **changed}))["run_name"]


def test_other_settings_begin_a_run_beside_and_the_same_ones_resume_theirs(unnamed, settings, tmp_path, capsys):
    first = unnamed()
    assert unnamed(learning_rate=2e-3) == f"{first}-2"
    line = next(line for line in capsys.readouterr().err.splitlines() if "learning_rate" in line)
    assert "learning_rate (0.001, 0.002)" in line and f"{first}-2" in line and "brain.previous" in line
    assert unnamed(seed=7) == f"{first}-3"
    for number, changed in (("", {}), ("-2", {"learning_rate": 2e-3}), ("-3", {"seed": 7})):
        before = sorted(path.name for path in (tmp_path / "runs").iterdir())
        assert unnamed(**changed) == first + number
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before
    assert unnamed(logging_steps=2, save_steps=2, temperature=0.5) == first  # these do not make another run
    with pytest.raises(UserError, match="learning_rate"):
        unnamed(run_name=first, learning_rate=2e-3)


def test_killed_runs_are_resumed_among_many(unnamed, tmp_path):
    first = unnamed()
    stop_after(3, lambda: unnamed(max_steps=5, seed=1))
    stop_after(3, lambda: unnamed(max_steps=5, seed=2))
    assert unnamed(max_steps=5, seed=1) == f"{first}-2" and unnamed(max_steps=5, seed=2) == f"{first}-3"
    summary = json.loads((tmp_path / "runs" / f"{first}-2" / "summary.json").read_text())
    assert summary["steps"] == 5


def test_ten_runs_keep_their_order(unnamed, tmp_path):
    """The number after 9 is 10, also if a run in the middle was deleted."""
    first = unnamed()
    for number in (2, 9, 10):
        (tmp_path / "runs" / f"{first}-{number}").mkdir()
        (tmp_path / "runs" / f"{first}-{number}" / "config.json").write_text("{")
    assert unnamed(seed=3) == f"{first}-11"
    assert unnamed() == first


def test_changed_text_begins_a_run_beside(unnamed, settings, capsys):
    text = Path(settings["corpus"][0])
    original = text.read_text()
    first = unnamed()
    try:
        text.write_text(original + " Dan satu kalimat lagi.")
        assert unnamed() == f"{first}-2"
        assert "documents_sha256 (the corpus has another text now)" in capsys.readouterr().err
    finally:
        text.write_text(original)
    assert unnamed() == first


def test_model_of_the_same_shape_begins_a_run_beside_but_a_moved_one_does_not(unnamed, small_model, tmp_path):
    for name in ("a/brain", "b/brain"):
        shutil.copytree(small_model, tmp_path / name)
    first = unnamed(model=str(tmp_path / "a/brain"))
    assert unnamed(model=str(tmp_path / "b/brain")) == f"{first}-2"
    os.symlink(tmp_path / "a", tmp_path / "link")
    assert unnamed(model=str(tmp_path / "link/brain")) == first
    (tmp_path / "a").rename(tmp_path / "c")
    assert unnamed(model=str(tmp_path / "c/brain")) == first


def test_damaged_config_does_not_hide_a_run(unnamed, tmp_path, capsys):
    first = unnamed()
    (tmp_path / "runs" / first / "config.json").write_text("{ not JSON")
    assert unnamed() == first
    for path in (tmp_path / "runs" / first / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    (tmp_path / "runs" / first / "config.json").write_text("{ not JSON")
    assert unnamed() == f"{first}-2"
    assert "is a run that cannot be read" in capsys.readouterr().err
    assert (tmp_path / "runs" / first / "summary.json").exists()


def test_damaged_state_of_the_newest_checkpoint_does_not_hide_a_run(unnamed, tmp_path):
    stop_after(3, lambda: unnamed(max_steps=5))
    [first] = [path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]
    newest = sorted((tmp_path / "runs" / first / "checkpoints").iterdir())[-1] / "state.json"
    newest.write_text(newest.read_text().replace('"seed": 42', '"seed": 43'))
    assert unnamed(max_steps=5) == first
    assert any(path.name.endswith(".corrupt") for path in (tmp_path / "runs" / first / "checkpoints").iterdir())


def test_run_without_a_checkpoint_is_taken_by_the_same_settings_only(unnamed, tmp_path):
    stop_after(1, lambda: unnamed(save_steps=99))
    [first] = [path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]
    assert unnamed(seed=5) == f"{first}-2"
    assert unnamed() == first


def test_extend_finds_the_run_that_differs_in_its_length_only(unnamed, tmp_path, capsys):
    constant = {"lr_scheduler_type": "constant"}
    first = unnamed(**constant)
    assert unnamed(**constant, max_steps=4) == f"{first}-2"
    assert "--extend resumes it up to the new length" in capsys.readouterr().err
    assert unnamed(**constant, max_steps=4, extend=True) == f"{first}-2"  # it has that length already
    with pytest.raises(UserError, match=f"several runs.*{first}, {first}-2.*--run_name"):
        unnamed(**constant, max_steps=6, extend=True)
    with pytest.raises(UserError, match="seed"):
        unnamed(**constant, max_steps=6, seed=1, extend=True)
    assert unnamed(seed=9) == f"{first}-3"
    assert unnamed(seed=9, max_steps=4, extend=True) == f"{first}-3"


def test_starting_over_sets_the_run_with_these_settings_aside(unnamed, tmp_path):
    first = unnamed()
    assert unnamed(seed=1) == f"{first}-2"
    assert unnamed(seed=1, resume_from_checkpoint="none") == f"{first}-2"
    assert unnamed(seed=2, resume_from_checkpoint="none") == f"{first}-3"
    names = {path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")}
    assert names == {first, f"{first}-2", f"{first}-2.1", f"{first}-3"}


def test_named_checkpoint_belongs_to_its_run(unnamed, tmp_path):
    first = unnamed()
    assert unnamed(seed=1) == f"{first}-2"
    newest = sorted((tmp_path / "runs" / f"{first}-2" / "checkpoints").iterdir())[-1]
    assert unnamed(seed=1, resume_from_checkpoint=str(newest)) == f"{first}-2"


def test_two_ranks_take_the_same_folder(settings, tmp_path):
    words = flags({**settings, "run_name": "", "max_steps": 2, "eval_on_start": False, "prompt": ["a"]})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    for seed in ("1", "2"):
        done = subprocess.run(
            [*torchrun, *words, "--seed", seed], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("A new run begins beside it") == 1
    assert len([path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]) == 2


@pytest.mark.parametrize(
    "output, run, named",
    [
        ("model", "", "output_dir"),
        ("model/brain", "", "output_dir"),
        (".", "", "output_dir"),
        ("link", "", "output_dir"),
        ("link/brain", "", "output_dir"),
        ("brain", "model", "logging_dir"),
        ("brain", "link", "logging_dir"),
    ],
)
def test_no_run_writes_into_the_folder_of_its_model(settings, small_model, tmp_path, output, run, named):
    shutil.copytree(small_model, tmp_path / "model")
    os.symlink(tmp_path / "model", tmp_path / "link")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    changed = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / output)}
    if run:
        changed["logging_dir"] = str(tmp_path / run)
    with pytest.raises(UserError, match=f"^{named}: .*--model"):
        train(TrainConfig(**{**settings, **changed}))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    if output != "link/brain":  # one through the door is enough
        return
    done = run_script("train.py", *flags({**settings, **changed}))
    assert done.returncode == 2 and not (tmp_path / "runs").exists(), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"train.py: error: {named}: ") and "Traceback" not in done.stderr


def test_checkpoint_of_another_run_is_a_model_but_not_of_the_run_itself(run_train, tmp_path):
    run_train(max_steps=4)
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    for start in ("auto", "none"):
        with pytest.raises(UserError, match="^run_name: .* contains the folder of --model"):
            run_train(model=str(checkpoint), output_dir=str(tmp_path / "second"), resume_from_checkpoint=start)
    run_train(model=str(checkpoint), output_dir=str(tmp_path / "second"), run_name="", max_steps=3, save_steps=1)
    assert checkpoint.is_dir() and (tmp_path / "second" / "config.json").exists()


def test_path_on_an_unmounted_drive_is_refused(tmp_path, monkeypatch):
    mounts = []
    monkeypatch.setattr(drive, "COLAB", str(tmp_path / "content"))
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in mounts)
    inside = tmp_path / "content" / "drive" / "MyDrive"
    config = TrainConfig(logging_dir=str(inside / "runs"))
    checked(config)  # not on Colab
    (tmp_path / "content").mkdir()
    line = f'from google.colab import drive; drive.mount\\("{tmp_path}/content/drive"\\)'
    for refused in (
        config,
        TrainConfig(output_dir=str(inside / "brain")),
        TrainConfig(corpus=["a.txt", str(inside / "b.txt")]),
        EvaluateConfig(model=str(inside / "brain")),
        GenerateConfig(prompt_file=str(inside / "a.txt")),
    ):
        with pytest.raises(UserError, match=line):
            checked(refused)
    inside.mkdir(parents=True)  # as a run before has left it
    with pytest.raises(UserError, match=line):
        checked(config)
    monkeypatch.chdir(tmp_path / "content")
    with pytest.raises(UserError, match=line):
        checked(replace(config, logging_dir="drive/MyDrive/runs"))
    checked(replace(config, logging_dir="runs"))
    mounts.append(str(tmp_path / "content" / "drive"))
    checked(config)
