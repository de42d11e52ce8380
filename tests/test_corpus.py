import hashlib
import json
import os

import numpy
import pytest
from conftest import REAL_CORPUS, needs_corpus
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from mori.cli import UserError
from mori.data import corpus, pieces
from mori.data.corpus import SHIPPED, TokenFile, encode, find_files, read_documents, text_bytes_from
from mori.model.loading import train_tokenizer


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_files_come_in_a_fixed_order_and_none_twice(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.TXT", ".hidden/d.txt", "e.md"):
        write(tmp_path / name, "x")
    in_folder = [str(p.relative_to(tmp_path)) for p in find_files([str(tmp_path)])]
    assert in_folder == ["a.txt", "b.txt", "sub/c.TXT"]
    mixed = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(tmp_path / "e.md")])
    assert [p.name for p in mixed] == ["b.txt", "a.txt", "e.md"]
    assert [p.name for p in find_files([str(tmp_path / "**/c.TXT")])] == ["c.TXT"]
    assert len(find_files([])) >= 10


def test_shipped_transcripts_are_enough_and_all_different():
    documents = read_documents(find_files([]))
    assert len(documents) >= 10 and sum(d.bytes for d in documents) >= 60_000
    paragraphs = [line for d in documents for line in d.text.splitlines() if line]
    assert len(paragraphs) == len(set(paragraphs))


def test_byte_order_mark_and_line_ends(tmp_path):
    plain, dressed = write(tmp_path / "a", "satu\ndua"), write(tmp_path / "b", b"\xef\xbb\xbfsatu\r\ndua")
    a, b = read_documents([plain, dressed])
    assert a.text == b.text == "satu\ndua"
    assert (a.bytes, b.bytes) == (8, 12)


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"abc\0def", "offset 3"),
        ("aé".encode() + b"\xff tail", "byte 0xff at offset 3"),
        ("halo".encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, named):
    with pytest.raises(UserError, match=named) as error:
        read_documents([write(tmp_path / "t.txt", content)])
    assert "t.txt" in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, named in (
        ("none.txt", "does not exist"),
        ("empty", "holds no"),
        ("*.md", "matches no file"),
        ("", "holds no|does not exist"),
    ):
        with pytest.raises(UserError, match=named):
            find_files([str(tmp_path / name)])


def test_a_link_that_leads_out_of_the_folder_is_read_only_when_it_is_named(tmp_path):
    outside, inside = write(tmp_path / "outside.txt", "rahasia"), write(tmp_path / "texts" / "a.txt", "halo")
    (tmp_path / "texts" / "link.txt").symlink_to("a.txt")
    assert find_files([str(tmp_path / "texts")]) == [inside]
    (tmp_path / "texts" / "out.txt").symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the corpus folder; to read it, name the file itself"):
        find_files([str(tmp_path / "texts")])
    assert find_files([str(tmp_path / "texts" / "out.txt")]) == [tmp_path / "texts" / "out.txt"]
    (tmp_path / "link to texts").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "out.txt").unlink()
    assert len(find_files([str(tmp_path / "link to texts")])) == 1


def test_pipes_devices_and_endless_files_are_never_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    for name in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(UserError, match="neither a file nor a folder"):
            find_files([str(name)])
    with pytest.raises(UserError, match="holds no"):
        find_files([str(tmp_path)])
    write(tmp_path / "endless.txt", "halo")
    os.truncate(tmp_path / "endless.txt", 1 << 40)
    monkeypatch.setattr(corpus, "memory_bytes", lambda: 32 << 30)
    with pytest.raises(UserError, match="1,024.0 GiB, and the whole corpus may have 512.0 GiB here"):
        read_documents(find_files([str(tmp_path)]))
    monkeypatch.setattr(corpus, "memory_bytes", lambda: 1 << 40)
    with pytest.raises(UserError, match="NUL byte at offset 4"):
        read_documents(find_files([str(tmp_path)]))


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "~nobody-of-that-name/x"])
def test_names_that_cannot_be_are_one_line(name):
    with pytest.raises(UserError) as error:
        find_files([name])
    assert len(str(error.value)) < 400


def test_token_file_holds_every_token_and_the_end_of_each_document(tmp_path, tokenizer):
    documents = read_documents([write(tmp_path / "a", "halo dunia " * 50), write(tmp_path / "b", "apa kabar?")])
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    whole = []
    for document in documents:
        whole += tokenizer(document.text)["input_ids"] + [tokenizer.eos_token_id]
    assert tokens.ids.tolist() == whole
    assert tokens.ids.dtype == numpy.uint16 and not tokens.ids.flags.writeable
    assert tokens.header["first_tokens"][1] == len(tokenizer(documents[0].text)["input_ids"]) + 1
    assert tokenizer.decode(tokens.ids.tolist()).split(tokenizer.eos_token) == [d.text for d in documents] + [""]


def test_nothing_is_truncated_whatever_the_tokenizer_says(tokenizer):
    limited = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=8, eos_token="<|endoftext|>"
    )
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=4000)
    text = "halo semua apa kabar " * 40
    ids = encode(limited, text)
    assert len(ids) > 100 and tokenizer.decode(ids) == text


def test_token_file_is_reused_only_for_the_same_corpus_and_tokenizer(tmp_path, tokenizer):
    documents = read_documents([write(tmp_path / "a", "halo dunia " * 50)])
    first = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    made_at = first.path.stat().st_mtime_ns
    assert TokenFile.make(documents, tokenizer, tmp_path / "cache").path.stat().st_mtime_ns == made_at
    other_text = read_documents([write(tmp_path / "a", "halo dunia! " * 50)])
    assert TokenFile.make(other_text, tokenizer, tmp_path / "cache").path != first.path
    other_tokenizer = train_tokenizer(["lain sekali " * 9], 300)
    assert TokenFile.make(documents, other_tokenizer, tmp_path / "cache").path != first.path


def rewritten(path, *, seal=True, said=None, text=None, **changed):
    """Change a token file's header; with `seal`, as one would who knows the format."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    header = {**json.loads(raw[16 : 16 + length]), **changed}
    data = raw[-(-(16 + length) // 64) * 64 :]
    if seal:
        rest = {key: value for key, value in header.items() if key != "sha256"}
        header["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode() + data).hexdigest()
    text = json.dumps(header).encode() if text is None else text
    head = raw[:8] + (len(text) if said is None else said).to_bytes(8, "little") + text
    path.write_bytes(head.ljust(-(-len(head) // 64) * 64, b"\0") + data)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "magic": lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
    "another token, and a possible one": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\1\0"),
    "another place of a document": lambda path: rewritten(path, seal=False, first_tokens=[1]),
    "another largest id": lambda path: rewritten(path, seal=False, max_id=1),
    "header of an exabyte": lambda path: rewritten(path, said=1 << 60),
    "header of a terabyte, which is there": lambda path: (rewritten(path, said=1 << 39), os.truncate(path, 1 << 40)),
    "header is no JSON": lambda path: rewritten(path, text=b"{"),
    "header is no object": lambda path: rewritten(path, text=b"[1]"),
    "header is nested deeply": lambda path: rewritten(path, text=b"[" * 100_000),
    "count below nothing": lambda path: rewritten(path, count=-1),
    "count beyond all": lambda path: rewritten(path, count=10**30),
    "count is a word": lambda path: rewritten(path, count="1"),
    "objects": lambda path: rewritten(path, dtype="object"),
    "no type": lambda path: rewritten(path, dtype=None),
    "a list of types": lambda path: rewritten(path, dtype=["uint16"]),
    "another corpus": lambda path: rewritten(path, corpus_sha256="0" * 64),
    "another version": lambda path: rewritten(path, version="1"),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_token_file_is_made_again(tmp_path, tokenizer, damage):
    documents = read_documents([write(tmp_path / "a", "halo dunia " * 50)])
    first = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    ids, header = first.ids.tolist(), first.header
    DAMAGES[damage](first.path)
    again = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    assert again.ids.tolist() == ids and again.header == header


def test_a_tokenizer_that_makes_no_token_is_named(tmp_path):
    class Mute:
        eos_token_id = bos_token_id = None

        def get_vocab(self):
            return {}

        def __call__(self, text, **_):
            return {"input_ids": []}

    with pytest.raises(UserError, match="makes no token"):
        TokenFile.make(read_documents([write(tmp_path / "a", "a b c")]), Mute(), tmp_path)


def test_a_tokenizer_that_fails_over_the_text_is_one_line(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"halo": 0}, unk_token="none")))
    # A search that takes longer than its library allows ends in a panic of the tokenizer, which is no Exception.
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"halo": 0}, unk_token="halo")))
    endless.backend_tokenizer.pre_tokenizer = Split(Regex("(a+)+$"), "isolated")
    for tokenizer, text in ((words, "apa"), (endless, "a" * 5000 + "b")):
        with pytest.raises(UserError, match="cannot tokenize the corpus: .*(UNK|Regex)"):
            encode(tokenizer, text)


def test_large_vocabularies_get_wide_ids(tmp_path):
    class Words:
        """A tokenizer with 70,000 words and no fast backend."""

        eos_token_id = bos_token_id = None

        def __len__(self):
            return 70_000

        def get_vocab(self):
            return {"w": 69_999}

        def __call__(self, text, **_):
            return {"input_ids": [69_999] * len(text.split())}

    tokens = TokenFile.make(read_documents([write(tmp_path / "a", "a b c")]), Words(), tmp_path)
    assert tokens.ids.tolist() == [69_999] * 3 and tokens.ids.dtype == numpy.uint32


def test_bytes_behind_a_token(tmp_path, tokenizer):
    texts = ["halo dunia, apa kabar?", "héllo 🌧 hujan"]
    documents = read_documents([write(tmp_path / str(n), text) for n, text in enumerate(texts)])
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    ends = len(tokenizer(texts[0])["input_ids"])
    assert text_bytes_from(0, tokens, documents, tokenizer) == sum(len(t.encode()) for t in texts)
    assert text_bytes_from(ends, tokens, documents, tokenizer) == len(texts[1].encode())
    assert text_bytes_from(ends + 1, tokens, documents, tokenizer) == len(texts[1].encode())
    tail = tokenizer.decode(tokens.ids[3:ends].tolist())
    assert text_bytes_from(3, tokens, documents, tokenizer) == len(tail) + len(texts[1].encode())


TEXT = "halo dunia, apa kabar? héllo 🌧 hujan\r\nturun 今日は\r lagi \r\n" * 30


@pytest.fixture
def small_parts(monkeypatch):
    """Texts are read, cut and marked in parts of a few characters."""
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", 7)
    monkeypatch.setattr(corpus, "_MARK_CHARACTERS", 100)
    monkeypatch.setattr(pieces, "PIECE", 40)
    monkeypatch.setattr(pieces, "OVERLAP", 12)
    monkeypatch.setattr(pieces, "BATCH", 3)
    for room in (pieces, corpus):
        monkeypatch.setattr(room, "CUT_FROM", 3 * pieces.PIECE)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
def test_a_text_read_in_parts_is_the_same(tmp_path, monkeypatch, block):
    raw = b"\xef\xbb\xbf" + TEXT.encode() + b"\r"
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", block)
    (document,) = read_documents([write(tmp_path / "a", raw)])
    text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    assert document.text == text and (document.bytes, document.text_bytes) == (len(raw), len(text.encode()))
    for at in (50, 100, 101, len(raw)):
        spoiled = raw[:at] + "é".encode()[:1] + raw[at:]
        with pytest.raises(UnicodeDecodeError) as decoding:
            spoiled.decode()
        with pytest.raises(UserError, match=f"offset {decoding.value.start};"):
            read_documents([write(tmp_path / "b", spoiled)])
    with pytest.raises(UserError, match="NUL byte at offset 50;"):
        read_documents([write(tmp_path / "b", raw[:50] + b"\0" + raw[50:])])
    blank, text = write(tmp_path / "blank", b" \r\n" * 40), write(tmp_path / "text", b" \r\n" * 40 + b"x")
    assert [d.path for d in read_documents([blank, text])] == [str(text)]


def test_the_hash_of_a_corpus_is_over_its_texts_and_their_borders(tmp_path, small_parts):
    documents = read_documents([write(tmp_path / "a", TEXT), write(tmp_path / "b", "apa kabar?")])
    texts = [document.text.encode() for document in documents]
    whole = b"".join(len(text).to_bytes(8, "little") + text for text in texts)
    assert corpus.corpus_hash(documents) == hashlib.sha256(whole).hexdigest()


def test_a_long_text_in_parts_has_the_tokens_and_the_bytes_of_the_whole(tmp_path, tokenizer, small_parts):
    documents = read_documents([write(tmp_path / str(n), TEXT) for n in range(2)])
    tokens = TokenFile.make(documents, tokenizer, tmp_path / "cache")
    text = documents[0].text
    backend = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert tokens.ids.tolist() == 2 * [*backend.ids, tokenizer.eos_token_id]
    marks = tokens.header["marks"]
    assert len(marks) > 10 and all(
        backend.offsets[token % (len(backend.ids) + 1)][0] == place for token, place in marks
    )
    size = len(text.encode())
    for n, (place, _) in list(enumerate([*backend.offsets, (len(text), None)]))[::-37]:
        behind = len(text[place:].encode())
        assert text_bytes_from(n, tokens, documents, tokenizer) == behind + size
        assert text_bytes_from(n + len(backend.ids) + 1, tokens, documents, tokenizer) == behind
    assert text_bytes_from(len(tokens), tokens, documents, tokenizer) == 0


def test_a_text_that_turns_out_not_to_be_cut_is_tokenized_in_one_call(tmp_path, tokenizer, small_parts, monkeypatch):
    documents = read_documents([write(tmp_path / str(n), TEXT) for n in range(2)])
    right = TokenFile.make(documents, tokenizer, tmp_path / "a")
    real = pieces.PieceEncoder.encode

    def failing(self, chunks):
        for n, found in enumerate(real(self, chunks)):
            if n == 8:
                raise pieces.CannotCut
            yield found

    monkeypatch.setattr(pieces.PieceEncoder, "encode", failing)
    whole = TokenFile.make(documents, tokenizer, tmp_path / "b")
    assert whole.ids.tolist() == right.ids.tolist() and whole.header["marks"] == []
    assert text_bytes_from(9, whole, documents, tokenizer) == text_bytes_from(9, right, documents, tokenizer)


def test_a_text_that_changes_while_it_is_read_is_named_and_nothing_is_left(tmp_path, tokenizer, monkeypatch):
    documents = read_documents([write(tmp_path / "a", TEXT)])
    real = corpus.corpus_hash
    monkeypatch.setattr(corpus, "corpus_hash", lambda given: (real(given), write(tmp_path / "a", TEXT + "!"))[0])
    with pytest.raises(UserError, match="has changed while it was read"):
        TokenFile.make(documents, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_corpus
def test_the_real_corpus_loses_nothing(tmp_path):
    documents = read_documents(find_files([str(REAL_CORPUS)]))
    assert "\n" not in documents[0].text and documents[0].bytes == 1_590_325
    tokenizer = train_tokenizer([documents[0].text], 1000)
    tokens = TokenFile.make(documents, tokenizer, tmp_path)
    assert tokenizer.decode(tokens.ids[:-1].tolist()) == documents[0].text
    assert json.loads(json.dumps(tokens.header))["count"] == len(tokens) > 400_000


def test_shipped_transcripts_are_packaged():
    assert SHIPPED.is_dir()
