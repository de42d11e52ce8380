"""File systems that lack a call which the work does not need, or whose folders cannot be renamed."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
from pathlib import Path

import numpy
import pytest
from conftest import assert_equal_weights, stop_after, weights

from mori import output
from mori.checkpoint import files, tensors
from mori.cli import RunFailed, UserError, errors


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(errors, "_refused", set())


def refuse(monkeypatch, owner, name: str, number: int, when=lambda *_, **__: True) -> None:
    """Let `owner.name` raise the error `number` if `when` is true of its arguments."""
    real = getattr(owner, name)

    def refusing(*arguments, **options):
        if when(*arguments, **options):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, refusing)


def is_folder(handle, *_) -> bool:
    return stat.S_ISDIR(os.fstat(handle).st_mode)


REFUSALS = {
    "flock ENOSYS": (fcntl, "flock", errno.ENOSYS, lambda *_, **__: True, "would not notice each other"),
    "flock ENOLCK": (fcntl, "flock", errno.ENOLCK, lambda *_, **__: True, "would not notice each other"),
    "fsync of a folder": (os, "fsync", errno.EINVAL, is_folder, "a power cut may lose"),
    "fsync": (os, "fsync", errno.EOPNOTSUPP, lambda *_, **__: True, "a power cut may lose"),
    "open of a folder": (os, "open", errno.EISDIR, lambda path, mode, *_, **options: not options and mode == os.O_RDONLY and Path(path).is_dir(), "a power cut may lose"),
    "chmod": (Path, "chmod", errno.EPERM, lambda *_, **__: True, "only this user may read"),
    "mmap of token ids": (numpy, "memmap", errno.ENODEV, lambda *_, **__: True, "read whole into memory"),
    "mmap of weights": ("mori.model.loading.mmap", "mmap", errno.ENODEV, lambda *_, **__: True, "read whole into memory"),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refused_call_costs_no_work_and_is_said_once(run_train, tmp_path, monkeypatch, capsys, refusal):
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    owner, name, number, when, lost = REFUSALS[refusal]
    if isinstance(owner, str):
        monkeypatch.setattr(
            f"{owner}.{name}", lambda *_, **__: (_ for _ in ()).throw(OSError(number, "No such device"))
        )
    else:
        refuse(monkeypatch, owner, name, number, when)
    capsys.readouterr()
    shutil.rmtree(tmp_path / "runs" / ".cache")  # the token file is written under the refusal too
    stop_after(8, run_train)
    run_train()
    monkeypatch.undo()
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    output = "".join(capsys.readouterr())
    assert output.count(lost) == 1 and "WARNING" not in output and "make room" not in output


def test_checkpoint_is_read_without_mmap(run_train, tmp_path, monkeypatch):
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(8, run_train)
    refuse(monkeypatch, tensors, "safe_open", errno.ENODEV)
    run_train()
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EPERM, errno.EBUSY])
def test_folders_that_cannot_be_renamed_are_moved_file_by_file(run_train, tmp_path, monkeypatch, number):
    """An overlay's lower folders, and object stores."""
    run_train(run_name="first", max_steps=2)
    first = weights(tmp_path / "brain")
    refuse(monkeypatch, os, "rename", number, lambda source, *_: Path(source).is_dir())
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(8, run_train)
    run_train()
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    previous = weights(tmp_path / "brain.previous")
    assert all(previous[name].equal(tensor) for name, tensor in first.items())
    assert [path.name for path in tmp_path.rglob(".*") if path.suffix in (".partial", ".pruned")] == []


@pytest.mark.parametrize(
    "number, advice", [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EIO, "mend that")]
)
def test_only_a_full_disk_is_told_to_make_room(run_train, tmp_path, monkeypatch, number, advice):
    real = output.publish_model

    def publish(*arguments):
        refuse(monkeypatch, files, "replace_folder", number)
        real(*arguments)

    monkeypatch.setattr(output, "publish_model", publish)
    with pytest.raises(RunFailed, match=f"{os.strerror(number)}; {advice} and run the same command again"):
        run_train(max_steps=1)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def mount(tmp_path):
    """Mount a file system, or skip the test; everything is unmounted at the end."""
    mounted = []

    def do(folder: Path, *options: str) -> Path:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True) if shutil.which("mount") else None
        if not done or done.returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)
        return folder

    yield do
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind", "read-only parent"])
def test_mount_point_is_filled_in_place(run_train, tmp_path, mount, kind):
    parent = tmp_path
    if kind == "read-only parent":
        parent = mount(tmp_path / "parent", "-t", "tmpfs", "none")
    brain = parent / "the brain"
    (tmp_path / "source").mkdir()
    mount(brain, *(["--bind", str(tmp_path / "source")] if kind == "bind" else ["-t", "tmpfs", "none"]))
    if kind == "read-only parent":
        subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
    (brain / "lost+found").mkdir()
    (brain / ".hidden").write_text("mine")
    run_train(output_dir=str(brain), max_steps=2, run_name="a")
    first = weights(brain)
    run_train(output_dir=str(brain), max_steps=3, run_name="b")
    second = weights(brain)
    assert all(weights(brain / ".previous")[name].equal(tensor) for name, tensor in first.items())
    run_train(output_dir=str(brain), max_steps=4, run_name="c")
    assert all(weights(brain / ".previous")[name].equal(tensor) for name, tensor in second.items())
    assert all(weights(brain / ".previous.1")[name].equal(tensor) for name, tensor in first.items())
    assert not {".partial", ".rehearsal.partial"} & set(names(brain)) and (brain / ".hidden").read_text() == "mine"
    made_at = (brain / "config.json").stat().st_mtime_ns
    run_train(output_dir=str(brain), max_steps=4, run_name="c")  # it is finished
    assert (brain / "config.json").stat().st_mtime_ns == made_at
    run_train(output_dir=str(tmp_path / "plain"), max_steps=4, run_name="plain")
    assert_equal_weights(brain, tmp_path / "plain")


def test_mount_point_whose_filling_was_cut_loses_nothing(run_train, tmp_path, monkeypatch):
    brain = tmp_path / "brain"
    run_train(max_steps=2, run_name="a")
    first = (brain / "model.safetensors").read_bytes()
    monkeypatch.setattr(files, "_mount_points", lambda: {os.fsencode(brain)})
    for moment in range(1, 9, 2):
        moved, real = [], os.rename

        def cut(source, target, moved=moved, real=real, moment=moment):
            if str(source).startswith(f"{brain}/") and "rehearsal" not in f"{source}":
                moved.append(source)
                if len(moved) == moment:
                    raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", cut)
            with contextlib.suppress(KeyboardInterrupt):  # what is left may need fewer moves
                run_train(max_steps=3, run_name="b")
    run_train(max_steps=3, run_name="b")
    run_train(output_dir=str(tmp_path / "plain"), max_steps=3, run_name="plain")
    assert_equal_weights(brain, tmp_path / "plain")
    assert first in [path.read_bytes() for path in brain.rglob("model.safetensors")]


def test_mount_point_with_something_else_is_refused(run_train, tmp_path, monkeypatch):
    (tmp_path / "brain").mkdir()
    (tmp_path / "brain" / "photos").mkdir()
    monkeypatch.setattr(files, "_mount_points", lambda: {os.fsencode(tmp_path / "brain")})
    with pytest.raises(UserError, match="contains something that is not a model"):
        run_train()


def test_mount_points_with_odd_names_are_recognized(tmp_path, mount):
    folder = mount(tmp_path / "a b\\c\td ü", "-t", "tmpfs", "none")
    assert os.fsencode(folder) in files._mount_points() and files.stays_in_place(folder)
    assert not files.stays_in_place(tmp_path)
