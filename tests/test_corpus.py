"""Files, formats and documents."""

import dataclasses
import hashlib
import json
import os
import random

import pytest
from conftest import REAL_CORPUS, needs_corpus

from mori.cli import UserError
from mori.data import corpus
from mori.data.corpus import Ledger, read_corpus
from mori.data.files import SHIPPED, find_files
from mori.data.formats import ReadOptions
from mori.data.token_writer import make_token_file
from mori.model.loading import train_tokenizer


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --------------------------------------------------------------------------------------------------------------- files


def test_find_files_has_a_fixed_order_and_no_duplicates(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.TXT", ".hidden/d.txt", ".e.txt", "e.log"):
        write(tmp_path / name, "x")
    in_folder = [str(path.relative_to(tmp_path)) for path in find_files([str(tmp_path)])]
    assert in_folder == ["a.txt", "b.txt", "sub/c.TXT"]
    mixed = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(tmp_path / "e.log")])
    assert [path.name for path in mixed] == ["b.txt", "a.txt", "e.log"]
    assert [path.name for path in find_files([str(tmp_path / "**/c.TXT")])] == ["c.TXT"]


def test_find_files_without_names_gives_the_shipped_transcripts():
    shipped = read_corpus(find_files([]))
    assert SHIPPED.is_dir() and shipped.measures.documents >= 10 and shipped.measures.bytes >= 60_000
    paragraphs = [line for text in shipped.texts() for line in text.splitlines() if line]
    assert len(paragraphs) == len(set(paragraphs))


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.txt", "does not exist"),
        ("empty", "holds no"),
        ("*.md", "matches no file"),
        ("pipe.txt", "neither a file nor a folder"),
        ("folder with a pipe", "holds no"),
        ("/dev/zero", "neither a file nor a folder"),
    ],
)
def test_find_files_refuses_a_name_without_files(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder with a pipe").mkdir()
    os.mkfifo(tmp_path / "folder with a pipe" / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=message):
        find_files([str(tmp_path / name)])


def test_find_files_says_where_it_looked_and_names_the_nearest_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts" / "mori_corpus.txt", "halo")
    with pytest.raises(
        UserError,
        match=f"^corpus texts/mori_korpus.txt does not exist in {tmp_path}; did you mean texts/mori_corpus.txt",
    ):
        find_files(["texts/mori_korpus.txt"])
    with pytest.raises(UserError, match="/none/a.txt does not exist; give a text file"):
        find_files([str(tmp_path / "none" / "a.txt")])


@pytest.mark.parametrize("name", ["", "x" * 5000, "a/" * 3000, "~nobody-of-that-name/x"])
def test_find_files_refuses_an_impossible_name_in_one_line(name):
    with pytest.raises(UserError) as error:
        find_files([name])
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_find_files_follows_a_link_out_of_a_folder_only_if_it_is_named(tmp_path):
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


# ----------------------------------------------------------------------------------------------------------- documents


def rows(path):
    """A made-up format: a JSON list, in which None is a row without text."""
    for text in json.loads(path.read_text()):
        yield [] if text is None else [text[at : at + 3] for at in range(0, len(text), 3)]


@pytest.fixture
def corpus_of(tmp_path, monkeypatch):
    """Write texts as rows of one file, and read them."""
    monkeypatch.setattr(corpus, "read_documents", lambda path, options: rows(path))

    def read(*texts):
        return read_corpus([write(tmp_path / "rows.json", json.dumps(texts))])

    return read


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_read_corpus_refuses_a_blank_corpus(tmp_path, content):
    with pytest.raises(UserError, match="the corpus is empty: .*t.txt"):
        read_corpus([write(tmp_path / "t.txt", content)])


def test_read_corpus_omits_and_counts_documents_without_text(corpus_of):
    blanks = " \r\n" * 40
    read = corpus_of(None, blanks, blanks + "x", "", "halo", None, "halo", "\u3000", "halo")
    assert list(read.texts()) == [blanks + "x", "halo", "halo", "halo"]
    assert dataclasses.asdict(read.measures) == {
        **dataclasses.asdict(read.measures),
        "bytes": read.files[0].stat().st_size,
        "text_bytes": len(blanks) + 1 + 3 * 4,
        "documents": 4,
        "empty_documents": 3,
        "blank_documents": 2,
        "duplicate_documents": 2,
        "alphabet": "".join(sorted(set(blanks + "xhalo"))),
    }


@pytest.mark.parametrize("seed", range(5))
def test_read_corpus_measures_random_documents(corpus_of, monkeypatch, seed):
    """Against counting by hand; the hashes of documents are compared a few at a time."""
    monkeypatch.setattr(corpus, "_HASHES_AT_ONCE", 7)
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aé日🌧 \n", k=rng.randrange(5))) for _ in range(200)]
    measures = corpus_of(*texts).measures
    kept = [text for text in texts if text.strip()]
    assert (measures.documents, measures.text_bytes) == (len(kept), len("".join(kept).encode()))
    assert measures.empty_documents == texts.count("")
    assert measures.blank_documents == sum(text.isspace() for text in texts)
    assert measures.duplicate_documents == len(kept) - len(set(kept)) > 0
    assert measures.alphabet == "".join(sorted(set("".join(kept))))
    hashes = [hashlib.sha256(text.encode()).digest() for text in kept]
    assert measures.sha256 == hashlib.sha256(b"".join(hashes)).hexdigest()


def test_corpus_sha256_depends_on_the_borders_of_documents_and_not_on_files(tmp_path, corpus_of):
    texts = [("halo", "dunia"), ("halod", "unia"), ("halodunia",), ("dunia", "halo"), ("halo", "dunia", "halo")]
    hashes = [corpus_of(*each).measures.sha256 for each in texts]
    assert len(set(hashes)) == 5
    files = [write(tmp_path / f"{n}.json", json.dumps([None, text, " "])) for n, text in enumerate(texts[0])]
    assert read_corpus(files).measures.sha256 == hashes[0]


def test_corpus_texts_end_at_the_limit(corpus_of):
    read = corpus_of("halo", "halo dunia apa", "kabar")
    assert list(read.texts()) == ["halo", "halo dunia apa", "kabar"]
    assert list(read.texts(limit=8)) == ["halo", "halo d"]
    assert list(read.texts(limit=23)) == list(read.texts())


def test_ledger_tells_what_was_left_out_and_what_is_there_twice():
    ledger = Ledger(
        bytes=90, text_bytes=1200, documents=1234, tokens=9, train_tokens=5, held_out_tokens=4, dropped_tokens=0
    )
    assert str(ledger).startswith("1,234 documents, 90 bytes (1,200 of text) -> 9 tokens") and ";" not in str(ledger)
    ledger = dataclasses.replace(ledger, empty_documents=3, blank_documents=2, duplicate_documents=1000)
    assert str(ledger).endswith(
        "; 3 without text, left out; 2 blank, left out; 1,000 the same as an earlier one, trained on"
    )


# -------------------------------------------------------------------------------------------------- a pass that is saved


@pytest.fixture
def reads(monkeypatch):
    """The files that are read; every corpus counts as large, and its files as old."""
    reads, real = [], corpus.read_documents
    monkeypatch.setattr(corpus, "read_documents", lambda path, options: reads.append(path.name) or real(path, options))
    monkeypatch.setattr(corpus, "_ALWAYS_READ_BYTES", 20)
    monkeypatch.setattr(corpus, "_SETTLED_SECONDS", -60)
    return reads


def test_read_corpus_reads_an_unchanged_large_corpus_once(tmp_path, reads):
    paths = [write(tmp_path / name, "halo dunia, apa kabar?") for name in ("a.txt", "b.txt")]
    first = read_corpus(paths, cache_dir=tmp_path / "cache")
    assert read_corpus(paths, cache_dir=tmp_path / "cache") == first and reads == ["a.txt", "b.txt"]
    assert read_corpus(paths[:1], cache_dir=tmp_path / "cache").measures.documents == 1 and len(reads) == 3
    assert read_corpus(paths, ReadOptions(encoding="latin-1"), tmp_path / "cache").measures == first.measures
    assert len(reads) == 5


CHANGES = {
    "longer": lambda path: write(path, "halo dunia, apa kabar?!"),
    "same length": lambda path: write(path, "halo dunia; apa kabar?"),
    "same length and time": lambda path: (write(path, "halo dunia; apa kabar?"), os.utime(path, ns=(0, 10**18))),
    "replaced": lambda path: os.replace(write(path.with_name("new"), "halo dunia; apa kabar?"), path),
}


@pytest.mark.parametrize("change", CHANGES)
def test_read_corpus_notices_a_changed_file(tmp_path, reads, change):
    path = write(tmp_path / "a.txt", "halo dunia, apa kabar?")
    os.utime(path, ns=(0, 10**18))
    first = read_corpus([path], cache_dir=tmp_path / "cache")
    CHANGES[change](path)
    assert read_corpus([path], cache_dir=tmp_path / "cache").measures.sha256 != first.measures.sha256
    assert reads == ["a.txt", "a.txt"]


@pytest.mark.parametrize("reason", ["small", "new", "changed meanwhile", "damaged", "no cache", "read-only"])
def test_read_corpus_reads_again_if_it_cannot_be_certain(tmp_path, reads, monkeypatch, reason):
    path, cache = write(tmp_path / "a.txt", "halo dunia, apa kabar?"), tmp_path / "cache"
    if reason == "small":
        monkeypatch.setattr(corpus, "_ALWAYS_READ_BYTES", 100)
    if reason == "new":
        monkeypatch.setattr(corpus, "_SETTLED_SECONDS", 60)
    if reason == "read-only":
        cache.write_text("a file where the folder should be")
    counted = corpus.read_documents
    if reason == "changed meanwhile":
        monkeypatch.setattr(corpus, "read_documents", lambda *args: (os.utime(path), counted(*args))[1])
    first = read_corpus([path], cache_dir=None if reason == "no cache" else cache)
    if reason == "damaged":
        (index,) = cache.glob("corpus-*.json")
        index.write_text(index.read_text().replace('"documents": 1', '"documents": 2'))
    assert read_corpus([path], cache_dir=None if reason == "no cache" else cache) == first
    assert reads == ["a.txt", "a.txt"]


@needs_corpus
def test_the_real_corpus_loses_no_text(tmp_path):
    read = read_corpus(find_files([str(REAL_CORPUS)]))
    [text] = read.texts()
    assert "\n" not in text and read.measures.bytes == 1_590_325
    tokenizer = train_tokenizer([text], 1000)
    tokens = make_token_file(read, tokenizer, tmp_path)
    assert tokenizer.decode(tokens.ids[:-1].tolist()) == text
    assert tokens.header["count"] == len(tokens) > 400_000


def test_find_files_leaves_out_models_and_runs_in_a_folder(run_train, text_file, tmp_path):
    """A second run on the same folder reads the same text, although the first one has written into it."""
    text = tmp_path / "a.txt"
    text.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    ledgers = [run_train(corpus=[str(tmp_path)], run_name=name, max_steps=1)["ledger"] for name in ("first", "second")]
    assert ledgers[0] == ledgers[1]
    assert find_files([str(tmp_path)]) == [text]
