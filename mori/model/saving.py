"""Save a model and its tokenizer, so that other programs and older releases of transformers load them."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import GenerationConfig

from mori.checkpoint import shards
from mori.checkpoint.files import write, write_json
from mori.checkpoint.tensors import MODEL, HostMemory, check_finite, distinct, serialized
from mori.cli import UserError, guarded, one_line
from mori.model.adapters import lora


def save(model: nn.Module, tokenizer, folder: Path, *, rehearsal: bool = False) -> None:
    """Write model and tokenizer so that `AutoModelForCausalLM` and `AutoTokenizer` load them from `folder`.

    Adapters are merged into the weights. A `rehearsal` writes one element of each weight, and everything else in full.

    Raises OSError if they cannot be written, and UserError for other errors of the libraries.
    """
    if rehearsal:
        options = {"state_dict": _samples(model.state_dict()), "save_original_format": False}
    else:
        options = {"state_dict": lora.merged_state_dict(model)} if lora.adapted(model) else {}
    try:
        with _published_generation_config(model, folder), _on_any_rank(model):
            model.save_pretrained(folder, **options)
    except SafetensorError as error:  # safetensors' error for a full disk
        failure = OSError(str(error))
        if number := re.search(r"os error (\d+)", str(error)):
            failure = OSError(int(number[1]), os.strerror(int(number[1])))
        raise failure from None
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UserError(f"the model cannot be saved: {one_line(error)}") from None
    guarded("the tokenizer cannot be saved", lambda: tokenizer.save_pretrained(folder))
    _add_names_of_transformers_4(folder)


@contextlib.contextmanager
def _on_any_rank(model: nn.Module) -> Iterator[None]:
    """The context in which transformers (5.24) writes on every rank that saves, because each node may have its own disk."""
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def save_divided(model: nn.Module, tokenizer, folder: Path, writers: int) -> None:
    """`save` for weights that are divided over ranks: each of the first `writers` ranks writes some, whole. Collective.

    A rank holds no more than the tensors that it writes, and one more. Every rank raises what one of them raises: the errors of
    `save`, or FloatingPointError if a weight is not finite.
    """
    rank = dist.get_rank()
    with _agreed():
        if rank == 0:
            save(model, tokenizer, folder, rehearsal=True)
            (folder / MODEL).unlink()
    merged = lora.merged_state_dict(model, keep_vars=True)
    tensors = distinct({name: _by_rows(tensor) for name, tensor in merged.items()})
    owner = shards.owners(tensors, writers)
    parts = shards.file_names(MODEL, owner)
    own = shards.owned(MODEL, tensors, owner, HostMemory())
    with _agreed():
        check_finite(own, dict(model.named_buffers()))
        if rank in parts:
            write(folder / parts[rank], serialized(own))
        if rank == 0 and len(parts) > 1:
            write(folder / f"{MODEL}.index.json", [shards.index(tensors, owner, parts)])


def _by_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, of which each rank has some rows if the ranks divide it: a transposed sum of two may be divided by columns."""
    if not isinstance(tensor, DTensor) or all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
        return tensor
    return tensor.redistribute(placements=[p if p.is_replicate() else Shard(0) for p in tensor.placements])


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """The context of work whose error on one rank is raised on all."""
    error = None
    try:
        yield
    except (OSError, UserError, FloatingPointError) as raised:
        error = raised
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise first


def _add_names_of_transformers_4(folder: Path) -> None:
    """Name the tokenizer's class, its special tokens and the rotary positions as transformers 4 reads them.

    Without them release 4 refuses the tokenizer, and computes rotary positions from its defaults. Release 5 reads both.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        write_json(path, settings)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    if "sliding_attention" in rotary:  # Gemma 3
        config["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    is_neox = config["model_type"] == "gpt_neox"
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"} if is_neox else {}
    scaling = dict(rotary)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rotary:
            config[names.get(name, name)] = scaling.pop(name)
    if scaling and scaling.get("rope_type") != "default":
        config["rope_scaling"] = scaling
    if rotary:
        write_json(folder / "config.json", config)


def _samples(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One element of each tensor; tensors that share memory share it still."""
    tensors = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    samples: dict[tuple, torch.Tensor] = {}
    for tensor in tensors.values():
        samples.setdefault(_memory(tensor), tensor[(slice(1),) * tensor.dim()].clone())
    return {name: samples[_memory(tensor)] for name, tensor in tensors.items()}


def _memory(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@contextlib.contextmanager
def _published_generation_config(model: nn.Module, folder: Path) -> Iterator[None]:
    """The context of `save_pretrained`: the model's generation_config.json is written as it is.

    transformers loads a contradiction such as a temperature without sampling with a warning, but refuses to save it.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(folder / "generation_config.json", use_diff=True)
