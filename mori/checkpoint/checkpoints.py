"""Checkpoints: complete and on disk, or not there. Staged, synced, described by a manifest, then renamed into place.

    step-00000100/
        model.safetensors      the model's state_dict(), tied tensors once; of a run with adapters adapter_model.safetensors
        optimizer.safetensors  the optimizer's tensors, "<parameter index>.<name>"
        state.json             everything that is not a tensor
        config.json ...        what `save_pretrained` writes beside the weights, so that transformers loads the folder
        manifest.json          the step, and size and SHA-256 of the files above; written last

Safetensors and JSON only, so resuming from a checkpoint runs no code.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import nn

from mori.checkpoint import optimizer_state
from mori.checkpoint.files import describe, rename_folder, set_aside, sync, write
from mori.checkpoint.tensors import check_finite, check_storable, distinct, serialized
from mori.cli import UserError

_FORMAT = 1
_MANIFEST, _LARGEST_MANIFEST = "manifest.json", 1 << 16
_STEP = re.compile(r"step-\d{8}")
_FILES = {"optimizer.safetensors", "state.json"}
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
_REHEARSAL = ".step-00000000.partial"  # `clean` removes it


class CorruptCheckpoint(ValueError):
    """A checkpoint that differs from its manifest; the message names the file and the damage."""


# What `save` may raise; a RuntimeError may be a lack of memory.
SAVE_ERRORS = (OSError, FloatingPointError, TypeError, RuntimeError, MemoryError, CorruptCheckpoint)


def save(
    root: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    beside: Mapping[str, bytes] | None = None,
    weights_file: str = "model.safetensors",
) -> Path:
    """Write the checkpoint of `step` under `root` and return its folder, which appears by one rename, complete and synced.

    `state` is everything else that the run needs, as JSON values; the keys `step` and `optimizer` are set here. `beside` are
    further files, by their paths in the folder. `weights_file` is the name of the file with the model's `state_dict()`.

    Raises TypeError, before anything is written, for a part of the optimizer's state that cannot be stored (see
    `optimizer_state.pack`), and FloatingPointError if a tensor holds NaN, or infinity and is no buffer. Raises OSError with
    the space needed and the space free if the disk refuses, and CorruptCheckpoint if the files do not read back as they were
    written; what was staged is removed.
    """
    weights = distinct(model.state_dict())
    moments, plain = optimizer_state.pack(optimizer)
    check_storable(weights)
    check_storable(moments)
    check_finite(weights, dict(model.named_buffers()))
    check_finite(moments)
    text = json.dumps({**state, "step": step, "optimizer": plain}).encode()
    return _write(
        root, step, {weights_file: weights, "optimizer.safetensors": moments}, {"state.json": text, **(beside or {})}
    )


def rehearse(
    root: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    beside: Mapping[str, bytes],
    sample_bytes: int = 0,
) -> int:
    """Save, load and remove a checkpoint with one element of each type of tensor; returns the bytes that a whole one takes.

    `sample_bytes` of the largest tensor are saved too, if it has so many. Every cause that would make `save` fail, except a full
    disk, raises the same errors here. A killed rehearsal leaves a folder that `clean` removes.
    """
    weights = distinct(model.state_dict())
    moments, plain = optimizer_state.pack(optimizer)
    check_storable(weights)
    check_storable(moments)
    text = json.dumps({"step": 0, "optimizer": plain}).encode()
    samples = {str(tensor.dtype): tensor[(slice(1),) * tensor.dim()] for tensor in weights.values()}
    if sample_bytes:
        largest = max(weights.values(), key=lambda tensor: tensor.nbytes)
        samples["largest"] = largest.flatten()[: sample_bytes // largest.element_size()]
        with contextlib.suppress(FloatingPointError):  # for its time alone
            check_finite(samples)
    staged = root / _REHEARSAL
    shutil.rmtree(staged, ignore_errors=True)
    try:
        tensors = {_WEIGHTS[0]: samples, "optimizer.safetensors": {}}
        folder = _write(staged, 0, tensors, {"state.json": text, **beside})
        loaded = _load_tensors_of(folder / _WEIGHTS[0])
        if any(loaded[name].dtype != sample.dtype for name, sample in samples.items()):
            raise CorruptCheckpoint(f"{folder} reads back with other types of tensors")
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return sum(tensor.nbytes for tensor in [*weights.values(), *moments.values()]) + sum(map(len, beside.values()))


def _write(root: Path, step: int, tensors: Mapping[str, dict], others: Mapping[str, bytes]) -> Path:
    """Write, verify and publish the checkpoint of `step`: files of tensors, and `others` that hold none, by their names."""
    final, staged = folder_of(root, step), root / f".step-{step:08d}.partial"
    try:
        os.makedirs(root, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        os.mkdir(staged)
        files = {name: write(staged / name, serialized(content)) for name, content in tensors.items()}
        for name, content in others.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = write(staged / name, [content])
        write_manifest(staged, step, files)
        verify(staged)  # an unreadable checkpoint must not replace a readable one
        for folder in {(staged / name).parent for name in files}:
            sync(folder)
        set_aside(final)
        rename_folder(staged, final)
        sync(root)
    except OSError as error:
        needed = sum(t.nbytes for content in tensors.values() for t in content.values()) + sum(
            map(len, others.values())
        )
        room = f"it needs {needed / 2**20:,.1f} MiB"
        with contextlib.suppress(OSError, StopIteration):
            free = shutil.disk_usage(next(folder for folder in root.absolute().parents if folder.exists())).free
            room += f", {free / 2**20:,.1f} MiB are free"
        failure = OSError(f"{root}: {error.strerror or error} ({room})")
        failure.errno = error.errno
        raise failure from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return final


def write_manifest(folder: Path, step: int, files: dict[str, dict]) -> None:
    """Write the manifest of the checkpoint in `folder`; `files` are the descriptions of its files, by name."""
    manifest = {"format": _FORMAT, "step": step, "files": files, "seal": _seal(files)}
    write(folder / _MANIFEST, [json.dumps(manifest).encode()])


def verify(folder: Path, only: str | None = None) -> None:
    """Compare every file, or that named `only`, with the manifest. Raises CorruptCheckpoint with the first difference.

    Raises UserError if this user may not read a file: the checkpoint is not damaged then, and must not be set aside.
    """
    path = folder / _MANIFEST
    try:
        if _plain_file(path).stat().st_size > _LARGEST_MANIFEST:
            raise CorruptCheckpoint(f"{path} is too large for a manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise CorruptCheckpoint(f"{folder} has format {manifest['format']}, this mori reads {_FORMAT}")
        if manifest["seal"] != _seal(manifest["files"]) or not _are_files_of_a_checkpoint(manifest["files"]):
            raise CorruptCheckpoint(f"{path} is not what was written (its seal differs)")
        if _STEP.fullmatch(folder.name) and int(folder.name[5:]) != manifest["step"]:
            raise CorruptCheckpoint(f"{path} belongs to step {manifest['step']}")
        for name, description in manifest["files"].items():
            if only not in (None, name):
                continue
            path = _plain_file(folder / name)
            if path.stat().st_size != description["bytes"]:
                raise CorruptCheckpoint(f"{path} has {path.stat().st_size} bytes, not its {description['bytes']}")
            if describe(path) != description:
                raise CorruptCheckpoint(f"{path} is not what was written (SHA-256 differs)")
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read by this user; change its permissions") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CorruptCheckpoint):
            raise
        raise CorruptCheckpoint(f"{folder / _MANIFEST} cannot be read: {error}") from None


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest verified checkpoint under `root`, None if there is no checkpoint at all.

    A damaged checkpoint is renamed to `<name>.corrupt`, never deleted, and told to `say`; then the one before it is tried.
    Raises UserError if all are damaged, because only the user can decide to start over.
    """
    any_damaged = any(root.glob("*.corrupt*"))
    for folder in published(root)[::-1]:
        try:
            verify(folder)
            return folder
        except CorruptCheckpoint as error:
            any_damaged = True
            set_damaged_aside(folder, error, say)
    if any_damaged:
        raise UserError(
            f"no whole checkpoint is left under {root}; --resume_from_checkpoint none starts the run from the beginning"
        )
    return None


def set_damaged_aside(folder: Path, error: CorruptCheckpoint, say: Callable[[str], None]) -> None:
    """Rename a damaged checkpoint to `<name>.corrupt`, and tell `say`; a missing one is left missing."""
    if not folder.is_dir():
        return
    aside = folder.with_name(folder.name + ".corrupt")
    set_aside(aside)  # an earlier damaged checkpoint of this step
    rename_folder(folder, aside)
    say(f"checkpoint set aside as {aside.name}: {error}")


def folder_of(root: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return root / f"step-{step:08d}"


def published(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first. Raises OSError if `root` cannot be read."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return [root / name for name in sorted(names) if _STEP.fullmatch(name) and (root / name).is_dir()]


def load_state(folder: Path) -> dict:
    """The `state` of a verified checkpoint, with its `step`. Raises UserError if it is not what `save` writes."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if isinstance(state, dict) and isinstance(state.get("step"), int):
            return state
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{folder / 'state.json'} is not what mori writes; take another checkpoint")


def load_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a verified checkpoint into `model` and `optimizer`, which must be built as those that were saved.

    Raises UserError if the model's tensors have other names, shapes or types, or the optimizer's state does not fit.
    """
    load_weights(folder, model)
    load_moments(folder, optimizer)


def load_moments(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the state of a verified checkpoint's optimizer. Raises UserError if it does not fit `optimizer`."""
    try:
        moments = _load_tensors_of(folder / "optimizer.safetensors")
        optimizer_state.unpack(optimizer, moments, load_state(folder).get("optimizer", {}))
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} was saved from another optimizer, or its state is damaged: {error}; take another checkpoint"
        ) from None


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights of a verified checkpoint into `model`. Raises UserError if they have other names, shapes or types."""
    try:
        weights = _load_tensors_of(next(folder / name for name in _WEIGHTS if (folder / name).exists()))
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    own = distinct(model.state_dict())
    shapes, saved_shapes = ({name: (t.shape, t.dtype) for name, t in group.items()} for group in (own, weights))
    if shapes != saved_shapes:
        raise UserError(f"{folder} was saved from another model: its tensors have other names, shapes or types")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _load_tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; read at once if the file system refuses mmap."""
    try:
        return load_file(path)
    except (OSError, RuntimeError, SafetensorError):
        return load(path.read_bytes())


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the `keep` newest and the one of `best_step`; call it after a `save`.

    A folder that holds other files than those of its manifest is left alone. A folder is hidden by a rename before its
    files are deleted, so a half-deleted one is never taken for a checkpoint.
    """
    for folder in published(root)[:-keep]:
        if folder != folder_of(root, best_step or 0) and _holds_its_files_only(folder):
            hidden = root / f".{folder.name}.pruned"
            rename_folder(folder, hidden)
            shutil.rmtree(hidden)


def clean(root: Path) -> None:
    """Remove what a process killed in `save` or `prune` left under `root`; no other process may be saving there."""
    for leftover in [*root.glob(".step-????????.partial"), *root.glob(".step-????????.pruned")]:
        shutil.rmtree(leftover, ignore_errors=True)


def files_of_the_run(folder: Path) -> list[str]:
    """The files of a checkpoint that no other program reads; none of another folder."""
    return sorted({*_FILES, _MANIFEST}) if all((folder / name).is_file() for name in (*_FILES, _MANIFEST)) else []


def _plain_file(path: Path) -> Path:
    if not path.is_symlink() and path.is_file():
        return path
    raise CorruptCheckpoint(f"{path} is {'not a plain file' if os.path.lexists(path) else 'missing'}")


def _are_files_of_a_checkpoint(names) -> bool:
    """Whether `names` hold all that a run needs, and nothing outside the folder."""
    paths = map(PurePosixPath, names)
    return (
        set(names) >= _FILES
        and not set(names).isdisjoint(_WEIGHTS)
        and not any(path.is_absolute() or ".." in path.parts for path in paths)
    )


def _holds_its_files_only(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files_in(folder)}
        sizes.pop(_MANIFEST)
        return sizes == {name: description["bytes"] for name, description in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _seal(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
