"""mori without what only POSIX has. No Windows machine was at hand: a subprocess hides it and imitates how Windows refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, assert_equal_weights, flags, wait_for

# The modules are hidden from mori alone: on Windows, libraries take others.
IMITATION = """
import builtins, errno, os, runpy, signal, sys, types
real_import, real_open, real_rename, real_fsync = builtins.__import__, os.open, os.rename, os.fsync
import fcntl, torch, torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, get_scheduler  # these choose by system
def imported(name, globals=None, *rest, **options):
    if str((globals or {}).get("__name__")).startswith("mori"):
        if name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "msvcrt":
            return msvcrt
    return real_import(name, globals, *rest, **options)
builtins.__import__ = imported
def locking(handle, mode, size):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None
msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for module, names in ((os, "fork sched_getaffinity sched_setaffinity sysconf geteuid getuid sync"),
                      (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGKILL")):
    for name in names.split():
        delattr(module, name)
os.O_BINARY = 1 << 30
writable = set()
def opened(path, flags, *rest, **options):
    if os.path.isdir(path) and "dir_fd" not in options:  # as shutil.rmtree has it here alone
        raise PermissionError(errno.EACCES, "Permission denied", path)
    if flags & os.O_WRONLY and str(path).endswith((".json", ".safetensors", ".partial")):
        assert flags & os.O_BINARY, f"{path} would get the line ends of text"
    handle = real_open(path, flags & ~os.O_BINARY, *rest, **options)
    (writable.add if flags & (os.O_WRONLY | os.O_RDWR) else writable.discard)(handle)
    return handle
os.open = opened
def renamed(source, target, **options):
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "File exists", source, None, target)
    inside = os.path.realpath(source) + os.sep
    for handle in os.listdir("/proc/self/fd"):
        try:
            if os.path.realpath(f"/proc/self/fd/{handle}").startswith(inside):
                raise PermissionError(errno.EACCES, "a file is open", source)
        except FileNotFoundError:
            pass
    real_rename(source, target, **options)
os.rename = renamed
def synced(handle):
    if isinstance(handle, int) and handle not in writable and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == 0:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real_fsync(handle)
os.fsync = synced
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script: str, *words, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", IMITATION, str(ROOT / "scripts" / script), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed, errors


def test_train_kill_resume_generate_on_windows(run_train, settings, tmp_path):
    run_train(output_dir=str(tmp_path / "expected"), run_name="expected")
    words = flags({**settings, "save_steps": 1})
    process = start("train.py", *words)
    wait_for(tmp_path / "runs/run/checkpoints/step-00000003", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, errors = finish(start("train.py", *words))
    assert errors.count("refuses to open a folder for fsync") == 1  # said once
    assert "refuses flock" not in errors
    assert json.loads((tmp_path / "runs/run/summary.json").read_text())["steps"] == 12
    assert_equal_weights(tmp_path / "brain", tmp_path / "expected")
    printed, _ = finish(start("generate.py", "--model", tmp_path / "brain", "--prompt", "Halo", "--max_new_tokens", 4))
    assert printed.startswith("Halo")


def test_train_interrupted_on_windows_saves_and_starts_over(settings, tmp_path):
    words = flags({**settings, "max_steps": 4000, "save_steps": 2, "eval_steps": 4000})
    process = start("train.py", *words)
    wait_for(tmp_path / "runs/run/checkpoints/step-00000002", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300) and process.returncode == 130


def test_run_folder_is_locked_on_windows(settings, tmp_path):
    words = flags({**settings, "max_steps": 4000, "save_steps": 2, "eval_steps": 4000})
    first = start("train.py", *words)
    wait_for(tmp_path / "runs/run/checkpoints/step-00000002", first)
    second = start("train.py", *words)
    _, errors = second.communicate(timeout=300)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "another process is writing" in errors


@pytest.mark.parametrize("module", ["fcntl", "resource", "pwd", "grp", "termios", "msvcrt", "winreg"])
def test_no_module_of_one_system_is_imported_unguarded(module):
    places = [
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "mori").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
        if f"\nimport {module}\n" in path.read_text(encoding="utf-8")
    ]
    assert places == []
