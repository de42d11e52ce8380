"""Checkpoints on disk: complete, or not there. `writing` stages, syncs, describes and renames them; here they are verified and read.

    step-00000100/
        model.safetensors      the model's state_dict(), tied tensors once; of a run with adapters adapter_model.safetensors
        optimizer.safetensors  the optimizer's tensors, "<parameter index>.<name>"
        state.json             everything that is not a tensor
        config.json ...        what `save_pretrained` writes beside the weights, so that transformers loads the folder
        manifest.json          the step, and size and SHA-256 of the files above; written last

Of a model that is divided over ranks, each rank writes some tensors, whole: model-00001-of-00004.safetensors and so on with
model.safetensors.index.json, as transformers does, and optimizer-00001-of-00004.safetensors.

Safetensors and JSON only, so resuming from a checkpoint runs no code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from torch import nn

from mori.checkpoint import optimizer_state
from mori.checkpoint.files import describe, rename_folder, set_aside, write
from mori.checkpoint.optimizer_state import AsSaved
from mori.checkpoint.shards import local, rows
from mori.checkpoint.tensors import Saved, distinct
from mori.cli import UserError

_FORMATS = (1, 2)  # 2 has files of several ranks
_MANIFEST, _LARGEST_MANIFEST = "manifest.json", 1 << 24
_STEP = re.compile(r"step-\d{8}")
_STATE, _OPTIMIZER, _WEIGHTS = "state.json", "optimizer", ("model", "adapter_model")
_PART = r"(-\d{5}-of-\d{5})?\.safetensors"


class CorruptCheckpoint(ValueError):
    """A checkpoint that differs from its manifest; the message names the file and the damage."""


def write_manifest(folder: Path, step: int, *parts: Mapping[str, dict]) -> None:
    """Write the manifest of the checkpoint in `folder`; `parts` are the descriptions of each rank's files, by name.

    Of several ranks it lists which files each has written. The names, types, shapes and offsets of the tensors are in the
    headers of the safetensors files.
    """
    files = {name: description for part in parts for name, description in part.items()}
    layout = [sorted(part) for part in parts] if len(parts) > 1 else None
    manifest = {"format": _FORMATS[layout is not None], "step": step, "files": files, "seal": _seal(files, layout)}
    if layout:
        manifest["files_of_ranks"] = layout
    write(folder / _MANIFEST, [json.dumps(manifest).encode()])


def verify(folder: Path, only: str | None = None) -> None:
    """Compare every file, or that named `only`, with the manifest. Raises CorruptCheckpoint with the first difference.

    Raises UserError if this user may not read a file: the checkpoint is not damaged then, and must not be set aside.
    """
    files = read_manifest(folder)["files"]
    verify_files(folder, {name: description for name, description in files.items() if only in (None, name)})


def read_manifest(folder: Path) -> dict:
    """The manifest of the checkpoint in `folder`. Raises as `verify` does if it is damaged."""
    path = folder / _MANIFEST
    try:
        if _plain_file(path).stat().st_size > _LARGEST_MANIFEST:
            raise CorruptCheckpoint(f"{path} is too large for a manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMATS["files_of_ranks" in manifest]:
            raise CorruptCheckpoint(f"{folder} has format {manifest['format']}, this mori reads {_FORMATS[-1]}")
        seal = _seal(manifest["files"], manifest.get("files_of_ranks"))
        if manifest["seal"] != seal or not _are_files_of_a_checkpoint(manifest["files"]):
            raise CorruptCheckpoint(f"{path} is not what was written (its seal differs)")
        if _STEP.fullmatch(folder.name) and int(folder.name[5:]) != manifest["step"]:
            raise CorruptCheckpoint(f"{path} belongs to step {manifest['step']}")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise _damage(path, error) from None


def verify_files(folder: Path, files: Mapping[str, dict]) -> None:
    """Compare files in `folder` with their descriptions, as `verify` does."""
    for name, description in files.items():
        path = folder / name
        try:
            size = _plain_file(path).stat().st_size
            if size != description["bytes"]:
                raise CorruptCheckpoint(f"{path} has {size} bytes, not its {description['bytes']}")
            if describe(path) != description:
                raise CorruptCheckpoint(f"{path} is not what was written (SHA-256 differs)")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _damage(path, error) from None


def _damage(path: Path, error: Exception) -> Exception:
    """What to raise for an error of reading `path`."""
    if isinstance(error, CorruptCheckpoint):
        return error
    if isinstance(error, PermissionError):
        return UserError(f"{error.filename} cannot be read by this user; change its permissions")
    return CorruptCheckpoint(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def newest(
    root: Path,
    say: Callable[[str], None],
    verify: Callable[[Path], None] = verify,
    put_aside: Callable[..., None] | None = None,
) -> Path | None:
    """The newest checkpoint under `root` that `verify` does not refuse, None if there is no checkpoint at all.

    A damaged checkpoint is renamed to `<name>.corrupt`, never deleted, and told to `say`; then the one before it is tried.
    `put_aside` is called instead of `set_damaged_aside`, with its arguments. Raises UserError if all are damaged, because only the
    user can decide to start over.
    """
    any_damaged = any(root.glob("*.corrupt*"))
    for folder in published(root)[::-1]:
        try:
            verify(folder)
            return folder
        except CorruptCheckpoint as error:
            any_damaged = True
            (put_aside or set_damaged_aside)(folder, error, say)
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


def staged_folder_of(root: Path, step: int) -> Path:
    """Where the files of the checkpoint of `step` are until it is published."""
    return root / f".step-{step:08d}.partial"


def published(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first. Raises OSError if `root` cannot be read."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return [root / name for name in sorted(names) if _STEP.fullmatch(name) and (root / name).is_dir()]


def load_state(folder: Path) -> dict:
    """The `state` of a verified checkpoint, with its `step`. Raises UserError if it is not what `writing` writes."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if isinstance(state, dict) and isinstance(state.get("step"), int):
            return state
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{folder / _STATE} is not what mori writes; take another checkpoint")


def load_tensors(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, as_saved: AsSaved = optimizer_state.as_it_is
) -> None:
    """Load a verified checkpoint into `model` and `optimizer`, which must be built as those that were saved.

    A rank that has a part of a tensor (a DTensor) reads that part alone; how the saved run divided its tensors does not matter.
    `as_saved` is explained in `optimizer_state`. Raises UserError if the model's tensors have other names, shapes or types, or the
    optimizer's state does not fit.
    """
    load_weights(folder, model)
    load_moments(folder, optimizer, as_saved)


def load_moments(folder: Path, optimizer: torch.optim.Optimizer, as_saved: AsSaved = optimizer_state.as_it_is) -> None:
    """Load the state of a verified checkpoint's optimizer. Raises UserError if it does not fit `optimizer`."""
    try:
        saved = Saved(_parts(folder, _OPTIMIZER))
        whole = optimizer_state.whole_shapes(optimizer, as_saved)
        moments = {}
        for name, (shape, _) in saved.kinds().items():
            like = whole.get(name.partition(".")[0])
            part = rows(like) if like is not None and like.shape == shape else slice(None)
            moments[name] = saved.read(name, part)
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
        saved = Saved(next(filter(None, (_parts(folder, stem) for stem in _WEIGHTS))))
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    own = distinct(model.state_dict(keep_vars=True))
    if {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} != saved.kinds():
        raise UserError(f"{folder} was saved from another model: its tensors have other names, shapes or types")
    for name, tensor in own.items():
        local(tensor).copy_(saved.read(name, rows(tensor)))


def _parts(folder: Path, stem: str) -> list[Path]:
    """The files of tensors in `folder` whose names begin with `stem`: one, or those of several ranks."""
    return sorted(path for path in folder.glob(f"{stem}*") if re.fullmatch(stem + _PART, path.name))


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the `keep` newest and the one of `best_step`; call it after a save.

    A folder that holds other files than those of its manifest is left alone. A folder is hidden by a rename before its
    files are deleted, so a half-deleted one is never taken for a checkpoint.
    """
    for folder in published(root)[:-keep]:
        if folder != folder_of(root, best_step or 0) and _holds_its_files_only(folder):
            hidden = root / f".{folder.name}.pruned"
            rename_folder(folder, hidden)
            shutil.rmtree(hidden)


def clean(root: Path) -> None:
    """Remove what a process killed in a save or in `prune` left under `root`; no other process may be saving there."""
    for leftover in [*root.glob(".step-????????.partial"), *root.glob(".step-????????.pruned")]:
        shutil.rmtree(leftover, ignore_errors=True)


def files_of_the_run(folder: Path) -> list[str]:
    """The files of a checkpoint that no other program reads; none of another folder."""
    paths = [folder / _STATE, folder / _MANIFEST, *(_parts(folder, _OPTIMIZER) or [folder / _OPTIMIZER])]
    return sorted(path.name for path in paths) if all(path.is_file() for path in paths) else []


def _plain_file(path: Path) -> Path:
    if not path.is_symlink() and path.is_file():
        return path
    raise CorruptCheckpoint(f"{path} is {'not a plain file' if os.path.lexists(path) else 'missing'}")


def _are_files_of_a_checkpoint(names) -> bool:
    """Whether `names` hold all that a run needs, and nothing outside the folder."""
    paths = map(PurePosixPath, names)
    return (
        _STATE in names
        and any(re.fullmatch(_OPTIMIZER + _PART, name) for name in names)
        and any(re.fullmatch(stem + _PART, name) for stem in _WEIGHTS for name in names)
        and not any(path.is_absolute() or ".." in path.parts for path in paths)
    )


def _holds_its_files_only(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files_in(folder)}
        sizes.pop(_MANIFEST)
        whole = {name: description["bytes"] for name, description in manifest["files"].items()}
        # Without a shared disk, a node has the files of its own ranks.
        return sizes == whole or "files_of_ranks" in manifest and sizes.items() <= whole.items()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _seal(files: dict, layout: list | None) -> str:
    sealed = files if layout is None else [files, layout]
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
