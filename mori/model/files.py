"""A model folder from elsewhere: all files that transformers will read are checked first: types, links, sizes, headers, numbers.

Afterwards, loading reads plain files of this folder only, and takes memory in proportion to its weights. Other files in the
folder are not looked at.
"""

import inspect
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING

from mori.cli import UserError
from mori.data.files import leads_out, memory_bytes

# Where transformers looks for the weights, in its order; an index names the files.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
# The names that configurations and tokenizers of transformers read (`vocab_files_names` of the tokenizer classes).
_READ = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|chat_template|normalizer|byte_maps|emoji)\.(json|jinja)"
    r"|word_(shape|pronunciation)\.json|dict\.txt|bpe\.codes|.*\.tiktoken"
    r"|(token|tekken|vocab|entity_vocab|target_vocab|merges|spiece|spm|sentencepiece|prophetnet).*"
    r"\.(json|txt|model|tokenizer)"
)
# Far above the largest in use (a configuration of 1 MB, a tokenizer of 33 MB). Parsing takes many times the size.
_CONFIG_BYTES, _TEXT_BYTES, _HEADER_BYTES = 8 << 20, 64 << 20, 32 << 20
# Counts in config.json: the largest, and the sum of all.
_LARGEST_INTEGER, _LARGEST_SUM = 1 << 24, 1 << 26
# Integers that no list is as long as: frequencies, token ids, lengths. Building the model bounds what tensors they make.
_NO_COUNT = re.compile(r"theta|freq|base|seed|_id$|_ids$|length|position|window|ctx|seq")
_LARGEST_NUM_LABELS = 1 << 20  # transformers builds two dicts of that length, which take 150 bytes an entry
_ITEM_BITS = {"BOOL": 8, "F4": 4, "F6": 6, "F8": 8, "I8": 8, "U8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_ITEM_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}

_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass
class Stored:
    """An upper bound of what the weight files of a folder hold: `elements` in all, in `tensors` tensors."""

    elements: int = 0
    tensors: int = 0


def check_text_files(folder: Path) -> None:
    """Raise UserError for a link that leaves the folder, and for anything but plain files, among the text files of a model."""
    templates = folder / "additional_chat_templates"
    read = [path for path in folder.iterdir() if _READ.fullmatch(path.name) or path == templates]
    for path in [*sorted(read), *sorted(templates.glob("*.jinja"))]:
        _check_text_file(path, folder)


def check_folder(folder: Path) -> Stored:
    """Check the files of a model folder that transformers reads; returns the size of its weights.

    Raises UserError for a link that leaves the folder (except to the blobs of the hub's cache), for anything but plain
    files, for a shard or another file that is named outside the folder, for a missing shard, for an adapter beside the
    model, for a distributed checkpoint, and for impossible sizes: of a JSON file, the weights, a header, a tensor, or in config.json.
    """
    check_text_files(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds a model (config.json) and an adapter (adapter_config.json); move one of them elsewhere"
        )
    for name in _SETTINGS:
        if (folder / name).is_file():
            _check_named_files(folder / name)
    config = _read_json(folder / "config.json")
    weights = _weights(folder, config)
    if not weights and any(path.name == ".metadata" or path.name.startswith("shard-0") for path in folder.iterdir()):
        raise UserError(f"{folder} holds a distributed checkpoint; save the whole model with save_pretrained()")
    for path in weights:
        _check_file_type(path, folder)
    size, memory = sum(path.stat().st_size for path in weights), memory_bytes()
    if size > memory:
        raise UserError(
            f"the weights in {folder} have {size / 2**30:,.0f} GiB, this machine's memory {memory / 2**30:,.0f} GiB; take a smaller model"
        )
    stored = Stored()
    for path in weights:
        if path.suffix == ".safetensors":
            _add_header(path, stored)
        else:  # only unpacking would tell the shapes; an element has at least one byte
            size = path.stat().st_size
            stored.elements += size
            stored.tensors += min(size // 64, 10_000)
    _check_counts(folder, config)
    return stored


def _weights(folder: Path, config) -> list[Path]:
    """The files that transformers loads the weights from; none if it will find none."""
    own = config.get("transformers_weights") if isinstance(config, dict) else None
    names = [own, f"{own}.index.json"] if isinstance(own, str) and Path(own).name == own else []
    for path in [folder / name for name in (*names, *_WEIGHTS)]:
        if path.name.endswith(".index.json") and path.is_file():
            _check_text_file(path, folder)
            return _shards(path)
        if os.path.lexists(path):
            return [path]
    return []


def weights_in(folder: Path) -> list[Path]:
    """The files with the weights of the model in `folder`, which `check_folder` has accepted."""
    return _weights(folder, _read_json(folder / "config.json"))


def _check_text_file(path: Path, folder: Path) -> None:
    _check_file_type(path, folder)
    limit = _CONFIG_BYTES if path.name in _SETTINGS else _TEXT_BYTES
    if path.stat().st_size > limit:
        raise UserError(f"{path} has {_mib(path.stat().st_size)}, which no model needs ({_mib(limit)} at most)")


def _check_file_type(path: Path, folder: Path) -> None:
    roots = [folder]
    snapshots = Path(os.path.realpath(folder)).parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        roots.append(snapshots.parent / "blobs")
    if path.is_symlink() and leads_out(path, *roots):
        raise UserError(f"{path} is a link that leads out of the model's folder; replace it by the file, or remove it")
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a plain file nor a folder (a pipe, a device or a broken link?); remove it")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(f"{path} is a pointer of Git LFS instead of the file; run git lfs pull in {folder}")


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot load model {path.parent}: {path.name} is no JSON ({str(error)[:100]})") from None


def _shards(path: Path) -> list[Path]:
    """The files that an index names, each once."""
    index = _read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{path} has no weight_map from tensors to files; save the model again")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{path} names a shard outside its folder: {name[:100]!r}; do not use this model")
        if not (path.parent / name).is_file():
            raise UserError(f"{path} names the shard {name}, which is missing; download the model again")
    return [path.parent / name for name in names]


def _check_named_files(path: Path) -> None:
    """Refuse a setting that names a file outside the folder, if that file exists on this machine.

    A path left over from the author's machine does no harm.
    """
    settings = _read_json(path)
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key.endswith(("_file", "_files")) or key == "transformers_weights":
            for name in value if isinstance(value, list) else [value]:
                if not isinstance(name, str) or "\0" in name or Path(name).name == name:
                    continue
                if any(leads_out(p, path.parent) and p.exists() for p in (Path(name), path.parent / name)):
                    raise UserError(
                        f"{path} names a file outside its folder: {key} is {name[:100]!r}; remove it from {path.name}"
                    )


def _add_header(path: Path, stored: Stored) -> None:
    """Add the tensors in a safetensors header to `stored` (https://huggingface.co/docs/safetensors, "Format")."""
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
                bits = next(bits for dtype, bits in _ITEM_BITS.items() if tensor["dtype"].startswith(dtype))
                in_file = 0 <= begin <= end <= size - 8 - length
                if min([0, *shape]) < 0 or not in_file or elements * bits != (end - begin) * 8:
                    raise UserError(
                        f"cannot load model {path.parent}: {path.name} gives {name[:100]} an impossible size"
                    )
                stored.elements += elements
                stored.tensors += 1
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, StopIteration) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot load model {path.parent}: the header of {path.name} is damaged") from None


def _check_counts(folder: Path, config) -> None:
    """Refuse counts that no model needs, because configurations build lists as long as they say.

    A field that the configuration's class does not declare is only kept, and counts nothing.
    """
    if not isinstance(config, dict) or not _config_class(config):
        return  # transformers refuses it, or runs its code if the user trusts it
    total, rest = 0, [("", config)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += [(name, item) for name, item in value.items() if _may_count(name, _config_class(value))]
        elif isinstance(value, list):
            rest += [(key, item) for item in value]
        elif isinstance(value, int) and not _NO_COUNT.search(key):
            total += abs(value)
            limit = _LARGEST_NUM_LABELS if key == "num_labels" else _LARGEST_INTEGER
            if abs(value) > limit or total > _LARGEST_SUM:
                raise UserError(
                    f"cannot load model {folder}: the integer {key[:100]} in config.json is too large to count anything"
                )


def _config_class(settings: dict) -> type | None:
    """The class of a configuration, if transformers has one."""
    model_type = settings.get("model_type")
    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def _may_count(name: str, config_class: type | None) -> bool:
    """Whether a configuration of this class may build a list from the field; an undeclared one may be an older name."""
    if config_class is None or "layer" in name or "dense" in name or name == "num_labels":
        return True
    return name in config_class.attribute_map or name in inspect.signature(config_class).parameters


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
