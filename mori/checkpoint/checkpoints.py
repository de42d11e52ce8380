"""State <-> disk. A checkpoint is whole or it is not there: staged, synced, sealed by a manifest, renamed.

    step-00000100/
        model.safetensors      the model's state_dict(), tied tensors once
        optimizer.safetensors  the optimizer's tensors, "<parameter>.<name>"
        state.json             everything that is not a tensor
        manifest.json          the step, and size and SHA-256 of the files above, written last

Safetensors and JSON only: reading a checkpoint runs no code. Every change on disk is an `os.*` call of this room, so that
the tests can stand between any two of them.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mori.cli import UserError

_FORMAT = 1
_MANIFEST, _LARGEST_MANIFEST = "manifest.json", 1 << 16
_STEP = re.compile(r"step-\d{8}")
_OF_BLOCKS = {"qmap1", "qmap2", "absmax1", "absmax2"}  # what moments of 8 bits have besides (bitsandbytes)
_FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}
# https://huggingface.co/docs/safetensors, "Format"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CorruptCheckpoint(ValueError):
    """A checkpoint that is not what its manifest says: names the file and the damage."""


def save(root: Path, step: int, *, model: dict, optimizer: dict, state: dict) -> Path:
    """Publish the checkpoint of `step` under `root`; its folder appears by one rename, complete and on disk, or not at all.

    Args:
        model, optimizer: their `state_dict()`s.
        state: whatever else the run needs, as JSON values.

    Raises OSError (no space, no permission), which names the need and the room, and CorruptCheckpoint where the files do
    not read back as they were written; what was staged is removed. Raises FloatingPointError where a weight or a moment
    is not finite: such a state is not worth going on from.
    """
    final, staged = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    weights = _distinct(model)
    moments = {
        f"{index}.{name}": value for index, values in optimizer["state"].items() for name, value in values.items()
    }
    for name, tensor in itertools.chain(weights.items(), moments.items()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
    need = sum(tensor.nbytes for tensor in itertools.chain(weights.values(), moments.values()))
    try:
        os.makedirs(root, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        os.mkdir(staged)
        others = {**state, "step": step}
        files = {
            "model.safetensors": write(staged / "model.safetensors", _serialized(weights)),
            "optimizer.safetensors": write(staged / "optimizer.safetensors", _serialized(moments)),
            "state.json": write(staged / "state.json", [json.dumps(others).encode()]),
        }
        manifest = {"format": _FORMAT, "step": step, "files": files, "seal": _seal(files)}
        write(staged / _MANIFEST, [json.dumps(manifest).encode()])
        verify(staged)  # read back: what cannot be read must not take the place of what can
        sync(staged)
        set_aside(final)
        os.rename(staged, final)
        sync(root)
    except OSError as error:
        room = shutil.disk_usage(next(folder for folder in root.absolute().parents if folder.exists())).free
        what = error.strerror or error
        raise OSError(f"{root}: {what} (it needs {need / 2**20:,.1f} MiB, {room / 2**20:,.1f} MiB are free)") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return final


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises CorruptCheckpoint with the first difference.

    Raises UserError where a file may not be read: that is no damage, and nobody's work should be set aside for it.
    """
    path = folder / _MANIFEST
    try:
        if _plain(path).stat().st_size > _LARGEST_MANIFEST:
            raise CorruptCheckpoint(f"{path} is too large for a manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise CorruptCheckpoint(f"{folder} has format {manifest['format']}, this mori reads {_FORMAT}")
        if manifest["seal"] != _seal(manifest["files"]) or set(manifest["files"]) != _FILES:
            raise CorruptCheckpoint(f"{path} is not what was written (its seal differs)")
        if _STEP.fullmatch(folder.name) and int(folder.name[5:]) != manifest["step"]:
            raise CorruptCheckpoint(f"{path} belongs to step {manifest['step']}")
        for name, described in manifest["files"].items():
            path = _plain(folder / name)
            if path.stat().st_size != described["bytes"]:
                raise CorruptCheckpoint(f"{path} has {path.stat().st_size} bytes, not its {described['bytes']}")
            if _described(path) != described:
                raise CorruptCheckpoint(f"{path} is not what was written (SHA-256 differs)")
    except PermissionError as error:
        raise UserError(f"{error.filename} may not be read by this user; change its permissions") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CorruptCheckpoint):
            raise
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
            os.rename(folder, aside)
            say(f"checkpoint set aside as {aside.name}: {error}")
    if damaged or any(root.glob("*.corrupt*")):
        raise UserError(f"no whole checkpoint is left under {root}; --resume_from_checkpoint none starts anew")
    return None


def published(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first. Raises OSError where `root` may not be read."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return [root / name for name in sorted(names) if _STEP.fullmatch(name) and (root / name).is_dir()]


def load_state(folder: Path) -> dict:
    """What is not a tensor in a verified checkpoint. Raises UserError where it is not what `save` writes."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if isinstance(state, dict) and isinstance(state.get("step"), int):
            return state
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{folder / 'state.json'} is not what mori writes; take another checkpoint")


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
    own = _distinct(model.state_dict())
    if {k: (v.shape, v.dtype) for k, v in own.items()} != {k: (v.shape, v.dtype) for k, v in saved.items()}:
        raise UserError(f"{folder} was saved from another model: its tensors have other names, shapes or types")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict] = {index: {} for index in range(len(parameters))} if moments else {}
    for name, value in moments.items():
        index, _, key = name.partition(".")
        known = index.isdecimal() and int(index) in state
        if not known or key not in _OF_BLOCKS and value.shape not in ((), parameters[int(index)].shape):
            raise UserError(f"{folder} was saved from another optimizer: {name} belongs to no parameter")
        state[int(index)][key] = value
    if len({frozenset(values) - _OF_BLOCKS for values in state.values()}) > 1:
        raise UserError(f"{folder} was saved from another optimizer: not all parameters have the same moments")
    # How the optimizer is set is the config's to say, and compared there.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and the one of `best_step`; call it after a `save`.

    Only what is ours is deleted: a folder that holds the files of its manifest and nothing else. It is hidden first, so
    that a half-deleted one is never taken for a checkpoint.
    """
    for folder in published(root)[:-keep]:
        if folder.name != f"step-{best_step or 0:08d}" and _is_ours(folder):
            hidden = root / f".{folder.name}.pruned"
            os.rename(folder, hidden)
            shutil.rmtree(hidden)


def clean(root: Path) -> None:
    """Remove what a kill in the middle of `save` or `prune` left under `root`; nobody may be saving there."""
    for leftover in [*root.glob(".step-????????.partial"), *root.glob(".step-????????.pruned")]:
        shutil.rmtree(leftover, ignore_errors=True)


def publish(final: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder, filled by `fill(folder)`, in the place of `final` once it is complete and on disk.

    Raises OSError where it cannot be written; what was staged is removed.
    """
    staged = final.with_name(f".{final.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        fill(staged)
        replace_folder(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def replace_folder(staged: Path, final: Path) -> None:
    """Put the complete folder `staged` in the place of `final`.

    An old `final` stays as `<name>.previous`, and an older one of that name as `<name>.previous.1` and so on: nothing
    is deleted.
    """
    for path in [*staged.rglob("*"), staged]:
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors' own writer gives 0600
        sync(path)
    previous = final.with_name(final.name + ".previous")
    if final.exists():
        set_aside(previous)
        os.rename(final, previous)
    os.rename(staged, final)
    sync(final.parent)


def set_aside(path: Path) -> None:
    """Rename `path`, where there is one, to the first of `<name>.1`, `<name>.2` ... that is free."""
    if os.path.lexists(path):
        numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        os.rename(path, next(free for free in numbered if not os.path.lexists(free)))


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in `folder`."""
    return {path.name: _described(path)["sha256"] for path in sorted(folder.iterdir()) if path.is_file()}


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> dict:
    """Write `blocks` to a new file and wait until it is on disk; returns its size and SHA-256, found on the way."""
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
    """Put a JSON file in its place by one rename: whoever reads it finds the old one or the new one, whole."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        write(staged, [json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"])
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _serialized(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, one tensor in host memory at a time: the header's length, the header, the tensors in order."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _distinct(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share memory (tied weights) once, under their first name."""
    first = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name, (name, tensor))
    return dict(first.values())


def _plain(path: Path) -> Path:
    if not path.is_symlink() and path.is_file():
        return path
    raise CorruptCheckpoint(f"{path} is {'not a plain file' if os.path.lexists(path) else 'missing'}")


def _is_ours(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != _MANIFEST}
        return files == {name: described["bytes"] for name, described in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return False


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
