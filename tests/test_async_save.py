"""Saving in the background: the same checkpoints as without, published in order, and training goes on meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, assert_equal_weights, flags

from mori import optim, output
from mori.checkpoint import checkpoints, writing
from mori.checkpoint.tensors import HostMemory
from mori.cli import Interrupted, RunFailed
from mori.config import TrainConfig
from mori.train import train


def saved(tmp_path, run_name: str = "run") -> dict[str, dict]:
    """The hashes of the tensors in each checkpoint of a run, by the checkpoint's name."""
    files = {}
    for folder in checkpoints.published(tmp_path / "runs" / run_name / "checkpoints"):
        checkpoints.verify(folder)
        described = json.loads((folder / "manifest.json").read_text())["files"]
        files[folder.name] = {
            name: described[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")
        }
    return files


class Gate:
    """Holds every staging back until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.running, self.most_running, self.steps = threading.Event(), 0, 0, []
        real = writing.stage

        def stage(root, snapshot, *rest):
            self.running, self.steps = self.running + 1, [*self.steps, snapshot.step]
            self.most_running = max(self.most_running, self.running)
            self.opened.wait(60)
            self.running -= 1
            return real(root, snapshot, *rest)

        monkeypatch.setattr(writing, "stage", stage)


@pytest.fixture
def gate(monkeypatch):
    """A gate that is closed."""
    return Gate(monkeypatch)


def test_async_save_writes_the_checkpoints_of_a_run_without_it(run_train, settings, tmp_path, gate):
    gate.opened.set()
    run_train(save_total_limit=9, run_name="whole", output_dir=str(tmp_path / "whole"))
    gate.opened.clear()
    config = TrainConfig(**settings, save_total_limit=9, async_save=True)
    # The snapshot of step 4 is written after three more steps have changed the weights.
    train(config, on_step=lambda step, _: gate.opened.set() if step == 7 else None)
    assert saved(tmp_path) == saved(tmp_path, "whole") and list(saved(tmp_path)) == [
        f"step-{step:08d}" for step in (4, 8, 12)
    ]
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


def test_async_save_copies_while_the_gradients_are_computed_and_the_optimizer_waits(run_train, tmp_path, monkeypatch):
    run_train(save_total_limit=9, run_name="whole", output_dir=str(tmp_path / "whole"))
    gradients, copy, rate = threading.Event(), HostMemory.copy, optim.set_learning_rate
    threads = []

    def slow(memory, file, tensors):
        threads.append(threading.current_thread() is threading.main_thread())
        assert gradients.wait(60)
        time.sleep(0.2)
        return copy(memory, file, tensors)

    monkeypatch.setattr(HostMemory, "copy", slow)
    monkeypatch.setattr(optim, "set_learning_rate", lambda *a: (gradients.set(), rate(*a)))
    real_save = output.save
    monkeypatch.setattr(output, "save", lambda *a: (gradients.clear(), real_save(*a)))
    finish = output.finish
    monkeypatch.setattr(output, "finish", lambda *a: (gradients.set(), finish(*a))[1])
    run_train(save_total_limit=9, async_save=True)
    assert saved(tmp_path) == saved(tmp_path, "whole") and threads and not any(threads)


def test_async_save_publishes_between_steps_once_it_is_staged(settings, tmp_path, gate, monkeypatch):
    at_step, real = {}, writing.Pending.is_staged.fget

    def is_staged(pending):
        gate.opened.set()  # asked for the first time between steps 5 and 6
        pending._staged.exception()
        return real(pending)

    monkeypatch.setattr(writing.Pending, "is_staged", property(is_staged))
    train(
        TrainConfig(**settings, async_save=True),
        on_step=lambda step, _: at_step.update({step: list(saved(tmp_path))}),
    )
    four, eight = "step-00000004", "step-00000008"
    assert at_step[5] == [] and at_step[6] == at_step[9] == [four] and at_step[10] == [four, eight]


def test_async_save_never_writes_two_checkpoints_at_once(settings, tmp_path, gate):
    real, waited = output.complete_save, []

    def open_after(step, _):
        if step == 9:
            gate.opened.set()

    def complete_save(run, state):
        if state.pending_save and state.step == 8:
            waited.append(list(saved(tmp_path)))
            gate.opened.set()
        real(run, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "complete_save", complete_save)
        train(TrainConfig(**settings, async_save=True, save_total_limit=9), on_step=open_after)
    assert waited == [[]] and gate.steps == [4, 8, 12] and gate.most_running == 1 and len(saved(tmp_path)) == 3


def test_signal_publishes_the_pending_checkpoint_and_then_that_of_the_step(settings, tmp_path, gate, monkeypatch):
    def tell(step, _):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            gate.opened.set()

    config = TrainConfig(**settings, async_save=True)
    with pytest.raises(Interrupted, match="saved at step 6"):
        train(config, on_step=tell)
    assert list(saved(tmp_path)) == ["step-00000004", "step-00000006"] and gate.steps == [4, 6]
    gate.opened.set()
    train(config)
    train(TrainConfig(**{**settings, "run_name": "whole", "output_dir": str(tmp_path / "whole")}))
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


@pytest.mark.parametrize("failing", ["write", "snapshot"])
def test_failed_async_save_is_a_warning_and_the_best_is_that_of_the_checkpoint_before(
    run_train, tmp_path, monkeypatch, capsys, failing
):
    real, states, real_save = writing.stage, [], output.save

    def stage(root, snapshot, *rest):
        if snapshot.step == 8:
            raise OSError(28, "No space left on device")
        return real(root, snapshot, *rest)

    def snapshot(step, **content):
        if step == 8:
            raise TypeError("no name")
        return real_snapshot(step, **content)

    real_snapshot = writing.snapshot
    if failing == "write":
        monkeypatch.setattr(writing, "stage", stage)
    else:
        monkeypatch.setattr(writing, "snapshot", snapshot)
    monkeypatch.setattr(output, "save", lambda run, state: (states.append(state), real_save(run, state)))
    options = {"max_steps": 10, "eval_steps": 4, "learning_rate": 1e-3, "save_steps": 4, "async_save": True}
    run_train(**options, save_total_limit=9, load_best_model_at_end=True)
    assert capsys.readouterr().out.count("WARNING: no checkpoint at step 8: ") == 1
    assert list(saved(tmp_path)) == ["step-00000004", "step-00000010"]
    assert states[0].best.saved["step"] in (4, 10)


def test_failed_last_async_save_fails_the_run(run_train, tmp_path, monkeypatch):
    real = writing.stage

    def stage(root, snapshot, *rest):
        if snapshot.step == 12:
            raise OSError(28, "No space left on device")
        return real(root, snapshot, *rest)

    monkeypatch.setattr(writing, "stage", stage)
    with pytest.raises(RunFailed, match="the last checkpoint could not be saved"):
        run_train(async_save=True)
    assert list(saved(tmp_path))[-1] == "step-00000008" and (tmp_path / "brain" / "model.safetensors").is_file()


def test_error_in_a_step_leaves_the_pending_checkpoint_published(settings, tmp_path, gate, monkeypatch):
    real = optim.set_learning_rate
    calls = []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 6:
            gate.opened.set()
            raise RuntimeError("broken")
        return real(*arguments)

    monkeypatch.setattr(optim, "set_learning_rate", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(TrainConfig(**settings, async_save=True))
    assert list(saved(tmp_path)) == ["step-00000004"]


def test_second_ctrl_c_leaves_nothing_of_a_pending_checkpoint(settings, tmp_path, gate, monkeypatch):
    def leave(step, _):
        if step == 5:
            threading.Timer(0.2, gate.opened.set).start()
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, async_save=True), on_step=leave)
    assert os.listdir(tmp_path / "runs/run/checkpoints") == [] and threading.active_count() <= before + 1


def test_host_memory_is_reused_and_holds_what_was_copied():
    memory, tensor = HostMemory(), torch.arange(6.0).view(2, 3).T
    first = memory.copy("a", {"x": tensor, "n": torch.tensor(3)})
    address, expected = first["x"].data_ptr(), tensor.clone()
    tensor += 1
    assert torch.equal(first["x"], expected) and first["n"].item() == 3
    second = memory.copy("a", {"x": tensor, "n": torch.tensor(4)})
    assert second["x"].data_ptr() == address and torch.equal(second["x"], tensor)
    assert memory.copy("b", {"x": tensor})["x"].data_ptr() != address
    assert memory.copy("a", {"x": tensor.double()})["x"].dtype == torch.float64


def test_two_ranks_save_in_the_background_what_they_save_without(settings, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    for name, options in {"run": ["--async_save"], "whole": []}.items():
        words = flags({**settings, "save_total_limit": 9, "run_name": name, "output_dir": tmp_path / name})
        done = subprocess.run([*command, *words, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert saved(tmp_path) == saved(tmp_path, "whole") and len(saved(tmp_path)) == 3
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
