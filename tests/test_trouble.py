"""What a run does when numbers go bad, memory or disk runs out, or nobody listens any more."""

import os
import re
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT, assert_equal_weights, flags, stop_after, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mori import optim, output
from mori.checkpoint import checkpoints, files, writing
from mori.cli import RunFailed
from mori.model import saving
from mori.model.lm import CausalLMLoss
from mori.tracking.loggers import MetricsFile, read_metrics


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_that_are_never_finite_stop_the_run(run_train, tmp_path, monkeypatch, precision):
    real, calls = CausalLMLoss.forward, []

    def poisoned(*batch):
        calls.append(torch.is_grad_enabled())
        loss = real(*batch)
        return loss * torch.nan if sum(calls) > 5 else loss

    monkeypatch.setattr(CausalLMLoss, "forward", poisoned)
    with pytest.raises(RunFailed, match="3 steps in a row, up to step 8.*loss nan"):
        run_train(precision=precision, max_nonfinite_steps=3, eval_steps=100, save_steps=1)
    logged = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert logged[-1]["train/skipped_steps"] == 3 and logged[-1]["train/loss"] != logged[-1]["train/loss"]
    from safetensors.torch import load_file

    for path in (tmp_path / "runs" / "run" / "checkpoints").glob("*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert not (tmp_path / "brain").exists()


def test_smaller_batch_size_after_out_of_memory_is_remembered(run_train, tmp_path, monkeypatch, capsys):
    real, sizes, rows = CausalLMLoss.forward, [], []

    def forward(self, input_ids, labels, n_targets=None, loss_scale=None):
        if n_targets is not None:
            sizes.append(len(input_ids))
            rows.append(self.rows)
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, input_ids, labels, n_targets, loss_scale)

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 8}
    stop_after(4, lambda: run_train(**options))
    assert sizes == rows == [4] + [2] * 10  # the step that is broken off among them
    assert "step 1: memory ran out" in capsys.readouterr().out
    sizes.clear()
    run_train(**options)
    assert sizes == [2] * 8  # 4 is not tried again
    monkeypatch.undo()
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run_train(**options, run_name="small", output_dir=str(tmp_path / "small"))
    assert_equal_weights(tmp_path / "small", tmp_path / "brain")


def test_run_fails_if_not_one_window_fits(run_train, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    with pytest.raises(RunFailed, match="use a smaller --block_size"):
        run_train()


def test_graph_of_a_failed_pass_is_freed_before_the_retry(run_train, monkeypatch):
    real, kept, alive = CausalLMLoss.forward, [], []

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def forward(self, input_ids, labels, n_targets=None, loss_scale=None):
        if n_targets is None:
            return real(self, input_ids, labels)
        if kept:
            alive.append(kept[0]() is not None)
        loss = real(self, input_ids, labels, n_targets, loss_scale)
        if len(input_ids) > 2:
            hidden = loss * 1  # stands for all that the failed pass holds
            kept.append(weakref.ref(hidden))
            loss = hidden * 1
            loss.register_hook(full)
            loss.hidden = hidden
        return loss

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    run_train(per_device_train_batch_size=4, max_steps=1)
    assert alive and not any(alive)


def test_interrupted_run_that_cannot_be_saved_fails(run_train, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.Pending, "files", full)
    real = optim.set_learning_rate
    monkeypatch.setattr(optim, "set_learning_rate", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), real(*a)))
    with pytest.raises(RunFailed, match="stopped by SIGTERM, NOT saved at step 1"):
        run_train()


def test_run_that_only_skips_stops_between_logs_too(run_train, tmp_path, monkeypatch):
    real = CausalLMLoss.forward

    def forward(self, input_ids, labels, n_targets=None, loss_scale=None):
        loss = real(self, input_ids, labels, n_targets, loss_scale)
        return loss if n_targets is None else loss * torch.nan

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    with pytest.raises(RunFailed, match="in 3 steps in a row, up to step 3 .*the loss, on the training windows"):
        run_train(max_nonfinite_steps=3, logging_steps=1000, max_steps=20)
    [line] = [line for line in read_metrics(tmp_path / "runs/run/metrics.jsonl") if "train/loss" in line]
    assert line["step"] == 3 and line["train/loss"] != line["train/loss"]  # the real figure, not 0


def test_failed_prune_is_not_a_failed_save(run_train, tmp_path, capsys, monkeypatch):
    def busy(*_):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoints, "prune", busy)
    run_train()
    assert "could not delete an old checkpoint" in capsys.readouterr().out
    assert len(list((tmp_path / "runs/run/checkpoints").iterdir())) == 3


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_infinite_norm_is_skipped_with_a_scaler_too(run_train, small_model, tmp_path, monkeypatch, max_grad_norm):
    """Gradients of 1e30 are finite, their norm is not."""
    real = CausalLMLoss.forward

    def forward(self, input_ids, labels, n_targets=None, loss_scale=None):
        loss = real(self, input_ids, labels, n_targets, loss_scale)
        if n_targets is not None:
            for parameter in self.parameters():
                parameter.register_hook(lambda grad: torch.full_like(grad, 1e30))
        return loss

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    with pytest.raises(RunFailed, match="3 steps in a row"):
        run_train(precision="fp16", max_grad_norm=max_grad_norm, max_nonfinite_steps=3, save_steps=1)
    start = AutoModelForCausalLM.from_pretrained(small_model).state_dict()
    for folder in (tmp_path / "runs/run/checkpoints").iterdir():
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert torch.equal(tensor, start[name]), name


def test_other_runtime_errors_are_raised(run_train, monkeypatch):
    def forward(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        run_train()


def test_diverging_run_ends_or_stops_in_one_line(run_train, tmp_path):
    try:
        summary = run_train(learning_rate=1e30, max_grad_norm=0.0)
    except RunFailed:
        return
    assert summary["skipped_steps"] > 0 and "no sample" in summary["samples"]["after"][0]


def test_closed_pipe_does_not_stop_the_training(settings, tmp_path):
    words = " ".join(flags({**settings, "prompt": "Halo"}))
    shell = f"set -o pipefail; {sys.executable} {ROOT}/scripts/train.py {words} | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "brain" / "config.json").exists(), done.stderr


def test_full_disk_does_not_stop_the_training(run_train, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def rehearse(*arguments):
        size = real(*arguments)
        monkeypatch.setattr(files.os, "write", full)
        return size

    real = output.rehearse
    monkeypatch.setattr(output, "rehearse", rehearse)
    for module in (files, saving):
        monkeypatch.setattr(module, "write_json", lambda *_: None)
    with pytest.raises(RunFailed, match="last checkpoint could not be saved"):
        run_train(max_steps=4, save_steps=2)
    said = capsys.readouterr().out
    for step in (2, 4):  # the next save tries again
        assert f"WARNING: no checkpoint at step {step}: {tmp_path}/runs/run/checkpoints: No space left" in said
    assert re.search(r"it needs 0\.\d MiB", said) and "MiB are free" in said
    assert not list((tmp_path / "runs" / "run" / "checkpoints").iterdir())
    monkeypatch.undo()
    first = weights(tmp_path / "brain")
    run_train(max_steps=4, save_steps=2)  # with room again, it begins anew, and ends alike
    assert all(torch.equal(value, first[name]) for name, value in weights(tmp_path / "brain").items())


def test_unwritable_log_does_not_stop_the_training(run_train, tmp_path, capsys, monkeypatch):
    """For a while the log's folder is gone: each write fails, is told once, and is tried again."""
    real, calls = MetricsFile.scalars, []

    def scalars(self, *arguments):
        calls.append(1)
        self.run_dir = tmp_path / ("missing" if 3 <= len(calls) < 6 else "runs/run")
        real(self, *arguments)

    monkeypatch.setattr(MetricsFile, "scalars", scalars)
    run_train(eval_steps=100)
    assert capsys.readouterr().out.count("cannot be written") == 1
    steps = [line["step"] for line in read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")]
    assert steps == [0, 1, *range(5, 13), 12]


def test_missing_tensorboard_does_not_stop_the_training(run_train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.summary", None)  # its import fails
    run_train(max_steps=4)
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]
    assert not list((tmp_path / "runs" / "run").glob("events.*"))


def test_nonfinite_weight_is_never_published(run_train, tmp_path, capsys, monkeypatch):
    real, calls = optim.set_learning_rate, []

    def poison(optimizer, value):
        calls.append(1)
        if len(calls) == 6:
            optimizer.param_groups[0]["params"][0].data[0, 0] = torch.nan
        real(optimizer, value)

    monkeypatch.setattr(optim, "set_learning_rate", poison)
    with pytest.raises(RunFailed, match="is not finite"):
        run_train(max_steps=12, save_steps=4, eval_steps=100)
    assert not (tmp_path / "brain").exists()
    assert "is not finite" in capsys.readouterr().out
    kept = [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000004"]
