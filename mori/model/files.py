"""A model folder from elsewhere, looked at before anything in it is loaded: kinds of files, links, sizes, headers, numbers.

What is loaded afterwards reads plain files of this folder alone, and takes memory in proportion to its weights.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mori.cli import UserError
from mori.data.files import leads_out, memory_bytes

WEIGHTS = (".safetensors", ".bin")
# Far above the largest in use (a configuration of 1 MB, a tokenizer of 33 MB); what is parsed takes many times its size.
_CONFIG_BYTES, _TEXT_BYTES, _HEADER_BYTES = 8 << 20, 64 << 20, 32 << 20
# Numbers in config.json up to here are harmless whatever they count: a list as long takes 8 MB.
_SMALL = 1 << 20
# These count nothing: frequencies, places in a text, ids, and what people note besides.
_NO_COUNT = re.compile(r"theta|position|length|seq|window|context|ctx|token|param|freq|base|flos", re.IGNORECASE)
_ITEM_BITS = {"BOOL": 8, "F4": 4, "F6": 6, "F8": 8, "I8": 8, "U8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_ITEM_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}


@dataclass
class Stored:
    """What the weight files of a folder hold at most: `elements` in all, in `tensors`, the longest side being `longest`."""

    elements: int = 0
    tensors: int = 0
    longest: int = 0


def check_folder(folder: Path) -> Stored:
    """Look at every file of a model folder; returns what its weight files hold.

    Raises UserError for a link that leads out of the folder (but that of the hub's cache to its own blobs), for what is no
    plain file, for a shard or another file that is named outside the folder, and for sizes and counts that cannot be:
    of a JSON file, of a header, of a tensor, or in config.json.
    """
    for path in _walk(folder):
        _check_kind(path, folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS):
            limit = _CONFIG_BYTES if "config" in path.name else _TEXT_BYTES
            if path.suffix in (".json", ".txt", ".jinja", ".model") and path.stat().st_size > limit:
                raise UserError(f"{path} has {_mib(path.stat().st_size)}, which no model needs ({_mib(limit)} at most)")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json); merge it into its model (peft: merge_and_unload) and save that"
        )
    if any(path.name == ".metadata" or path.name.startswith("shard-0") for path in folder.iterdir()):
        raise UserError(f"{folder} holds a distributed checkpoint; save the model whole, with save_pretrained()")
    for path in sorted(folder.glob("*.index.json")):
        _check_index(path)
    for path in sorted(folder.glob("*config.json")):
        _check_named_files(path)
    # As transformers chooses; a .bin may also be something else that a training has left.
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    size, memory = sum(path.stat().st_size for path in weights), memory_bytes()
    if size > memory:
        raise UserError(
            f"the weights in {folder} have {size / 2**30:,.0f} GiB, this machine's memory {memory / 2**30:,.0f} GiB; take a smaller model"
        )
    stored = Stored()
    for path in weights:
        if path.suffix == ".safetensors":
            _add_header(path, stored)
        else:  # its shapes are known only by unpacking it; an element takes a byte at least
            size = path.stat().st_size
            stored.elements += size
            stored.tensors += min(size // 64, 10_000)
            stored.longest = max(stored.longest, size)
    _check_numbers(folder / "config.json", stored.longest)
    return stored


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent) / name for name in [*folders, *files])


def _check_kind(path: Path, folder: Path) -> None:
    roots = [folder]
    snapshots = Path(os.path.realpath(folder)).parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        roots.append(snapshots.parent / "blobs")
    if path.is_symlink() and leads_out(path, *roots):
        raise UserError(
            f"{path} is a link that leads out of the model's folder; put the file itself there, or remove it"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a plain file nor a folder (a pipe, a device or a broken link?); remove it")


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot load model {path.parent}: {path.name} is no JSON ({str(error)[:100]})") from None


def _check_index(path: Path) -> None:
    index = _read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{path} has no weight_map from tensors to files; save the model again")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{path} names a shard outside its folder: {name[:100]!r}; do not use this model")
        if not (path.parent / name).is_file():
            raise UserError(f"{path} names the shard {name}, which is missing; download the model again")


def _check_named_files(path: Path) -> None:
    """A path in a setting may be left over from its author's machine; one to a file that is on this machine is refused."""
    settings = _read_json(path)
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key.endswith(("_file", "_files")) or key == "transformers_weights":
            for name in value if isinstance(value, list) else [value]:
                plain = not isinstance(name, str) or "\0" in name or Path(name).name == name
                if not plain and any(
                    leads_out(p, path.parent) and p.exists() for p in (Path(name), path.parent / name)
                ):
                    raise UserError(
                        f"{path} names a file outside its folder: {key} is {name[:100]!r}; remove it from {path.name}"
                    )


def _add_header(path: Path, stored: Stored) -> None:
    """Count the tensors of a safetensors file by its header (https://github.com/huggingface/safetensors#format)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _HEADER_BYTES):
            raise UserError(f"cannot load model {path.parent}: {path.name} is cut short or no safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
                elements = math.prod(shape)
                bits = next(bits for kind, bits in _ITEM_BITS.items() if tensor["dtype"].startswith(kind))
                if (
                    min([0, *shape]) < 0
                    or not 0 <= begin <= end <= size - 8 - length
                    or elements * bits != (end - begin) * 8
                ):
                    raise UserError(
                        f"cannot load model {path.parent}: {path.name} gives {name[:100]} an impossible size"
                    )
                stored.elements += elements
                stored.tensors += 1
                stored.longest = max([stored.longest, *shape])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, StopIteration) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot load model {path.parent}: the header of {path.name} is damaged") from None


def _check_numbers(path: Path, longest: int) -> None:
    """Refuse counts that no tensor bears out: a configuration makes lists as long as they say, before any model is there."""
    limit = max(_SMALL, longest)
    total, rest = 0, [("", _read_json(path))]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(key, item) for item in value]
        elif isinstance(value, int) and not _NO_COUNT.search(key):
            total += abs(value)
            if abs(value) > limit or total > 64 * limit:
                raise UserError(
                    f"cannot load model {path.parent}: {key} in config.json is larger than anything in its weights"
                )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
