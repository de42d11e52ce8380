"""The groups of fields that configs are made of: model, corpus, training, speed, device, logging, output."""

import codecs
import difflib
import encodings.aliases
import re
from dataclasses import dataclass

from mori.cli import Config, flag, json_object


@dataclass
class ModelConfig(Config):
    """Which model."""

    group = "model"

    model: str = flag("mini", "'mini' (a small GPT-2 made from scratch), a folder, or a name on the hub", path=True)
    trust_remote_code: bool = flag(False, "allow Python code from the model's repository", may_change=True)


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
class TextConfig(Config):
    """The text, and how its files are read."""

    group = "corpus"

    corpus: list[str] = flag(
        [],
        "files, folders or globs of .txt .md .jsonl .json .csv .tsv .parquet .srt .vtt, plain or as .gz .bz2 .xz .zst .zip; - is "
        "plain text on standard input; unset takes the transcripts that ship with mori",
        may_change=True,
        path=True,
    )
    text_column: str = flag(
        "",
        "column with the text, in tables and JSON; unset takes 'text', or else the only column of text",
        may_change=True,
    )
    encoding: str = flag(
        "",
        "encoding of text files, such as latin-1; unset is UTF-8. A byte order mark decides before it",
        may_change=True,
    )

    def contradictions(self) -> list[str]:
        """An encoding that Python does not know."""
        return _encoding_mistakes(self.encoding) + super().contradictions()


def _encoding_mistakes(encoding: str) -> list[str]:
    """What is wrong with the name of an encoding."""
    if not encoding:
        return []
    try:
        " ".encode(encoding)  # refuses codecs that are not from text to bytes, such as hex
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        names = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
        nearest = difflib.get_close_matches(encoding.lower().replace("-", "_"), sorted(names), 1)
        advice = f"did you mean {nearest[0]}?" if nearest else "known are utf-8, utf-16, latin-1, cp1252, shift_jis ..."
        return [f"encoding {encoding[:40]!r} is no text encoding of Python; {advice}"]
    return []


@dataclass
class CorpusConfig(TextConfig):
    """The text, and how it is cut."""

    group = "corpus"

    document_bos: bool = flag(
        True, "begin each document as the tokenizer begins a prompt, if it does so (with <s>, say)", may_change=True
    )
    parse_special_tokens: bool | None = flag(
        None,
        "read the name of a special token in the text, such as <s>, as that token; off keeps it as text, also in prompts and "
        "in the trained model's folder; unset leaves it to the tokenizer",
        kind=bool,
        may_change=True,
    )
    block_size: int = flag(128, "tokens in one training window", above=0)
    document_mask: bool = flag(
        False, "mask attention between documents that share a window, and restart positions in each"
    )
    held_out_fraction: float = flag(
        0.05,
        "share of the tokens, at the end of the corpus, kept for evaluation (at least one window); 0 trains on everything",
        min=0,
        below=1,
    )
    validation_file: list[str] = flag(
        [], "text to evaluate on, instead of the end of the corpus: named as in --corpus", path=True
    )


@dataclass
class TrainingConfig(Config):
    """The optimizer steps."""

    group = "training"

    per_device_train_batch_size: int = flag(4, "windows in one micro-batch on each device", above=0, inexact=True)
    gradient_accumulation_steps: int = flag(1, "micro-batches in one optimizer step", above=0, inexact=True)
    auto_find_batch_size: bool = flag(
        False,
        "make the micro-batches as large as memory allows: start with all windows of a step, halve until they fit",
        inexact=True,
    )
    num_train_epochs: float | None = flag(
        None, "passes over the training windows", pretrained=5.0, scratch=10.0, above=0, max=1_000_000, extends=True
    )
    max_steps: int = flag(-1, "optimizer steps; overrides num_train_epochs when positive", min=-1, extends=True)
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer, as in Trainer: AdamW in PyTorch's fused kernel, or without it; AdamW with 8-bit moments by bitsandbytes (2 "
        "bytes a weight instead of 8; results differ), paged if a GPU's memory runs out; adafactor (factored second moments); sgd, rmsprop and adagrad with "
        "PyTorch's defaults. Also muon (torch.optim.Muon for the hidden matrices, AdamW for the rest)",
        choices=(
            "adamw_torch_fused",
            "adamw_torch",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "muon",
            "adafactor",
            "sgd",
            "rmsprop",
            "adagrad",
        ),
    )
    learning_rate: float | None = flag(
        None, "peak learning rate", pretrained=5e-5, scratch=1e-3, adapters=5e-4, above=0
    )
    lr_scheduler_type: str = flag(
        "linear",
        "shape of the learning rate after the warm-up, as in Trainer; constant, reduce_lr_on_plateau and greedy have no warm-up, "
        "and the last two follow the held-out loss",
        choices=(
            "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
            "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
        ),
    )  # fmt: skip
    lr_scheduler_kwargs: dict | None = flag(
        None, "further keywords of the schedule, as JSON: '{\"num_cycles\": 2}'", kind=json_object
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

    group, inexact = "speed and memory", True

    chunked_loss: bool = flag(
        True, "compute the logits, and their gradients, for a few hundred tokens at a time, if the model allows it"
    )
    mask_free_attention: bool = flag(
        True, "causal attention without a mask, if every layer attends to all earlier tokens"
    )
    fused_adapters: bool = flag(True, "compute an adapter in one function, which keeps fewer tensors")
    fused_activations: bool = flag(
        True, "activations, gated MLPs and RMS norms that keep fewer tensors than those written out in Python"
    )
    cpu_matmul: str = flag(
        "auto",
        "library for large fp32 matmuls on a CPU; auto takes oneDNN if it is at least 1.5 times as fast here, and a resumed "
        "run keeps its choice",
        choices=("auto", "onednn", "torch"),
        inexact=False,  # a resumed run keeps its choice
    )
    tf32: bool = flag(True, "on a GPU in fp32, TF32 matmuls: a mantissa of 10 bits instead of 23, faster")
    gradient_checkpointing: bool = flag(
        False, "keep one activation of each layer and recompute the others: less memory, about a third more time"
    )
    cuda_graphs: bool = flag(
        False,
        "on one GPU, replay forward and backward pass as a CUDA graph: for small batches, whose launches take longest",
        may_change=True,
    )
    torch_compile: bool | None = flag(
        None,
        "compile the model: takes minutes at the start, then speeds up steps; unset compiles, on one GPU, as soon as the measured speed says that it pays",
        kind=bool,
        inexact=False,  # a resumed run keeps its choice
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
        "precision of the forward pass; auto is bf16 or fp16 on a GPU, and fp32 on a CPU unless bf16 is clearly faster there",
        choices=("auto", "fp32", "bf16", "fp16"),
        may_change=True,  # the checkpoint records what auto was
    )
    fsdp: str = flag(
        "none",
        "with several ranks, shard weights, gradients and moments over them (FSDP2), instead of a whole model on each: full_shard "
        "gathers each layer's weights for its forward pass and again for its backward pass, shard_grad_op keeps them between the "
        "two, hybrid_shard shards within each node",
        choices=("none", "full_shard", "shard_grad_op", "hybrid_shard"),
        inexact=True,
    )
    ddp_timeout: int = flag(1800, "seconds before an unresponsive rank is treated as lost", above=0, may_change=True)


@dataclass
class HubConfig(Config):
    """Whether a model's folder is uploaded to the hub, and under which name."""

    group, may_change = "hub", True

    push_to_hub: bool = flag(
        False, "upload the model's folder to the hub; log in before with `hf auth login`, or set HF_TOKEN"
    )
    hub_model_id: str = flag(
        "", "its name there: NAME, USER/NAME or ORGANIZATION/NAME; unset takes the name of the folder"
    )
    hub_private_repo: bool | None = flag(
        None, "make a new repository private; unset leaves it to the settings of the account", kind=bool
    )

    def contradictions(self) -> list[str]:
        """A name or a visibility for an upload that does not happen."""
        unused = [name for name in ("hub_model_id", "hub_private_repo") if getattr(self, name) and not self.push_to_hub]
        mistakes = [f"{name} is for an upload; add --push_to_hub, or leave {name} out" for name in unused]
        return mistakes + super().contradictions()


@dataclass
class OutputConfig(HubConfig):
    """Where the results go, and what the run continues from."""

    group, may_change = "output", True

    output_dir: str = flag("mori_brain_final", "folder of the trained model", path=True)
    logging_dir: str = flag("runs", "folder of all runs, for tensorboard --logdir", path=True)
    run_name: str = flag(
        "",
        "this run's folder in logging_dir; unset is made of the names of model and corpus, and a number if settings differ",
    )
    resume_from_checkpoint: str = flag(
        "auto",
        "auto resumes the run, none starts over (the old run is set aside), or the path of a checkpoint",
        path=True,
    )
    language: list[str] = flag(
        [], "languages of the text, as codes of ISO 639 (id, en, jav), for the card of the model (README.md)"
    )
    extend: bool = flag(False, "resume a run, finished or not, up to the num_train_epochs or max_steps given now")
    dry_run: bool = flag(
        False,
        "check everything, measure a few steps and undo them, say what the run will take and need, and stop before its first step",
    )

    def contradictions(self) -> list[str]:
        """A language that is no code."""
        wrong = [language for language in self.language if not re.fullmatch("[a-z]{2,3}", language)]
        mistakes = (
            [f"language {', '.join(wrong)[:40]!r} is no code of ISO 639; write id, en or jav, say"] if wrong else []
        )
        return mistakes + super().contradictions()
