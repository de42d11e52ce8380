"""Recipes: settings under a name."""

import shlex
from dataclasses import dataclass

from mori.cli import Config, flag

RECIPES: dict[str, dict] = {
    # The course's script, for any model: the sampling is that of its first look at the result.
    "modul_11": {
        "block_size": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 5.0,
        "optim": "adamw_torch_fused",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
    },
}


def flags_of(recipe: str) -> str:
    """The settings of a recipe as they are written on a command line."""
    return " ".join(
        f"--{name} {shlex.quote(f'{v:g}' if isinstance(v, float) else str(v))}" for name, v in RECIPES[recipe].items()
    )


@dataclass
class RecipeConfig(Config):
    """Settings under a name, which the other flags override."""

    group = "recipe"

    recipe: str | None = flag(
        None,
        "a set of settings, instead of the defaults that depend on the model; other flags override them. "
        + "; ".join(f"{name}: {flags_of(name)}" for name in RECIPES),
        kind=str,
        choices=tuple(RECIPES),
        may_change=True,  # the settings themselves are compared
    )
