"""The options of scripts/compare.py and scripts/bench.py, and the models that the benchmarks build. Imports no torch."""

from dataclasses import dataclass, fields
from typing import ClassVar

from mori.cli import Config, flag, same_flag
from mori.config import FOLLOW_EVALUATIONS, DeviceConfig, TextConfig, TrainConfig

ARMS = ("mori", "mori-exact", "trainer", "trainer-tuned", "course")
NOT_IN_TRAINER = ("muon",)  # optimizers
# Fields of a run that the arms of a comparison do not share.
_ONE_WAY = (
    "eval_strategy", "save_strategy", "logging_strategy", "load_best_model_at_end", "early_stopping_patience",
)  # fmt: skip
TRAIN_ARMS = ("mori", "trainer", "trainer-tuned", "bare", "nanogpt", "mori-compiled")
DECODE_ARMS = ("mori-greedy", "generate-greedy", "mori-sampled", "generate-sampled", "mori-process", "generate-process")
TOKENIZE_ARMS = ("mori", "run_clm", "one-call")

_GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# The models by name: random weights, the sizes of well-known ones, no dropout.
SHAPES = {
    "tiny": {**_GPT2, "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 8192},
    "mini": {**_GPT2, "n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 8192},
    "small": {**_GPT2, "n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 8192},
    "124m": {**_GPT2, "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257},
    "llama-160m": {
        "model_type": "llama", "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
        "intermediate_size": 2048, "vocab_size": 32_000, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "llama-1b": {
        "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
}  # fmt: skip
# Context lengths of the models that the training benchmarks accept, in tokens.
CONTEXTS = {"tiny": 1024, "mini": 1024, "124m": 1024, "llama-160m": 2048, "smollm2-135m": 8192, "llama-1b": 8192}


@dataclass
class CompareConfig(TrainConfig):
    """A call of `scripts/compare.py`: a run of `scripts/train.py`, repeated by several arms."""

    group = "comparison"

    arms: list[str] = flag(list(ARMS), f"implementations to compare: {', '.join(ARMS)}; separated by spaces or commas")
    repeats: int = flag(1, "runs of each arm; the report gives median and range of speed and memory", min=1)
    logging_steps: int = same_flag(TrainConfig, "logging_steps", 1)
    max_eval_windows: int | None = same_flag(TrainConfig, "max_eval_windows", 0)

    def resolve(self) -> "CompareConfig":
        """A copy with every default that depends on another field filled in."""
        resolved = super().resolve()
        resolved.arms = split_names(resolved.arms)
        return resolved

    def contradictions(self) -> list[str]:
        """Unknown arms, and settings under which the arms would not do the same work."""
        mistakes = unknown_arms(split_names(self.arms), ARMS)
        if self.dry_run:
            mistakes.append("dry_run tries a single run: use it with mori train")
        for name in ("document_mask", "dtype"):
            if getattr(self, name) != getattr(TrainConfig, name):
                mistakes.append(
                    f"{name} does not exist in Trainer, so the arms would not do the same work; leave it out"
                )
        for name in _ONE_WAY:
            if getattr(self, name) != getattr(TrainConfig, name):
                mistakes.append(f"{name}: every arm does all steps, and logs and evaluates by steps; leave it out")
        if self.optim in NOT_IN_TRAINER:
            mistakes.append(f"optim {self.optim} does not exist in Trainer; take another")
        if self.lr_scheduler_type in FOLLOW_EVALUATIONS:
            mistakes.append(
                f"lr_scheduler_type {self.lr_scheduler_type} follows evaluations, and Trainer's arms have none; take another"
            )
        if self.validation_file or not self.held_out_fraction:
            mistakes.append(
                "the arms are compared on the end of the corpus: leave validation_file out, and hold some text out"
            )
        if "-" in self.corpus:
            mistakes.append("corpus - is standard input, which only one of the arms could read; name a file")
        if not self.eval_on_start:
            mistakes.append("eval_on_start must stay on: the report shows every arm's loss before training")
        return mistakes + super().contradictions()

    def arm_config(self, **changed) -> TrainConfig:
        """The config of the run that each arm does, with the fields in `changed` replaced."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)} | changed)


@dataclass
class BenchConfig(Config):
    """The options that all commands of `scripts/bench.py` share."""

    group = "benchmark"

    repeats: int = flag(5, "processes of each arm, run in turn", above=0)
    threads: int = flag(0, "threads of each process; 0 is PyTorch's default", min=0)
    output_dir: str = flag("runs/bench", "folder of the JSON files with the results", path=True)

    known_arms: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.known_arms:
            self.arms = split_names(self.arms)

    def contradictions(self) -> list[str]:
        """An empty folder, and unknown, repeated or missing arms."""
        mistakes = [] if self.output_dir else ["output_dir is empty"]
        if self.known_arms:
            mistakes += unknown_arms(self.arms, self.known_arms)
            if "mori" not in self.arms or len(set(self.arms)) < len(self.arms):
                mistakes.append(f"arms are {' '.join(self.arms)}, must include mori, and each arm once")
        return mistakes + super().contradictions()


@dataclass
class DecodeBenchConfig(BenchConfig, DeviceConfig):
    """A call of `scripts/bench.py decode`: text generation by `mori` and by `generate()`."""

    shape: str = flag(
        "small",
        "the model, with random weights; small is a GPT-2 of 4 layers and width 128",
        choices=("small", "124m", "llama-160m", "smollm2-135m", "llama-1b"),
    )
    dtype: str = flag("float32", "type of the weights", choices=("float32", "bfloat16"))
    batch_size: int = flag(1, "sequences in a batch", above=0)
    new_tokens: int = flag(100, "tokens to generate after a prompt of 16", above=0)
    rounds: int = flag(5, "generations in each process; their median counts", above=0)
    arm: str = flag("", "internal: measure this arm alone, in this process, and print its JSON")


@dataclass
class StartupBenchConfig(BenchConfig, DeviceConfig):
    """A call of `scripts/bench.py startup`: seconds until the first optimizer step is complete."""

    shape: str = flag("mini", "the model, with random weights", choices=tuple(CONTEXTS))
    per_device_train_batch_size: int = same_flag(TrainConfig, "per_device_train_batch_size", 4)
    block_size: int = same_flag(TrainConfig, "block_size", 128)

    def contradictions(self) -> list[str]:
        """A window longer than the model's context."""
        mistakes, context = super().contradictions(), CONTEXTS.get(self.shape)
        if context and self.block_size > context:
            mistakes.append(f"block_size {self.block_size} is longer than the context of {self.shape}, {context}")
        return mistakes


@dataclass
class TrainBenchConfig(StartupBenchConfig):
    """A call of `scripts/bench.py train`: the same training by `mori`, by Trainer, and by a minimal PyTorch loop."""

    arms: list[str] = flag(
        list(TRAIN_ARMS[:-1]), f"implementations to compare: {', '.join(TRAIN_ARMS)}; separated by spaces or commas"
    )
    max_steps: int = flag(40, "optimizer steps of each run", above=0)
    uncounted_steps: int = flag(5, "steps before the measurement starts: some arms compile during them", above=0)
    precision: str = same_flag(TrainConfig, "precision", "auto")
    logging_steps: int = same_flag(TrainConfig, "logging_steps", 10)

    known_arms: ClassVar[tuple[str, ...]] = TRAIN_ARMS

    def contradictions(self) -> list[str]:
        """Numbers of steps that leave nothing to measure or to compare."""
        mistakes = super().contradictions()
        if self.uncounted_steps >= self.max_steps:
            mistakes.append(f"uncounted_steps {self.uncounted_steps} leaves none of max_steps {self.max_steps}")
        if self.logging_steps > self.max_steps:
            mistakes.append(
                f"logging_steps {self.logging_steps} is more than max_steps {self.max_steps}: no loss would be compared"
            )
        return mistakes


@dataclass
class MemoryBenchConfig(TrainBenchConfig):
    """A call of `scripts/bench.py memory`: the peak memory of a few training steps."""

    arms: list[str] = same_flag(TrainBenchConfig, "arms", ["mori", "trainer"])
    max_steps: int = same_flag(TrainBenchConfig, "max_steps", 4)
    uncounted_steps: int = same_flag(TrainBenchConfig, "uncounted_steps", 1)
    logging_steps: int = same_flag(TrainBenchConfig, "logging_steps", 2)


@dataclass
class TokenizeBenchConfig(BenchConfig, TextConfig):
    """A call of `scripts/bench.py tokenize`: a corpus from its file to token ids."""

    arms: list[str] = flag(
        list(TOKENIZE_ARMS), f"implementations to compare: {', '.join(TOKENIZE_ARMS)}; separated by spaces or commas"
    )
    megabytes: float = flag(100.0, "repeat the corpus until it has this size", above=0)
    threads: int = flag(0, "cores of each process; 0 is all", min=0)

    known_arms: ClassVar[tuple[str, ...]] = TOKENIZE_ARMS


DESCRIPTIONS = {
    "train": "Seconds of the same training steps, by mori, Trainer and a minimal PyTorch loop.",
    "decode": "Seconds to generate text, by mori and generate().",
    "tokenize": "Seconds from a corpus file to all its token ids.",
    "startup": "Seconds until the first optimizer step is complete.",
    "memory": "Peak memory of a few training steps.",
}
COMMANDS = {
    "train": TrainBenchConfig,
    "decode": DecodeBenchConfig,
    "tokenize": TokenizeBenchConfig,
    "startup": StartupBenchConfig,
    "memory": MemoryBenchConfig,
}


def split_names(words: list[str]) -> list[str]:
    """The names in `words`, which are separated by spaces or commas on the command line."""
    return [name for word in words for name in word.split(",") if name]


def unknown_arms(arms: list[str], known: tuple[str, ...]) -> list[str]:
    """A message for each of `arms` that is not in `known`."""
    return [f"arm {name!r} does not exist, must be one of {', '.join(known)}" for name in arms if name not in known]
