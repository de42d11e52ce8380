"""Durable files: content is on disk before the rename that publishes it, so a crash leaves the old version or the new one.

Every change on disk is an `os.*` call, so tests can stop the process between any two changes.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> dict:
    """Write `blocks` to a new file and sync it; returns its size in bytes and its SHA-256, as `describe` does."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for block in blocks:
            digest.update(block)
            rest = memoryview(block)
            while rest:
                written = os.write(handle, rest)
                size, rest = size + written, rest[written:]
        os.fsync(handle)
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
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(final: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill(folder)` on a staging folder, then put that folder in the place of `final`, see `replace_folder`.

    Raises OSError if it cannot be written, after removing the staging folder.
    """
    staged = final.with_name(f".{final.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        fill(staged)
        replace_folder(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def replace_folder(staged: Path, final: Path) -> None:
    """Sync the complete folder `staged` and rename it to `final`.

    Nothing is deleted: an existing `final` becomes `<name>.previous`, an existing `<name>.previous` becomes
    `<name>.previous.1`, and so on.
    """
    for path in [*staged.rglob("*"), staged]:
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors writes files with mode 0600
        sync(path)
    previous = final.with_name(final.name + ".previous")
    if final.exists():
        set_aside(previous)
        os.rename(final, previous)
    os.rename(staged, final)
    sync(final.parent)


def set_aside(path: Path) -> None:
    """Rename `path`, if it exists, to the first free name of `<name>.1`, `<name>.2` ..."""
    if os.path.lexists(path):
        numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        os.rename(path, next(free for free in numbered if not os.path.lexists(free)))


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder`, by name."""
    return {path.name: describe(path)["sha256"] for path in sorted(folder.iterdir()) if path.is_file()}


def describe(path: Path) -> dict:
    """The size in bytes and the SHA-256 of a file, read from disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
