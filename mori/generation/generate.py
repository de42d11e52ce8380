"""Prompts -> texts: settings, batches, where a text ends, and the text itself as it is born."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import nn

from mori.cli import UserError, checked, guarded
from mori.config import SamplingConfig
from mori.generation.decode import decode
from mori.generation.sampling import Sampler
from mori.model.loading import check_fits, context_length

# The settings that are about the text, and not about the next token.
_OF_THE_TEXT = ("max_new_tokens", "max_time", "stop_strings", "num_return_sequences", "dry_sequence_breakers")
_WINDOW = 64  # tokens that are decoded again so that the next one's text is right


@dataclass
class Completion:
    """A prompt, the text that follows it, and the ids of that text (the end-of-text token not among them).

    `finish_reason` is "eos", "stop_string", "length", "context" or "time". A stop string is not part of the text; the
    ids go on to the token that completed it.
    """

    prompt: str
    text: str
    new_token_ids: list[int]
    finish_reason: str = ""


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
    """Texts that go on from `prompts`, `num_return_sequences` for each, in order.

    Args:
        seed: the r-th text of each prompt is drawn with random numbers from (`seed`, r) alone, so it does not depend on the
            prompts beside it.
        batch_size: texts that are drawn side by side.
        crop_prompt: leave out the beginning of a prompt that is longer than the context, instead of refusing it.
        on_full_context: "stop" ends a text where the model's context is full, "slide" goes on with the newer half of it.
        on_text: called with the number of a text and the next piece of it, as soon as the piece is certain.
        controls: the fields of `config.SamplingConfig`. One that is not given has the value in the model's own
            generation_config.json, and where that has none it does nothing.

    The model is put into evaluation mode meanwhile; PyTorch's global random state is neither read nor changed.
    Raises FloatingPointError where the logits are not finite, UserError for a value that cannot be, a prompt longer than
    the context, and an empty prompt where the tokenizer has no beginning-of-text token.
    """
    settings = settings_for(model, controls)
    context, eos_ids = context_length(model.config), _eos_ids(model, tokenizer)
    _check_ids(settings, model.get_output_embeddings().weight.size(0))
    encoded = [_prompt_ids(prompt, tokenizer, model.config, crop_prompt) for prompt in prompts]
    rows = [(number, again) for number in range(len(prompts)) for again in range(settings.num_return_sequences)]
    slides = on_full_context == "slide"
    batches = _batches([len(encoded[number]) for number, _ in rows], batch_size, equal_lengths=slides)
    of_the_token = {n: v for n, v in settings.sampling().items() if n not in _OF_THE_TEXT}
    if settings.dry_multiplier:
        of_the_token["dry_breaker_ids"] = _breaker_ids(tokenizer, settings.dry_sequence_breakers)
    device = next(model.parameters()).device
    texts: list[_Text | None] = [None] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            for place in batch:
                ids = encoded[rows[place][0]]
                room = context - len(ids) + 1 if context and not slides else settings.max_new_tokens
                texts[place] = _Text(tokenizer, ids, settings, eos_ids, room, on_text and _for(on_text, place))
            sampler = Sampler(
                [f"{seed}/{rows[place][1]}" for place in batch], device=device, eos_ids=sorted(eos_ids), **of_the_token
            )
            _draw(
                model,
                [encoded[rows[place][0]] for place in batch],
                [texts[p] for p in batch],
                sampler,
                settings,
                context,
            )
    finally:
        model.train(was_training)
    return [text.completion(prompts[number]) for (number, _), text in zip(rows, texts, strict=True)]


def _draw(
    model: nn.Module, prompts: list, texts: list["_Text"], sampler: Sampler, settings: SamplingConfig, context
) -> None:
    """Draw until every text has ended. On a GPU the host looks at eight tokens at a time, so as not to wait for each."""
    started = time.monotonic()
    at_once = 8 if next(model.parameters()).device.type == "cuda" else 1
    steps = max(text.limit for text in texts)
    for new_ids in decode(model, prompts, sampler, steps, context=context, steps_at_once=at_once):
        late = settings.max_time and time.monotonic() - started > settings.max_time
        for text, ids in zip(texts, new_ids, strict=True):
            for token in ids:
                text.take(token)
            if late:
                text.end("time")
        if all(text.finish_reason for text in texts):
            return


class _Text:
    """One text: its ids, whether it has ended and why, and its pieces as they become certain."""

    def __init__(
        self, tokenizer, prompt_ids: list[int], settings: SamplingConfig, eos_ids: set[int], room: int, on_piece
    ):
        self.tokenizer, self.prompt_ids, self.settings, self.eos_ids = tokenizer, prompt_ids, settings, eos_ids
        self.limit = min(room, settings.max_new_tokens)
        self.ids: list[int] = []
        self.finish_reason = ""
        self.on_piece = on_piece
        self.stream = (
            TextStream(tokenizer, prompt_ids, settings.stop_strings) if on_piece or settings.stop_strings else None
        )

    def take(self, token: int) -> None:
        """One token more; nothing once the text has ended."""
        if self.finish_reason:
            return
        if token in self.eos_ids:
            return self.end("eos")
        self.ids.append(token)
        if self.stream:
            self._tell(self.stream.add(token))
            if self.stream.stopped:
                return self.end("stop_string")
        if len(self.ids) == self.limit:
            self.end("length" if self.limit == self.settings.max_new_tokens else "context")

    def end(self, reason: str) -> None:
        """No more tokens; what was held back is told."""
        if not self.finish_reason:
            self.finish_reason = reason
            if self.stream:
                self._tell(self.stream.rest())
                if self.stream.stopped:
                    self.finish_reason = "stop_string"

    def _tell(self, piece: str) -> None:
        if piece and self.on_piece:
            self.on_piece(piece)

    def completion(self, prompt: str) -> Completion:
        """The text as a whole, decoded at once."""
        text = _decoded(self.tokenizer, self.prompt_ids + self.ids)
        text = text[len(_decoded(self.tokenizer, self.prompt_ids)) :]  # alone, a text may lose its first space
        stops = [text.find(stop) for stop in self.settings.stop_strings if stop in text]
        return Completion(prompt, text[: min(stops)] if stops else text, self.ids, self.finish_reason)


class TextStream:
    """The text of tokens that come one by one: `add` gives what has become certain, `rest` what was held back.

    Together they are the text that the tokenizer makes of all tokens at once, up to the first of `stop_strings`. Held back
    are bytes that are no whole character yet, and what may be the beginning of a stop string. A run of byte tokens
    (`<0xE2>`, as SentencePiece's tokenizers have them) is held to its end, because it is decoded as a whole.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], stop_strings: list[str] = ()):
        self.tokenizer, self.stop_strings = tokenizer, list(stop_strings)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = tokenizer.convert_tokens_to_ids(names)
        self.byte_ids = {
            i for i, name in zip(ids, names, strict=True) if tokenizer.convert_ids_to_tokens(i or 0) == name
        }
        self.ids = list(prompt_ids)
        self.held, self.stopped = "", False
        self._begin_anew()

    def add(self, token: int) -> str:
        """One token more; the text that is certain now."""
        self.ids.append(token)
        if token in self.byte_ids:
            return ""
        text = self._new_text().rstrip("\ufffd")
        piece, self.told = text[self.told :], max(self.told, len(text))
        if len(self.ids) - self.start > 2 * _WINDOW and len(text) == len(self._new_text()):
            self._begin_anew()
        return self._until_stop(piece, last=False)

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        piece = self._new_text()[self.told :]
        self.told += len(piece)
        return self._until_stop(piece, last=True)

    def _begin_anew(self) -> None:
        """Take the last tokens as what is known: the text that they add to is all that must be decoded from here on."""
        self.start = max(0, len(self.ids) - _WINDOW)
        while self.start and (
            self.ids[self.start] in self.byte_ids
            or "\ufffd" in _decoded(self.tokenizer, self.ids[self.start : self.start + 1])
        ):
            self.start -= 1
        self.known, self.told = len(_decoded(self.tokenizer, self.ids[self.start :])), 0

    def _new_text(self) -> str:
        return _decoded(self.tokenizer, self.ids[self.start :])[self.known :]

    def _until_stop(self, piece: str, last: bool) -> str:
        if self.stopped:
            return ""
        text, self.held = self.held + piece, ""
        found = [text.find(stop) for stop in self.stop_strings if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not last:
            for length in range(min(len(text), max(map(len, self.stop_strings), default=1) - 1), 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self.stop_strings):
                    text, self.held = text[:-length], text[-length:]
                    break
        return text


def settings_for(model: nn.Module, controls: dict) -> SamplingConfig:
    """The settings in force: `controls`, then what the model brings, then nothing. UserError for what cannot be."""
    unknown = sorted(set(controls) - {f.name for f in fields(SamplingConfig)})
    if unknown:
        raise UserError(f"there is no control {', '.join(unknown)}; config.SamplingConfig lists them")
    return checked(replace(SamplingConfig(), **{**brought_settings(model), **controls}))


def brought_settings(model: nn.Module) -> dict:
    """What the model's own generation_config.json sets, of the fields of SamplingConfig, where it is not the default."""
    brought = {}
    for name, default in SamplingConfig().sampling().items():
        value = getattr(model.generation_config, name, None)
        if isinstance(value, dict):  # sequence_bias in its older form
            value = [[list(ids), bias] for ids, bias in value.items()]
        if isinstance(default, list) and value is not None:
            value = [value] if isinstance(value, str) else [list(v) if isinstance(v, tuple) else v for v in value]
        if value is not None and value != default:
            brought[name] = type(default)(value)
    return brought


def check_prompts(prompts: list[str], tokenizer, model_config, crop_prompt: bool = False) -> None:
    """Raise UserError for a prompt that this model could not go on from."""
    for prompt in prompts:
        _prompt_ids(prompt, tokenizer, model_config, crop_prompt)


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _for(on_text: Callable[[int, str], None], place: int) -> Callable[[str], None]:
    return lambda piece: on_text(place, piece)


def _batches(lengths: list[int], size: int, equal_lengths: bool) -> list[list[int]]:
    """The places of the texts that are drawn together: in order, or by length where none may be padded."""
    groups = [list(range(len(lengths)))]
    if equal_lengths:
        groups = [[place for place, n in enumerate(lengths) if n == length] for length in dict.fromkeys(lengths)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _prompt_ids(prompt: str, tokenizer, model_config, crop: bool = False) -> list[int]:
    context = context_length(model_config)
    ids = guarded("cannot tokenize the prompt", lambda: tokenizer(prompt)["input_ids"]) if prompt else []
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError(
                "the prompt is empty and this model has no beginning-of-text token to start from; give a --prompt"
            )
        ids = [tokenizer.bos_token_id]
    if context and len(ids) > context:
        if not crop:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context is {context}; make the prompt shorter, or leave out its "
                "beginning with --crop_prompt"
            )
        ids = ids[-context:]
    check_fits(model_config, block_size=len(ids), max_id=max(ids))
    return ids


def _eos_ids(model: nn.Module, tokenizer) -> set[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return set() if eos is None else set(eos) if isinstance(eos, list) else {eos}


def _check_ids(settings: SamplingConfig, vocabulary: int) -> None:
    named = {
        "suppress_tokens": settings.suppress_tokens,
        "bad_words_ids": [i for ids in settings.bad_words_ids for i in ids],
        "sequence_bias": [i for ids, _ in settings.sequence_bias for i in ids],
    }
    for name, ids in named.items():
        if max(ids, default=0) >= vocabulary:
            raise UserError(f"{name} names token {max(ids)}, but the model's vocabulary ends at {vocabulary - 1}")


def _breaker_ids(tokenizer, breakers: list[str]) -> list[int]:
    """Every token whose text has one of `breakers` in it."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [token for token, text in enumerate(texts) if any(breaker in text for breaker in breakers)]
