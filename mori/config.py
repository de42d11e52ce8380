"""What a run is: its fields, with their defaults, ranges and command-line help.

A field is declared once (`cli.flag`); the class that declares it is its group in `--help`. Only the standard library is
imported here, so that `--help` and flag errors appear immediately.
"""

import dataclasses
import importlib.util
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from mori.cli import Config, flag, json_list, same_flag

PRESETS = ("mini",)


@dataclass
class ModelConfig(Config):
    """Which model."""

    group = "model"

    model: str = flag("mini", "'mini' (a small GPT-2 made from scratch), a folder, or a name on the hub")
    trust_remote_code: bool = flag(False, "allow Python code from the model's repository")


@dataclass
class TrainedModelConfig(ModelConfig):
    """Which model, and how it is loaded for training."""

    dropout: float | None = flag(None, "sets every dropout of the model; unset keeps its own", min=0, below=1)
    dtype: str = flag(
        "float32",
        "type of the weights while training; bfloat16 halves the memory of weights and gradients and rounds updates "
        "stochastically: results differ, and each step synchronizes host and device",
        choices=("float32", "bfloat16"),
    )


@dataclass
class CorpusConfig(Config):
    """The text, and how it is cut."""

    group = "corpus"

    corpus: list[str] = flag(
        [], "text files, folders of *.txt, or globs; unset takes the transcripts that ship with mori", may_change=True
    )
    block_size: int = flag(128, "tokens in one training window", above=0)
    document_mask: bool = flag(
        False, "mask attention between documents that share a window, and restart positions in each"
    )
    held_out_fraction: float = flag(
        0.05,
        "share of the tokens, at the end of the corpus, kept for evaluation (at least one window)",
        above=0,
        below=1,
    )


@dataclass
class TrainingConfig(Config):
    """The optimizer steps."""

    group = "training"

    per_device_train_batch_size: int = flag(4, "windows in one micro-batch on each device", above=0)
    gradient_accumulation_steps: int = flag(1, "micro-batches in one optimizer step", above=0)
    auto_find_batch_size: bool = flag(
        False,
        "make the micro-batches as large as memory allows: start with all windows of a step, halve until they fit",
    )
    num_train_epochs: float | None = flag(
        None, "passes over the training windows", pretrained=5.0, scratch=10.0, above=0, max=1_000_000, extends=True
    )
    max_steps: int = flag(-1, "optimizer steps; overrides num_train_epochs when positive", min=-1, extends=True)
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer: AdamW in PyTorch's fused kernel; AdamW with 8-bit moments by bitsandbytes (2 bytes a weight instead of "
        "8; results differ); muon (torch.optim.Muon for the hidden matrices, AdamW for the rest); adafactor "
        "(Trainer's: factored second moments)",
        choices=("adamw_torch_fused", "adamw_bnb_8bit", "muon", "adafactor"),
    )
    learning_rate: float | None = flag(None, "peak learning rate", pretrained=5e-5, scratch=1e-3, above=0)
    lr_scheduler_type: str = flag(
        "linear", "shape of the learning rate after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup_steps: float | None = flag(
        None, "steps of linear warm-up; below 1 a share of all steps", pretrained=0.0, scratch=0.05, min=0, share=True
    )
    weight_decay: float = flag(0.0, "decoupled weight decay, on all weights but biases and norms", min=0)
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment", min=0, below=1)
    adam_beta2: float = flag(0.999, "decay of AdamW's second moment", min=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0 is off", min=0)
    max_nonfinite_steps: int = flag(
        20,
        "stop after this many consecutive steps with a non-finite gradient (they are skipped)",
        above=0,
        may_change=True,
    )
    seed: int = flag(42, "seed of the weights, the order of the windows and the dropout", min=0, max=2**32 - 1)


@dataclass
class SpeedConfig(Config):
    """What makes a step faster or smaller."""

    group = "speed and memory"

    chunked_loss: bool = flag(
        True, "compute the logits, and their gradients, for a few hundred tokens at a time, if the model allows it"
    )
    mask_free_attention: bool = flag(
        True, "causal attention without a mask, if every layer attends to all earlier tokens"
    )
    fused_activations: bool = flag(True, "PyTorch's GELU kernel instead of one written out in Python")
    cpu_matmul: str = flag(
        "auto",
        "library for large fp32 matmuls on a CPU; auto takes oneDNN if it is at least 1.5 times as fast here, and a resumed "
        "run keeps its choice",
        choices=("auto", "onednn", "torch"),
    )
    tf32: bool = flag(True, "on a GPU in fp32, TF32 matmuls: a mantissa of 10 bits instead of 23, faster")
    gradient_checkpointing: bool = flag(
        False, "keep one activation of each layer and recompute the others: less memory, about a third more time"
    )
    torch_compile: bool | None = flag(
        None,
        "compile the model: takes minutes at the start, then speeds up steps; unset compiles long runs on one GPU only",
        kind=bool,
    )


@dataclass
class DeviceConfig(Config):
    """Where a model runs."""

    group = "device"

    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...", may_change=True)

    def contradictions(self) -> list[str]:
        """The device's name has none of the known forms."""
        known = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device)
        mistakes = [] if known else [f"device {self.device!r} is not auto, cpu, mps, cuda or cuda:N"]
        return mistakes + super().contradictions()


@dataclass
class TrainDeviceConfig(DeviceConfig):
    """Where and in which precision a run trains."""

    precision: str = flag(
        "auto",
        "precision of the forward pass; auto is bf16 or fp16 on a GPU and fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    ddp_timeout: int = flag(1800, "seconds before an unresponsive rank is treated as lost", above=0, may_change=True)


@dataclass
class LoggingConfig(Config):
    """When a run logs, evaluates and saves."""

    group, may_change = "logging", True

    logging_steps: int = flag(10, "interval of logging, in steps", above=0)
    eval_steps: float = flag(
        0.1, "interval of evaluation and samples, in steps; below 1 a fraction of all steps", above=0, share=True
    )
    eval_on_start: bool = flag(True, "evaluate and sample before the first step as well")
    per_device_eval_batch_size: int = flag(8, "windows in one batch of the evaluation", above=0)
    save_steps: float = flag(
        0.1, "interval of checkpoints, in steps; below 1 a fraction of all steps", above=0, share=True
    )
    save_total_limit: int = flag(2, "checkpoints to keep, besides the best one", above=0)


@dataclass
class SamplingConfig(Config):
    """How text is drawn. Names and meanings are those of `generate()`; an unset control does nothing."""

    group, may_change = "sampling", True

    temperature: float = flag(1.0, "divides the logits; 0 takes the likeliest token (greedy)", min=0)
    top_h: float = flag(1.0, "keep the likeliest tokens with this share of the entropy; 1 keeps all", above=0, max=1)
    top_k: int = flag(0, "keep the k likeliest tokens; 0 keeps all", min=0)
    top_p: float = flag(1.0, "keep the smallest set of tokens whose probability reaches p; 1 keeps all", above=0, max=1)
    min_p: float = flag(
        0.0, "keep tokens with this share of the likeliest one's probability; 0 keeps all", min=0, max=1
    )
    typical_p: float = flag(1.0, "keep the tokens of most typical surprise that reach p; 1 keeps all", above=0, max=1)
    epsilon_cutoff: float = flag(0.0, "keep tokens of at least this probability; 0 keeps all", min=0, below=1)
    eta_cutoff: float = flag(0.0, "the same, lower if the model is unsure; 0 keeps all", min=0, below=1)
    xtc_probability: float = flag(0.0, "how often XTC removes the top choices; 0 is off", min=0, max=1)
    xtc_threshold: float = flag(
        0.1, "XTC keeps only the least likely of the tokens with at least this probability", min=0, max=1
    )
    repetition_penalty: float = flag(
        1.0, "divides positive logits of tokens already in the text, multiplies negative ones; 1 is off", above=0
    )
    frequency_penalty: float = flag(0.0, "subtracted from a token's logit for each time it was drawn; 0 is off")
    presence_penalty: float = flag(0.0, "subtracted from a token's logit once it was drawn; 0 is off")
    no_repeat_ngram_size: int = flag(0, "no run of this many tokens comes twice; 0 is off", min=0)
    dry_multiplier: float = flag(0.0, "DRY: strength of the penalty on longer and longer repetitions; 0 is off", min=0)
    dry_base: float = flag(1.75, "DRY: the penalty grows by this factor with each repeated token", above=0)
    dry_allowed_length: int = flag(2, "DRY: tokens that may be repeated before the penalty begins", min=1)
    dry_sequence_breakers: list[str] = flag(
        ["\n", ":", '"', "*"], "DRY: no repetition crosses a token that contains one of these texts"
    )
    sequence_bias: list = flag(
        [], "added to the logit that completes a sequence of ids, as JSON: [[[5, 7], -2.0], ...]", kind=json_list
    )
    bad_words_ids: list = flag([], "sequences of ids that are never completed, as JSON: [[5, 7], ...]", kind=json_list)
    suppress_tokens: list[int] = flag([], "token ids that are never drawn", kind=int)
    min_new_tokens: int = flag(0, "suppress the end of the text until this many tokens", min=0)
    exponential_decay_length_penalty: list[float] = flag(
        [], "after the first number of tokens, the end's logit grows by the power of the second", kind=float
    )
    max_new_tokens: int = flag(100, "tokens to draw after the prompt", min=1)
    max_time: float = flag(0.0, "stop generating after this many seconds; 0 is off", min=0)
    stop_strings: list[str] = flag([], "texts that end the answer, and are not part of it")
    num_return_sequences: int = flag(1, "texts to draw for each prompt", min=1)

    def sampling(self) -> dict:
        """The sampling fields alone: the keywords of `mori.generation.generate.generate`."""
        return {f.name: getattr(self, f.name) for f in fields(SamplingConfig)}

    def contradictions(self) -> list[str]:
        """Malformed lists of ids, and controls that exclude each other."""
        decay = self.exponential_decay_length_penalty
        checks = [
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}",
            ),
            (all(map(_is_ids, self.bad_words_ids)), "bad_words_ids must be lists of token ids, such as [[5, 7], [9]]"),
            (
                all(map(_is_bias, self.sequence_bias)),
                "sequence_bias must be pairs of token ids and a number, such as [[[5, 7], -2.0]]",
            ),
            (not self.suppress_tokens or _is_ids(self.suppress_tokens), "suppress_tokens must be token ids"),
            (
                not decay or len(decay) == 2 and decay[0] >= 0 and decay[1] > 0,
                "exponential_decay_length_penalty must be two numbers: the tokens before it begins, and a factor above 0",
            ),
            ("" not in self.stop_strings, "stop_strings contains an empty text, which would end every answer"),
            (
                self.temperature > 0 or self.num_return_sequences == 1,
                "temperature 0 is greedy and gives one text: num_return_sequences above 1 contradicts it",
            ),
        ]
        return [message for ok, message in checks if not ok] + super().contradictions()


@dataclass
class TrainSamplingConfig(SamplingConfig):
    """The samples drawn at each evaluation, by the recipe of the course."""

    prompt: list[str] = flag(
        ["Halo semua, selamat datang di stream kali ini kita akan"], "prompts of the samples drawn at each evaluation"
    )
    temperature: float = same_flag(SamplingConfig, "temperature", 0.9)
    top_k: int = same_flag(SamplingConfig, "top_k", 50)
    top_p: float = same_flag(SamplingConfig, "top_p", 0.95)


@dataclass
class OutputConfig(Config):
    """Where the results go, and what the run continues from."""

    group, may_change = "output", True

    output_dir: str = flag("mori_brain_final", "folder of the trained model")
    logging_dir: str = flag("runs", "folder of all runs, for tensorboard --logdir")
    run_name: str = flag("", "this run's folder in logging_dir; unset is made of the names of model and corpus")
    resume_from_checkpoint: str = flag(
        "auto", "auto resumes the run, none starts over (the old run is set aside), or the path of a checkpoint"
    )
    extend: bool = flag(False, "resume a run, finished or not, up to the num_train_epochs or max_steps given now")


@dataclass
class TrainConfig(
    TrainedModelConfig,
    CorpusConfig,
    TrainingConfig,
    SpeedConfig,
    TrainDeviceConfig,
    LoggingConfig,
    TrainSamplingConfig,
    OutputConfig,
):
    """A run of `scripts/train.py`. Names are those of `TrainingArguments` and `generate()` for the same things."""

    def resolve(self) -> "TrainConfig":
        """A copy in which every default that depends on another field has its value."""
        resolved = dataclasses.replace(self, model=self.model.rstrip("/") or self.model)
        start = "scratch" if resolved.model in PRESETS else "pretrained"
        for f in fields(resolved):
            if start in f.metadata and getattr(resolved, f.name) is None:
                setattr(resolved, f.name, f.metadata[start])
        if not resolved.run_name:
            corpus = "-".join(Path(name).stem.strip("*.") or "text" for name in resolved.corpus[:2]) or "transcripts"
            resolved.run_name = re.sub(r"[^\w.-]+", "-", f"{Path(resolved.model).name}-{corpus}")
        return resolved

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps of the run, rounded up to a whole step as Trainer does."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def contradictions(self) -> list[str]:
        """Empty names, and settings that exclude each other."""
        checks = [
            (self.max_steps != 0, "max_steps is 0, must be above 0, or -1 to count epochs"),
            (
                not 0 < self.max_steps < (self.warmup_steps or 0),
                f"warmup_steps {self.warmup_steps or 0:g} is more than max_steps {self.max_steps}",
            ),
            (bool(self.resume_from_checkpoint), "resume_from_checkpoint is empty, must be auto, none or a path"),
            (
                not (self.extend and self.resume_from_checkpoint == "none"),
                "extend resumes a run, resume_from_checkpoint none starts one: they contradict each other",
            ),
            (
                self.optim != "adamw_bnb_8bit" or importlib.util.find_spec("bitsandbytes") is not None,
                "optim adamw_bnb_8bit needs bitsandbytes: pip install bitsandbytes",
            ),
            (
                self.optim == "adamw_torch_fused" or self.dtype == "float32",
                f"optim {self.optim} does not round stochastically: with dtype bfloat16 small updates would be lost; leave one out",
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
        return [message for ok, message in checks if not ok] + super().contradictions()

    def differences(self, other: "TrainConfig", extending: bool = False) -> dict[str, str]:
        """The fields that differ and would change the weights of a resumed run, each with `(this, other)`.

        With `extending`, the length of the run may differ too.
        """
        fixed = [
            f.name
            for f in fields(self)
            if not f.metadata.get("may_change", self.declaring_class(f.name).may_change)
            and not (extending and f.metadata.get("extends"))
        ]
        values = {name: (getattr(self, name), getattr(other, name)) for name in fixed}
        return {name: f"({mine!r}, {theirs!r})" for name, (mine, theirs) in values.items() if mine != theirs}


@dataclass
class GenerateConfig(ModelConfig, SamplingConfig, DeviceConfig):
    """A call of `scripts/generate.py`."""

    group = "text"

    model: str = flag("mori_brain_final", "a folder with a model and its tokenizer, or a name on the hub")
    prompt: list[str] = flag([""], "text to continue; several give several answers, an empty one starts from nothing")
    prompt_file: str = flag("", "a UTF-8 file with one prompt on each line; empty lines are skipped")
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


def steps_of(value: float, total: int) -> int:
    """A number of steps; below 1 it is a share of `total`, rounded up as in `TrainingArguments`."""
    return int(value) if value >= 1 else math.ceil(value * total)


def _is_ids(value) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(i, int) and i >= 0 for i in value)


def _is_bias(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_ids(value[0]) and isinstance(value[1], (int, float))
