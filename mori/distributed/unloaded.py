"""A model whose weights are not in memory yet: every rank then reads its rows of them from the model's files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from mori.checkpoint import shards
from mori.cli import UserError, one_line
from mori.config import TrainConfig
from mori.distributed.ranks import Runtime
from mori.model import files, loading

Places = dict[str, tuple[Path, str]]  # of each weight: its file, and its name there


def load_model(config: TrainConfig, model_config, runtime: Runtime) -> tuple[nn.Module, Places | None]:
    """The model of a run, on its device; or with its weights on the meta device, and where they are stored.

    The latter if ranks are to share all weights of a model in a folder, and can read them as they are. Otherwise every rank
    loads the whole model, as transformers converts it. Raises UserError as `loading.load_model` does.
    """
    if runtime.sharded and not config.use_peft and (result := unloaded(Path(config.model), model_config, config)):
        return result
    four_bit = runtime.dtype if config.load_in_4bit else None
    model = loading.load_model(config.model, model_config, config.trust_remote_code, four_bit)
    return loading.move(model, runtime.device), None


def unloaded(folder: Path, model_config, config: TrainConfig) -> tuple[nn.Module, Places] | None:
    """The model in `folder` with its parameters on the meta device, and where they are stored.

    None if it takes transformers to read the files: they are not safetensors, or hold the weights under other names or in
    other shapes.
    """
    if not (folder / "config.json").is_file():
        return None
    files.check_folder(folder)
    paths = files.weights_in(folder)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return None
    hook = register_module_parameter_registration_hook(_to_meta)
    try:
        options = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
        model = AutoModelForCausalLM.from_config(model_config, **options)
    finally:
        hook.remove()
    places = _places(model, paths)
    return places and (model.train(), places)


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Replaces a parameter as soon as it is registered, before its random values are drawn."""
    if parameter is None or parameter.is_meta:  # a tied weight is registered twice, and stays one
        return None
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def _places(model: nn.Module, paths: list[Path]) -> Places | None:
    """Where each weight and each saved buffer is stored; a tied weight is stored under one of its names."""
    stored, shapes = {}, {}
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored[name], shapes[name] = path, file.get_slice(name).get_shape()
    prefix, places, remaining = f"{model.base_model_prefix}.", {}, set(stored)
    for name, tensor in model.state_dict(keep_vars=True).items():
        for written in (name, name.removeprefix(prefix), prefix + name):
            if written in stored and shapes[written] == list(tensor.shape):
                places[name] = stored[written], written
                remaining.discard(written)
                break
    own = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in own.items() if name in places}
    is_whole = all(id(parameter) in present for parameter in own.values())
    return places if is_whole and not remaining else None


def allocate(module: nn.Module, device: torch.device) -> None:
    """Allocate the weights, which are on the meta device; buffers keep their values, and tied weights stay tied."""
    owners = list(module.modules())
    buffers = [(owner, name, b) for owner in owners for name, b in owner.named_buffers(recurse=False)]
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in owners:
        for name, parameter in owner.named_parameters(recurse=False):
            tied.setdefault(id(parameter), []).append((owner, name))
    module.to_empty(device=device)
    for (first, name), *others in tied.values():
        for owner, other in others:
            setattr(owner, other, getattr(first, name))
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.to(device))


@torch.no_grad()
def read(model: nn.Module, places: Places) -> None:
    """Read this rank's part of all weights of `model`, which are in memory by now. Raises UserError if a file is damaged."""
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (path, written) in places.items():
        by_file.setdefault(path, []).append((name, written))
    tensors = model.state_dict()
    for path, names in by_file.items():
        try:
            with safe_open(path, "pt") as file:
                for name, written in names:
                    shards.read(tensors[name], file.get_slice(written))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"cannot load model {path.parent}: {path.name}: {one_line(error)}") from None
