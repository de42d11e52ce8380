"""A tokenizer as a GGUF file describes it, checked: it must give the ids that the model was trained on."""

import functools
import heapq
import json
import re
from collections.abc import Callable, Iterator

import gguf
from tokenizers import Tokenizer
from torch import nn

from mori.cli import UserError
from mori.model import special_tokens

# The pre-tokenizers of llama.cpp (src/llama-vocab.cpp) by name: the expressions that split a text one after the other, and
# whether a word that is a token itself is taken without merges.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PRE_TOKENIZERS = {
    "gpt-2": ([_GPT2], False),
    "smollm": ([r"\p{N}", _GPT2], False),
    "llama-bpe": (
        [
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        True,
    ),
    "tekken": (
        [
            r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|"
            r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        True,
    ),
}
PROBE = (
    "Halo semua, selamat datang!  I'm sure they'll say it's FINE; DON'T we'Ve?\n\n\tif x_1 != 1234567890:\r\n        return 3.14 / 2\n"
    "ÀÉÎõü e\u0301 naïve — “kutip” … ½ ² Ⅳ ٣٤٥ 한국어 日本語のテキスト 中文，测试。 Ελληνικά Привет, мир! שלום مرحبا नमस्ते ไทย 👩‍👩‍👧 😀🇮🇩 \u00a0\u2003x "
    "camelCase HTTPServer http://a.b/c?d=e&f=1 #tag @name a\u200bb <b>tebal</b> $100,000.00 (ya)... 'tis ''quoted'' __x__   \n \n  akhir  "
)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


def write(writer: gguf.GGUFWriter, tokenizer, model_config, texts: Callable[[], Iterator[str]]) -> str:
    """Write the tokenizer; returns how the file names it. Its ids are compared on a probe text, all tokens, and `texts()`.

    Raises UserError if llama.cpp has no tokenizer that gives the same ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    bpe = settings["model"]
    if bpe["type"] != "BPE":
        raise UserError(f"format gguf takes tokenizers of the kind BPE; this model's is {bpe['type']}")

    def probes() -> Iterator[str]:
        yield PROBE
        yield from _texts_of_tokens(backend)
        yield from texts()

    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    if bpe.get("byte_fallback"):
        scores = _scores(bpe["vocab"], [merge.split(" ") for merge in merges])
        name, prefix = _checked_sentencepiece(settings, scores, probes)
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(prefix)
    else:
        name = _checked_pre_tokenizer(settings, probes)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(merges)
    writer.add_tokenizer_pre(name)
    tokens, types = _tokens(backend, model_config.vocab_size, byte_fallback=bool(bpe.get("byte_fallback")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if bpe.get("byte_fallback"):
        writer.add_token_scores([scores.get(token, -1e6) for token in tokens])
    return name


def write_special_tokens(writer: gguf.GGUFWriter, tokenizer, model: nn.Module) -> None:
    """Write which tokens begin a prompt and end an answer, and the chat template."""
    prefix = special_tokens.decide(tokenizer).prompt_begin
    begins_with_bos = prefix == (tokenizer.bos_token_id,)
    if prefix and not begins_with_bos:
        names = tokenizer.convert_ids_to_tokens(list(prefix))
        raise UserError(f"format gguf: prompts begin with {names}; llama.cpp can put only the BOS token there")
    writer.add_add_bos_token(begins_with_bos)
    writer.add_add_eos_token(False)
    ends = [token for token in special_tokens.eos_ids(model, tokenizer) if token < model.config.vocab_size]
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, ends[0] if ends else None),
        (writer.add_eot_token_id, ends[1] if len(ends) > 1 else None),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(backend: Tokenizer, size: int, byte_fallback: bool) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types; rows of the embeddings without a token get a name of their number."""
    added, vocab = backend.get_added_tokens_decoder(), backend.get_vocab(with_added_tokens=True)
    if max(vocab.values()) >= size:
        raise UserError(
            f"the tokenizer has {max(vocab.values()) + 1} tokens, but the model has embeddings for {size}; "
            "tokenizer and model do not belong together"
        )
    names = {token: text for text, token in vocab.items()}
    kinds, unknown = gguf.TokenType, json.loads(backend.to_str())["model"].get("unk_token")
    tokens, types = [], []
    for token in range(size):
        text = names.get(token)
        if text is None:
            text, kind = f"[PAD{token}]", kinds.UNUSED
        elif byte_fallback and text == unknown:
            kind = kinds.UNKNOWN
        elif token in added:
            kind = kinds.CONTROL if added[token].special else kinds.USER_DEFINED
        else:
            kind = kinds.BYTE if byte_fallback and _BYTE.fullmatch(text) else kinds.NORMAL
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _texts_of_tokens(backend: Tokenizer) -> Iterator[str]:
    """Texts in which all tokens occur."""
    size = backend.get_vocab_size(with_added_tokens=False)
    for start in range(0, size, 64):
        texts = [backend.decode([token], skip_special_tokens=True) for token in range(start, min(start + 64, size))]
        yield "".join(texts)
        yield " ".join(texts)


def _without_added_tokens(settings: dict, **changed) -> Tokenizer:
    """A tokenizer by its settings, without special tokens, which every program cuts out of a text beforehand."""
    free = {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    return Tokenizer.from_str(json.dumps({**settings, **free, **changed}))


def _first_difference(expected, ids, text: str) -> str | None:
    """The beginning of the first line of `text` whose ids differ."""
    if expected(text) == ids(text):
        return None
    lines = text.splitlines(keepends=True)
    return next((line for line in lines if expected(line) != ids(line)), text)[:40]


def _checked_pre_tokenizer(settings: dict, probes: Callable[[], Iterator[str]]) -> str:
    """The name of the pre-tokenizer that gives the same ids for all texts. Raises UserError if none does."""
    expected = _encoder(_without_added_tokens(settings))
    differences = {}
    for name, (expressions, ignore_merges) in PRE_TOKENIZERS.items():
        splits = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
            for expression in expressions
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        candidate = _without_added_tokens(
            settings,
            normalizer=None,
            pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            model={**settings["model"], **plain, "fuse_unk": False, "ignore_merges": ignore_merges},
        )
        difference = next(
            filter(None, (_first_difference(expected, _encoder(candidate), text) for text in probes())), None
        )
        if difference is None:
            return name
        differences[name] = difference
    raise UserError(
        "format gguf: this model's tokenizer gives other ids than each pre-tokenizer that the file could name: "
        + ", ".join(f"{name} in {text!r}" for name, text in differences.items())
    )


def _encoder(tokenizer: Tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _checked_sentencepiece(
    settings: dict, scores: dict[str, float], probes: Callable[[], Iterator[str]]
) -> tuple[str, bool]:
    """The name of the pre-tokenizer and whether a space is put before a text. Raises UserError if the ids differ."""
    vocab = settings["model"]["vocab"]
    if not all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        raise UserError("format gguf: this model's tokenizer has no token for some bytes, which llama.cpp needs")
    expected = _encoder(_without_added_tokens(settings))
    differences = {}
    for prefix in (True, False):
        encode = functools.partial(sentencepiece_ids, vocab=vocab, scores=scores, prefix=prefix)
        difference = next(filter(None, (_first_difference(expected, encode, text) for text in probes() if text)), None)
        if difference is None:
            return "default", prefix
        differences[prefix] = difference
    raise UserError(
        "format gguf: this model's tokenizer gives other ids than llama.cpp's SentencePiece: with a space in front "
        f"in {differences[True]!r}, without in {differences[False]!r}"
    )


def _scores(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, float]:
    """SentencePiece's scores, which order the merges: minus the rank of a token's first merge."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges, start=1):
        scores.setdefault("".join(pair), -float(rank))
    return scores


def sentencepiece_ids(text: str, vocab: dict[str, int], scores: dict[str, float], prefix: bool) -> list[int]:
    """The ids that llama.cpp computes from a SentencePiece vocabulary (`llm_tokenizer_spm`): the best-scored pair is merged first."""
    text = (" " * prefix + text).replace(" ", _SPACE)
    crossing = _crosses_words(frozenset(vocab))
    words = [text] if crossing else re.findall(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+", text)
    ids_of: dict[str, list[int]] = {}
    for word in words:
        if word not in ids_of:
            ids_of[word] = _merged(word, vocab, scores)
    return [token for word in words for token in ids_of[word]]


@functools.lru_cache(maxsize=1)
def _crosses_words(vocab: frozenset[str]) -> bool:
    """Whether a token goes on behind a space that follows a letter."""
    return any(re.search(f"[^{_SPACE}]{_SPACE}", token) for token in vocab)


def _merged(word: str, vocab: dict[str, int], scores: dict[str, float]) -> list[int]:
    """Merge neighbours while they form a token: the highest score first, the leftmost among equals."""
    parts: list[str | None] = list(word)
    after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(parts) and (pair := parts[left] + parts[right]) in vocab:
            heapq.heappush(queue, (-scores.get(pair, -1e6), left, right, pair))

    for left in range(len(parts) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, pair = heapq.heappop(queue)
        if parts[left] is None or parts[right] is None or parts[left] + parts[right] != pair:
            continue
        parts[left], parts[right], after[left] = pair, None, after[right]
        if after[right] < len(parts):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    ids: list[int] = []
    for part in filter(None, parts):
        ids += [vocab[part]] if part in vocab else [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids
