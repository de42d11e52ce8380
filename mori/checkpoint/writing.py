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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mori.checkpoint import checkpoints, optimizer_state, shards
from mori.checkpoint.checkpoints import CorruptCheckpoint, folder_of, staged_folder_of
from mori.checkpoint.files import rename_folder, set_aside, sync, write
from mori.checkpoint.optimizer_state import AsSaved
from mori.checkpoint.tensors import MODEL, HostMemory, Saved, check_finite, check_storable, distinct, serialized

OPTIMIZER = "optimizer.safetensors"
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
        memory: where copies of the tensors go, see `copied`; None if they need no copy.
    """

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    others: dict[str, bytes]
    buffers: frozenset[str] = frozenset()
    memory: HostMemory | None = None

    def copied(self) -> "Snapshot":
        """The same, of which no tensor changes any more."""
        if self.memory is None:
            return self
        copies = {file: self.memory.copy(file, content) for file, content in self.tensors.items()}
        return replace(self, tensors=copies, memory=None)

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
    weights_file: str = MODEL,
    memory: HostMemory | None = None,
    as_saved: AsSaved = optimizer_state.as_it_is,
    ranks: int = 1,
) -> Snapshot:
    """The checkpoint of `step` as one rank writes it; its tensors are those of `model` and `optimizer`, except buffers, which any
    forward pass may change. With `memory` they can be `copied`.

    `state` is everything else that the run needs, as JSON values; the keys `step` and `optimizer` are set here. `beside` are
    further files, by their paths in the folder. `weights_file` is the name of the file with the model's `state_dict()`. `as_saved`
    is explained in `optimizer_state`.

    With several `ranks` it is collective: each gets copies of some tensors, whole and in host memory, and the first gets all else.

    Raises TypeError for a part of the optimizer's state that cannot be stored, see `optimizer_state.pack`.
    """
    tensors, plain = _content(model, optimizer, as_saved, weights_file)
    others = {"state.json": json.dumps({**state, "step": step, "optimizer": plain}).encode(), **(beside or {})}
    buffers = frozenset(name for name, _ in model.named_buffers())
    if ranks > 1:
        tensors, others = _share(tensors, others, ranks, memory or HostMemory())
        return Snapshot(step, tensors, others, buffers)
    if memory:
        weights = tensors[weights_file]
        weights |= {name: tensor.clone() for name, tensor in weights.items() if name in buffers}
    return Snapshot(step, tensors, others, buffers, memory)


def _content(
    model: nn.Module, optimizer: torch.optim.Optimizer, as_saved: AsSaved, weights_file: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """The tensors of a checkpoint by file, and what `pack` returns beside tensors. Raises TypeError if it cannot be stored."""
    weights = distinct(model.state_dict(keep_vars=True))
    moments, plain = optimizer_state.pack(optimizer, as_saved)
    check_storable(weights)
    check_storable(moments)
    return {weights_file: weights, OPTIMIZER: moments}, plain


def _share(
    tensors: dict[str, dict], others: dict[str, bytes], ranks: int, memory: HostMemory
) -> tuple[dict[str, dict], dict[str, bytes]]:
    """What this rank writes of a checkpoint whose tensors are divided over the ranks. Collective."""
    own, rank = {}, dist.get_rank()
    for file, content in tensors.items():
        writers = ranks if file in (MODEL, OPTIMIZER) else 1  # transformers and PEFT know no parts of adapters
        owner = shards.owners(content, writers)
        parts = shards.file_names(file, owner)
        copies = shards.owned(file, content, owner, memory)
        if rank in parts:
            own[parts[rank]] = copies
        if file == MODEL and len(parts) > 1:
            others[f"{MODEL}.index.json"] = shards.index(content, owner, parts)
    return own, others if rank == 0 else {}


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


def publish(root: Path, step: int, *parts: Mapping[str, dict]) -> Path:
    """Seal what was staged of the checkpoint of `step` with a manifest; rename it into place; returns its folder.

    `parts` are the descriptions of each rank's files, by name. Raises as `stage` does.
    """
    final, staged = folder_of(root, step), staged_folder_of(root, step)
    files = {name: description for part in parts for name, description in part.items()}
    with _space_told(root, sum(description["bytes"] for description in files.values())):
        checkpoints.write_manifest(staged, step, *parts)
        checkpoints.read_manifest(staged)
        for folder in {(staged / name).parent for name in files}:
            if folder.exists():  # another node's disk may hold the files in it
                sync(folder)
        set_aside(final)
        rename_folder(staged, final)
        sync(root)
    return final


def discard(root: Path, step: int) -> None:
    """Remove what was staged of the checkpoint of `step`, also by an earlier process."""
    shutil.rmtree(staged_folder_of(root, step), ignore_errors=True)


class Pending:
    """The checkpoint of a step from its snapshot to its publication, on a rank that writes a part of it or all.

    `take()` returns the snapshot; it is called here, and what it raises is raised by `files`. With `in_background` a thread
    copies and stages the snapshot, and the model and the optimizer must not change before `wait_for_copy` returns; else `files`
    stages it.
    """

    def __init__(self, root: Path, step: int, take: Callable[[], Snapshot], in_background: bool):
        self.root, self.step = root, step
        self._abandoned, self._copied = threading.Event(), threading.Event()
        try:
            taken = take()
            if any(tensor.is_cuda for content in taken.tensors.values() for tensor in content.values()):
                taken = taken.copied()  # a copy by another thread would end the capture of a CUDA graph
            self._stage = partial(self._copy_and_stage, taken)
        except SAVE_ERRORS as error:
            self._copied.set()
            self._stage = partial(_fail, error)
        self._staged: Future | None = None
        if in_background:
            thread = ThreadPoolExecutor(1)
            self._staged = thread.submit(self._stage)
            thread.shutdown(wait=False)  # once it is staged

    def _copy_and_stage(self, taken: Snapshot) -> dict[str, dict]:
        try:
            taken = taken.copied()
        finally:
            self._copied.set()
        return stage(self.root, taken, self._abandoned.is_set)

    def wait_for_copy(self) -> None:
        """Wait until the thread needs the tensors of the model and the optimizer no more."""
        self._copied.wait()

    @property
    def is_staged(self) -> bool:
        """Whether `files` returns, or raises, at once."""
        return self._staged is not None and self._staged.done()

    def files(self) -> dict[str, dict]:
        """The descriptions of the staged files by name, once they are staged. Raises what `take` or `stage` raised."""
        return self._staged.result() if self._staged else self._stage()

    def end(self) -> None:
        """Stop the thread."""
        self._abandoned.set()
        if self._staged:
            wait([self._staged])


def _fail(error: Exception) -> None:
    raise error


def save(root: Path, step: int, **content) -> Path:
    """Take a snapshot of the whole state (see `snapshot`), stage and publish it; returns the checkpoint's folder.

    Raises what these raise; what was staged is removed then.
    """
    taken = snapshot(step, **content)
    discard(root, step)
    try:
        return publish(root, step, stage(root, taken))
    finally:
        discard(root, step)


def rehearse(
    root: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    beside: Mapping[str, bytes],
    sample_bytes: int = 0,
    as_saved: AsSaved = optimizer_state.as_it_is,
) -> int:
    """Save, load and remove a checkpoint with one element of each type of tensor; returns the bytes that a whole one takes.

    `sample_bytes` of the largest tensor are saved too, if it has so many. Every cause that would make a save fail, except a full
    disk, raises the same errors here. A killed rehearsal leaves a folder that `checkpoints.clean` removes.
    """
    tensors, plain = _content(model, optimizer, as_saved, MODEL)
    text = json.dumps({"step": 0, "optimizer": plain}).encode()
    weights = [shards.local(tensor) for tensor in tensors[MODEL].values()]
    samples = {str(tensor.dtype): tensor[(slice(1),) * tensor.dim()] for tensor in weights}
    if sample_bytes:
        largest = max(weights, key=lambda tensor: tensor.nbytes)
        samples["largest"] = largest.flatten()[: sample_bytes // largest.element_size()]
        with contextlib.suppress(FloatingPointError):  # for its time alone
            check_finite(samples)
    part = Snapshot(0, {MODEL: samples, OPTIMIZER: {}}, {"state.json": text, **beside})
    discard(root, 0)
    try:
        inside = staged_folder_of(root, 0)
        folder = publish(inside, 0, _write(inside, part))
        loaded = Saved([folder / MODEL])
        if any(loaded.read(name).dtype != sample.dtype for name, sample in samples.items()):
            raise CorruptCheckpoint(f"{folder} reads back with other types of tensors")
    finally:
        discard(root, 0)
    return Snapshot(0, tensors, dict(beside)).nbytes


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
