"""A call of `mori export`."""

from dataclasses import dataclass, fields

from mori.cli import flag
from mori.config.groups import HubConfig, ModelConfig, TextConfig


@dataclass
class ExportConfig(ModelConfig, TextConfig, HubConfig):
    """A call of `mori export`."""

    group = "export"

    model: str = flag("mori_brain_final", "a folder with a model and its tokenizer, or a name on the hub")
    format: str = flag("gguf", "the format of the file: gguf, for llama.cpp and what builds on it", choices=("gguf",))
    outtype: str = flag(
        "f16",
        "type of the matrices in the file: f32, f16, or q8_0 (8 bits and a scale for each 32 values)",
        choices=("f32", "f16", "q8_0"),
    )
    merge: bool = flag(
        False,
        "instead, merge an adapter into its unquantized base model and write a model folder, read back and compared",
    )
    output: str = flag(
        "", "the file or folder; unset is <model>-<outtype>.gguf, or <model>-merged, in the current folder"
    )

    def contradictions(self) -> list[str]:
        """Settings of a file, when the folder is uploaded as it is."""
        default = {f.name: f.default for f in fields(self)} | {"corpus": []}
        unused = [name for name in ("outtype", "merge", "output", "corpus") if getattr(self, name) != default[name]]
        mistakes = [
            f"push_to_hub uploads the folder of --model as it is; leave {name} out"
            for name in unused
            if self.push_to_hub
        ]
        return mistakes + super().contradictions()
