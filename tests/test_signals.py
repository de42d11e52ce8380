"""Asked to stop, a run finishes its step, saves, leaves with code 130, and goes on later to the same bits."""

import fcntl
import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_equal_weights, flags

import mori.run
import mori.train
from mori import optim, output
from mori.checkpoint import checkpoints
from mori.cli import Interrupted, interruptible
from mori.distributed import StopSignals
from mori.tracking.loggers import read_metrics

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def saved_steps(tmp_path: Path) -> list[str]:
    return [path.name for path in checkpoints.published(tmp_path / "runs" / "run" / "checkpoints")]


# Where in a run the signal falls: a function that the run calls then, and at which of its calls.
PLACES = {
    "before the first step": (mori.train, "evaluate", 1, 0),
    "in a step": (optim, "set_learning_rate", 3, 3),
    "in an accumulation": (mori.train, "load_step", 5, 5),
    "in an evaluation": (mori.train, "evaluate", 2, 6),
    "in the samples": (mori.train, "generate", 2, 6),
    "in a save": (output, "save", 1, 4),
    "in the last step": (optim, "set_learning_rate", 12, 12),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_saves_within_a_step_and_the_resumed_run_is_bit_identical(
    run_train, tmp_path, monkeypatch, place, number
):
    module, name, at_call, expected_step = PLACES[place]
    options = {"gradient_accumulation_steps": 2, "logging_steps": 5}
    run_train(**options, run_name="whole", output_dir=str(tmp_path / "whole"))
    real, calls = getattr(module, name), []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(Interrupted, match=f"{number.name}, saved at step {expected_step};"):
            run_train(**options)
    assert signal.getsignal(number) == handler
    assert saved_steps(tmp_path)[-1] == f"step-{expected_step:08d}"
    run_train(**options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    whole, stopped = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "run"))
    numbers = ("step", "train/loss", "train/grad_norm", "eval/loss")
    assert [[line.get(n) for n in numbers] for line in whole] == [[line.get(n) for n in numbers] for line in stopped]


def test_signal_exits_with_130_and_names_the_step(settings, tmp_path):
    words = flags({**settings, "max_steps": 100_000, "eval_steps": 1e5, "save_steps": 1e5})
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_lines(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"saved at step {int(saved_steps(tmp_path)[-1][5:])}" in errors


def _wait_for_lines(tmp_path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_second_ctrl_c_interrupts_but_its_echo_does_not():
    with StopSignals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo
        assert signals.received == "SIGINT"
        signals._at -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_with_a_dead_pipe_saves(settings, tmp_path):
    """`train.py 2>&1 | tee log`: Ctrl-C ends tee as well."""
    words = flags({**settings, "max_steps": 100_000, "eval_steps": 1e5, "save_steps": 1e5})
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    _wait_for_lines(tmp_path, process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and len(saved_steps(tmp_path)) == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_the_first_step_ends_the_run_at_once(run_train, tmp_path, monkeypatch, number):
    real = mori.run.prepare
    monkeypatch.setattr(mori.run, "prepare", lambda *a: (os.kill(os.getpid(), number), time.sleep(60), real(*a)))
    with pytest.raises(KeyboardInterrupt):
        run_train()
    assert not (tmp_path / "runs" / "run").exists()


def test_interruptible_ends_a_native_call_at_once():
    finished = []

    def derive():
        try:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)  # seconds that no signal handler interrupts
        finally:
            finished.append(True)

    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(derive)
    assert not finished


def test_interruptible_returns_and_raises_as_the_action_does():
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_closed_terminal_saves(settings, tmp_path):
    """The terminal's window is closed: the system sends SIGHUP, and nothing can be printed any more."""
    words = flags({**settings, "max_steps": 5_000, "eval_steps": 1e5, "save_steps": 1e5})
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words]
    keys, screen = pty.openpty()

    def open_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen)
    process = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=open_terminal)
    os.close(screen)
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        if select.select([keys], [], [], 0.1)[0]:
            os.read(keys, 4096)  # what the run prints, so that it never waits for a reader
    os.close(keys)
    assert process.wait(timeout=60) == 130 and len(saved_steps(tmp_path)) == 1


def test_nohup_ignores_a_closed_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_hang_up_of_torchrun_saves(settings, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    words = flags({**settings, "max_steps": 100_000, "save_steps": 1e5, "eval_steps": 1e5})
    process = subprocess.Popen(
        [*torchrun, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    _wait_for_lines(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert "saved at step" in errors and len(saved_steps(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_rank_stops_all_ranks(settings, tmp_path, number):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    words = flags({**settings, "max_steps": 60, "save_steps": 1000, "eval_steps": 1000})
    whole = [*torchrun, *words, "--run_name", "whole", "--output_dir", str(tmp_path / "whole")]
    assert subprocess.run(whole, cwd=ROOT, capture_output=True).returncode == 0
    process = subprocess.Popen(
        [*torchrun, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    _wait_for_lines(tmp_path, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "saved at step" in errors
    [step] = saved_steps(tmp_path)
    assert 0 < int(step[5:]) < 60
    assert subprocess.run([*torchrun, *words], cwd=ROOT, capture_output=True).returncode == 0
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
