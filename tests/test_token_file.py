"""The token file: its ids, its reuse, damaged files, and the text bytes after a token."""

import hashlib
import json
import os
import tracemalloc

import numpy
import pytest

from mori.cli import UserError
from mori.data import formats, token_file, tokenize
from mori.data.corpus import corpus_hash, read_documents
from mori.data.token_file import TokenFile, text_bytes_from
from mori.data.tokenize import TextEncoder
from mori.data.words import CannotCut
from mori.model.loading import train_tokenizer

TEXT = "halo dunia, apa kabar? héllo 🌧 hujan\r\nturun 今日は\r lagi \r\n" * 30


def write(path, content):
    path.write_bytes(content.encode())
    return path


class SlowTokenizer:
    """A tokenizer without a fast backend; each word becomes the same id."""

    eos_token_id = bos_token_id = unk_token_id = unk_token = None
    added_tokens_decoder, all_special_ids = {}, ()

    def __init__(self, *word_ids):
        self.word_ids = list(word_ids)

    def get_vocab(self):
        return {str(word_id): word_id for word_id in self.word_ids}

    def __call__(self, text, **_):
        return {"input_ids": self.word_ids * len(text.split())}

    def convert_ids_to_tokens(self, token):
        return str(token)

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.fixture
def documents(tmp_path):
    return read_documents([write(tmp_path / "a", "halo dunia " * 50)])


@pytest.fixture
def small_parts(monkeypatch):
    """Texts are read, cut and marked in parts of a few characters."""
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", 7)
    monkeypatch.setattr(token_file, "_MARK_CHARACTERS", 100)
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(tokenize, "PIECES_PER_PART", 3)
    monkeypatch.setattr(tokenize, "LONG_CHARACTERS", 120)
    monkeypatch.setattr(token_file, "LONG_CHARACTERS", 120)


def test_token_file_holds_every_token_and_the_end_of_each_document(tmp_path, tokenizer):
    documents = read_documents([write(tmp_path / "a", "halo dunia " * 50), write(tmp_path / "b", "apa kabar?")])
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    expected = []
    for document in documents:
        expected += tokenizer(document.text)["input_ids"] + [tokenizer.eos_token_id]
    assert tokens.ids.tolist() == expected
    assert tokens.ids.dtype == numpy.uint16 and not tokens.ids.flags.writeable
    assert tokens.header["first_tokens"] == [0, len(tokenizer(documents[0].text)["input_ids"]) + 1]
    assert tokenizer.decode(tokens.ids.tolist()).split(tokenizer.eos_token) == [d.text for d in documents] + [""]


def test_token_file_is_reused_only_for_the_same_corpus_and_tokenizer(tmp_path, tokenizer, documents):
    first = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    written = first.path.stat().st_mtime_ns
    assert TokenFile.make(documents, tokenizer, tmp_path / "cache").path.stat().st_mtime_ns == written
    changed = read_documents([write(tmp_path / "a", "halo dunia! " * 50)])
    assert TokenFile.make(changed, tokenizer, tmp_path / "cache").path != first.path
    retrained = train_tokenizer(["lain sekali " * 9], 300)
    TokenFile.make(changed, retrained, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def rewrite(path, *, seal=True, length=None, text=None, text_account=None, **changed):
    """Change a token file's header, `text_account` its field `text`; with `seal`, give it a hash that fits."""
    changed |= {} if text_account is None else {"text": text_account}
    raw = path.read_bytes()
    old_length = int.from_bytes(raw[8:16], "little")
    header = {**json.loads(raw[16 : 16 + old_length]), **changed}
    ids = raw[token_file.data_start(old_length) :]
    if seal:
        header["sha256"] = token_file.header_hash({k: v for k, v in header.items() if k != "sha256"}, [ids])
    text = json.dumps(header).encode() if text is None else text
    head = raw[:8] + (len(text) if length is None else length).to_bytes(8, "little") + text
    path.write_bytes(head.ljust(token_file.data_start(len(text)), b"\0") + ids)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "magic": lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
    "another valid token": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\1\0"),
    "another first token": lambda path: rewrite(path, seal=False, first_tokens=[1]),
    "another largest id": lambda path: rewrite(path, seal=False, max_id=1),
    "header of an exabyte": lambda path: rewrite(path, length=1 << 60),
    "header of a terabyte in a sparse file": lambda path: (rewrite(path, length=1 << 39), os.truncate(path, 1 << 40)),
    "header is no JSON": lambda path: rewrite(path, text=b"{"),
    "header is no object": lambda path: rewrite(path, text=b"[1]"),
    "header is nested deeply": lambda path: rewrite(path, text=b"[" * 100_000),
    "negative count": lambda path: rewrite(path, count=-1),
    "huge count": lambda path: rewrite(path, count=10**30),
    "count is a string": lambda path: rewrite(path, count="1"),
    "objects": lambda path: rewrite(path, dtype="object"),
    "no type": lambda path: rewrite(path, dtype=None),
    "a list of types": lambda path: rewrite(path, dtype=["uint16"]),
    "another corpus": lambda path: rewrite(path, corpus_sha256="0" * 64),
    "no account of the text": lambda path: rewrite(path, text_account={}),
    "another account of the text": lambda path: rewrite(path, text_account=dict.fromkeys(token_file._ACCOUNT, 0)),
    "another version": lambda path: rewrite(path, version="1"),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_token_file_replaces_a_damaged_one(tmp_path, tokenizer, documents, damage):
    first = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    ids, header = first.ids.tolist(), first.header
    DAMAGES[damage](first.path)
    second = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    assert second.ids.tolist() == ids and second.header == header


def test_token_file_refuses_a_tokenizer_without_tokens(tmp_path, documents):
    with pytest.raises(UserError, match="gives no token"):
        TokenFile.make(documents, SlowTokenizer(), tmp_path)


def test_token_file_has_wide_ids_for_a_large_vocabulary(tmp_path):
    documents = read_documents([write(tmp_path / "a", "a b c")])
    tokens = TokenFile.make(documents, SlowTokenizer(69_999), tmp_path)
    assert tokens.ids.tolist() == [69_999] * 3 and tokens.ids.dtype == numpy.uint32


def test_token_file_refuses_an_id_outside_the_vocabulary(tmp_path, documents):
    tokenizer = SlowTokenizer(1)
    tokenizer.get_vocab = lambda: {"1": 1}
    tokenizer.word_ids = [70_000]
    with pytest.raises(UserError, match="token id 70000, which is not in its own vocabulary"):
        TokenFile.make(documents, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("token", [1 << 31, (1 << 32) - 1, 1 << 32])
def test_token_file_counts_special_tokens_of_any_size(tmp_path, documents, monkeypatch, token):
    """Whether the text has the largest possible id or not; no table of that size is made."""
    monkeypatch.setattr(token_file, "special_ids", lambda tokenizer: {token})
    tracemalloc.start()
    tokens = TokenFile.make(documents, SlowTokenizer(min(token, (1 << 32) - 1)), tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(tokens.header["text"]["special_tokens"].values()) == (len(tokens) if token < 1 << 32 else 0)
    assert peak < 1 << 26


def test_token_file_refuses_an_end_of_text_outside_the_vocabulary(tmp_path, documents):
    tokenizer = SlowTokenizer(1)
    tokenizer.get_vocab = lambda: {"1": 1}
    tokenizer.eos_token_id = 1 << 32
    with pytest.raises(UserError, match="token id 4294967296, which is not in its own vocabulary"):
        TokenFile.make(documents, tokenizer, tmp_path / "cache")


def test_token_file_reports_a_corpus_that_changes_while_it_is_read(tmp_path, tokenizer, documents, monkeypatch):
    def hash_then_change(documents):
        digest = corpus_hash(documents)
        write(tmp_path / "a", "halo dunia?" * 50)
        return digest

    monkeypatch.setattr(token_file, "corpus_hash", hash_then_change)
    with pytest.raises(UserError, match="has changed while it was read"):
        TokenFile.make(documents, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_token_file_hashes_a_corpus_as_corpus_hash_does(tmp_path, tokenizer, small_parts):
    documents = read_documents([write(tmp_path / "a", TEXT), write(tmp_path / "b", "apa kabar?")])
    texts = [document.text.encode() for document in documents]
    expected = hashlib.sha256(b"".join(len(text).to_bytes(8, "little") + text for text in texts)).hexdigest()
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    assert corpus_hash(documents) == expected == tokens.header["corpus_sha256"]


# -------------------------------------------------------------------------------------------------------- text_bytes_from


def test_text_bytes_from_counts_the_bytes_after_a_token(tmp_path, tokenizer):
    texts = ["halo dunia, apa kabar?", "héllo 🌧 hujan"]
    documents = read_documents([write(tmp_path / str(n), text) for n, text in enumerate(texts)])
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    end = len(tokenizer(texts[0])["input_ids"])
    last = len(texts[1].encode())
    assert text_bytes_from(0, tokens, documents, tokenizer) == len(texts[0]) + last
    assert text_bytes_from(end, tokens, documents, tokenizer) == last
    assert text_bytes_from(end + 1, tokens, documents, tokenizer) == last
    tail = tokenizer.decode(tokens.ids[3:end].tolist())
    assert text_bytes_from(3, tokens, documents, tokenizer) == len(tail) + last


def test_text_bytes_from_ignores_truncation(tmp_path, documents, tokenizer):
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tail = tokenizer.decode(tokens.ids[100:-1].tolist())
    assert text_bytes_from(100, tokens, documents, tokenizer) == len(tail)


def test_token_file_of_long_texts_has_the_ids_and_bytes_of_one_call(tmp_path, tokenizer, small_parts):
    documents = read_documents([write(tmp_path / str(n), TEXT) for n in range(2)])
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    text = documents[0].text
    expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert tokens.ids.tolist() == 2 * [*expected.ids, tokenizer.eos_token_id]
    marks = tokens.header["marks"]
    assert len(marks) > 10
    assert all(expected.offsets[token % (len(expected) + 1)][0] == character for token, character in marks)
    size = len(text.encode())
    for n, (character, _) in list(enumerate([*expected.offsets, (len(text), None)]))[::-37]:
        after = len(text[character:].encode())
        assert text_bytes_from(n, tokens, documents, tokenizer) == after + size
        assert text_bytes_from(n + len(expected) + 1, tokens, documents, tokenizer) == after
    assert text_bytes_from(len(tokens), tokens, documents, tokenizer) == 0


def test_token_file_falls_back_to_one_call_if_the_ids_contradict_the_cuts(
    tmp_path, tokenizer, small_parts, monkeypatch
):
    documents = read_documents([write(tmp_path / str(n), TEXT) for n in range(2)])
    expected = TokenFile.make(documents, tokenizer, tmp_path / "a")
    real = TextEncoder.encode

    def contradict(self, chunks):
        for n, piece in enumerate(real(self, chunks)):
            if n == 8:
                raise CannotCut
            yield piece

    monkeypatch.setattr(TextEncoder, "encode", contradict)
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "b")
    assert tokens.ids.tolist() == expected.ids.tolist() and tokens.header["marks"] == []
    assert text_bytes_from(9, tokens, documents, tokenizer) == text_bytes_from(9, expected, documents, tokenizer)
