"""Which weights train: all, some layers, or adapters beside frozen ones."""

from dataclasses import dataclass

from mori.cli import Config, flag


@dataclass
class AdapterConfig(Config):
    """LoRA adapters, with the names of TRL's `ModelConfig`."""

    group = "adapters"

    use_peft: bool = flag(
        False, "train LoRA adapters and freeze the model; the learning rate is then 5e-4 unless given"
    )
    lora_r: int = flag(16, "rank of the adapters", above=0)
    lora_alpha: float = flag(32.0, "scale of the adapters: alpha / r, or alpha / sqrt(r) with --use_rslora", above=0)
    lora_dropout: float = flag(
        0.0, "dropout in front of the adapters; on a CPU its random numbers take a good part of a step", min=0, below=1
    )
    lora_target_modules: list[str] = flag(
        [],
        "layers that get adapters, by the ends of their names (q_proj v_proj) or by a regular expression; unset takes all "
        "linear layers but the head",
    )
    lora_modules_to_save: list[str] = flag([], "modules that train whole and are saved beside the adapters")
    use_rslora: bool = flag(False, "scale the adapters by alpha / sqrt(r)")
    save_merged: bool | None = flag(
        None,
        "merge the adapters into the model in --output_dir; off writes them alone; unset merges if the model has less than 2 GiB",
        kind=bool,
        may_change=True,
    )
    load_in_4bit: bool = flag(
        False,
        "hold the frozen layers in 4 bits (QLoRA: NF4 with nested constants, by bitsandbytes); the adapters stay in fp32",
    )
    base_dtype: str = flag(
        "float32",
        "type of the frozen weights; bfloat16 halves their memory and rounds them",
        choices=("float32", "bfloat16"),
    )


@dataclass
class FreezingConfig(Config):
    """Freezing, with the names of LLaMA-Factory."""

    group = "freezing"

    freeze_trainable_layers: int | None = flag(
        None,
        "train the last N layers and freeze the others; with -N, the first N",
        kind=int,
    )
    freeze_trainable_modules: list[str] = flag(
        ["all"], "modules of these layers that train, such as self_attn mlp; all trains whole layers"
    )
    freeze_extra_modules: list[str] = flag([], "modules outside the layers that train too, such as lm_head")

    def contradictions(self) -> list[str]:
        """No layer at all, and settings of freezing without freezing."""
        freezes = self.freeze_trainable_layers is not None
        checks = [
            (self.freeze_trainable_layers != 0, "freeze_trainable_layers is 0, must be a number of layers"),
            (
                freezes or not (self.freeze_extra_modules or self.freeze_trainable_modules != ["all"]),
                "freeze_trainable_modules and freeze_extra_modules need freeze_trainable_layers",
            ),
        ]
        return [message for ok, message in checks if not ok] + super().contradictions()
