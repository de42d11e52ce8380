"""Which weights of a model train: all, some layers (with the names of LLaMA-Factory), or adapters beside frozen ones."""

import re
from dataclasses import fields

import torch
from torch import nn

from mori.cli import UserError
from mori.config import TrainConfig
from mori.config.adapters import AdapterConfig
from mori.model.adapters import lora
from mori.model.probes import read_text


def select(model: nn.Module, config: TrainConfig, input_ids: torch.Tensor) -> str:
    """Freeze what `config` does not train, and add its adapters; returns what trains, in words, "" if everything does.

    Args:
        input_ids: `(B, T)`, a few tokens on the model's device, to see which layers the model calls.

    Raises UserError if a setting matches nothing in the model.
    """
    if config.freeze_trainable_layers is not None:
        freeze(model, config.freeze_trainable_layers, config.freeze_trainable_modules, config.freeze_extra_modules)
    elif config.use_peft:
        wanted = lora.LoRASettings(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=tuple(config.lora_target_modules),
            modules_to_save=tuple(config.lora_modules_to_save),
        )
        if layers := list(lora.adapted(model).values()):
            _check_same(layers[0].lora.settings, wanted)
        else:
            called = lora.called_layers(model, lambda: read_text(model, config.model, input_ids[:1, :2]))
            lora.add(model, wanted, called=called)
    for layer in lora.adapted(model).values():
        layer.lora.fused = config.fused_adapters
    if all(parameter.requires_grad for parameter in model.parameters()):
        return ""
    return table(model)


def _check_same(loaded: lora.LoRASettings, wanted: lora.LoRASettings) -> None:
    """Raise UserError for a setting that was asked for and that the loaded adapter does not have."""
    for member in fields(AdapterConfig):
        name = member.name if member.name in ("lora_alpha", "lora_dropout") else member.name.removeprefix("lora_")
        if not hasattr(wanted, name):
            continue
        default = getattr(AdapterConfig(), member.name)
        ours, theirs = (getattr(settings, name) for settings in (wanted, loaded))
        if ours not in (theirs, tuple(default) if isinstance(default, list) else default):
            raise UserError(f"{member.name} is {ours}, but the adapter that continues has {theirs}; leave it out")


def freeze(model: nn.Module, wanted: int, modules: list[str], extra_modules: list[str]) -> None:
    """Leave gradients on for parts of some layers, and off for all other parameters.

    Args:
        wanted: the number of layers that train: the last ones, or the first ones if it is negative.
        modules: the modules of these layers that train, by a part of their names; `all` is all of them.
        extra_modules: modules outside the layers that train too, by a part of their names.

    Raises UserError if the model has no list of layers, or fewer, or if a name matches nothing.
    """
    prefix, all_layers = layers(model)
    count = len(all_layers)
    if not count:
        raise UserError(f"freeze_trainable_layers: {type(model).__name__} has no list of layers")
    if abs(wanted) > count:
        raise UserError(f"freeze_trainable_layers is {wanted}, but the model has {count} layers")
    chosen = range(count - wanted, count) if wanted > 0 else range(-wanted)
    layer, inside, outside = re.compile(rf"{re.escape(prefix)}\.(\d+)\."), {}, {}
    for name, _ in model.named_parameters():
        if match := layer.match(name):
            inside[name] = int(match[1]) in chosen, name[match.end() :]
        else:
            outside[name] = name
    _check_matched(
        "freeze_trainable_modules", [m for m in modules if m != "all"], [rest for _, rest in inside.values()]
    )
    _check_matched("freeze_extra_modules", extra_modules, list(outside))
    for name, parameter in model.named_parameters():
        if name in inside:
            is_chosen, rest = inside[name]
            trains = is_chosen and ("all" in modules or _named(rest, modules))
        else:
            trains = _named(name, extra_modules)
        parameter.requires_grad_(trains)


def layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the model's layers, and its name; an empty list if there is none."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) == wanted]
    return min(lists, key=lambda item: item[0].count("."), default=("", nn.ModuleList()))


def _named(name: str, modules: list[str]) -> bool:
    """Whether a module in the path `name` bears one of the names."""
    return any(f".{module}." in f".{name}." for module in modules)


def _check_matched(flag: str, modules: list[str], names: list[str]) -> None:
    for module in modules:
        if not any(_named(name, [module]) for name in names):
            known = ", ".join(sorted({part for name in names for part in name.split(".")[:-1] if not part.isdigit()}))
            raise UserError(f"{flag}: {module} matches no module; there are {known}")


def table(model: nn.Module) -> str:
    """How many weights train, of how many, and in which modules; one line for each kind of module."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        kind = re.sub(r"\.\d+\.", ".*.", name.partition(".lora.")[0].removesuffix(".weight").removesuffix(".bias"))
        numbers = totals.setdefault(kind, [0, 0])
        numbers[0] += parameter.numel() * parameter.requires_grad
        numbers[1] += parameter.numel()
    trained, total = (sum(numbers[i] for numbers in totals.values()) for i in (0, 1))
    rows = {kind: numbers for kind, numbers in totals.items() if numbers[0]}
    width = max(map(len, rows), default=0)
    lines = [f"  {kind:{width}}  {part:>13,} of {whole:,}" for kind, (part, whole) in rows.items()]
    return "\n".join([f"trains {trained:,} of {total:,} weights ({trained / total:.2%}):", *lines])
