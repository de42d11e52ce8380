"""A run that is taken up again: after a kill, with other settings, to a new length, or when it has ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    Stop,
    assert_equal_weights,
    flags,
    run_script,
    stop_after,
    wait_for,
    weights,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mori import output
from mori.cli import RunFailed, UserError
from mori.speed import matmul
from mori.tracking.loggers import read_metrics


def test_torchrun_trains_resumes_and_prints_once(settings, tmp_path):
    """An epoch of two ranks ends with a step in which one rank has nothing left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    for name, killed in (("whole", False), ("run", True)):
        brain = str(tmp_path / f"brain-{name}")
        words = flags({**settings, "num_train_epochs": 2, "run_name": name, "output_dir": brain, "max_steps": -1})
        command = torchrun + words + ["--save_steps", "3"]
        if killed:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(tmp_path / "runs" / name / "checkpoints" / "step-00000003" / "manifest.json", process)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, workers)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("reads ") == 1 and ("\nresumed at step " in done.stdout) == killed
    assert_equal_weights(tmp_path / "brain-whole", tmp_path / "brain-run")


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16", "precision": "bf16"}, {"optim": "adamw_bnb_8bit"}], ids=["bf16", "8 bits"]
)
def test_resume_with_bf16_weights_or_8bit_moments_gives_the_same_weights(options, run_train, tmp_path):
    if "optim" in options:
        pytest.importorskip("bitsandbytes")
    options = {"dropout": 0.1, "max_steps": 12, "save_steps": 5, **options}
    whole = run_train(run_name="whole", output_dir=str(tmp_path / "whole"), **options)
    stop_after(8, lambda: run_train(**options))
    run_train(**options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    assert whole["eval"]["after"]["loss"] < whole["eval"]["before"]["loss"]
    if "dtype" in options:
        stored = load_file(tmp_path / "whole" / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("library", ["onednn", "torch"])
def test_resumed_run_keeps_its_matmul_library(library, run_train, tmp_path, monkeypatch):
    """The measurement chooses another library when the run resumes; the last bits would differ."""
    if matmul.choose_library("onednn") == "torch":
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "_MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(matmul, "onednn_speedup", lambda: 2.0 if library == "onednn" else 1.0)
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(8, run_train)
    monkeypatch.setattr(matmul, "onednn_speedup", lambda: 1.0 if library == "onednn" else 2.0)
    run_train()
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    state = json.loads((tmp_path / "runs/run/checkpoints/step-00000012/state.json").read_text())
    assert state["cpu_matmul"] == library


def test_killed_run_resumes_to_the_same_weights(settings, tmp_path):
    """SIGKILL after a checkpoint; dropout on, accumulation 2, a save that falls between two log lines."""
    words = flags({**settings, "gradient_accumulation_steps": 2, "max_steps": 40, "save_steps": 7, "logging_steps": 5})
    whole = run_script("train.py", *words, "--run_name", "whole", "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for checkpoint in ("step-00000007", "step-00000021"):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(tmp_path / "runs" / "run" / "checkpoints" / checkpoint / "manifest.json", process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = run_script("train.py", *words)
    assert done.returncode == 0 and "\nresumed at step " in done.stdout, done.stderr
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    both = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "run")]
    losses = [[(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] for lines in both]
    assert losses[0] == losses[1]


def test_finished_run_is_not_trained_again(run_train, tmp_path, capsys):
    first = run_train()
    made_at = (tmp_path / "brain").stat().st_mtime_ns
    assert run_train() == json.loads(json.dumps(first))
    assert "is finished (12 steps)" in capsys.readouterr().out
    assert (tmp_path / "brain").stat().st_mtime_ns == made_at and not (tmp_path / "brain.previous").exists()


def test_run_killed_before_publishing_publishes(run_train, tmp_path, monkeypatch):
    def cut(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(output, "publish_model", cut)
        with pytest.raises(Stop):
            run_train()
    first = json.loads(json.dumps(run_train()))
    assert (tmp_path / "brain" / "config.json").exists()
    whole = run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    assert first["eval"] == whole["eval"] and first["samples"] == whole["samples"]
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


def test_peak_memory_of_a_resumed_run_is_that_of_all_its_processes(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr("mori.state.peak_memory_bytes", lambda device: 5 << 30)
    stop_after(8, run_train)
    monkeypatch.setattr("mori.state.peak_memory_bytes", lambda device: 1 << 30)
    assert run_train()["peak_memory_bytes"] == 5 << 30
    assert read_metrics(tmp_path / "runs/run/metrics.jsonl")[-2]["perf/peak_memory_gib"] == 5


def test_resume_refuses_other_settings(run_train, text_file, tmp_path):
    run_train(max_steps=4)
    with pytest.raises(UserError, match=r"learning_rate \(0.001, 0.002\)"):
        run_train(max_steps=4, learning_rate=2e-3)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + " lain")
    with pytest.raises(UserError, match="documents_sha256"):
        run_train(max_steps=4, corpus=[str(other)])
    run_train(max_steps=4, learning_rate=2e-3, resume_from_checkpoint="none")
    assert (tmp_path / "runs" / "run.1" / "summary.json").exists()  # the old run is set aside


def test_extend_needs_the_flag(run_train, tmp_path, monkeypatch):
    run_train(max_steps=4, lr_scheduler_type="constant")
    with pytest.raises(UserError, match=r"max_steps \(4, 8\).*--extend"):
        run_train(max_steps=8, lr_scheduler_type="constant")
    with pytest.raises(UserError, match=r"learning_rate \(0.001, 0.002\)"):
        run_train(max_steps=8, lr_scheduler_type="constant", learning_rate=2e-3, extend=True)
    with pytest.raises(UserError, match="has done 4 steps already"):
        run_train(max_steps=3, lr_scheduler_type="constant", extend=True)
    with pytest.raises(UserError, match="has no checkpoint"):
        run_train(run_name="new", extend=True)
    # A constant learning rate does not know how long the run is: extended, it is the run that was as long from the start.
    run_train(max_steps=8, lr_scheduler_type="constant", extend=True)
    run_train(max_steps=8, lr_scheduler_type="constant", run_name="long", output_dir=str(tmp_path / "long"))
    assert_equal_weights(tmp_path / "brain", tmp_path / "long")
    assert run_train(max_steps=8, lr_scheduler_type="constant")["steps"] == 8  # its length is 8 now


def test_extended_run_follows_the_schedule_of_its_new_length(run_train, tmp_path):
    run_train(max_steps=4)
    run_train(max_steps=8, extend=True)
    rates = [
        line["train/learning_rate"]
        for line in read_metrics(tmp_path / "runs/run/metrics.jsonl")
        if "train/loss" in line
    ]
    assert rates == pytest.approx([1e-3 * x for x in (1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])


def test_extended_run_that_stopped_is_not_finished(run_train, tmp_path, monkeypatch):
    run_train(max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(output, "publish_model", lambda *_: (_ for _ in ()).throw(RunFailed("no room")))
        with pytest.raises(RunFailed):
            run_train(max_steps=8, extend=True)
    assert run_train(max_steps=8)["steps"] == 8
    run_train(max_steps=4, run_name="first", output_dir=str(tmp_path / "first"))
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in ("brain", "first")))


def test_restart_by_torchrun_resumes(run_train, tmp_path, monkeypatch):
    stop_after(6, run_train)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_train(resume_from_checkpoint="none")
    assert not (tmp_path / "runs" / "run.1").exists()


def test_resume_mends_a_truncated_log(run_train, tmp_path):
    stop_after(6, run_train)
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    with path.open("a") as lines:
        lines.write('{"step": 6, "train/lo')
    run_train()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines() if "train/loss" in line]
    assert steps == list(range(1, 13))


def test_attempt_without_a_checkpoint_leaves_no_lines(run_train, tmp_path):
    stop_after(2, lambda: run_train(save_steps=100))
    run_train()
    logged = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [line["step"] for line in logged if "eval/loss" in line] == [0, 6, 12]
    board = EventAccumulator(str(tmp_path / "runs" / "run"))
    board.Reload()
    assert [event.step for event in board.Scalars("eval/loss")] == [0, 6, 12]


def test_resume_from_a_named_checkpoint(run_train, tmp_path):
    run_train(save_total_limit=9)
    named = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    run_train(run_name="from4", output_dir=str(tmp_path / "from4"), resume_from_checkpoint=str(named))
    assert_equal_weights(tmp_path / "brain", tmp_path / "from4")
    with pytest.raises(UserError, match="not a folder"):
        run_train(resume_from_checkpoint=str(tmp_path / "none"))


def test_best_checkpoint_is_kept(run_train, tmp_path):
    """A learning rate that rises until it is far too high makes an early evaluation the best; one newer checkpoint may stay."""
    summary = run_train(
        max_steps=12, save_steps=2, eval_steps=2, learning_rate=2.0, save_total_limit=1, warmup_steps=12
    )
    best = summary["eval"]["best"]["step"]
    assert best < 12
    kept = sorted(p.name for p in (tmp_path / "runs" / "run" / "checkpoints").iterdir())
    assert kept == sorted({f"step-{step:08d}" for step in (best, 12) if step})


def test_finished_run_restores_a_replaced_model(run_train, tmp_path):
    run_train(max_steps=2, run_name="a")
    first = weights(tmp_path / "brain")
    run_train(max_steps=3, run_name="b")
    run_train(max_steps=2, run_name="a")
    again = weights(tmp_path / "brain")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_run_folder_is_locked(run_train, tmp_path):
    from mori.checkpoint.run_folder import lock

    run_train(max_steps=2)
    with lock(tmp_path / "runs" / "run"):
        for how in ("auto", "none"):
            with pytest.raises(UserError, match="another process is writing"):
                run_train(max_steps=2, output_dir=str(tmp_path / "other"), resume_from_checkpoint=how)
    assert not (tmp_path / "runs" / "run.1").exists()


def test_mistake_does_not_set_the_old_run_aside(run_train, small_model, tmp_path):
    run_train(max_steps=2)
    with pytest.raises(UserError):
        run_train(model=str(tmp_path / "none"), resume_from_checkpoint="none")
    assert (tmp_path / "runs" / "run").exists() and not (tmp_path / "runs" / "run.1").exists()


def test_resume_refuses_to_go_back(run_train, tmp_path):
    run_train(save_total_limit=9)
    with pytest.raises(UserError, match="has gone on to step-00000012"):
        run_train(resume_from_checkpoint=str(tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"))
