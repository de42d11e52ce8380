"""A run of `scripts/train.py`."""

import dataclasses
import importlib.util
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from mori.cli import plural
from mori.config.adapters import AdapterConfig, FreezingConfig
from mori.config.groups import (
    CorpusConfig,
    OutputConfig,
    SpeedConfig,
    TrainDeviceConfig,
    TrainedModelConfig,
    TrainingConfig,
)
from mori.config.logging import LoggingConfig
from mori.config.recipes import RECIPES, RecipeConfig
from mori.config.sampling import TrainSamplingConfig

PRESETS = ("mini",)
FOLLOW_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules of transformers that follow the held-out loss
_ELEMENTWISE = (
    "adamw_torch_fused",
    "adamw_torch",
    "sgd",
    "rmsprop",
    "adagrad",
)  # optimizers that can work on any part of a weight
NO_WARMUP = ("constant", *FOLLOW_EVALUATIONS)  # those without a warm-up


@dataclass
class TrainConfig(
    TrainedModelConfig,
    CorpusConfig,
    RecipeConfig,
    TrainingConfig,
    AdapterConfig,
    FreezingConfig,
    SpeedConfig,
    TrainDeviceConfig,
    LoggingConfig,
    TrainSamplingConfig,
    OutputConfig,
):
    """A run of `scripts/train.py`. Names are those of `TrainingArguments` and `generate()` for the same things."""

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters train: as asked for, or because the model is a folder with an adapter."""
        return self.use_peft or Path(self.model, "adapter_config.json").is_file()

    def resolve(self) -> "TrainConfig":
        """A copy in which every default that depends on another field has its value: the recipe's, or that of the model's start."""
        resolved = dataclasses.replace(self, model=self.model.rstrip("/") or self.model)
        resolved.use_peft = resolved.trains_adapters
        recipe = RECIPES.get(resolved.recipe, {})
        start = "scratch" if resolved.model in PRESETS else "adapters" if resolved.use_peft else "pretrained"
        if resolved.warmup_steps is None and resolved.lr_scheduler_type in NO_WARMUP:
            resolved.warmup_steps = 0.0
        for f in fields(resolved):
            default = recipe.get(f.name, f.metadata.get(start, f.metadata.get("pretrained")))
            if default is not None and getattr(resolved, f.name) is None:
                setattr(resolved, f.name, default)
        if not resolved.run_name:
            names = [re.sub(r"\.(gz|bz2|xz|zst|zip)$", "", name, flags=re.IGNORECASE) for name in resolved.corpus[:2]]
            corpus = "-".join(Path(name).stem.strip("*.-") or "text" for name in names) or "transcripts"
            name = re.sub(r"[^\w.-]+", "-", f"{Path(resolved.model).name}-{corpus}")
            resolved.run_name = name.encode()[:200].decode(errors="ignore")  # a folder's name has at most 255 bytes
        return resolved

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps of the run, rounded up to a whole step as Trainer does."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def too_late(self, total_steps: int) -> str:
        """What is wrong with a setting that reaches beyond the last of `total_steps`; empty if none does."""
        if steps_of(self.warmup_steps, total_steps) > total_steps:
            return f"warmup_steps {self.warmup_steps:g} is more than the run's {plural(total_steps, 'step')}"
        if self.profiled_steps and self.profiled_steps[0] > total_steps:
            return f"profile_steps {self.profile_steps} begins after the run's {plural(total_steps, 'step')}"
        return ""

    def contradictions(self) -> list[str]:
        """Empty names, and settings that exclude each other."""
        checks = [
            (self.max_steps != 0, "max_steps is 0, must be above 0, or -1 to count epochs"),
            (
                not 0 < self.max_steps < (self.warmup_steps or 0),
                f"warmup_steps {self.warmup_steps or 0:g} is more than max_steps {self.max_steps}",
            ),
            (
                not (self.warmup_steps and self.lr_scheduler_type in NO_WARMUP),
                f"lr_scheduler_type {self.lr_scheduler_type} has no warm-up; take constant_with_warmup, or leave warmup_steps out",
            ),
            (
                not (self._needs_evaluations() and self._without_evaluations()),
                f"{self._needs_evaluations()} follows the held-out loss, which {self._without_evaluations()} leaves out",
            ),
            (
                not self.greater_is_better,
                f"greater_is_better contradicts metric_for_best_model {self.metric_for_best_model}: the lowest is best",
            ),
            (
                not (self.load_best_model_at_end and self.save_strategy == "no"),
                "load_best_model_at_end publishes a checkpoint, and save_strategy no keeps none; take save_strategy best",
            ),
            (
                not self.early_stopping_threshold or self.early_stopping_patience is not None,
                "early_stopping_threshold does nothing without early_stopping_patience",
            ),
            (bool(self.resume_from_checkpoint), "resume_from_checkpoint is empty, must be auto, none or a path"),
            (
                not (self.extend and self.resume_from_checkpoint == "none"),
                "extend resumes a run, resume_from_checkpoint none starts one: they contradict each other",
            ),
            (
                "bit" not in self.optim or importlib.util.find_spec("bitsandbytes") is not None,
                f"optim {self.optim} needs bitsandbytes: pip install bitsandbytes",
            ),
            (
                self.optim == "adamw_torch_fused" or self.dtype == "float32",
                f"optim {self.optim} does not round stochastically: with dtype bfloat16 small updates would be lost; leave one out",
            ),
            (
                not (self.use_peft and self.freeze_trainable_layers is not None),
                "use_peft and freeze_trainable_layers contradict each other; take one of them",
            ),
            (
                not (self.use_peft and self.model in PRESETS),
                f"use_peft trains adapters of a trained model, and {self.model} starts from random weights; give a --model",
            ),
            (
                not (self.load_in_4bit and self.save_merged),
                "save_merged would round the trained model to 4 bits; leave it out, and merge the adapter into the unquantized "
                "model afterwards: mori export --merge",
            ),
            (
                not self.load_in_4bit or importlib.util.find_spec("bitsandbytes") is not None,
                "load_in_4bit needs bitsandbytes: pip install bitsandbytes",
            ),
            (
                not (self.use_peft and self.dtype != "float32"),
                "dtype is the type of weights that train; with use_peft the frozen ones have base_dtype",
            ),
            (bool(self.output_dir), "output_dir is empty"),
            (bool(self.logging_dir), "logging_dir is empty"),
            (
                not re.search(r"[/\\\0]", self.run_name)
                and self.run_name not in (".", "..")
                and len(self.run_name) <= 100,
                f"run_name {self.run_name!r} must be the name of one folder, of at most 100 letters; its parent is logging_dir",
            ),
        ]
        given = frozenset() if "use_peft" in self.given else self.given
        defaults = {f.name: getattr(AdapterConfig(), f.name) for f in fields(AdapterConfig)}
        unused = [n for n in defaults if (n in given and getattr(self, n)) or getattr(self, n) != defaults[n]]
        checks.append((self.trains_adapters or not unused, f"{', '.join(unused)} needs use_peft"))
        return [message for ok, message in checks if not ok] + self._unshardable() + super().contradictions()

    def _unshardable(self) -> list[str]:
        """Settings that need whole weights on every rank."""
        if self.fsdp == "none":
            return []
        names = f"{', '.join(_ELEMENTWISE[:-1])} or {_ELEMENTWISE[-1]}"
        checks = {
            f"optim {self.optim} needs whole weights, and fsdp shards them; take {names}": self.optim in _ELEMENTWISE,
            "load_in_4bit packs weights into blocks, which fsdp cannot shard; leave one out": not self.load_in_4bit,
        }
        return [mistake for mistake, ok in checks.items() if not ok]

    def _needs_evaluations(self) -> str:
        """The first setting that needs the held-out loss; empty if there is none."""
        settings = {
            f"lr_scheduler_type {self.lr_scheduler_type}": self.lr_scheduler_type in FOLLOW_EVALUATIONS,
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience is not None,
            "save_strategy best": self.save_strategy == "best",
        }
        return next((name for name, needs in settings.items() if needs), "")

    def _without_evaluations(self) -> str:
        """The setting that leaves the held-out loss out; empty if there is none."""
        if self.eval_strategy == "no":
            return "eval_strategy no"
        return "" if self.held_out_fraction > 0 or self.validation_file else "held_out_fraction 0"

    def differences(self, other: "TrainConfig", extending: bool = False) -> dict[str, str]:
        """The fields that differ and would make a resumed run another run, each with `(this, other)`.

        With `extending`, the length of the run may differ too.
        """
        return self._differing(
            other, lambda f: not self.rule(f, "inexact") and not (extending and f.metadata.get("extends"))
        )

    def inexact_differences(self, other: "TrainConfig") -> dict[str, str]:
        """The fields that differ and change only the rounding of a resumed run, each with `(this, other)`."""
        return self._differing(other, lambda f: self.rule(f, "inexact"))

    def _differing(self, other: "TrainConfig", compared) -> dict[str, str]:
        names = [f.name for f in fields(self) if not self.rule(f, "may_change") and compared(f)]
        values = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: f"({mine!r}, {theirs!r})" for name, (mine, theirs) in values.items() if mine != theirs}


def steps_of(value: float, total: int) -> int:
    """A number of steps; below 1 it is a share of `total`, rounded up as in `TrainingArguments`."""
    return int(value) if value >= 1 else math.ceil(value * total)
