"""Durable files: content is on disk before the rename that publishes it, so a crash leaves the old version or the new one.

Every change on disk is an `os.*` call, so tests can stop the process between any two changes. A call that some file systems
refuse is `optional`, or has another way.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from mori.cli import UNSUPPORTED, UserError, optional

# How a file system refuses to rename a folder though it may rename files: mount points, overlays, object stores.
_CANNOT_RENAME = UNSUPPORTED | {errno.EBUSY, errno.EXDEV, errno.EMFILE}
PREVIOUS = ".previous"
_PARTIAL = ".partial"
# Windows translates line ends unless told not to, and syncs only what it may write.
_BINARY = getattr(os, "O_BINARY", 0)
_TO_SYNC = os.O_RDWR if _BINARY else os.O_RDONLY


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> dict:
    """Write `blocks` to a new file and sync it; returns its size in bytes and its SHA-256, as `describe` does."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
    try:
        for block in blocks:
            digest.update(block)
            rest = memoryview(block)
            while rest:
                written = os.write(handle, rest)
                size, rest = size + written, rest[written:]
        _fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(path: Path, value) -> None:
    """Write a JSON file and rename it into place, so a reader sees the old file or the new one, never a part."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        write(staged, [json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"])
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on disk."""
    with optional("to open a folder for fsync", "a power cut may lose the newest files"):
        handle = os.open(path, _TO_SYNC)
        try:
            _fsync(handle)
        finally:
            os.close(handle)


def _fsync(handle: int) -> None:
    with optional("fsync", "a power cut may lose the newest files"):
        os.fsync(handle)


def publish(final: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill(folder)` on a staging folder, then put that folder in the place of `final`, see `replace_folder`.

    Raises OSError if it cannot be written, after removing the staging folder.
    """
    staged = staging_folder(final)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        fill(staged)
        replace_folder(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish_file(final: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill(path)` on a name beside `final`, sync the file, and rename it; an existing `final` becomes `<name>.previous`.

    Raises what `fill` raises, after removing the unfinished file.
    """
    staged = final.with_name(f".{final.name}{_PARTIAL}")
    try:
        fill(staged)
        sync(staged)
        if final.exists():
            previous = final.with_name(final.name + PREVIOUS)
            set_aside(previous)
            os.rename(final, previous)
        os.rename(staged, final)
        sync(final.parent)
    finally:
        staged.unlink(missing_ok=True)


def rehearse_publication(final: Path, fill: Callable[[Path], None]) -> dict[str, bytes]:
    """Publish twice inside the staging folder, as `publish` would, and remove it; returns the files' contents by path.

    `final` itself is not touched. A killed rehearsal leaves the staging folder, which the next start removes.
    """
    staged = staging_folder(final)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        os.makedirs(staged)
        folder = staged / "rehearsal"
        publish(folder, os.mkdir)
        publish(folder, fill)  # replaces the first
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def staging_folder(final: Path) -> Path:
    """Where the files for the folder `final` are written first: beside it, or inside if it cannot be renamed."""
    return final / _PARTIAL if stays_in_place(final) else final.with_name(f".{final.name}{_PARTIAL}")


def stays_in_place(folder: Path) -> bool:
    """Whether an existing folder is a mount point, or its parent's permissions forbid to rename it."""
    if not folder.is_dir():
        return False
    if os.path.ismount(folder) or os.fsencode(folder) in _mount_points():
        return True
    parent, user = folder.parent.stat(), os.geteuid() if hasattr(os, "geteuid") else 0
    sticky = parent.st_mode & stat.S_ISVTX and user not in (0, parent.st_uid, folder.stat().st_uid)
    return bool(sticky) or not os.access(folder.parent, os.W_OK | os.X_OK)


def _mount_points() -> set[bytes]:
    """All mount points on Linux, also those of a folder of the same file system, which `ismount` does not recognize."""
    with contextlib.suppress(OSError):
        fields = [line.split()[4] for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]
        return {re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), field) for field in fields}
    return set()


def replace_folder(staged: Path, final: Path) -> None:
    """Sync the complete folder `staged` and put it in the place of `final`, by renames.

    Nothing is deleted: an existing `final` becomes `<name>.previous`, an existing `<name>.previous` becomes
    `<name>.previous.1`, and so on. If `staged` is inside `final`, `final` is filled in place, and its old files go into
    `.previous` inside it.
    """
    for path in [*staged.rglob("*"), staged]:
        wanted = 0o666 & ~_umask()
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != wanted:  # safetensors writes files with mode 0600
            with optional("chmod", "only this user may read the model's files"):
                path.chmod(wanted)
        sync(path)
    if staged.parent == final:
        old, previous = visible(final), final / PREVIOUS
        if old and previous.exists() and any(previous.iterdir()):
            set_aside(previous)
        os.makedirs(previous, exist_ok=True)  # also without old files, as the mark of a folder that is filled in place
        _move(old, previous)
        _move(list(staged.iterdir()), final)
        sync(final)
        return
    if final.exists():
        previous = final.with_name(final.name + PREVIOUS)
        set_aside(previous)
        rename_folder(final, previous)
    rename_folder(staged, final)
    sync(final.parent)


def visible(folder: Path) -> list[Path]:
    """What is in a folder, without hidden files and what a file system itself puts there."""
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "lost+found"]


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder to a new name; its files one by one if the file system cannot rename folders."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME:
            raise
        os.makedirs(target, exist_ok=True)
        _move(list(source.iterdir()), target)
        os.rmdir(source)


def _move(paths: list[Path], folder: Path) -> None:
    """Move files and folders into `folder`; those without which the others count for nothing come last."""
    for path in sorted(paths, key=lambda path: (path.name in ("manifest.json", "config.json"), path.name)):
        (rename_folder if path.is_dir() else os.rename)(path, folder / path.name)


def set_aside(path: Path) -> None:
    """Rename `path`, if it exists, to the first free name of `<name>.1`, `<name>.2` ..."""
    if os.path.lexists(path):
        numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        free = next(free for free in numbered if not os.path.lexists(free))
        (rename_folder if path.is_dir() else os.rename)(path, free)


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each visible file in `folder`, by name."""
    return {path.name: describe(path)["sha256"] for path in sorted(visible(folder)) if path.is_file()}


def describe(path: Path) -> dict:
    """The size in bytes and the SHA-256 of a file, read from disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_room(sizes: dict[Path, int]) -> None:
    """Raise UserError if the file systems of these folders have less room than the sum of the bytes planned there."""
    needed: dict[int, int] = {}
    for folder, size in sizes.items():
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + size
    for folder in sizes:
        usage, size = shutil.disk_usage(folder), needed[folder.stat().st_dev]
        if usage.total and usage.free < size:  # some file systems do not tell their size
            raise UserError(
                f"{folder} has room for {usage.free / 2**20:,.1f} MiB, but the files of this run need at least "
                f"{size / 2**20:,.1f} MiB; make room, or keep fewer checkpoints (--save_total_limit), and run the same command again"
            )


def advice(error: Exception) -> str:
    """The reason of an error of writing, and what to do about it."""
    remedy = "make room" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return f"{getattr(error, 'strerror', None) or error}; {remedy} and run the same command again"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
