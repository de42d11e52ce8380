"""A call of `scripts/generate.py`."""

from dataclasses import dataclass

from mori.cli import flag, same_flag
from mori.config.groups import DeviceConfig, ModelConfig
from mori.config.sampling import SamplingConfig


@dataclass
class GenerateConfig(ModelConfig, SamplingConfig, DeviceConfig):
    """A call of `scripts/generate.py`."""

    group = "text"

    model: str = flag("mori_brain_final", "a folder with a model and its tokenizer, or a name on the hub", path=True)
    prompt: list[str] = flag([""], "text to continue; several give several answers, an empty one starts from nothing")
    prompt_file: str = flag("", "a UTF-8 file with one prompt on each line; empty lines are skipped", path=True)
    seed: int = flag(0, "seed of the sampler; every prompt starts from it", min=0, max=2**32 - 1)
    batch_size: int = flag(32, "texts that are decoded in one batch", min=1)
    crop_prompt: bool = flag(False, "drop the beginning of a prompt that is longer than the context")
    on_full_context: str = flag(
        "stop",
        "what happens when the context is full: stop, or slide: drop its older half and continue",
        choices=("stop", "slide"),
    )
    interactive: bool = flag(False, "a prompt line: type, read the answer, change settings with /help")
    json: bool = flag(False, "print one JSON list of {prompt, text, new_token_ids, finish_reason} and nothing else")

    def contradictions(self) -> list[str]:
        """A prompt line takes its prompts from the keyboard and prints text."""
        contradicts = self.interactive and (self.json or self.prompt_file)
        return ["interactive contradicts json and prompt_file"] * bool(contradicts) + super().contradictions()


@dataclass
class ChatConfig(GenerateConfig):
    """A call of `mori chat`."""

    interactive: bool = same_flag(GenerateConfig, "interactive", True)
