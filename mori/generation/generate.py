"""Prompts -> completions: settings, batches, and the end of each text."""

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from mori.cli import UserError, checked, plural
from mori.config import SamplingConfig
from mori.generation.decode import decode
from mori.generation.reader import reads_padded_alike
from mori.generation.sampler import Sampler
from mori.generation.sampling import check_token_ids
from mori.generation.stream import TextStream, before_answer, decode_text
from mori.model.context import context_length, usable_context
from mori.model.loading import check_fits
from mori.model.special_tokens import encode_prompt, eos_ids


class PromptTooLong(UserError):
    """A prompt that is longer than the model's context."""


@dataclass
class Completion:
    """A prompt, the text that follows it, and the token ids of both; those of the text without the end-of-text token.

    `finish_reason` is "eos", "stop_string", "length", "context" or "time". The text ends before a stop string, the ids end
    with the token that completed it.
    """

    prompt: str
    text: str
    new_token_ids: list[int]
    prompt_ids: list[int]
    finish_reason: str = ""

    def characters(self, tokenizer, spans: Iterable[tuple[int, int]]) -> list[list[int]]:
        """The ranges of characters, in `prompt + text`, of some ranges of `new_token_ids`; a part of a character is left out."""
        before = before_answer(tokenizer, self.prompt_ids, self.new_token_ids)
        n_before = len(decode_text(tokenizer, before))

        def position(n_tokens: int) -> int:
            text = decode_text(tokenizer, before + self.new_token_ids[:n_tokens])[n_before:]
            return len(self.prompt) + len(os.path.commonprefix([text, self.text]))

        return [[position(start), position(stop)] for start, stop in spans]


def generate(
    model: nn.Module,
    tokenizer,
    prompts: list[str],
    *,
    seed: int = 0,
    batch_size: int = 32,
    crop_prompt: bool = False,
    on_full_context: str = "stop",
    on_text: Callable[[int, str], None] | None = None,
    **controls,
) -> list[Completion]:
    """Continue each of `prompts` `num_return_sequences` times; returns the completions in order.

    Args:
        seed: the r-th text of a prompt depends on (`seed`, r) and its prompt only, not on the other prompts.
        batch_size: texts that are decoded together.
        crop_prompt: drop the beginning of a prompt that is longer than the context, instead of raising UserError.
        on_full_context: "stop" ends a text when the model's context is full, "slide" continues from its newer half.
        on_text: called with the index of a text and its next piece, as soon as the piece is certain.
        controls: fields of `config.SamplingConfig`. The default of each is the value in the model's generation_config.json,
            and without one the control is off.

    The model is in evaluation mode during the call. PyTorch's global RNG is neither read nor changed.
    Raises FloatingPointError if the logits are not finite; UserError for an invalid value, a prompt longer than the context,
    and an empty prompt if the tokenizer has no beginning-of-text token.
    """
    settings = resolve_settings(model, controls)
    vocabulary = model.get_output_embeddings().weight.size(0)
    check_token_ids(settings, vocabulary)
    prompt_ids = [_encode(prompt, tokenizer, model.config, crop_prompt) for prompt in prompts]
    pairs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.num_return_sequences)]
    slides = on_full_context == "slide"
    context = usable_context(model, "position_ids" in inspect.signature(model.forward).parameters)
    ends = set(eos_ids(model, tokenizer))
    breaker_ids = _breaker_ids(tokenizer, settings.dry_sequence_breakers) if settings.dry_multiplier else []
    texts = []
    for number, (prompt, _) in enumerate(pairs):
        ids = prompt_ids[prompt]
        capacity = context - len(ids) + 1 if context and not slides else settings.max_new_tokens
        texts.append(_Text(number, tokenizer, ids, settings, ends, capacity, on_text))
    was_training, cudnn_attention = model.training, torch.backends.cuda.cudnn_sdp_enabled()
    model.eval()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a new plan for each number of keys
    try:
        equal_lengths = slides or not reads_padded_alike(model, prompt_ids, context)
        for batch in _batches([len(text.prompt_ids) for text in texts], batch_size, equal_lengths):
            sampler = Sampler(
                [f"{seed}/{pairs[number][1]}" for number in batch],
                settings,
                device=next(model.parameters()).device,
                eos_ids=sorted(token for token in ends if token < vocabulary),
                dry_breaker_ids=breaker_ids,
            )
            _decode_batch(model, [texts[number] for number in batch], sampler, context)
    finally:
        model.train(was_training)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    return [text.completion(prompts[prompt]) for (prompt, _), text in zip(pairs, texts, strict=True)]


def resolve_settings(model: nn.Module, controls: dict) -> SamplingConfig:
    """The settings in force: `controls`, then those of the model, then the defaults. UserError for invalid values."""
    unknown = sorted(set(controls) - {field.name for field in fields(SamplingConfig)})
    if unknown:
        raise UserError(f"there is no control {', '.join(unknown)}; config.SamplingConfig lists them")
    return checked(replace(SamplingConfig(), **{**model_settings(model), **controls}))


def model_settings(model: nn.Module) -> dict:
    """The fields of SamplingConfig that the model's own generation_config.json sets to other values than the default."""
    defaults, settings = SamplingConfig(), {}
    vocabulary = model.config.get_text_config().vocab_size
    for field in fields(SamplingConfig):
        default, value = getattr(defaults, field.name), getattr(model.generation_config, field.name, None)
        if isinstance(value, dict):  # an older form of sequence_bias
            value = [[list(ids), bias] for ids, bias in value.items()]
        if isinstance(default, list) and value is not None:
            items = [value] if isinstance(value, (str, int)) else value
            value = [list(item) if isinstance(item, tuple) else item for item in items]
            if field.name.endswith("suppress_tokens"):  # ids behind the vocabulary need not be suppressed
                value = [token for token in value if token < vocabulary]
        if value is not None and value != default:
            settings[field.name] = type(default)(value)
    return settings


def check_prompts(prompts: list[str], tokenizer, model_config, crop_prompt: bool = False) -> None:
    """Raise UserError for a prompt that the model cannot continue."""
    for prompt in prompts:
        _encode(prompt, tokenizer, model_config, crop_prompt)


class _Text:
    """A text while it is generated: its token ids, why it ended, and its pieces for `on_text`."""

    def __init__(
        self,
        number: int,
        tokenizer,
        prompt_ids: list[int],
        settings: SamplingConfig,
        eos_ids: set[int],
        capacity: int,
        on_text: Callable[[int, str], None] | None,
    ):
        self.number, self.tokenizer, self.prompt_ids = number, tokenizer, prompt_ids
        self.settings, self.eos_ids, self.on_text = settings, eos_ids, on_text
        self.limit = min(capacity, settings.max_new_tokens)
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.finish_reason = ""
        self.stream = None
        if on_text or settings.stop_strings:
            self.stream = TextStream(tokenizer, prompt_ids, settings.stop_strings)

    def append(self, token: int) -> None:
        """Add a token, unless the text has ended."""
        if self.finish_reason:
            return
        if token in self.eos_ids:
            return self.end("eos")
        self.ids.append(token)
        if self.stream:
            self._emit(self.stream.add(token))
            if self.stream.stopped:
                return self.end("stop_string")
        if len(self.ids) == self.limit:
            self.end("length" if self.limit == self.settings.max_new_tokens else "context")

    def end(self, reason: str) -> None:
        """End the text, unless it has ended, and emit what the stream withheld."""
        if self.finish_reason:
            return
        self.finish_reason = reason
        if self.stream:
            self._emit(self.stream.finish())
            if self.stream.stopped:
                self.finish_reason = "stop_string"

    def completion(self, prompt: str) -> Completion:
        """The result. The text is decoded together with its prompt: alone, it could lose its first space."""
        before = before_answer(self.tokenizer, self.prompt_ids, self.ids)
        text = decode_text(self.tokenizer, before + self.ids)[len(decode_text(self.tokenizer, before)) :]
        if self.stream and self.stream.stopped:
            text = "".join(self.pieces)
        return Completion(prompt, text, self.ids, self.prompt_ids, self.finish_reason)

    def _emit(self, piece: str) -> None:
        self.pieces.append(piece)
        if piece and self.on_text:
            self.on_text(self.number, piece)


def _decode_batch(model: nn.Module, texts: list[_Text], sampler: Sampler, context: int | None) -> None:
    """Decode until every text has ended. On a GPU the host reads eight tokens at a time, for fewer host syncs."""
    started, max_time = time.monotonic(), sampler.config.max_time
    steps_at_once = 8 if sampler.device.type == "cuda" else 1
    prompts, steps = [text.prompt_ids for text in texts], max(text.limit for text in texts)
    for new_ids in decode(model, prompts, sampler, steps, context=context, steps_at_once=steps_at_once):
        late = max_time and time.monotonic() - started > max_time
        for text, ids in zip(texts, new_ids, strict=True):
            for token in ids:
                text.append(token)
            if late:
                text.end("time")
        if all(text.finish_reason for text in texts):
            return


def _batches(lengths: list[int], size: int, equal_lengths: bool) -> Iterator[list[int]]:
    """The numbers of the texts that are decoded together: in order, or grouped by length if none may be padded."""
    groups = [list(range(len(lengths)))]
    if equal_lengths:
        groups = [[number for number, n in enumerate(lengths) if n == length] for length in dict.fromkeys(lengths)]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _encode(prompt: str, tokenizer, model_config, crop: bool) -> list[int]:
    """The ids of a prompt, which fit the model."""
    context = context_length(model_config)
    ids = encode_prompt(tokenizer, prompt) if prompt else []
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty and this model has no beginning-of-text token; give a --prompt")
        ids = [tokenizer.bos_token_id]
    if context and len(ids) > context:
        if not crop:
            raise PromptTooLong(
                f"the prompt has {plural(len(ids), 'token')}, the model's context is {context}; shorten the prompt"
            )
        ids = ids[-context:]
    check_fits(model_config, block_size=len(ids), max_id=max(ids))
    return ids


def _breaker_ids(tokenizer, breakers: list[str]) -> list[int]:
    """Every token whose text contains one of `breakers`."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [token for token, text in enumerate(texts) if any(breaker in text for breaker in breakers)]
