"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mori.checkpoint.files import describe
from mori.cli import UserError, guarded
from mori.model.adapters import lora
from mori.model.adapters.lora import LoRASettings, adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT that change nothing here, and the values of the others under which an adapter is a plain LoRA.
_FREE = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out",
    "init_lora_weights", "megatron_core", "megatron_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_PLAIN = {"peft_type": "LORA", "bias": "none"}


def base_of(name: str) -> str:
    """The model that the adapter in the folder `name` belongs to; `name` itself if it is not a folder with an adapter.

    Raises UserError if the adapter does not name its model.
    """
    folder = Path(name)
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return name
    base = read_settings(folder)[1].get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / CONFIG} does not name its base model; enter it as base_model_name_or_path")
    return base


def adapter_config(model: nn.Module, base: str) -> dict:
    """The adapter_config.json of `model`; `base` is the name or folder of the model that the adapters belong to."""
    layers = adapted(model)
    settings = next(iter(layers.values())).lora.settings
    return {
        **_PLAIN,
        **asdict(settings),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "revision": getattr(model.config, "_commit_hash", None),
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "target_modules": _shortest_ends(model, set(layers)),
        "modules_to_save": sorted(settings.modules_to_save) or None,
    }


def _shortest_ends(model: nn.Module, names: set[str]) -> list[str]:
    """The last parts of the names if PEFT would match no other linear layer by them, else the whole names; sorted."""
    ends = {name.rpartition(".")[2] for name in names}
    matched = {
        name for name, module in model.named_modules() if name.rpartition(".")[2] in ends and hasattr(module, "weight")
    }
    return sorted(ends if matched == names else names)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that train, by PEFT's names: adapters, and the modules that train whole."""
    return {
        _PREFIX + name.replace(".lora.lora_", ".lora_"): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class Trained:
    """The tensors of a model that train, as the `state_dict()` of a checkpoint."""

    def __init__(self, model: nn.Module):
        self._model = model

    def state_dict(self, keep_vars: bool = False) -> dict[str, torch.Tensor]:
        """`tensors` of the model."""
        return tensors(self._model)

    def named_buffers(self) -> dict:
        """None: buffers belong to the base model."""
        return {}


def stored(model: nn.Module) -> nn.Module | Trained:
    """What a checkpoint holds of the model: all of it, or its adapters."""
    return Trained(model) if adapted(model) else model


def save(model: nn.Module, whole: dict[str, torch.Tensor], tokenizer, folder: Path, base: str) -> None:
    """Write the adapters of `model`, their configuration, and the tokenizer into `folder`, as PEFT does.

    `whole` are the `tensors` of the model, gathered if they are divided over ranks.

    Raises OSError if they cannot be written, and UserError if the tokenizer cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(adapter_config(model, base), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file({name: tensor.cpu().contiguous() for name, tensor in whole.items()}, folder / WEIGHTS, {"format": "pt"})
    guarded("the tokenizer cannot be saved", lambda: tokenizer.save_pretrained(folder))


def base_identity(base: str, commit: str | None) -> str:
    """What tells the weights of `base` from others: its commit on the hub, or the SHA-256 of the files in its folder."""
    if commit:
        return commit
    paths = sorted([*Path(base).glob("*.safetensors"), *Path(base).glob("*.bin")])
    return hashlib.sha256("".join(describe(path)["sha256"] for path in paths).encode()).hexdigest()


def read_settings(folder: Path) -> tuple[LoRASettings, dict]:
    """The settings of the adapter in `folder`, and all of its adapter_config.json.

    Raises UserError if the file cannot be read, or describes more than plain LoRA.
    """
    path = folder / CONFIG
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    known = {field.name for field in fields(LoRASettings)}
    for name, value in saved.items():
        plain = value == _PLAIN[name] if name in _PLAIN else name in _FREE or name in known or not value
        if not plain:
            raise UserError(f"{path}: {name} is {json.dumps(value)[:60]}, and mori reads plain LoRA adapters only")
    try:
        targets = saved.get("target_modules") or ()
        if isinstance(targets, str):
            targets = () if targets == "all-linear" else (targets,)
        return LoRASettings(
            r=int(saved["r"]),
            lora_alpha=float(saved["lora_alpha"]),
            lora_dropout=float(saved.get("lora_dropout", 0.0)),
            use_rslora=bool(saved.get("use_rslora", False)),
            target_modules=tuple(targets),
            modules_to_save=tuple(saved.get("modules_to_save") or ()),
        ), saved
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not an adapter's configuration: {error}") from None


def attach(folder: Path, model: nn.Module) -> None:
    """Add the adapters in `folder` to their base model. Raises UserError if they do not match."""
    lora.add(model, read_settings(folder)[0])
    load(folder, model)


@torch.no_grad()
def load(folder: Path, model: nn.Module) -> None:
    """Load the tensors in `folder` into the adapters of `model`. Raises UserError if they do not match."""
    path = folder / WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    own = tensors(model)
    shapes, saved_shapes = ({name: tensor.shape for name, tensor in group.items()} for group in (own, saved))
    if shapes != saved_shapes:
        differing = sorted(set(shapes.items()) ^ set(saved_shapes.items()))[0][0]
        raise UserError(f"{path} belongs to another model or other settings: {differing} differs")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
