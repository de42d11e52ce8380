"""The special tokens of a run, decided once: what begins and ends a text, and whether a text may name them.

Training, prompts, the end of an answer and the published model all follow this decision. It asks the tokenizer and the
model's own files, and knows no class of them.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from mori.cli import UserError, guarded
from mori.data.token_file import separator
from mori.data.tokenize import special_ids


@dataclass(frozen=True)
class SpecialTokens:
    """The decision.

    Attributes:
        prompt_begin: the ids that the tokenizer puts in front of a prompt.
        begin: those that begin each document of the corpus.
        end: the id that ends each document, if there is one.
        parsed: whether the name of a special token in a text, such as <s>, is that token.
    """

    prompt_begin: tuple[int, ...]
    begin: tuple[int, ...]
    end: int | None
    parsed: bool

    @property
    def borders(self) -> tuple[int, ...]:
        """The ids at which a document begins for `document_mask`."""
        return tuple(dict.fromkeys([*self.begin[:1], *([] if self.end is None else [self.end])]))

    def describe(self, model: nn.Module, tokenizer) -> str:
        """The decision in words."""
        begin, end, answer_end = (
            _names(ids, tokenizer) or "no token"
            for ids in (self.begin, [] if self.end is None else [self.end], eos_ids(model, tokenizer))
        )
        prompt = "" if self.begin == self.prompt_begin else f" (prompts with {_names(self.prompt_begin, tokenizer)})"
        named = "are tokens too" if self.parsed else "stay text"
        return (
            f"documents begin with {begin}{prompt} and end with {end}; answers end at {answer_end}; names of special tokens "
            f"in the text {named}"
        )


def decide(tokenizer, *, document_bos: bool = True, parse: bool | None = None) -> SpecialTokens:
    """The special tokens of a run. `parse`, if given, is set in the tokenizer, which `save_pretrained` then saves."""
    if parse is not None:
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = not parse
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.encode_special_tokens = not parse
    prefix, _ = _affixes(tokenizer)
    return SpecialTokens(
        prompt_begin=prefix,
        begin=prefix if document_bos else (),
        end=separator(tokenizer),
        parsed=not tokenizer.split_special_tokens,
    )


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, as the tokenizer gives them, but without those that it puts behind a text: they would end it.

    Raises UserError if the tokenizer fails or knows nothing of the prompt, and if special tokens are to stay text and it makes
    one nevertheless.
    """
    ids = _ids(tokenizer, prompt, "the prompt")
    prefix, suffix = _affixes(tokenizer)
    if suffix and tuple(ids[-len(suffix) :]) == suffix:
        ids = ids[: -len(suffix)]
    if prompt.strip() and tuple(ids) == prefix:
        raise UserError(f"the tokenizer cannot express the prompt {prompt[:100]!r}; take a model of its language")
    if tokenizer.split_special_tokens:
        parsed = special_ids(tokenizer).intersection(ids[len(prefix) :]) - {tokenizer.unk_token_id}
        if parsed:
            raise _cannot_split(f"the prompt {prompt[:100]!r}", _names(sorted(parsed), tokenizer))
    return ids


def check_corpus(special: SpecialTokens, names: Iterable[str]) -> None:
    """Raise UserError if special tokens were to stay text, and the corpus holds some nevertheless, with these `names`."""
    if not special.parsed and names:
        raise _cannot_split("the corpus", ", ".join(names))


def eos_ids(model: nn.Module, tokenizer) -> list[int]:
    """The ids that end an answer: the end of the documents, and all that the model's own files name, in Trainer's order.

    They may lie outside the vocabulary: the default of a configuration's class may stand in its file.
    """
    named = [separator(tokenizer), tokenizer.eos_token_id]
    for config in (model.generation_config, model.config.get_text_config(), model.config):
        eos = getattr(config, "eos_token_id", None)
        named += eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys(token for token in named if token is not None))


def write_into(model: nn.Module, tokenizer) -> None:
    """Name all ids that end an answer, and the tokenizer's BOS, in the model's `generation_config`, as Trainer does."""
    config, ids = model.generation_config, eos_ids(model, tokenizer)
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ids and set(named) != set(ids):
        config.eos_token_id = ids
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id


def _affixes(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts in front of a text and behind it."""
    for text in _probes(tokenizer):
        try:
            with_affixes = tuple(_ids(tokenizer, text, "the text"))
            plain = tuple(_ids(tokenizer, text, "the text", add_special_tokens=False))
        except UserError:  # a tokenizer without an unknown token fails on a word that it does not know
            continue
        for start in range(len(with_affixes) - len(plain) + 1) if plain else ():
            if with_affixes[start : start + len(plain)] == plain:
                return with_affixes[:start], with_affixes[start + len(plain) :]
    return (), ()


def _probes(tokenizer) -> Iterator[str]:
    """Texts, of which a tokenizer knows at least one."""
    yield from ("a", "A", "0", ".", "一")
    special = special_ids(tokenizer)
    yield from itertools.islice((word for word, token in tokenizer.get_vocab().items() if token not in special), 8)


def _ids(tokenizer, text: str, what: str, **options) -> list[int]:
    return guarded(f"cannot tokenize {what}", lambda: tokenizer(text, **options)["input_ids"])


def _names(ids: Iterable[int], tokenizer) -> str:
    size = len(tokenizer)  # a configuration may name ids beyond it
    return ", ".join((tokenizer.convert_ids_to_tokens(token) if token < size else None) or str(token) for token in ids)


def _cannot_split(where: str, names: str) -> UserError:
    return UserError(
        f"no-parse_special_tokens: {where} names the special tokens {names}, and this tokenizer's own vocabulary makes them of "
        "text; remove them from the text, or leave the flag out"
    )
