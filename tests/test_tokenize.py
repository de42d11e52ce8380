"""A text tokenized in parts has the ids of one call, for every tokenizer and text; or it is not cut."""

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
from conftest import ROOT, STORIES, needs_stories
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mori.cli import RunFailed, UserError
from mori.data import cuts, tokenize, words
from mori.data.corpus import read_corpus
from mori.data.files import SHIPPED
from mori.data.token_writer import make_token_file
from mori.data.tokenize import TextEncoder, encode
from mori.data.words import CannotCut
from mori.model import special_tokens
from mori.model.loading import train_tokenizer

TRAINING_TEXT = (
    sorted(SHIPPED.glob("*.txt"))[0].read_text(encoding="utf-8")[:6000] + " 今日は、世界 。\n안녕 สวัสดี é 12 345 " * 9
)
# Patterns as in the models' tokenizer.json.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_3_5 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT_4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n]*"
    r"|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
)


def trained(model, pre_tokenizer=None, normalizer=None, added=()):
    """A tokenizer trained on TRAINING_TEXT."""
    model, trainer = {
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
        "bpe fused": (models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
    }[model]
    backend = Tokenizer(model)
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    options = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {"min_frequency": 2}
    texts = TRAINING_TEXT.splitlines(keepends=True) if pre_tokenizer is None else [TRAINING_TEXT]
    backend.train_from_iterator(
        texts, trainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, **options)
    )
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece(model, normalizer=None, pre_tokenizer=None, added=()):
    """A BPE trained on words that begin with ▁, as by SentencePiece, then used without splitting into words."""
    tokenizer = trained(model, metaspace())
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.add_tokens(list(added))
    return tokenizer


def split(*patterns):
    """Patterns, then bytes, as in Llama 3."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


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
GEMMA = (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))
AT_SPACES, NOT_AT_SPACES, WHOLE = "at spaces", "not at spaces", "whole"
TOKENIZERS = {
    "byte level": (lambda: train_tokenizer([TRAINING_TEXT], 500), AT_SPACES),
    "byte level with a prefix": (lambda: trained("bpe", pre_tokenizers.ByteLevel(add_prefix_space=True)), AT_SPACES),
    "byte level, NFC": (lambda: trained("bpe", pre_tokenizers.ByteLevel(), normalizers.NFC()), AT_SPACES),
    "byte level, added": (lambda: trained("bpe", pre_tokenizers.ByteLevel(), None, ADDED), AT_SPACES),
    "Llama 3": (lambda: trained("bpe", split(LLAMA_3)), AT_SPACES),
    "Qwen 3.5": (lambda: trained("bpe", split(QWEN_3_5), normalizers.NFC()), AT_SPACES),
    "GPT-4o": (lambda: trained("bpe", split(GPT_4O), normalizers.NFKC()), AT_SPACES),
    "Mistral": (lambda: trained("bpe", split(TEKKEN), None, ADDED), AT_SPACES),
    "DeepSeek": (lambda: trained("bpe", split(*DEEPSEEK)), AT_SPACES),
    "BLOOM": (lambda: trained("bpe", split(BLOOM)), AT_SPACES),
    "WordPiece": (
        lambda: trained("wordpiece", pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
        AT_SPACES,
    ),
    "WordPiece, added": (
        lambda: trained("wordpiece", pre_tokenizers.Whitespace(), normalizers.Lowercase(), ADDED),
        AT_SPACES,
    ),
    "Unigram": (lambda: trained("unigram", metaspace(), normalizers.NFKC()), AT_SPACES),
    "Unigram, Replace": (lambda: trained("unigram", metaspace(), normalizers.Replace(Regex(" {2,}"), " ")), AT_SPACES),
    "Metaspace, first": (
        lambda: trained("bpe", metaspace(prepend_scheme="first"), normalizers.StripAccents()),
        AT_SPACES,
    ),
    "Metaspace, added": (lambda: trained("bpe", metaspace(prepend_scheme="first"), None, ADDED), AT_SPACES),
    "Llama 2": (lambda: sentencepiece("bpe", LLAMA_2), AT_SPACES),
    "Llama 2, fused": (lambda: sentencepiece("bpe fused", LLAMA_2, None, ADDED), AT_SPACES),
    "Llama 2 in one pre-token": (lambda: sentencepiece("bpe", None, metaspace(split=False)), AT_SPACES),
    "Gemma": (lambda: sentencepiece("bpe fused", *GEMMA), AT_SPACES),
    "tokens of two words": (lambda: trained("bpe", None, LLAMA_2), WHOLE),
    "tokens of two words in one pre-token": (lambda: trained("bpe", metaspace(split=False)), WHOLE),
    "Unigram, one pre-token": (lambda: trained("unigram", None, LLAMA_2), WHOLE),
    "a pattern that looks behind": (lambda: trained("bpe", split(r"(?<=a) |[^ ]+| +")), WHOLE),
    "a pattern of two words": (lambda: trained("bpe", split(r"\p{L}+ \p{L}+|\p{L}+|[^\p{L}]+")), WHOLE),
    "a pattern without words": (lambda: trained("bpe", split(r"\p{N}{1,3}")), WHOLE),
    "an added token of two words": (
        lambda: trained("bpe", pre_tokenizers.ByteLevel(add_prefix_space=False), None, ["dunia apa"]),
        NOT_AT_SPACES,
    ),
    "an added token that takes the space": (
        lambda: trained("bpe", metaspace(), None, [AddedToken("apa", rstrip=True)]),
        WHOLE,
    ),
    "an added token that is not normalized": (
        lambda: sentencepiece("bpe", LLAMA_2, None, [AddedToken("halo", normalized=False)]),
        WHOLE,
    ),
    "an added token before stripped blanks": (
        lambda: trained("bpe", pre_tokenizers.ByteLevel(), normalizers.Strip(), [AddedToken("halo", normalized=False)]),
        WHOLE,
    ),
    "a replacement across words": (lambda: trained("bpe", metaspace(), normalizers.Replace("a b", "ab")), WHOLE),
}
WORDS = [
    *"halo dunia apa kabar Ab AB a b I'm you'll DON'T x1 1234567 12 3.14 é e\u0301 o\u0308\u0323 İstanbul ﬁn ß ſ ½ Ⅷ ª".split(),
    *"👩‍👩‍👧 🌧️ 🇮🇩 今日は、世界。你好，中文 안녕하세요 สวัสดีครับ नमस्ते مرحبا ﷺ ﱞ Ω ᢅ <mask> <|x|> <unk> ▁ Ġ".split(),
    "w" * 300, "。", "、", "", "", "\n", "\n\n", "\t", "\u00a0", "\u200d", "\u0301", "-", "...", "'", "\u3000", "dunia apa", "a b",
]  # fmt: skip
PLAIN_WORDS = TRAINING_TEXT.split()


def random_text(rng: random.Random) -> str:
    """Ordinary and odd words, separators and blanks; a tenth of the texts has no spaces."""
    choices = WORDS if rng.random() < 0.3 else WORDS + PLAIN_WORDS
    text = "".join(
        rng.choice(choices) + rng.choice((" ", " ", " ", "", "  ", "\n", "   ", ", ", "。"))
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
def small_parts(monkeypatch):
    """Documents are cut into pieces of 40 characters, of which three make a part."""
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(tokenize, "LONG_CHARACTERS", 120)
    monkeypatch.setattr(words, "CACHE_CHARACTERS", 200)
    monkeypatch.setattr(words, "_n_processes", lambda: 1)


def assert_ids_of_one_call(encoder: TextEncoder, tokenizer, texts: list[str], rng: random.Random) -> int:
    """Compare ids and the first character of each piece with those of one call; returns the number of pieces."""
    pieces = [piece for text in texts for piece in encoder.pieces(in_chunks(text, rng))]
    encoded = list(zip(pieces, encoder.encode(iter(pieces)), strict=True))
    for text in texts:
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        token = 0
        while True:
            piece, ids = encoded.pop(0)
            assert ids.tolist() == expected.ids[token : token + len(ids)]
            if 0 < token < len(expected.ids):
                assert expected.offsets[token - 1][1] == piece.start <= expected.offsets[token][0]
            token += len(ids)
            if piece.is_last:
                break
        assert token == len(expected.ids)
    return len(pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_encoder_gives_the_ids_of_one_call(name, small_parts):
    create, expected = TOKENIZERS[name]
    tokenizer = create()
    encoder, rng = TextEncoder(tokenizer), random.Random(name)
    separators = encoder.cutter.separators if encoder.cutter else {}
    assert (AT_SPACES if " " in separators else NOT_AT_SPACES if separators else WHOLE) == expected
    counts = [assert_ids_of_one_call(encoder, tokenizer, [random_text(rng)], rng) for _ in range(150)]
    assert max(counts) == 1 if expected == WHOLE else max(counts) > 5


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_encoder_gives_each_of_many_documents_the_ids_of_one_call(name, small_parts):
    """Short documents share a part; their first and last words have no neighbours."""
    tokenizer = TOKENIZERS[name][0]()
    encoder, rng = TextEncoder(tokenizer), random.Random(name)
    for _ in range(10):
        texts = [
            rng.choice((random_text(rng), rng.choice(WORDS), " ".join(rng.choices(PLAIN_WORDS, k=3))))
            for _ in range(20)
        ]
        assert_ids_of_one_call(encoder, tokenizer, [text for text in texts if text], rng)


@needs_stories
def test_text_encoder_gives_the_ids_of_one_call_of_a_pretrained_tokenizer(small_parts):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(STORIES / "tokenizer.json"))
    encoder, rng = TextEncoder(tokenizer), random.Random(0)
    assert max(assert_ids_of_one_call(encoder, tokenizer, [random_text(rng)], rng) for _ in range(150)) > 5


@pytest.mark.parametrize("name", ["byte level", "Llama 3", "Llama 2, fused", "Gemma"])
def test_text_encoder_keeps_special_tokens_as_text_as_one_call_does(name, small_parts):
    tokenizer, rng = TOKENIZERS[name][0](), random.Random(name)
    names = ["<s>", "</s>", "<|im_end|>", "[SEP]"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": names[1:]})
    special_tokens.decide(tokenizer, parse=False)
    encoder, counts = TextEncoder(tokenizer), []
    for _ in range(40):
        parts = random_text(rng).split("a")
        text = "".join(part + rng.choice(names) + rng.choice(("", " ")) for part in parts)
        counts.append(assert_ids_of_one_call(encoder, tokenizer, [text], rng))
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert numpy.concatenate(list(encoder.encode(encoder.pieces([text])))).tolist() == expected
        assert not set(tokenizer.convert_tokens_to_ids(names)) & set(expected)
    assert max(counts) > 1


def test_known_alternatives_match_nothing_across_a_cut_point():
    """No match holds a letter and the separator after it; a match of a word alternative ends after every letter."""
    letters = "".join(filter(str.isalpha, map(chr, range(0x180)))) + "今日はカ안สनمΩж"
    alternatives = dict.fromkeys(cuts.WORD_ALTERNATIVES, True) | dict.fromkeys(cuts.OTHER_ALTERNATIVES, False)
    for (alternative, is_word), separator in itertools.product(alternatives.items(), " \n、。，"):
        matches = pre_tokenizers.Split(Regex(alternative), "removed", invert=True)
        text = "".join(f"{before}{letter}{separator}" for letter in letters for before in ("a", "1", ",", "'"))
        spans = [span for _, span in matches.pre_tokenize_str(text + "a")]
        cut_points = set(range(2, len(text), 3))
        assert not any(
            cut in range(begin + 1, end) for begin, end in spans for cut in cut_points & {*range(begin, end)}
        )
        assert not is_word or cut_points <= {end for _, end in spans}, (alternative, separator)


def test_encode_truncates_nothing(tokenizer):
    limited = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=8, eos_token="<|endoftext|>"
    )
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=4000)
    text = "halo semua apa kabar " * 40
    ids = encode(limited, text)
    assert len(ids) > 100 and tokenizer.decode(ids) == text


def test_encode_reports_a_failing_tokenizer_in_one_line():
    no_unknown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"halo": 0}, unk_token="none")))
    # The search takes longer than the library allows, and ends in a panic, which is no Exception.
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"halo": 0}, unk_token="halo")))
    endless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    for tokenizer, text in ((no_unknown, "apa"), (endless, "a" * 5000 + "b")):
        with pytest.raises(UserError, match="cannot tokenize the corpus: .*(UNK|Regex)"):
            encode(tokenizer, text)


def test_text_encoder_refuses_a_text_without_cut_points_that_exceeds_memory(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("kata dan kata " * 40_000, encoding="utf-8")  # 560,000 characters
    corpus, tokenizer = read_corpus([tmp_path / "text.txt"]), trained("unigram")
    monkeypatch.setattr(tokenize, "memory_bytes", lambda: 64 * 550_000)
    with pytest.raises(UserError, match="cut the corpus into several files"):
        make_token_file(corpus, tokenizer, tmp_path)
    assert not list(tmp_path.glob("tokens-*"))
    monkeypatch.setattr(tokenize, "memory_bytes", lambda: 64 * 570_000)
    assert len(make_token_file(corpus, tokenizer, tmp_path)) == len(encode(tokenizer, next(corpus.texts())))


# ------------------------------------------------------------------------------------------------ the pool of processes


@pytest.fixture
def two_processes(small_parts, monkeypatch):
    monkeypatch.setattr(words, "_n_processes", lambda: 2)
    monkeypatch.setattr(words, "_PARTS_BEFORE_POOL", 2)


@pytest.mark.parametrize("name", ["byte level, added", "WordPiece", "Unigram", "Llama 2"])
def test_word_encoder_gives_the_ids_of_one_call_from_processes(name, two_processes, capfd):
    tokenizer = TOKENIZERS[name][0]()
    encoder, rng = TextEncoder(tokenizer), random.Random(name)
    for _ in range(3):
        text = " ".join(rng.choice(PLAIN_WORDS) + random_text(rng) for _ in range(20))
        assert assert_ids_of_one_call(encoder, tokenizer, [text], rng) > 3 * 3 * 2
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""  # the library warns of a fork if it is not told


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system"), ImportError("no sem_open"), NotImplementedError()]
)
def test_word_encoder_needs_no_processes(two_processes, monkeypatch, capfd, error):
    """A read-only or missing /dev/shm has no room for their semaphores."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(words, "ProcessPoolExecutor", refuse)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokenizer, rng = TOKENIZERS["byte level, added"][0](), random.Random(0)
    text = " ".join(rng.choice(PLAIN_WORDS) + random_text(rng) for _ in range(20))
    assert_ids_of_one_call(TextEncoder(tokenizer), tokenizer, [text], rng)
    assert capfd.readouterr().err.count("one core tokenizes") == 1


def test_word_encoder_raises_what_its_processes_raise(two_processes, monkeypatch):
    tokenizer, text, parent = TOKENIZERS["byte level"][0](), "kata dan kata " * 500, os.getpid()
    real, encoder = words.WordEncoder.encode, TextEncoder(tokenizer)

    def refuse(*_):
        raise CannotCut

    def fail_in_a_process(failure):
        monkeypatch.setattr(
            words.WordEncoder, "encode", lambda *arguments: (real if os.getpid() == parent else failure)(*arguments)
        )

    fail_in_a_process(refuse)
    with pytest.raises(CannotCut):
        list(encoder.encode(encoder.pieces([text])))
    fail_in_a_process(lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(RunFailed, match="TOKENIZERS_PARALLELISM=false"):
        list(encoder.encode(encoder.pieces([text])))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("value, expected", [("false", 1), ("0", 1), ("true", None), (None, None)])
def test_word_encoder_obeys_the_library_s_environment_variable(value, expected, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if value:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    assert words._n_processes() == (expected or min(8, len(os.sched_getaffinity(0))))


def test_word_encoder_processes_exit_with_a_killed_parent():
    """The parent is killed while its processes sleep, waiting for work."""
    program = """
import multiprocessing, time
from mori.data import words
from mori.data.tokenize import TextEncoder
from mori.model.loading import train_tokenizer
words._n_processes = lambda: 2
text = "kata dan kata lain " * 400_000
def chunks():
    for at in range(0, len(text), 1 << 18):
        yield text[at : at + (1 << 18)]
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
encoder = TextEncoder(train_tokenizer([text[:1000]], 300))
list(encoder.encode(encoder.pieces(chunks())))
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


def test_train_tokenizer_learns_as_the_library_does():
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TRAINING_TEXT], trainer)
    ours = train_tokenizer([TRAINING_TEXT], 600).backend_tokenizer
    assert ours.get_vocab() == library.get_vocab()
    assert ours.encode(TRAINING_TEXT).ids == library.encode(TRAINING_TEXT).ids


def test_train_tokenizer_cuts_an_endless_word():
    """The time to learn grows with the square of a word's length; in parts, no token is learned across their borders."""
    endless = ("c" + "a" * 4094 + "b") * 5
    learned = train_tokenizer([endless], 300)
    assert "aaaa" in learned.get_vocab() and not any("bc" in token for token in learned.get_vocab())
    assert learned.decode(learned(endless)["input_ids"]) == endless


def test_encode_waits_in_a_thread_so_that_ctrl_c_ends_it():
    threads = []

    class Slow:
        """A tokenizer without a backend of the library."""

        def __call__(self, text, **_):
            threads.append(threading.current_thread())
            return {"input_ids": [1]}

    assert encode(Slow(), "a") == [1] and threads != [threading.main_thread()]
