"""State <-> disk. A checkpoint is whole or it is not there: staged, synced, sealed by a manifest, renamed.

    step-00000100/
        model.safetensors      the model's state_dict(), tied tensors once
        optimizer.safetensors  the optimizer's tensors, "<parameter>.<name>"
        state.json             everything that is not a tensor
        manifest.json          size and SHA-256 of the files above, written last

Safetensors and JSON only: reading a checkpoint runs no code.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import UserError

_FORMAT = 1
_MANIFEST = "manifest.json"


class CorruptCheckpoint(ValueError):
    """A checkpoint that is not what its manifest says: names the file and the damage."""


def save(root: Path, step: int, *, model: dict, optimizer: dict, state: dict) -> Path:
    """Publish the checkpoint of `step` under `root`; its folder appears by one rename, complete and on disk, or not at all.

    Args:
        model, optimizer: their `state_dict()`s.
        state: whatever else the run needs, as JSON values.

    Raises OSError (no space, no permission), which names the need and the room; what was staged is removed. Raises
    FloatingPointError where a weight or a moment is not finite: such a state is not worth going on from.
    """
    final, staged = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    weights = _distinct(model)
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, values in optimizer["state"].items()
        for name, value in values.items()
    }
    for name, tensor in itertools.chain(weights.items(), moments.items()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
    need = sum(tensor.nbytes for tensor in itertools.chain(weights.values(), moments.values()))
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        save_file(weights, staged / "model.safetensors")
        save_file(moments, staged / "optimizer.safetensors")
        _write_json(staged / "state.json", {**state, "step": step, "param_groups": optimizer["param_groups"]})
        files = {path.name: _described(path) for path in sorted(staged.iterdir())}
        _write_json(staged / _MANIFEST, {"format": _FORMAT, "files": files, "seal": _seal(files)})
        for path in staged.iterdir():
            path.chmod(0o666 & ~_umask())  # safetensors writes 0600
            sync(path)
        sync(staged)
        set_aside(final)
        staged.rename(final)
        sync(root)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
        room = shutil.disk_usage(next(folder for folder in root.absolute().parents if folder.exists())).free
        raise OSError(f"{root}: {error} (it needs {need / 2**20:,.0f} MiB, {room / 2**20:,.0f} MiB are free)") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return final


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises CorruptCheckpoint with the first difference."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        expected = manifest["files"].items()
        if manifest["format"] != _FORMAT:
            raise CorruptCheckpoint(f"{folder} has format {manifest['format']}, this mori reads {_FORMAT}")
        if manifest["seal"] != _seal(manifest["files"]):
            raise CorruptCheckpoint(f"{folder / _MANIFEST} is not what was written (its seal differs)")
        for name, described in expected:
            if Path(name).name != name:
                raise CorruptCheckpoint(f"{folder / _MANIFEST} names a file outside its folder: {name}")
            if not (folder / name).is_file():
                raise CorruptCheckpoint(f"{folder / name} is missing")
            if (folder / name).stat().st_size != described["bytes"]:
                raise CorruptCheckpoint(f"{folder / name} has not its {described['bytes']} bytes")
            if _described(folder / name) != described:
                raise CorruptCheckpoint(f"{folder / name} is not what was written (SHA-256 differs)")
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{error.filename} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{folder / _MANIFEST} cannot be read: {error}") from None


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest verified checkpoint under `root`; None where there is none at all.

    A damaged one is set aside (renamed to `<name>.corrupt`, never deleted) and `say` is told; the one before is used.
    Raises UserError when all are damaged: starting over must be asked for.
    """
    damaged = []
    for folder in published(root)[::-1]:
        try:
            verify(folder)
            return folder
        except CorruptCheckpoint as error:
            damaged.append(str(error))
            aside = folder.with_name(folder.name + ".corrupt")
            set_aside(aside)  # an earlier one of that name
            folder.rename(aside)
            say(f"checkpoint set aside as {aside.name}: {error}")
    if damaged or any(root.glob("*.corrupt*")):
        raise UserError(f"no whole checkpoint is left under {root}; --resume_from_checkpoint none starts anew")
    return None


def published(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step-????????") if path.is_dir())


def load_state(folder: Path) -> dict:
    """What is not a tensor in a verified checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@torch.no_grad()
def load_tensors(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a verified checkpoint's tensors into `model` and `optimizer`, which must be of the same make.

    Raises UserError where names, shapes or types differ: nothing of the state is optional.
    """
    try:
        saved = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    own = _distinct(model.state_dict(), copy=False)
    if {k: (v.shape, v.dtype) for k, v in own.items()} != {k: (v.shape, v.dtype) for k, v in saved.items()}:
        raise UserError(f"{folder} was saved from another model: its tensors have other names, shapes or types")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    state: dict[int, dict] = {}
    for name, value in moments.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": load_state(folder)["param_groups"]})


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and the one of `best_step`."""
    for folder in published(root)[:-keep]:
        if folder.name != f"step-{best_step or 0:08d}":
            shutil.rmtree(folder)


def replace_folder(staged: Path, final: Path) -> None:
    """Put the complete folder `staged` in the place of `final`.

    An old `final` stays as `<name>.previous`, and an older one of that name as `<name>.previous.1` and so on: nothing
    is deleted.
    """
    for path in [*staged.rglob("*"), staged]:
        if path.is_file():
            path.chmod(0o666 & ~_umask())
        sync(path)
    previous = final.with_name(final.name + ".previous")
    if final.exists():
        set_aside(previous)
        final.rename(previous)
    staged.rename(final)
    sync(final.parent)


def set_aside(path: Path) -> None:
    """Rename `path`, where there is one, to the first of `<name>.1`, `<name>.2` ... that is free."""
    if os.path.lexists(path):
        numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        path.rename(next(free for free in numbered if not os.path.lexists(free)))


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in `folder`."""
    return {path.name: _described(path)["sha256"] for path in sorted(folder.iterdir()) if path.is_file()}


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _distinct(tensors: dict[str, torch.Tensor], copy: bool = True) -> dict[str, torch.Tensor]:
    """Tensors that share memory (tied weights) once, under their first name."""
    first = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name, (name, tensor))
    return {name: tensor.contiguous() if copy else tensor for name, tensor in first.values()}


def _described(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": _sha256(file)}


def _seal(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
