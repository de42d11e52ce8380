"""Load a model and its tokenizer: from the hub, from a folder, or made from scratch; and the model with its loss."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import pad
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
)
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mori.config import PRESETS, UserError, guarded, one_line
from mori.data.windows import IGNORE_INDEX
from mori.model import files as foreign
from mori.model.loss import chunked_cross_entropy_sum, cross_entropy_sum
from mori.speed.matmul import CUT, FastProducts, Products

# The base of all errors of the HTTP client, whichever client this release of huggingface_hub brings.
_HUB_ERRORS = (OSError, *huggingface_hub.errors.HfHubHTTPError.__bases__)
MASK_FREE = "mori"  # the name under which attention needs no mask
AttentionInterface.register(MASK_FREE, sdpa_attention_forward)
END_OF_TEXT = "<|endoftext|>"
MINI_VOCABULARY = 8192
_BUFFER_BYTES = 1 << 29  # buffers stand in no file; the largest in use are attention masks of some ten million bytes


class CausalLMLoss(nn.Module):
    """The model and its loss in one module, so that a wrapper (DDP, autocast) sees both.

    Args:
        model: any causal model of transformers.
        chunked_loss: never hold all logits (`loss.chunked_cross_entropy_sum`); for models whose logits are their head's
            product and no more, see `head_watched`.
        mask_free: causal attention without a mask, see `attends_to_all_before`.
        products: how large products are computed on a CPU, where not as PyTorch does.
        separator: the token at which a document begins; then no token sees another document, see `within_documents`.

    Attributes:
        rows: how many windows a batch has, but for the last of an epoch; where memory ran out, fewer than before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunked_loss: bool = False,
        mask_free: bool = False,
        products: Products | None = None,
        separator: int | None = None,
    ):
        super().__init__()
        self.model, self.chunked_loss, self.mask_free = model, chunked_loss, mask_free
        self.products, self.separator = products, separator
        self._compiled, self.rows = [], 0
        self.router_coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, n_targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of the token losses; with `n_targets`, what this batch adds to the mean loss of a step.

        Args:
            input_ids, labels: `(B, T)`, the labels shifted already.
            n_targets: how many labels the whole step has. A mixture of experts that gives a router loss (its
                `output_router_logits` is on) has it added then, by the share of the step's labels that are here.
        """
        compiled = self.training and self._compiled
        if compiled and (missing := self.rows - len(input_ids)) > 0:
            input_ids, labels = pad(input_ids, (0, 0, 0, missing)), pad(labels, (0, 0, 0, missing), value=IGNORE_INDEX)
        trunk = self.model.base_model if self.chunked_loss else self.model
        if compiled:
            trunk = self._compiled[0]
        documents = {} if self.separator is None else within_documents(input_ids, self.separator)
        with contextlib.ExitStack() as while_it_runs:
            if self.mask_free:
                while_it_runs.enter_context(_attention(self.model.config, MASK_FREE))
            while_it_runs.enter_context(self.fast_products())
            out = trunk(input_ids=input_ids, use_cache=False, **documents)
            if self.chunked_loss:  # out[0] is the head's input, (B, T, D)
                head = self.model.get_output_embeddings()
                loss = chunked_cross_entropy_sum(out[0], head, labels, self.products or CUT)
            else:
                loss = cross_entropy_sum(out.logits, labels)  # logits (B, T, V)
        if n_targets is None:
            return loss
        loss = loss / n_targets
        router_loss = getattr(out, "aux_loss", None)
        if router_loss is not None:
            share = (labels != IGNORE_INDEX).sum() / n_targets
            loss = loss + self.router_coefficient * router_loss * share
        return loss

    def fast_products(self) -> contextlib.AbstractContextManager:
        """A context in which large products are computed as `products` says."""
        return FastProducts(self.products) if self.products else contextlib.nullcontext()

    def compile_trunk(self, rows: int, backend="inductor") -> None:
        """Compile all of the model but its head (`torch.compile`), for training on batches of `self.rows` windows.

        One of fewer, at the end of an epoch, is filled up: another shape would be compiled anew.
        Where the compiler cannot, the model runs as it is, with the compiler's warning. It chooses no kernel by a race that
        another process may decide otherwise, such as one that takes up the run again.
        """
        torch._dynamo.config.suppress_errors = torch._inductor.config.deterministic = True
        trunk = self.model.base_model if self.chunked_loss else self.model
        # In a list, so that it is no second child; the model itself stays as it is, for whoever generates with it.
        self._compiled, self.rows = [torch.compile(trunk, backend=backend, dynamic=False)], rows


def within_documents(input_ids: torch.Tensor, separator: int) -> dict[str, torch.Tensor]:
    """What keeps the documents of a window `(B, T)` apart: `position_ids` `(B, T)` and `attention_mask` `(B, 1, T, T)`.

    A document begins at the separator before it, which so predicts its first token, and at the beginning of the window.
    """
    columns = torch.arange(input_ids.size(1), device=input_ids.device)
    first = torch.where(input_ids == separator, columns, 0).cummax(-1).values[..., None]  # (B, T, 1)
    visible = (columns >= first) & (columns <= columns[:, None])  # (B, T, T)
    return {"position_ids": columns - first[..., 0], "attention_mask": visible[:, None]}


@contextlib.contextmanager
def _attention(config, implementation: str) -> Iterator[None]:
    """Another attention for a while: who generates with the model meanwhile, or saves it, finds its own.

    Without a mask, and where a token for padding is known, transformers asks the device in every pass whether there is any
    (GPT-2, 5.23); so none is known meanwhile.
    """
    before, padding = config._attn_implementation, getattr(config, "pad_token_id", None)
    config._attn_implementation, config.pad_token_id = implementation, None
    try:
        yield
    finally:
        config._attn_implementation, config.pad_token_id = before, padding


def attends_to_all_before(model: nn.Module, block_size: int) -> bool:
    """Whether every layer lets a token see all tokens before it in a window of `block_size`, through transformers' SDPA.

    Then no mask is needed. transformers makes one all the same when the model is compiled, and with it the fast kernels are
    lost; in eager mode it asks the device at every forward pass whether one is needed. An attention under a name for which
    it knows no masks is left alone (transformers' documentation of `AttentionInterface`).
    """
    text = model.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        model.config._attn_implementation == "sdpa"
        and model._supports_attention_backend
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and all(isinstance(window, int) and window >= block_size for window in windows if window)
    )


@contextlib.contextmanager
def head_watched(model: nn.Module) -> Iterator[list[bool]]:
    """Note of each forward pass of `model`, called with keywords, whether its head is plain.

    It is where the logits are, to the bit, the output embeddings' product with what the trunk gives by itself: neither scaled
    nor capped. Such a model's loss may be computed in chunks. One that adds a router's loss is left whole as well.
    """
    head, trunk, plain = model.get_output_embeddings(), model.base_model, []

    def note(module, args, kwargs, out) -> None:
        try:
            plain.append(torch.equal(head(trunk(**kwargs)[0]), out.logits))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            plain.append(False)  # a trunk that cannot be called by itself

    if not isinstance(head, nn.Linear) or trunk is model or getattr(model.config, "output_router_logits", False):
        yield [False]
        return
    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield plain
    finally:
        hook.remove()


def train_tokenizer(texts: Iterable[str], vocabulary: int = MINI_VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al., 2016; Radford et al., 2019) learned from `texts`: no text is unknown to it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def mini_config(vocabulary: int) -> GPT2Config:
    """The shape of the preset `mini`: a GPT-2 that learns a small corpus on a CPU in minutes."""
    return GPT2Config(
        vocab_size=vocabulary, n_positions=512, n_embd=256, n_layer=4, n_head=8, bos_token_id=0, eos_token_id=0
    )


def load_tokenizer(name: str, texts: Iterable[str], trust_remote_code: bool = False):
    """The tokenizer of the model `name`; for a preset one that is learned from `texts`.

    Raises UserError where `name` is no model that can be reached.
    """
    if name in PRESETS:
        return train_tokenizer(texts)
    return _found(name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code))


def load_config(name: str, tokenizer, *, dropout: float | None = None, trust_remote_code: bool = False):
    """The configuration of the model `name`; `dropout`, where given, replaces every dropout probability in it."""
    if name in PRESETS:
        config = mini_config(len(tokenizer))
    else:
        config = _found(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
            raise UserError(
                f"model {name} is a {config.model_type} that reads text in both directions; take a causal model"
            )
        _check_config(name, config, trust_remote_code)
    if dropout is not None:
        for field, value in config.to_dict().items():
            if field.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(config, field, dropout)
    return config


def load_model(name: str, config, trust_remote_code: bool = False) -> nn.Module:
    """The model in fp32, in training mode; a preset's weights are drawn from PyTorch's global generator."""
    if name in PRESETS:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()

    def load():
        with _no_larger_than(stored) if stored else contextlib.nullcontext():
            return AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # so that they are told below, with those that are missing
                output_loading_info=True,
            )

    stored = _stored(name)
    model, found = _found(name, load)
    absent = sorted(found["missing_keys"]) + [str(key) for key, *_ in sorted(found["mismatched_keys"])]
    if absent:
        raise UserError(
            f"model {name} does not hold all its weights: {len(absent)} tensor(s) are missing or of another shape than "
            f"config.json says, such as {', '.join(absent[:3])}; they would be random"
        )
    return model.train()


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on `device`, in memory of its own.

    On a CPU its weights are the pages of a file at first. An optimizer's first step would have the system copy them one
    by one, as each is written to (mmap(2), MAP_PRIVATE), at a tenth of the speed.
    """
    model = model.to(device)
    if device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def store_in_bfloat16(model: nn.Module) -> None:
    """Put the matrices of `model` into bf16; biases and norms, which are small and hardly move, stay in fp32."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()


def fuse_activations(model: nn.Module) -> int:
    """Put PyTorch's own kernel in the place of the GELU's tanh form written out in Python; returns how often.

    It is the same function (Hendrycks and Gimpel, 2016, arXiv:1606.08415) but for the last bits, and keeps one tensor of the
    MLP's size for the backward pass instead of several. What `save` writes does not change.
    """
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) in (NewGELUActivation, FastGELUActivation)
    ]
    for module, name in places:
        setattr(module, name, nn.GELU(approximate="tanh"))
    return len(places)


def context_length(config) -> int | None:
    """The longest text that the model can see, in tokens; None where it has no such limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_fits(config, *, block_size: int, max_id: int) -> None:
    """Raise UserError where the windows or the token ids do not fit the model."""
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


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write model and tokenizer so that `AutoModelForCausalLM` and `AutoTokenizer` load them from `folder`.

    Raises OSError, and UserError for what the tokenizer's library raises, where they cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise OSError(str(error)) from None
    guarded("the tokenizer cannot be saved", lambda: tokenizer.save_pretrained(folder))


def check_reachable(name: str) -> None:
    """Raise UserError, at once, where `name` is no preset, no safe folder with a model, and no model on the hub."""
    folder = Path(name)
    if name in PRESETS:
        return
    if (folder / "config.json").is_file():
        _stored(name)
        return
    if folder.exists():
        raise UserError(
            f"model {name} has no config.json; give a folder that holds a model as save_pretrained() writes it"
        )
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        tilde = "; write ~ out, which no shell did" if name.startswith("~") else ""
        raise UserError(f"model folder {name} does not exist{tilde}")
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except _HUB_ERRORS as error:
        raise UserError(
            f"model {name} is no preset ({', '.join(PRESETS)}), no folder here, and the hub does not give it: {one_line(error)}"
        ) from None


def _stored(name: str) -> foreign.Stored | None:
    """What the weights in the folder `name` come to, the folder found safe; None where it is a model on the hub."""
    if not Path(name).is_dir():
        return None
    try:
        return foreign.check_folder(Path(name))
    except OSError as error:
        raise UserError(f"cannot load model {name}: {one_line(error)}") from None


@contextlib.contextmanager
def _no_larger_than(stored: foreign.Stored) -> Iterator[None]:
    """Stop the making of a model, which takes no memory yet, as soon as it outgrows the weights that are to fill it.

    A tied head and its embedding stand in the files once. Loaders may cut a tensor into several, or join several to one.
    """
    room = {"elements": 2 * stored.elements + (1 << 20), "tensors": 8 * stored.tensors + 1024, "buffers": _BUFFER_BYTES}

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or name in module._parameters or name in module._buffers:
            return  # loading puts the weights in the place of what was made
        if isinstance(tensor, nn.Parameter):
            room["elements"] -= tensor.numel()
            room["tensors"] -= 1
        else:
            room["buffers"] -= tensor.nbytes
        if min(room.values()) < 0:
            raise ValueError(f"config.json describes a far larger model than the weights beside it ({name})")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_config(name: str, config, trust_remote_code: bool) -> None:
    """Raise UserError for settings that would bring in other code, or a kind of weights that is not trained here."""
    if getattr(config, "quantization_config", None):
        raise UserError(f"model {name} is quantized; mori trains whole weights: take the model it was made from")
    for chosen in (config._attn_implementation, getattr(config, "_experts_implementation", None)):
        if isinstance(chosen, str) and "/" in chosen and not trust_remote_code:
            raise UserError(
                f"model {name} asks for code from the hub ({chosen[:100]}); "
                "if you trust it, say --trust_remote_code, else remove attn_implementation from its config.json"
            )


def _found(name: str, load):
    """`load()`, with transformers' long explanations of what is missing or broken made into one line."""
    check_reachable(name)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return guarded(f"cannot load model {name}", load)
