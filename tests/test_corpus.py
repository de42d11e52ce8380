"""Files, formats and documents."""

import os

import pytest
from conftest import REAL_CORPUS, needs_corpus

from mori.cli import UserError
from mori.data import corpus, formats
from mori.data.corpus import corpus_hash, read_documents
from mori.data.files import SHIPPED, find_files
from mori.data.token_file import TokenFile
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
    documents = read_documents(find_files([]))
    assert SHIPPED.is_dir() and len(documents) >= 10 and sum(document.bytes for document in documents) >= 60_000
    paragraphs = [line for document in documents for line in document.text.splitlines() if line]
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


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_read_documents_refuses_a_blank_corpus(tmp_path, content):
    with pytest.raises(UserError, match="the corpus is empty: .*t.txt"):
        read_documents([write(tmp_path / "t.txt", content)])


def test_read_documents_omits_blank_files(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", 7)
    blank, text = write(tmp_path / "blank", b" \r\n" * 40), write(tmp_path / "text", b" \r\n" * 40 + b"x")
    assert [document.path for document in read_documents([blank, text])] == [str(text)]


def test_read_documents_limits_the_corpus_by_memory(tmp_path, monkeypatch):
    os.truncate(write(tmp_path / "endless.txt", "halo"), 1 << 40)
    monkeypatch.setattr(corpus, "memory_bytes", lambda: 32 << 30)
    with pytest.raises(UserError, match="1,024.0 GiB or more .*endless.txt.*, the limit here is 512.0 GiB"):
        read_documents(find_files([str(tmp_path)]))
    monkeypatch.setattr(corpus, "memory_bytes", lambda: 1 << 40)
    with pytest.raises(UserError, match="NUL byte at offset 4"):
        read_documents(find_files([str(tmp_path)]))


def test_document_limits_its_whole_text_by_memory(tmp_path, monkeypatch):
    (document,) = read_documents([write(tmp_path / "a", "halo dunia")])
    monkeypatch.setattr(corpus, "memory_bytes", lambda: 39)
    with pytest.raises(UserError, match="is needed whole"):
        _ = document.text
    monkeypatch.setattr(corpus, "memory_bytes", lambda: 40)
    assert document.text == "halo dunia"


def test_corpus_hash_depends_on_the_borders_of_documents(tmp_path):
    parts = [[write(tmp_path / "a", "halo"), write(tmp_path / "b", "dunia")]]
    parts += [[write(tmp_path / "c", "halod"), write(tmp_path / "d", "unia")], [write(tmp_path / "e", "halodunia")]]
    assert len({corpus_hash(read_documents(paths)) for paths in parts}) == 3


@needs_corpus
def test_the_real_corpus_loses_no_text(tmp_path):
    documents = read_documents(find_files([str(REAL_CORPUS)]))
    assert "\n" not in documents[0].text and documents[0].bytes == 1_590_325
    tokenizer = train_tokenizer([documents[0].text], 1000)
    tokens = TokenFile.make(documents, tokenizer, tmp_path)
    assert tokenizer.decode(tokens.ids[:-1].tolist()) == documents[0].text
    assert tokens.header["count"] == len(tokens) > 400_000
