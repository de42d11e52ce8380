"""What a run is: its fields, their checks, its command line, and its JSON.

Only the standard library is imported here, so that `--help` and every mistake in a flag answer at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

PRESETS = ("mini",)
GROUP_ORDER = ["benchmark", "comparison", "model", "corpus", "training", "device", "logging", "sampling", "output"]
EXIT_OK, EXIT_FAILURE, EXIT_MISTAKE, EXIT_INTERRUPTED = 0, 1, 2, 130


# What a resumed run may change: none of it touches the weights. (The corpus is compared by its hash.)
MAY_CHANGE = frozenset(
    "corpus device output_dir logging_dir run_name resume_from_checkpoint logging_steps eval_steps eval_on_start save_steps "
    "save_total_limit per_device_eval_batch_size max_nonfinite_steps ddp_timeout extend prompt temperature top_h top_k top_p min_p typical_p "
    "epsilon_cutoff eta_cutoff xtc_probability xtc_threshold repetition_penalty frequency_penalty presence_penalty "
    "no_repeat_ngram_size dry_multiplier dry_base dry_allowed_length dry_sequence_breakers sequence_bias bad_words_ids "
    "suppress_tokens min_new_tokens exponential_decay_length_penalty max_new_tokens max_time stop_strings "
    "num_return_sequences".split()
)
# What a run that is extended may change besides: how long it is.
HORIZON = frozenset({"num_train_epochs", "max_steps"})


class UserError(ValueError):
    """A mistake that its maker can mend: one line that says what is wrong, where, and what to do."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake in its flags: one line that says why and what to do."""


class Interrupted(RuntimeError):
    """A run that was asked to stop, and is saved: one line that says where it stands."""


def guarded(what: str, action: Callable):
    """`action()`, a library's work on files from anywhere; whatever it raises becomes a UserError, `what` and the reason.

    What such a library raises has no common base: tokenizers raises Exception itself, and a panic of its Rust code is none.
    """
    try:
        return action()
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = one_line(error)
        if "weights_only" in str(error):  # PyTorch's advice is to run what is in the file
            reason = (
                "its weights are damaged, or hold more than plain tensors, which is never run; "
                "download it again, or take one with .safetensors"
            )
        elif "trust_remote_code" in str(error):
            reason = "it brings along Python code, which is not run; if you trust it, say --trust_remote_code"
        raise UserError(f"{what}: {reason}") from None


def one_line(error: BaseException) -> str:
    """The beginning of what an error says."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def json_list(text: str) -> list:
    """The list that a JSON text holds; ValueError where it holds none."""
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError("no list")
    return value


def flag(group: str, default, help: str, choices=None, kind=None):
    """A dataclass field that is also a command-line flag; a default of None is a number that depends on other fields.

    `kind` is the type of a list's items, str where it is not said; a `json_list` is given as one JSON text.
    """
    metadata = {"group": group, "help": help, "choices": choices}
    metadata["type"] = kind or (str if isinstance(default, list) else float if default is None else type(default))
    metadata["nargs"] = "+" if isinstance(default, list) and kind is not json_list else None
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def same_flag(cls, name: str, default):
    """The flag `name` of another config class, with another default."""
    meta = cls.__dataclass_fields__[name].metadata
    return flag(meta["group"], default, meta["help"], meta["choices"], meta["type"])


@dataclass
class SamplingConfig:
    """How text is drawn. The names and meanings are those of `generate()`; an unset control does nothing."""

    given: ClassVar[frozenset] = frozenset()  # the flags that stood on the command line

    temperature: float = flag("sampling", 1.0, "divides the logits; 0 takes the likeliest token (greedy)")
    top_h: float = flag("sampling", 1.0, "keep the likeliest tokens with this share of the entropy; 1 keeps all")
    top_k: int = flag("sampling", 0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = flag("sampling", 1.0, "keep the smallest set of tokens whose probability reaches p; 1 keeps all")
    min_p: float = flag(
        "sampling", 0.0, "keep the tokens with this share of the likeliest one's probability; 0 keeps all"
    )
    typical_p: float = flag("sampling", 1.0, "keep the tokens of most typical surprise that reach p; 1 keeps all")
    epsilon_cutoff: float = flag("sampling", 0.0, "keep the tokens of this probability or more; 0 keeps all")
    eta_cutoff: float = flag("sampling", 0.0, "the same, lower where the model is unsure; 0 keeps all")
    xtc_probability: float = flag("sampling", 0.0, "how often XTC takes the top choices away; 0 is off")
    xtc_threshold: float = flag(
        "sampling", 0.1, "XTC leaves the least likely of the tokens with this probability or more"
    )
    repetition_penalty: float = flag(
        "sampling",
        1.0,
        "divides the positive logits of tokens already in the text and multiplies the negative; 1 is off",
    )
    frequency_penalty: float = flag("sampling", 0.0, "taken from a token's logit for each time it was drawn; 0 is off")
    presence_penalty: float = flag("sampling", 0.0, "taken from a token's logit once it was drawn; 0 is off")
    no_repeat_ngram_size: int = flag("sampling", 0, "no run of this many tokens comes twice; 0 is off")
    dry_multiplier: float = flag(
        "sampling", 0.0, "DRY: strength of the penalty on longer and longer repetitions; 0 is off"
    )
    dry_base: float = flag("sampling", 1.75, "DRY: the penalty grows by this factor with each token repeated")
    dry_allowed_length: int = flag("sampling", 2, "DRY: tokens that may be repeated before the penalty begins")
    dry_sequence_breakers: list[str] = flag(
        "sampling", ["\n", ":", '"', "*"], "DRY: no repetition reaches over a token with one of these texts in it"
    )
    sequence_bias: list = flag(
        "sampling",
        [],
        "added to the logit that completes a sequence of ids, as JSON: [[[5, 7], -2.0], ...]",
        None,
        json_list,
    )
    bad_words_ids: list = flag(
        "sampling", [], "sequences of ids that are never completed, as JSON: [[5, 7], ...]", None, json_list
    )
    suppress_tokens: list[int] = flag("sampling", [], "token ids that are never drawn", None, int)
    min_new_tokens: int = flag("sampling", 0, "the text does not end before this many tokens")
    exponential_decay_length_penalty: list[float] = flag(
        "sampling",
        [],
        "after the first number of tokens, the end's logit grows by the power of the second",
        None,
        float,
    )
    max_new_tokens: int = flag("sampling", 100, "tokens to draw after the prompt")
    max_time: float = flag("sampling", 0.0, "seconds after which no further token is begun; 0 is off")
    stop_strings: list[str] = flag("sampling", [], "texts that end the answer, and are not part of it")
    num_return_sequences: int = flag("sampling", 1, "texts to draw for each prompt")

    def sampling(self) -> dict:
        """The fields of this class alone: the keywords of `mori.generate.generate`."""
        return {f.name: getattr(self, f.name) for f in fields(SamplingConfig)}

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        checks = [
            (self.temperature >= 0, f"temperature is {self.temperature}, must be 0 or more"),
            (self.top_k >= 0, f"top_k is {self.top_k}, must be 0 (off) or more"),
            *(
                (0 < value <= 1, f"{name} is {value}, must be above 0 and at most 1")
                for name, value in (("top_h", self.top_h), ("top_p", self.top_p), ("typical_p", self.typical_p))
            ),
            *(
                (0 <= value <= 1, f"{name} is {value}, must be between 0 and 1")
                for name, value in (
                    ("min_p", self.min_p),
                    ("xtc_probability", self.xtc_probability),
                    ("xtc_threshold", self.xtc_threshold),
                )
            ),
            *(
                (0 <= value < 1, f"{name} is {value}, must be 0 (off) or more and below 1")
                for name, value in (("epsilon_cutoff", self.epsilon_cutoff), ("eta_cutoff", self.eta_cutoff))
            ),
            *(
                (value >= 0, f"{name} is {value}, must be 0 (off) or more")
                for name, value in (
                    ("no_repeat_ngram_size", self.no_repeat_ngram_size),
                    ("dry_multiplier", self.dry_multiplier),
                    ("min_new_tokens", self.min_new_tokens),
                    ("max_time", self.max_time),
                )
            ),
            (self.dry_base > 0, f"dry_base is {self.dry_base}, must be above 0"),
            (self.dry_allowed_length >= 1, f"dry_allowed_length is {self.dry_allowed_length}, must be 1 or more"),
            (
                self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}",
            ),
            (all(map(_is_ids, self.bad_words_ids)), "bad_words_ids must be lists of token ids, such as [[5, 7], [9]]"),
            (
                all(
                    isinstance(pair, list) and len(pair) == 2 and _is_ids(pair[0]) and isinstance(pair[1], (int, float))
                    for pair in self.sequence_bias
                ),
                "sequence_bias must be pairs of token ids and a number, such as [[[5, 7], -2.0]]",
            ),
            (not self.suppress_tokens or _is_ids(self.suppress_tokens), "suppress_tokens must be token ids"),
            (
                not self.exponential_decay_length_penalty
                or len(self.exponential_decay_length_penalty) == 2
                and self.exponential_decay_length_penalty[0] >= 0
                and self.exponential_decay_length_penalty[1] > 0,
                "exponential_decay_length_penalty must be two numbers: the tokens before it begins, and a factor above 0",
            ),
            ("" not in self.stop_strings, "stop_strings has an empty text, with which every answer would end"),
            (self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}, must be above 0"),
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, must be 1 or more"),
            (self.num_return_sequences >= 1, f"num_return_sequences is {self.num_return_sequences}, must be 1 or more"),
            (
                self.temperature > 0 or self.num_return_sequences == 1,
                "temperature 0 is greedy and gives one text: num_return_sequences above 1 contradicts it",
            ),
        ]
        return [message for ok, message in checks if not ok] + _not_finite(self)


@dataclass
class GenerateConfig(SamplingConfig):
    """A call of `scripts/generate.py`."""

    model: str = flag("model", "mori_brain_final", "a folder with a model and its tokenizer, or a name on the hub")
    trust_remote_code: bool = flag("model", False, "run the Python code that a model brings along")
    prompt: list[str] = flag(
        "sampling", [""], "text to go on from; several make several answers, an empty one starts from nothing"
    )
    prompt_file: str = flag("sampling", "", "a UTF-8 file with one prompt on each line; empty lines are left out")
    seed: int = flag("sampling", 0, "seed of the sampler; each prompt starts from it anew")
    batch_size: int = flag("sampling", 32, "texts that are drawn side by side")
    crop_prompt: bool = flag("sampling", False, "leave out the beginning of a prompt that is longer than the context")
    on_full_context: str = flag(
        "sampling", "stop", "where the context is full: stop, or slide on with its newer half", ("stop", "slide")
    )
    device: str = flag("device", "auto", "auto, cpu, cuda, cuda:1 ...")
    interactive: bool = flag("output", False, "a prompt line: type, read the answer, change settings with /help")
    json: bool = flag(
        "output", False, "print one JSON list of {prompt, text, new_token_ids, finish_reason} and nothing else"
    )

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        found = super().mistakes() + _bad_seed(self.seed) + _bad_device(self.device)
        if self.batch_size < 1:
            found.append(f"batch_size is {self.batch_size}, must be 1 or more")
        if self.on_full_context not in ("stop", "slide"):
            found.append(f"on_full_context is {self.on_full_context!r}, must be stop or slide")
        if self.interactive and (self.json or self.prompt_file):
            found.append("interactive contradicts json and prompt_file")
        return found


@dataclass
class TrainConfig(SamplingConfig):
    """A run of `scripts/train.py`. Names are those of `TrainingArguments` and `generate()` where the same thing exists."""

    model: str = flag("model", "mini", "'mini' (a small GPT-2 made from scratch), a folder, or a name on the hub")
    dropout: float | None = flag("model", None, "sets every dropout of the model; unset keeps its own")
    dtype: str = flag(
        "model",
        "float32",
        "type of the weights while training; in bfloat16 they and their gradients take half the memory, updates are rounded at "
        "random, another result, and the host waits for the device at each step",
        ("float32", "bfloat16"),
    )
    trust_remote_code: bool = flag("model", False, "run the Python code that a model brings along")

    corpus: list[str] = flag(
        "corpus", [], "text files, folders of *.txt, or globs; unset takes the transcripts that ship with mori"
    )
    block_size: int = flag("corpus", 128, "tokens in one training window")
    document_mask: bool = flag(
        "corpus",
        False,
        "documents that share a window do not see each other, and positions begin anew in each",
    )
    held_out_fraction: float = flag(
        "corpus", 0.05, "share of the tokens, at the end of the corpus, kept for evaluation (at least one block)"
    )

    per_device_train_batch_size: int = flag("training", 4, "windows in one micro-batch on each device")
    gradient_accumulation_steps: int = flag("training", 1, "micro-batches in one optimizer step")
    auto_find_batch_size: bool = flag(
        "training",
        False,
        "make the micro-batches as large as memory allows: all windows of a step at first, halved until they fit",
    )
    chunked_loss: bool = flag(
        "training",
        True,
        "make the logits, and their gradients, for a few hundred tokens at a time, where the model allows it",
    )
    mask_free_attention: bool = flag(
        "training", True, "causal attention without a mask, where a layer sees all tokens before"
    )
    fused_activations: bool = flag("training", True, "PyTorch's GELU kernel in the place of one written out in Python")
    fast_products: bool = flag(
        "training",
        True,
        "on a CPU in fp32, large products cut among the threads, to the same bits, or by oneDNN where that is far faster",
    )
    tf32: bool = flag(
        "training",
        True,
        "on a GPU in fp32, products of matrices in TF32: 10 bits behind the point instead of 23, faster",
    )
    gradient_checkpointing: bool = flag(
        "training",
        False,
        "keep one activation of each layer and compute the others again: less memory, a third more time",
    )
    torch_compile: bool | None = flag(
        "training",
        None,
        "compile the model: minutes at the start, faster steps after; unset does so for a long run on one GPU, where it pays",
        kind=bool,
    )
    num_train_epochs: float | None = flag(
        "training", None, "passes over the training windows; unset is 5, or 10 for a model made from scratch"
    )
    max_steps: int = flag("training", -1, "optimizer steps; overrides num_train_epochs when positive")
    optim: str = flag(
        "training",
        "adamw_torch_fused",
        "AdamW: PyTorch's fused kernel, or bitsandbytes' with moments of 8 bits (2 bytes a weight instead of 8, but for "
        "embeddings; another result; the host waits for the device at each step)",
        ("adamw_torch_fused", "adamw_bnb_8bit"),
    )
    learning_rate: float | None = flag(
        "training", None, "peak learning rate; unset is 5e-5, or 1e-3 for a model made from scratch"
    )
    lr_scheduler_type: str = flag(
        "training", "linear", "how the learning rate falls after the warm-up", ("linear", "cosine", "constant")
    )
    warmup_steps: float | None = flag(
        "training",
        None,
        "steps of linear warm-up, below 1 a share of all steps; unset is 0, or 0.05 for a model made from scratch",
    )
    weight_decay: float = flag("training", 0.0, "decoupled weight decay, on all but biases and norms")
    adam_beta1: float = flag("training", 0.9, "AdamW's first moment decay")
    adam_beta2: float = flag("training", 0.999, "AdamW's second moment decay")
    adam_epsilon: float = flag("training", 1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag("training", 1.0, "clip the gradient to this norm; 0 is off")
    max_nonfinite_steps: int = flag(
        "training",
        20,
        "stop once so many steps in a row, or a few more, had a gradient that was not finite (such steps are never taken)",
    )
    seed: int = flag("training", 42, "seed of the weights, the order of the windows and the dropout")

    precision: str = flag(
        "device",
        "auto",
        "arithmetic of the forward pass; auto is bf16 or fp16 on a GPU and fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    device: str = flag("device", "auto", "auto, cpu, cuda, cuda:1 ...")
    ddp_timeout: int = flag("device", 1800, "seconds after which a rank that does not answer is given up by the others")

    logging_steps: int = flag("logging", 10, "log every so many steps")
    eval_steps: float = flag(
        "logging", 0.1, "evaluate and sample every so many steps; below 1 it is a share of all steps"
    )
    eval_on_start: bool = flag("logging", True, "evaluate and sample before the first step as well")
    per_device_eval_batch_size: int = flag("logging", 8, "windows in one batch of the evaluation")
    save_steps: float = flag(
        "logging", 0.1, "save a checkpoint every so many steps; below 1 it is a share of all steps"
    )
    save_total_limit: int = flag("logging", 2, "checkpoints to keep, the best one besides")

    output_dir: str = flag("output", "mori_brain_final", "where the trained model goes")
    logging_dir: str = flag("output", "runs", "the folder of all runs, for tensorboard --logdir")
    run_name: str = flag(
        "output", "", "this run's folder in logging_dir; unset is made of the model's and the corpus' names"
    )
    resume_from_checkpoint: str = flag(
        "output",
        "auto",
        "auto goes on where the run stopped, none starts anew (the old run is set aside), or the path of a checkpoint",
    )

    extend: bool = flag(
        "output", False, "go on with a run, finished or not, to the num_train_epochs or max_steps that are given now"
    )

    prompt: list[str] = flag(
        "sampling",
        ["Halo semua, selamat datang di stream kali ini kita akan"],
        "prompts of the samples drawn at each evaluation",
    )
    # The sampling recipe of the course.
    temperature: float = same_flag(SamplingConfig, "temperature", 0.9)
    top_k: int = same_flag(SamplingConfig, "top_k", 50)
    top_p: float = same_flag(SamplingConfig, "top_p", 0.95)

    def resolve(self) -> "TrainConfig":
        """A copy with every default that depends on another field filled in."""
        made = dataclasses.replace(self, model=self.model.rstrip("/") or self.model)
        if made.learning_rate is None:
            made.learning_rate = 1e-3 if made.model in PRESETS else 5e-5
        if made.num_train_epochs is None:
            made.num_train_epochs = 10.0 if made.model in PRESETS else 5.0
        if made.warmup_steps is None:
            made.warmup_steps = 0.05 if made.model in PRESETS else 0.0
        if not made.run_name:
            corpus = "-".join(Path(name).stem.strip("*.") or "text" for name in made.corpus[:2]) or "transcripts"
            made.run_name = re.sub(r"[^\w.-]+", "-", f"{Path(made.model).name}-{corpus}")
        return made

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many optimizer steps the run takes, its epochs having `steps_per_epoch` (rounded up, as Trainer does)."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        positive = (
            "block_size", "per_device_train_batch_size", "gradient_accumulation_steps",
            "per_device_eval_batch_size", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
            "adam_epsilon", "max_nonfinite_steps", "ddp_timeout",
        )  # fmt: skip
        found = [
            f"{name} is {getattr(self, name)}, must be above 0" for name in positive if not getattr(self, name) > 0
        ]
        warmup_steps = self.warmup_steps or 0.0
        not_negative = ("weight_decay", "max_grad_norm")
        found += [
            f"{name} is {getattr(self, name)}, must be 0 or more" for name in not_negative if getattr(self, name) < 0
        ]
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}, must be at least 0 and below 1")
        for name, value in (
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
            ("warmup_steps", warmup_steps),
        ):
            if value > 1 and value % 1:
                found.append(f"{name} is {value}, must be whole, or a share below 1")
        for name, choices in ((f.name, f.metadata["choices"]) for f in fields(self) if f.metadata["choices"]):
            if getattr(self, name) not in choices:
                found.append(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(choices)}")
        checks = [
            (
                self.learning_rate is None or self.learning_rate > 0,
                f"learning_rate is {self.learning_rate}, must be above 0",
            ),
            (
                self.num_train_epochs is None or 0 < self.num_train_epochs <= 1e6,
                f"num_train_epochs is {self.num_train_epochs}, must be above 0 and at most a million",
            ),
            (
                self.dropout is None or 0 <= self.dropout < 1,
                f"dropout is {self.dropout}, must be at least 0 and below 1",
            ),
            (0 < self.held_out_fraction < 1, f"held_out_fraction is {self.held_out_fraction}, must be between 0 and 1"),
            (
                self.max_steps == -1 or self.max_steps > 0,
                f"max_steps is {self.max_steps}, must be above 0, or -1 to count epochs",
            ),
            (
                not (self.max_steps > 0 and warmup_steps > self.max_steps),
                f"warmup_steps {warmup_steps:g} is more than max_steps {self.max_steps}",
            ),
            (bool(self.resume_from_checkpoint), "resume_from_checkpoint is empty, must be auto, none or a path"),
            (warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}, must be 0 or more"),
            (
                not (self.extend and self.resume_from_checkpoint == "none"),
                "extend goes on with a run, resume_from_checkpoint none begins one: they contradict each other",
            ),
            (
                self.optim != "adamw_bnb_8bit" or importlib.util.find_spec("bitsandbytes") is not None,
                "optim adamw_bnb_8bit needs bitsandbytes: pip install bitsandbytes",
            ),
            (
                self.optim == "adamw_torch_fused" or self.dtype == "float32",
                f"optim {self.optim} does not round at random: with dtype bfloat16 small updates would be lost; leave one out",
            ),
            (bool(self.output_dir), "output_dir is empty"),
            (bool(self.logging_dir), "logging_dir is empty"),
            (
                not re.search(r"[/\\\0]", self.run_name)
                and self.run_name not in (".", "..")
                and len(self.run_name) <= 100,
                f"run_name {self.run_name!r} must be one folder's name of at most 100 letters; its parent is logging_dir",
            ),
        ]
        found += [message for ok, message in checks if not ok]
        return found + super().mistakes() + _bad_seed(self.seed) + _bad_device(self.device)

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """The config that `to_json` wrote. Raises UserError for a field that does not exist."""
        values = json.loads(text)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"the config has fields that do not exist: {', '.join(unknown)}")
        return cls(**values)

    def differences(self, other: "TrainConfig") -> dict[str, str]:
        """The fields in which two runs differ so that their weights would, each with `(this, other)`."""
        return {
            f.name: f"({getattr(self, f.name)!r}, {getattr(other, f.name)!r})"
            for f in fields(self)
            if f.name not in MAY_CHANGE and getattr(self, f.name) != getattr(other, f.name)
        }


ARMS = ("mori", "mori-exact", "trainer", "trainer-tuned", "course")


@dataclass
class CompareConfig(TrainConfig):
    """A call of `scripts/compare.py`: a run of `scripts/train.py`, done by several arms."""

    arms: list[str] = flag("comparison", list(ARMS), f"what to compare, of {', '.join(ARMS)}; spaces or commas between")
    repeats: int = flag("comparison", 1, "runs of each arm, in turn; speed and memory are their median and spread")
    logging_steps: int = same_flag(TrainConfig, "logging_steps", 1)

    def resolve(self) -> "CompareConfig":
        """A copy with every default that depends on another field filled in."""
        made = super().resolve()
        made.arms = _words(made.arms)
        return made

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        found = _unknown_arms(_words(self.arms), ARMS)
        if self.repeats < 1:
            found.append(f"repeats is {self.repeats}, must be 1 or more")
        for name in ("document_mask", "dtype"):
            if getattr(self, name) != getattr(TrainConfig, name):
                found.append(f"{name} is something that Trainer does not do: the arms would do other work")
        if not self.eval_on_start:
            found.append("eval_on_start: a comparison shows the loss that all arms begin with")
        return found + super().mistakes()

    def arm_config(self, **changed) -> TrainConfig:
        """The run that one arm does."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)} | changed)


DECODE_ARMS = ("mori-greedy", "generate-greedy", "mori-sampled", "generate-sampled", "mori-process", "generate-process")


@dataclass
class BenchConfig:
    """What every command of `scripts/bench.py` has."""

    repeats: int = flag("benchmark", 5, "processes of each arm, in turn")
    threads: int = flag("benchmark", 0, "threads of each process; 0 is what PyTorch takes")
    output_dir: str = flag("output", "runs/bench", "where the figures go, as JSON")

    positive: ClassVar[tuple[str, ...]] = ("repeats",)
    known_arms: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.known_arms:
            self.arms = _words(self.arms)

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        small = [name for name in self.positive if not getattr(self, name) > 0]
        found = [f"{name} is {getattr(self, name)}, must be above 0" for name in small] + _not_finite(self)
        if self.threads < 0:
            found.append(f"threads is {self.threads}, must be 0 or more")
        if not self.output_dir:
            found.append("output_dir is empty")
        if self.known_arms:
            found += _unknown_arms(self.arms, self.known_arms)
            if "mori" not in self.arms or len(set(self.arms)) < len(self.arms):
                found.append(f"arms are {' '.join(self.arms)}, must have mori, and each once")
        return found + _bad_device(getattr(self, "device", "auto"))


@dataclass
class DecodeBenchConfig(BenchConfig):
    """A call of `scripts/bench.py decode`: text from random weights, by `mori` and by `generate()`, in turn."""

    shape: str = flag(
        "benchmark",
        "small",
        "the model, of random weights; small is a GPT-2 of 4 layers and width 128",
        ("small", "124m", "llama-160m", "llama-1b"),
    )
    dtype: str = flag("benchmark", "float32", "type of the weights", ("float32", "bfloat16"))
    batch_size: int = flag("benchmark", 1, "texts side by side")
    new_tokens: int = flag("benchmark", 100, "tokens to draw after a prompt of 16")
    rounds: int = flag("benchmark", 5, "times that each process draws the tokens; its median counts")
    device: str = same_flag(TrainConfig, "device", "auto")
    arm: str = flag("output", "", "run this arm alone and print what it took: what the benchmark calls itself")

    positive: ClassVar[tuple[str, ...]] = ("batch_size", "new_tokens", "repeats", "rounds")


BENCH_ARMS = ("mori", "trainer", "trainer-tuned", "bare", "mori-compiled")
BENCH_CONTEXTS = {"tiny": 1024, "mini": 1024, "124m": 1024, "llama-160m": 2048, "llama-1b": 8192}


@dataclass
class StartupBenchConfig(BenchConfig):
    """A call of `scripts/bench.py startup`: how long until the first step of a training is done."""

    shape: str = flag("benchmark", "mini", "the model, of random weights", tuple(BENCH_CONTEXTS))
    per_device_train_batch_size: int = same_flag(TrainConfig, "per_device_train_batch_size", 4)
    block_size: int = same_flag(TrainConfig, "block_size", 128)
    device: str = same_flag(TrainConfig, "device", "auto")

    positive: ClassVar[tuple[str, ...]] = ("repeats", "per_device_train_batch_size", "block_size")

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        found, context = super().mistakes(), BENCH_CONTEXTS.get(self.shape)
        if context is None:
            found.append(f"shape is {self.shape!r}, must be one of {', '.join(BENCH_CONTEXTS)}")
        elif self.block_size > context:
            found.append(f"block_size {self.block_size} is longer than the context of {self.shape}, {context}")
        return found


@dataclass
class TrainBenchConfig(StartupBenchConfig):
    """A call of `scripts/bench.py train`: the same training by `mori`, by Trainer, and by a loop with nothing around it."""

    arms: list[str] = flag(
        "benchmark", list(BENCH_ARMS[:-1]), f"what to compare, of {', '.join(BENCH_ARMS)}; spaces or commas between"
    )
    max_steps: int = flag("benchmark", 40, "optimizer steps of each run")
    uncounted_steps: int = flag("benchmark", 5, "steps before the clock counts: some arms compile in them")
    precision: str = flag(
        "device",
        "auto",
        "arithmetic of the forward pass; auto is bf16 on a GPU and fp32 on a CPU",
        ("auto", "fp32", "bf16"),
    )
    logging_steps: int = same_flag(TrainConfig, "logging_steps", 10)

    positive: ClassVar[tuple[str, ...]] = (
        *StartupBenchConfig.positive, "max_steps", "uncounted_steps", "logging_steps"
    )  # fmt: skip
    known_arms: ClassVar[tuple[str, ...]] = BENCH_ARMS

    def mistakes(self) -> list[str]:
        """All that is wrong with the values, one phrase each."""
        found = super().mistakes()
        if self.uncounted_steps >= self.max_steps:
            found.append(f"uncounted_steps {self.uncounted_steps} leaves none of max_steps {self.max_steps}")
        if self.logging_steps > self.max_steps:
            found.append(
                f"logging_steps {self.logging_steps} is more than max_steps {self.max_steps}: there would be no loss to compare"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            found.append(f"precision is {self.precision!r}, must be one of auto, fp32, bf16")
        return found


@dataclass
class MemoryBenchConfig(TrainBenchConfig):
    """A call of `scripts/bench.py memory`: the peak memory of a few steps."""

    arms: list[str] = same_flag(TrainBenchConfig, "arms", ["mori", "trainer"])
    max_steps: int = same_flag(TrainBenchConfig, "max_steps", 4)
    uncounted_steps: int = same_flag(TrainBenchConfig, "uncounted_steps", 1)
    logging_steps: int = same_flag(TrainConfig, "logging_steps", 2)


TOKENIZE_ARMS = ("mori", "run_clm", "one-call")


@dataclass
class TokenizeBenchConfig(BenchConfig):
    """A call of `scripts/bench.py tokenize`: a corpus from its file to token ids."""

    arms: list[str] = flag(
        "benchmark", list(TOKENIZE_ARMS), f"what to compare, of {', '.join(TOKENIZE_ARMS)}; spaces or commas between"
    )
    corpus: list[str] = same_flag(TrainConfig, "corpus", [])
    megabytes: float = flag("benchmark", 100.0, "the corpus is repeated until it has so many")
    threads: int = flag("benchmark", 0, "cores of each process; 0 is all")

    positive: ClassVar[tuple[str, ...]] = ("repeats", "megabytes")
    known_arms: ClassVar[tuple[str, ...]] = TOKENIZE_ARMS


def steps_of(value: float, total: int) -> int:
    """A number of steps that may be given as a share of `total` (`TrainingArguments` rounds the share up too)."""
    return int(value) if value >= 1 else math.ceil(value * total)


def _is_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, int) and i >= 0 for i in value)


def _words(words: list[str]) -> list[str]:
    """What was given with spaces or commas between."""
    return [name for word in words for name in word.split(",") if name]


def _unknown_arms(arms: list[str], known: tuple[str, ...]) -> list[str]:
    return [f"arm {name!r} does not exist, must be of {', '.join(known)}" for name in arms if name not in known]


def _not_finite(config) -> list[str]:
    numbers = ((f.name, getattr(config, f.name)) for f in fields(config))
    return [f"{name} is {value}" for name, value in numbers if isinstance(value, float) and not math.isfinite(value)]


def _bad_seed(seed: int) -> list[str]:
    return [] if 0 <= seed < 2**32 else [f"seed is {seed}, must be between 0 and 2**32 - 1"]


def _bad_device(device: str) -> list[str]:
    return (
        []
        if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device)
        else [f"device {device!r} is not auto, cpu, mps, cuda or cuda:N"]
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def _parser(cls, description: str) -> _Parser:
    parser = _Parser(
        description=description,
        usage="%(prog)s [--flag VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser._optionals.title = "help"
    groups = {}
    for f in sorted(fields(cls), key=lambda f: GROUP_ORDER.index(f.metadata["group"])):
        meta = f.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        if meta["type"] is bool:
            group.add_argument(
                f"--{f.name}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{meta['help']}\n(default: {'unset' if f.default is None else 'on' if f.default else 'off'})",
            )
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = (
            "unset"
            if default in (None, "", [])
            else " ".join(map(repr, default))
            if isinstance(default, list)
            else default
        )
        group.add_argument(
            f"--{f.name}",
            type=meta["type"],
            choices=meta["choices"],
            nargs=meta["nargs"],
            action="extend" if meta["nargs"] else "store",  # given twice, a list goes on
            default=argparse.SUPPRESS,
            metavar=None if meta["choices"] else meta["type"].__name__.upper(),
            help=f"{meta['help']}\n(default: {shown})".replace("%", "%%"),
        )
    return parser


def parse(cls, description: str, argv: list[str] | None = None):
    """Read a config of class `cls` from the command line (`sys.argv` by default).

    Flags are the names of the fields; `-` and `_` are the same. All mistakes are reported together.
    Raises UserError for an unknown flag (with the nearest one that exists) or for values that cannot be.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    switches = {f.name for f in fields(cls) if f.metadata["type"] is bool}
    argv = [f"--no-{word[5:]}" if word.startswith("--no_") and word[5:] in switches else word for word in argv]
    if any("\udc80" <= letter <= "\udcff" for word in argv for letter in word):
        raise UserError("the command line is not UTF-8")
    parser = _parser(cls, description)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{f.name}" for f in fields(cls)]
        if not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]!r} belongs to no flag; --help lists the flags")
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1, 0.6)
        raise UserError(
            f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
        )
    config = checked(cls(**vars(values)))
    config.given = frozenset(vars(values))
    return config


def take_command(commands) -> tuple[str, list[str]]:
    """The first word of the command line, which must be one of `commands`, and the words after it."""
    command, *rest = sys.argv[1:] or [""]
    if command not in commands:
        raise UserError(f"{command!r} is no command; say one of {', '.join(commands)} first, then --help for its flags")
    return command, rest


def checked(config):
    """`config` itself, when nothing is wrong with its values; UserError with every mistake in one line when something is."""
    mistakes = config.mistakes()
    if mistakes:
        raise UserError("; ".join(dict.fromkeys(mistakes)))
    return config


def _one_line(error: Exception) -> str:
    """What an error says; a line break may stand in a name that a user gave."""
    return " ".join(str(error).splitlines())


def run_door(name: str, main) -> None:
    """Run a script's `main()` and leave with its exit code; a user's mistake is one line on standard error and code 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode is no reason to fail
    try:
        code = main() or EXIT_OK
    except UserError as mistake:
        if not getattr(mistake, "told_by_main", False):
            tell(f"{name}: error: {_one_line(mistake)}")
        code = EXIT_MISTAKE
    except RunFailed as failure:
        tell(f"{name}: failed: {_one_line(failure)}")
        code = EXIT_FAILURE
    except Interrupted as stop:
        tell(f"\n{name}: {stop}")
        code = EXIT_INTERRUPTED
    except KeyboardInterrupt:
        tell(f"\n{name}: interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_OK
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads, or a full disk: Python would try again on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def tell(line: str) -> None:
    """Print a line on standard error, where that is possible."""
    with contextlib.suppress(OSError):  # standard error may be a file on a full disk
        print(line, file=sys.stderr, flush=True)
