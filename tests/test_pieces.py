"""Texts in pieces have the ids of one call, whatever the tokenizer and the text; or they are not cut."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from conftest import ROOT, STORIES, needs_stories
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mori.cli import RunFailed, UserError
from mori.data import pieces, words
from mori.data.corpus import SHIPPED, TokenFile, read_documents
from mori.data.pieces import PieceEncoder
from mori.data.words import CannotCut
from mori.model.loading import train_tokenizer

LEARNED_FROM = (
    sorted(SHIPPED.glob("*.txt"))[0].read_text(encoding="utf-8")[:6000] + " 今日は、世界 。\n안녕 สวัสดี é 12 345 " * 9
)
# The patterns of Llama 3 and of GPT-4o, as their tokenizer.json says them.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def made(model, pre_tokenizer=None, normalizer=None, added=()):
    """A tokenizer learned from `LEARNED_FROM`."""
    kinds = {
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
        "bpe fused": (models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
    }
    model, trainer = kinds[model]
    backend = Tokenizer(model)
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    options = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {"min_frequency": 2}
    texts = LEARNED_FROM.splitlines(keepends=True) if pre_tokenizer is None else [LEARNED_FROM]
    backend.train_from_iterator(
        texts, trainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, **options)
    )
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def split(pattern):
    """A pattern of one's own, then bytes, as Llama 3 has it."""
    regex = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([regex, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def metaspace(**options):
    return pre_tokenizers.Metaspace(**options)


ADDED = [
    AddedToken("<mask>", lstrip=True),
    AddedToken("halo", single_word=True),
    AddedToken("<|x|>", rstrip=True),
    AddedToken("  ", normalized=True),
    AddedToken("Ab", normalized=True),
]
LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SURE, SHARED, NOT_AT_SPACES, WHOLE = "by words", "by pieces", "by pieces, but not at spaces", "whole"
KINDS = {
    "byte level": (lambda: train_tokenizer([LEARNED_FROM], 500), SURE),
    "byte level with a prefix": (lambda: made("bpe", pre_tokenizers.ByteLevel(add_prefix_space=True)), SURE),
    "byte level, NFC": (lambda: made("bpe", pre_tokenizers.ByteLevel(), normalizers.NFC()), SURE),
    "byte level, added": (lambda: made("bpe", pre_tokenizers.ByteLevel(), None, ADDED), SURE),
    "Llama 3": (lambda: made("bpe", split(LLAMA_3)), SURE),
    "GPT-4o": (lambda: made("bpe", split(GPT_4O), normalizers.NFKC()), SURE),
    "WordPiece": (lambda: made("wordpiece", pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()), SURE),
    "WordPiece, added": (lambda: made("wordpiece", pre_tokenizers.Whitespace(), normalizers.Lowercase(), ADDED), SURE),
    "Unigram": (lambda: made("unigram", metaspace(), normalizers.NFKC()), SURE),
    "Unigram, Replace": (lambda: made("unigram", metaspace(), normalizers.Replace(Regex(" {2,}"), " ")), SURE),
    "Metaspace, first": (lambda: made("bpe", metaspace(prepend_scheme="first"), normalizers.StripAccents()), SURE),
    "Metaspace, added": (lambda: made("bpe", metaspace(prepend_scheme="first"), None, ADDED), SURE),
    "Llama 2": (lambda: made("bpe", None, LLAMA_2), SHARED),
    "Llama 2, fused": (lambda: made("bpe fused", None, LLAMA_2, ADDED), SHARED),
    "one pre-token": (lambda: made("bpe", metaspace(split=False)), SHARED),
    "no pre-tokenizer": (lambda: made("bpe"), SHARED),
    "digits": (lambda: made("bpe", pre_tokenizers.Digits(individual_digits=True)), SHARED),
    "Unigram, whole": (lambda: made("unigram", None, LLAMA_2), WHOLE),
    "a pattern that looks behind": (lambda: made("bpe", split(r"(?<=a) |[^ ]+| +")), WHOLE),
    "a pattern of two words": (lambda: made("bpe", split(r"\p{L}+ \p{L}+|\p{L}+|[^\p{L}]+")), NOT_AT_SPACES),
    "a token of two words": (lambda: made("bpe", pre_tokenizers.ByteLevel(), None, ["dunia apa"]), NOT_AT_SPACES),
    "a token that takes the space": (lambda: made("bpe", metaspace(), None, [AddedToken("apa", rstrip=True)]), WHOLE),
    "a replacement across words": (lambda: made("bpe", metaspace(), normalizers.Replace("a b", "ab")), NOT_AT_SPACES),
}
WORDS = [
    *"halo dunia apa kabar Ab AB a b I'm you'll DON'T x1 1234567 12 3.14 é e\u0301 o\u0308\u0323 İstanbul ﬁn ß ſ ½ Ⅷ ª".split(),
    *"👩‍👩‍👧 🌧️ 🇮🇩 今日は、世界。你好，中文 안녕하세요 สวัสดีครับ नमस्ते مرحبا ﷺ ﱞ Ω ᢅ <mask> <|x|> <unk> ▁ Ġ".split(),
    "w" * 300, "。", "、", "", "", "\n", "\n\n", "\t", "\u00a0", "\u200d", "\u0301", "-", "...", "'", "\u3000", "dunia apa", "a b",
]  # fmt: skip
PLAIN = LEARNED_FROM.split()


def some_text(rng: random.Random) -> str:
    """A mix of what is easy and what is odd; now and then with no spaces at all."""
    words = WORDS if rng.random() < 0.3 else WORDS + PLAIN
    text = "".join(
        rng.choice(words) + rng.choice((" ", " ", " ", "", "  ", "\n", "   ", ", ", "。"))
        for _ in range(rng.randrange(200))
    )
    return text.replace(" ", "") if rng.random() < 0.1 else text


def in_chunks(text: str, rng: random.Random):
    at = 0
    while at < len(text):
        size = rng.randrange(1, 90)
        yield text[at : at + size]
        at += size


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 40)
    monkeypatch.setattr(pieces, "OVERLAP", 12)
    monkeypatch.setattr(pieces, "BATCH", 3)
    monkeypatch.setattr(pieces, "CUT_FROM", 120)
    monkeypatch.setattr(words, "KNOWN", 200)
    monkeypatch.setattr(words, "_cores", lambda: 1)


def check(encoder: PieceEncoder, tokenizer, text: str, rng: random.Random) -> int:
    """The ids in pieces are those of one call, and begin where they are said to; returns the number of pieces."""
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    try:
        found = list(encoder.encode(in_chunks(text, rng)))
    except CannotCut:
        return 0
    assert numpy.concatenate([ids for ids, _ in found]).tolist() == whole.ids
    at = 0
    for ids, place in found:
        if 0 < at < len(whole.ids):
            assert whole.offsets[at - 1][1] == place <= whole.offsets[at][0]
        at += len(ids)
    return len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_in_pieces_are_those_of_one_call(kind, small_pieces):
    make, way = KINDS[kind]
    tokenizer = make()
    encoder = PieceEncoder(tokenizer)
    cutter = encoder._cutter
    at_spaces = SURE if cutter.word else SHARED if " " in cutter.separators else NOT_AT_SPACES
    assert way in (at_spaces, WHOLE)
    rng, counts = random.Random(kind), []
    for _ in range(150):
        counts.append(check(encoder, tokenizer, some_text(rng), rng))
    assert max(counts) == 1 if way == WHOLE else max(counts) > 5
    # Only where a border of tokens may lie inside a pre-token are there texts that cannot be cut.
    assert way != SURE or 0 not in counts


@needs_stories
def test_a_sentencepiece_tokenizer_in_pieces(small_pieces):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(STORIES / "tokenizer.json"))
    encoder, rng = PieceEncoder(tokenizer), random.Random(0)
    assert max(check(encoder, tokenizer, some_text(rng), rng) for _ in range(150)) > 5


def test_a_text_that_cannot_be_cut_is_refused_where_memory_does_not_take_it(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("kata dan kata " * 30_000, encoding="utf-8")
    documents, tokenizer = read_documents([tmp_path / "text.txt"]), made("unigram")
    monkeypatch.setattr(pieces, "memory_bytes", lambda: 64 * 400_000)
    with pytest.raises(UserError, match="cut the corpus into several files"):
        TokenFile.make(documents, tokenizer, tmp_path)
    assert not list(tmp_path.glob("tokens-*"))
    monkeypatch.setattr(pieces, "memory_bytes", lambda: 64 * 430_000)
    assert len(TokenFile.make(documents, tokenizer, tmp_path)) == len(pieces.encode(tokenizer, documents[0].text))


# ------------------------------------------------------------------------------------------------------- in processes


@pytest.fixture
def two_processes(small_pieces, monkeypatch):
    monkeypatch.setattr(words, "_cores", lambda: 2)
    monkeypatch.setattr(words, "_ALONE", 2)


@pytest.mark.parametrize("kind", ["byte level, added", "WordPiece", "Unigram"])
def test_ids_from_processes_are_those_of_one_call(kind, two_processes, capfd):
    tokenizer = KINDS[kind][0]()
    encoder, rng = PieceEncoder(tokenizer), random.Random(kind)
    for _ in range(3):
        text = " ".join(rng.choice(PLAIN) + some_text(rng) for _ in range(20))
        assert check(encoder, tokenizer, text, rng) > 3 * pieces.BATCH * 2
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""  # nor has the library warned of a fork


def test_what_fails_in_a_process_fails_here(two_processes, monkeypatch):
    tokenizer = KINDS["byte level"][0]()
    text = "kata dan kata " * 500
    here = os.getpid()

    def fail(*_):
        raise CannotCut

    real = words.WordEncoder.encode
    monkeypatch.setattr(words.WordEncoder, "encode", lambda *a: real(*a) if os.getpid() == here else fail())
    with pytest.raises(CannotCut):
        list(PieceEncoder(tokenizer).encode([text]))
    monkeypatch.setattr(
        words.WordEncoder, "encode", lambda *a: real(*a) if os.getpid() == here else os.kill(os.getpid(), 9)
    )
    with pytest.raises(RunFailed, match="TOKENIZERS_PARALLELISM=false"):
        list(PieceEncoder(tokenizer).encode([text]))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("value, expected", [("false", 1), ("0", 1), ("true", None), (None, None)])
def test_the_switch_of_the_library_leaves_one_process(value, expected, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if value:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    assert words._cores() == (expected or min(8, len(os.sched_getaffinity(0))))


def test_processes_die_with_a_parent_that_is_killed(tmp_path):
    """The parent is killed while it waits for its processes, which are then asleep, waiting for work."""
    program = """
import os, sys, time
from mori.data import words
from mori.data.pieces import PieceEncoder
from mori.model.loading import train_tokenizer
words._cores = lambda: 2
text = "kata dan kata lain " * 400_000
def chunks():
    for at in range(0, len(text), 1 << 18):
        yield text[at : at + (1 << 18)]
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
list(PieceEncoder(train_tokenizer([text[:1000]], 300)).encode(chunks()))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
