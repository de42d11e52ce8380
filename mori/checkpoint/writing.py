"""Save a checkpoint in three parts: `snapshot` what this rank writes, `stage` it on disk, `publish` what was staged by a rename.

Staging needs nothing of the model or the optimizer but the snapshot, so a thread may do it, see `Pending`.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mori.checkpoint import checkpoints, optimizer_state
from mori.checkpoint.checkpoints import CorruptCheckpoint, folder_of, staged_folder_of
from mori.checkpoint.files import rename_folder, set_aside, sync, write
from mori.checkpoint.tensors import HostMemory, check_finite, check_storable, distinct, serialized

# What a save may raise; a RuntimeError may be a lack of memory.
SAVE_ERRORS = (OSError, FloatingPointError, TypeError, RuntimeError, MemoryError, CorruptCheckpoint)


class Abandoned(Exception):
    """Nobody waits for the staged files any more."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of the checkpoint of `step`.

    Attributes:
        tensors: the tensors of each safetensors file, by the file's name.
        others: the content of every other file, by its path in the folder.
        buffers: the names of the tensors that may hold infinity.
    """

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    others: dict[str, bytes]
    buffers: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """The bytes of all files, without the headers of the safetensors files."""
        tensors = sum(tensor.nbytes for content in self.tensors.values() for tensor in content.values())
        return tensors + sum(map(len, self.others.values()))


def snapshot(
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    beside: Mapping[str, bytes] | None = None,
    weights_file: str = "model.safetensors",
    memory: HostMemory | None = None,
) -> Snapshot:
    """The checkpoint of `step` as one rank writes it; its tensors are those of `model` and `optimizer`, or copies in `memory`.

    `state` is everything else that the run needs, as JSON values; the keys `step` and `optimizer` are set here. `beside` are
    further files, by their paths in the folder. `weights_file` is the name of the file with the model's `state_dict()`.

    Raises TypeError for a part of the optimizer's state that cannot be stored, see `optimizer_state.pack`.
    """
    weights = distinct(model.state_dict())
    moments, plain = optimizer_state.pack(optimizer)
    check_storable(weights)
    check_storable(moments)
    text = json.dumps({**state, "step": step, "optimizer": plain}).encode()
    tensors = {weights_file: weights, "optimizer.safetensors": moments}
    return Snapshot(
        step,
        {file: memory.copy(file, content) for file, content in tensors.items()} if memory else tensors,
        {"state.json": text, **(beside or {})},
        frozenset(name for name, _ in model.named_buffers()),
    )


def stage(root: Path, snapshot: Snapshot, abandoned: Callable[[], bool] = lambda: False) -> dict[str, dict]:
    """Write the files of a snapshot into the staging folder, sync them, and read them back; returns their descriptions by name.

    As soon as `abandoned()` is true it stops, and raises Abandoned.

    Raises FloatingPointError, before anything is written, if a tensor holds NaN, or infinity and is no buffer. Raises OSError
    with the space needed and the space free if the disk refuses, and CorruptCheckpoint if a file does not read back as it was
    written; `discard` removes what was staged.
    """
    for content in snapshot.tensors.values():
        check_finite(content, snapshot.buffers)
    return _write(root, snapshot, abandoned)


def _write(root: Path, snapshot: Snapshot, abandoned: Callable[[], bool] = lambda: False) -> dict[str, dict]:
    def blocks(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
        for block in serialized(tensors):
            if abandoned():
                raise Abandoned
            yield block

    folder = staged_folder_of(root, snapshot.step)
    with _space_told(root, snapshot.nbytes):
        os.makedirs(folder, exist_ok=True)
        files = {name: write(folder / name, blocks(content)) for name, content in snapshot.tensors.items()}
        for name, content in snapshot.others.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = write(folder / name, [content])
        checkpoints.verify_files(folder, files)  # an unreadable checkpoint must not replace a readable one
    return files


def publish(root: Path, step: int, files: Mapping[str, dict]) -> Path:
    """Seal what was staged of the checkpoint of `step` with a manifest; rename it into place; returns its folder.

    `files` are the descriptions of all its files, by name. Raises as `stage` does.
    """
    final, staged = folder_of(root, step), staged_folder_of(root, step)
    with _space_told(root, sum(description["bytes"] for description in files.values())):
        checkpoints.write_manifest(staged, step, dict(files))
        checkpoints.read_manifest(staged)
        for folder in {(staged / name).parent for name in files}:
            sync(folder)
        set_aside(final)
        rename_folder(staged, final)
        sync(root)
    return final


def discard(root: Path, step: int) -> None:
    """Remove what was staged of the checkpoint of `step`, also by an earlier process."""
    shutil.rmtree(staged_folder_of(root, step), ignore_errors=True)


class Pending:
    """The checkpoint of a step from its snapshot to its publication, on a rank that writes a part of it.

    `take()` returns the snapshot; it is called here, and what it raises is raised by `files`. With `in_background` a thread
    stages the snapshot, else `files` does.
    """

    def __init__(self, root: Path, step: int, take: Callable[[], Snapshot], in_background: bool):
        self.root, self.step = root, step
        self._abandoned = threading.Event()
        discard(root, step)
        try:
            taken = take()
            self._stage = partial(stage, root, taken, self._abandoned.is_set)
        except SAVE_ERRORS as error:
            self._stage = partial(_fail, error)
        self._staged: Future | None = None
        if in_background:
            thread = ThreadPoolExecutor(1)
            self._staged = thread.submit(self._stage)
            thread.shutdown(wait=False)  # once it is staged

    @property
    def is_staged(self) -> bool:
        """Whether `files` returns, or raises, at once."""
        return self._staged is not None and self._staged.done()

    def files(self) -> dict[str, dict]:
        """The descriptions of the staged files by name, once they are staged. Raises what `take` or `stage` raised."""
        return self._staged.result() if self._staged else self._stage()

    def end(self) -> None:
        """Stop the thread, and remove what is staged and not published."""
        self._abandoned.set()
        if self._staged:
            wait([self._staged])
        discard(self.root, self.step)


def _fail(error: Exception) -> None:
    raise error


def save(root: Path, step: int, **content) -> Path:
    """Take a snapshot of the whole state (see `snapshot`), stage and publish it; returns the checkpoint's folder.

    Raises what these raise; what was staged is removed then.
    """
    pending = Pending(root, step, lambda: snapshot(step, **content), in_background=False)
    try:
        return publish(root, step, pending.files())
    finally:
        pending.end()


def rehearse(
    root: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    beside: Mapping[str, bytes],
    sample_bytes: int = 0,
) -> int:
    """Save, load and remove a checkpoint with one element of each type of tensor; returns the bytes that a whole one takes.

    `sample_bytes` of the largest tensor are saved too, if it has so many. Every cause that would make a save fail, except a full
    disk, raises the same errors here. A killed rehearsal leaves a folder that `checkpoints.clean` removes.
    """
    whole = snapshot(0, model=model, optimizer=optimizer, state={}, beside=beside)
    weights = whole.tensors["model.safetensors"]
    samples = {str(tensor.dtype): tensor[(slice(1),) * tensor.dim()] for tensor in weights.values()}
    if sample_bytes:
        largest = max(weights.values(), key=lambda tensor: tensor.nbytes)
        samples["largest"] = largest.flatten()[: sample_bytes // largest.element_size()]
        with contextlib.suppress(FloatingPointError):  # for its time alone
            check_finite(samples)
    part = Snapshot(0, {"model.safetensors": samples, "optimizer.safetensors": {}}, whole.others)
    discard(root, 0)
    try:
        inside = staged_folder_of(root, 0)
        folder = publish(inside, 0, _write(inside, part))
        loaded = checkpoints.load_tensors_of(folder / "model.safetensors")
        if any(loaded[name].dtype != sample.dtype for name, sample in samples.items()):
            raise CorruptCheckpoint(f"{folder} reads back with other types of tensors")
    finally:
        discard(root, 0)
    return whole.nbytes - len(whole.others["state.json"])


@contextlib.contextmanager
def _space_told(root: Path, needed: int) -> Iterator[None]:
    """The context of work on disk whose OSError tells the space that a checkpoint of `needed` bytes takes, and the space free."""
    try:
        yield
    except OSError as error:
        room = f"it needs {needed / 2**20:,.1f} MiB"
        with contextlib.suppress(OSError, StopIteration):
            free = shutil.disk_usage(next(folder for folder in root.absolute().parents if folder.exists())).free
            room += f", {free / 2**20:,.1f} MiB are free"
        failure = OSError(f"{root}: {error.strerror or error} ({room})")
        failure.errno = error.errno
        raise failure from None
