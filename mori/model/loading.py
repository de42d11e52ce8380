"""Load a model and its tokenizer from the hub, from a folder or from scratch."""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mori.cli import UserError, guarded, interruptible, one_line, optional, plural, print_error
from mori.config import PRESETS, TrainConfig
from mori.model import files
from mori.model.adapters import files as adapter_files
from mori.model.context import context_length

# The base classes of all errors of the HTTP client, which differs between releases of huggingface_hub.
_HUB_ERRORS = (OSError, *huggingface_hub.errors.HfHubHTTPError.__bases__)
END_OF_TEXT = "<|endoftext|>"
MINI_VOCABULARY = 8192
_LONGEST_WORD = 4096  # bytes
_HUB_SECONDS = 10
_WRAPPED = re.compile(r"^(?:_orig_mod\.|module\.)+")  # what torch.compile and DDP put in front of the names of tensors
_BUFFER_BYTES = 1 << 29  # buffers are in no file; the largest in use are attention masks of some ten million bytes


def train_tokenizer(texts: Iterable[str], vocabulary: int = MINI_VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al., 2016; Radford et al., 2019) learned from `texts`; it encodes any text."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Learning takes the square of a word's length: one of a genome, or of minified code, is learned from in parts.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_LONGEST_WORD)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    interruptible(lambda: bpe.train_from_iterator(texts, trainer))
    bpe.pre_tokenizer = words
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def mini_config(vocabulary: int) -> GPT2Config:
    """The shape of the preset `mini`: a GPT-2 that learns a small corpus on a CPU in minutes."""
    shape = {"n_positions": 512, "n_ctx": 512, "n_embd": 256, "n_layer": 4, "n_head": 8}  # n_ctx is for other programs
    return GPT2Config(vocab_size=vocabulary, **shape, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def load_tokenizer(name: str, texts: Iterable[str], trust_remote_code: bool = False):
    """The tokenizer of the model `name`; for a preset, one learned from `texts`. Raises UserError if it cannot be loaded.

    The tokenizer beside an adapter comes before that of its base model.
    """
    if name in PRESETS:
        return train_tokenizer(texts)
    if not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter_files.base_of(name)

    try:
        return _load(name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code))
    except UserError:
        if _needs_sentencepiece(name):
            raise UserError(
                f"model {name} has its tokenizer in tokenizer.model alone, which takes sentencepiece: pip install sentencepiece"
            ) from None
        raise


def _needs_sentencepiece(name: str) -> bool:
    """Whether the tokenizer is a file of SentencePiece only, and its library is not there."""
    if importlib.util.find_spec("sentencepiece"):
        return False

    def path(file: str) -> Path:
        if Path(name).is_dir():
            return Path(name) / file
        cached = huggingface_hub.try_to_load_from_cache(name, file)
        return Path(cached if isinstance(cached, str) else "")

    try:
        if path("tokenizer.json").is_file() or not path("tokenizer.model").is_file():
            return False
    except huggingface_hub.errors.HFValidationError:  # neither a folder nor a name on the hub
        return False
    with path("tokenizer.model").open("rb") as file:
        return file.read(1) == b"\n"  # SentencePiece's first field; tiktoken's files are plain text


def load_config(name: str, tokenizer, *, dropout: float | None = None, trust_remote_code: bool = False):
    """The configuration of the model `name`; `dropout`, if given, replaces every dropout probability in it."""
    _quiet_transformers()
    name = adapter_files.base_of(name)
    if name in PRESETS:
        config = mini_config(len(tokenizer))
    else:
        config = _load(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
        causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal:
            raise UserError(
                f"model {name} is a {config.model_type} that reads text in both directions; take a causal model"
            )
        _check_config(name, config, trust_remote_code)
    if dropout is not None:
        for field, value in config.to_dict().items():
            if field.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(config, field, dropout)
    return config


def config_hash(config) -> str:
    """SHA-256 over everything in a model's configuration but its origin."""
    origin = ("_name_or_path", "transformers_version", "architectures", "dtype")
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in origin}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def load_model(name: str, config, trust_remote_code: bool = False, four_bit: torch.dtype | None = None) -> nn.Module:
    """The model in fp32, in training mode; a preset's weights are drawn from PyTorch's global generator.

    If `name` is a folder with an adapter, its base model with the adapter added. With `four_bit`, its linear layers but the
    head hold NF4 (Dettmers et al., 2023, arXiv:2305.14314), with nested constants, by bitsandbytes; `four_bit` is the type in
    which they compute.
    """
    adapter, name = name, adapter_files.base_of(name)
    if name in PRESETS:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()

    def load(**options):
        with _no_larger_than(stored) if stored else contextlib.nullcontext():
            return AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # reported below, together with missing tensors
                output_loading_info=True,
                **({"quantization_config": _nf4(four_bit)} if four_bit else {}),
                **({} if _can_map(name) else {"disable_mmap": True}),
                **options,
            )

    stored = _stored(name)
    model, info = _load(name, load)
    if any(map(_WRAPPED.match, info["unexpected_keys"])):
        model, info = _load(name, lambda: load(key_mapping={_WRAPPED.pattern: ""}))
        if not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]:
            print_error(f"note: model {name}: its tensors' names begin with _orig_mod. or module., which is taken off")
    absent = sorted(info["missing_keys"]) + [str(key) for key, *_ in sorted(info["mismatched_keys"])]
    if absent:
        raise UserError(
            f"model {name} does not hold all its weights: {plural(len(absent), 'tensor')} missing or of another shape than "
            f"config.json says, such as {', '.join(absent[:3])}; they would be random"
        )
    if four_bit:  # an evaluation on a CPU would repack the weights in place, and a training step could not read them
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if name != adapter:
        adapter_files.attach(Path(adapter), model)
    return model.train()


def _nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on `device`.

    On a CPU the loaded weights are pages of a file (mmap(2), MAP_PRIVATE), which the first write to each would copy, at a tenth
    of the speed. They are copied at once.
    """
    model = model.to(device)
    if device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def store_in_bfloat16(model: nn.Module) -> None:
    """Convert the matrices of `model` to bf16; biases, norms and adapters are small and stay in fp32."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and ".lora.lora_" not in name:
            parameter.data = parameter.data.bfloat16()


def check_fits(config, *, block_size: int, max_id: int) -> None:
    """Raise UserError if the windows or the token ids do not fit the model."""
    context, vocabulary = context_length(config), config.get_text_config().vocab_size
    if context and block_size > context:
        raise UserError(
            f"block_size {block_size} is longer than the model's context of {context}; use --block_size {context} or less"
        )
    if max_id >= vocabulary:
        raise UserError(
            f"the tokenizer gives token id {max_id}, but the model has embeddings for {vocabulary}; "
            "tokenizer and model do not belong together"
        )


def check_reachable(name: str) -> None:
    """Raise UserError if `name` is neither a preset, nor a safe folder with a model, nor a model on the hub."""
    folder = Path(name)
    if name in PRESETS:
        return
    if (folder / "checkpoints").is_dir() and (folder / "environment.json").is_file():
        checkpoints = "".join(f", such as {path}" for path in sorted(folder.glob("checkpoints/step-*"))[-1:])
        raise UserError(
            f"model {name} is the folder of a run; give --model the run's output_dir, or one of its checkpoints{checkpoints}"
        )
    if (folder / "config.json").is_file():
        _stored(name)
        return
    if (folder / adapter_files.CONFIG).is_file():
        files.check_text_files(folder)
        return
    if folder.exists():
        raise UserError(
            f"model {name} has no config.json; give a folder that holds a model as save_pretrained() writes it"
        )
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        tilde = "; the shell did not expand ~: write the path out" if name.startswith("~") else ""
        raise UserError(f"model folder {name} does not exist{tilde}")
    if name == TrainConfig.output_dir:
        raise UserError(
            f"model folder {name} does not exist in {Path.cwd()}; mori train writes it: go to the folder of the training, or "
            "give --model FOLDER"
        )
    _ask_hub(name)


@functools.cache
def _ask_hub(name: str) -> None:
    """Ask the hub for a model once; without an answer, its files in the cache are used, and no more is asked.

    Raises UserError if the hub does not have it, or does not answer, and it is not in the cache.
    """
    is_cached = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    if is_cached and huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        interruptible(lambda: huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS), _HUB_SECONDS)
    except _HUB_ERRORS as error:
        if not is_cached:
            raise UserError(
                f"model {name} is no preset ({', '.join(PRESETS)}), no folder here, and not available on the hub: "
                f"{one_line(error)}"
            ) from None
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # as the environment variable does
        print_error(f"note: the hub is not available ({one_line(error)}); model {name} is taken from the local cache")


def _can_map(name: str) -> bool:
    """Whether the weights in the folder `name` can be mapped into memory, as transformers does unless told otherwise."""
    path = next(Path(name).glob("*.safetensors"), None)
    if path is None or "disable_mmap" not in inspect.signature(PreTrainedModel.from_pretrained).parameters:
        return True
    with optional("mmap", "files are read whole into memory"), path.open("rb") as file:
        mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ).close()
        return True
    return False


def _stored(name: str) -> files.Stored | None:
    """The sizes of the weights in the folder `name`, after a check that it is safe; None for a model on the hub."""
    if not Path(name).is_dir():
        return None
    try:
        return files.check_folder(Path(name))
    except OSError as error:
        raise UserError(f"cannot load model {name}: {one_line(error)}") from None


@contextlib.contextmanager
def _no_larger_than(stored: files.Stored) -> Iterator[None]:
    """Stop the construction of a model, on the meta device, as soon as it outgrows the stored weights.

    Tied weights are stored once, and loaders may split or join tensors: the limits leave slack for both.
    """
    budget = {
        "elements": 2 * stored.elements + (1 << 20),
        "tensors": 8 * stored.tensors + 1024,
        "buffers": _BUFFER_BYTES,
    }

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or name in module._parameters or name in module._buffers:
            return  # loading replaces the constructed tensors
        if isinstance(tensor, nn.Parameter):
            budget["elements"] -= tensor.numel()
            budget["tensors"] -= 1
        else:
            budget["buffers"] -= tensor.nbytes
        if min(budget.values()) < 0:
            raise ValueError(f"config.json describes a far larger model than the weights beside it ({name})")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_config(name: str, config, trust_remote_code: bool) -> None:
    """Raise UserError for quantized weights, and for code from the hub without --trust_remote_code."""
    if getattr(config, "quantization_config", None):
        raise UserError(f"model {name} is quantized; mori trains unquantized weights: take the model it was made from")
    for implementation in (config._attn_implementation, getattr(config, "_experts_implementation", None)):
        if isinstance(implementation, str) and "/" in implementation and not trust_remote_code:
            raise UserError(
                f"model {name} asks for code from the hub ({implementation[:100]}); "
                "if you trust it, say --trust_remote_code, else remove attn_implementation from its config.json"
            )


def _load(name: str, load):
    """Return `load()`; transformers' long error messages become one line."""
    check_reachable(name)
    _quiet_transformers()
    return guarded(f"cannot load model {name}", load)


def _quiet_transformers() -> None:
    """Let transformers print errors only, and no progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
