"""The token file: its ids, its reuse, damaged files, and the text bytes after a token."""

import fcntl
import json
import os
import random
import shutil
import signal
import tracemalloc

import numpy
import pandas
import pytest

from mori.cli import UserError
from mori.config import TrainConfig
from mori.data import account, corpus, formats, token_file, token_writer, tokenize
from mori.data.corpus import read_corpus
from mori.data.formats import archives
from mori.data.token_file import text_bytes_from
from mori.data.token_writer import make_token_file
from mori.data.words import CannotCut, WordEncoder
from mori.model.loading import train_tokenizer
from mori.train import train

TEXT = "halo dunia, apa kabar? héllo 🌧 hujan\r\nturun 今日は\r lagi \r\n" * 30


def write(path, content):
    path.write_bytes(content.encode())
    return path


def corpus_of(folder, *texts):
    return read_corpus([write(folder / f"{number:03}.txt", text) for number, text in enumerate(texts)])


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
def small_corpus(tmp_path):
    return read_corpus([write(tmp_path / "a", "halo dunia " * 50)])


@pytest.fixture
def small_parts(monkeypatch):
    """Texts are read, cut and marked in parts of a few characters."""
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", 7)
    monkeypatch.setattr(token_writer, "_MARK_CHARACTERS", 100)
    monkeypatch.setattr(tokenize, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(tokenize, "LONG_CHARACTERS", 120)
    monkeypatch.setattr(token_writer, "LONG_CHARACTERS", 120)


def test_token_file_holds_every_token_and_the_end_of_each_document(tmp_path, tokenizer):
    texts = ["halo dunia " * 50, "apa kabar?"]
    tokens = make_token_file(corpus_of(tmp_path, *texts), tokenizer, tmp_path / "cache")
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert tokens.ids.tolist() == ids[0] + ids[1]
    assert tokens.ids.dtype == numpy.uint16 and not tokens.ids.flags.writeable
    assert tokens.first_tokens.tolist() == [0, len(ids[0])] and tokens.marks.shape == (0, 2)
    assert tokenizer.decode(tokens.ids.tolist()).split(tokenizer.eos_token) == [*texts, ""]


def test_token_file_is_reused_only_for_the_same_corpus_and_tokenizer(tmp_path, tokenizer, small_corpus):
    first = make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    written = first.path.stat().st_mtime_ns
    assert make_token_file(small_corpus, tokenizer, tmp_path / "cache").path.stat().st_mtime_ns == written
    changed = read_corpus([write(tmp_path / "a", "halo dunia! " * 50)])
    assert make_token_file(changed, tokenizer, tmp_path / "cache").path != first.path
    retrained = train_tokenizer(["lain sekali " * 9], 300)
    make_token_file(changed, retrained, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 3


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
    "another first token": lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\1" + bytes(7)),
    "no documents": lambda path: rewrite(path, documents=0),
    "a token for a document": lambda path: rewrite(path, count=97, documents=3),
    "marks are a list": lambda path: rewrite(path, marks=[]),
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
def test_token_file_replaces_a_damaged_one(tmp_path, tokenizer, small_corpus, damage):
    first = make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    ids, header = first.ids.tolist(), first.header
    DAMAGES[damage](first.path)
    second = make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    assert second.ids.tolist() == ids and second.header == header


def test_token_file_refuses_a_tokenizer_without_tokens(tmp_path, small_corpus):
    with pytest.raises(UserError, match="gives no token"):
        make_token_file(small_corpus, SlowTokenizer(), tmp_path)


def test_token_file_has_wide_ids_for_a_large_vocabulary(tmp_path):
    tokens = make_token_file(corpus_of(tmp_path, "a b c"), SlowTokenizer(69_999), tmp_path)
    assert tokens.ids.tolist() == [69_999] * 3 and tokens.ids.dtype == numpy.uint32


def test_token_file_refuses_an_id_outside_the_vocabulary(tmp_path, small_corpus):
    tokenizer = SlowTokenizer(1)
    tokenizer.get_vocab = lambda: {"1": 1}
    tokenizer.word_ids = [70_000]
    with pytest.raises(UserError, match="token id 70000, which is not in its own vocabulary"):
        make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("tokens-*")) == []


@pytest.mark.parametrize("token", [1 << 31, (1 << 32) - 1, 1 << 32])
def test_token_file_counts_special_tokens_of_any_size(tmp_path, small_corpus, monkeypatch, token):
    """Whether the text has the largest possible id or not; no table of that size is made."""
    monkeypatch.setattr(account, "special_ids", lambda tokenizer: {token})
    tracemalloc.start()
    tokens = make_token_file(small_corpus, SlowTokenizer(min(token, (1 << 32) - 1)), tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(tokens.header["text"]["special_tokens"].values()) == (len(tokens) if token < 1 << 32 else 0)
    assert peak < 1 << 26


def test_token_file_refuses_an_end_of_text_outside_the_vocabulary(tmp_path, small_corpus):
    tokenizer = SlowTokenizer(1)
    tokenizer.get_vocab = lambda: {"1": 1}
    tokenizer.eos_token_id = 1 << 32
    with pytest.raises(UserError, match="token id 4294967296, which is not in its own vocabulary"):
        make_token_file(small_corpus, tokenizer, tmp_path / "cache")


def test_token_file_reports_a_corpus_that_changes_while_it_is_read(tmp_path, tokenizer, small_corpus):
    write(tmp_path / "a", "halo dunia?" * 50)
    with pytest.raises(UserError, match="has changed while it was read"):
        make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("tokens-*")) == []


def test_token_file_is_the_same_for_rows_and_for_files(tmp_path, tokenizer, small_parts, monkeypatch):
    """Documents of many lengths, blank ones among them, in one file or one file each."""
    rng = random.Random(0)
    texts = [TEXT[: rng.randrange(3, 400)] for _ in range(60)] + [TEXT, " ", "halo"]
    first = make_token_file(corpus_of(tmp_path, *texts), tokenizer, tmp_path / "a")
    expected = [tokenizer(text.replace("\r\n", "\n"))["input_ids"] + [0] for text in texts if text.strip()]
    assert first.ids.tolist() == sum(expected, [])
    assert numpy.diff(first.first_tokens).tolist() == [len(ids) for ids in expected[:-1]]
    monkeypatch.setattr(
        corpus, "read_documents", lambda path, options: ([text.replace("\r\n", "\n")] for text in texts)
    )
    second = make_token_file(read_corpus([tmp_path / "000.txt"]), tokenizer, tmp_path / "b")
    assert second.path.name == first.path.name and second.path.read_bytes() == first.path.read_bytes()


# ------------------------------------------------------------------------------------------------- killed while tokenizing


def tokenize_in_a_fork(read, tokenizer, cache, kill_at=0):
    """The numbers of calls and of tokenized pieces; None if the process was killed at the call `kill_at`."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with open(reader) as result:
            text = result.read()
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        return [int(word) for word in text.split()] if status == 0 else None
    status = 1
    try:
        n_calls = n_pieces = 0

        def killing(call):
            def wrapped(*arguments, **options):
                nonlocal n_calls
                n_calls += 1
                if n_calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return wrapped

        def counted(self, part, real=WordEncoder.encode):
            nonlocal n_pieces
            n_pieces += len(part.texts)
            return real(self, part)

        WordEncoder.encode = counted
        for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, name, killing(getattr(os, name)))
        for name in ("begin", "write", "keep", "finish"):
            setattr(token_writer._Writer, name, killing(getattr(token_writer._Writer, name)))
        make_token_file(read, tokenizer, cache)
        os.write(writer, f"{n_calls} {n_pieces}".encode())
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize("seed", range(4))
def test_token_file_continues_after_kills_with_equal_bytes(tmp_path, tokenizer, small_parts, monkeypatch, seed):
    """Killed at random calls until it is complete; a long document and short ones."""
    monkeypatch.setattr(token_writer, "_SEGMENT_BYTES", 1000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rng = random.Random(seed)
    short = [TEXT[rng.randrange(50) : rng.randrange(60, 500)] for _ in range(30)]
    read = corpus_of(tmp_path, *rng.sample([TEXT * 4, *short, TEXT * 3], 32))
    n_calls, n_pieces = tokenize_in_a_fork(read, tokenizer, tmp_path / "whole")
    kills = [
        rng.randrange(1, n_calls // 4) for _ in range(4)
    ]  # fewer than half of the calls, or the work would be done
    assert all(tokenize_in_a_fork(read, tokenizer, tmp_path / "cache", kill_at) is None for kill_at in kills)
    _, n_continued = tokenize_in_a_fork(read, tokenizer, tmp_path / "cache")
    assert 0 < n_continued < n_pieces
    [expected], [path] = ((tmp_path / name).glob("tokens-*.bin") for name in ("whole", "cache"))
    assert path.name == expected.name and path.read_bytes() == expected.read_bytes()


@pytest.fixture
def interrupted(tmp_path, tokenizer, small_parts, monkeypatch):
    """A token file whose writing was interrupted after some segments; returns the corpus and the folder of what is there."""
    monkeypatch.setattr(token_writer, "_SEGMENT_BYTES", 500)
    read, real = corpus_of(tmp_path, *[TEXT * 2] * 3), tokenize.TextEncoder.encode

    def interrupt(self, pieces):
        for n, ids in enumerate(real(self, pieces)):
            if n == 100:
                raise KeyboardInterrupt
            yield ids

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize.TextEncoder, "encode", interrupt)
        make_token_file(read, tokenizer, tmp_path / "cache")
    [folder] = (tmp_path / "cache").glob("tokens-*.partial")
    return read, folder


def append_to(path):
    with path.open("ab") as file:
        file.write(bytes(100))


PARTIAL_DAMAGES = {
    "nothing": (lambda folder: None, True),
    "written beyond the journal": (lambda folder: [append_to(folder / name) for name in ("ids", "first_tokens", "marks")], True),
    "ids cut": (lambda folder: os.truncate(folder / "ids", 20_000), False),
    "ids changed": (lambda folder: (folder / "ids").write_bytes((folder / "ids").read_bytes()[:-1000] + bytes(1000)), False),
    "no ids": (lambda folder: (folder / "ids").unlink(), False),
    "no marks": (lambda folder: (folder / "marks").write_bytes(b""), False),
    "journal cut": (lambda folder: os.truncate(folder / "journal.json", 100), False),
    "no journal": (lambda folder: (folder / "journal.json").unlink(), False),
    "journal changed": (
        lambda folder: (folder / "journal.json").write_text((folder / "journal.json").read_text().replace('"pieces": ', '"pieces": 1')),
        False,
    ),
    "another tokenizer's journal": (
        lambda folder: corpus.store_sealed(
            folder / "journal.json", corpus.load_sealed(folder / "journal.json") | {"identity": {}}
        ),
        False,
    ),
    "a journal of another place in the text": (
        lambda folder: corpus.store_sealed(
            folder / "journal.json", corpus.load_sealed(folder / "journal.json") | {"pieces": 3}
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", PARTIAL_DAMAGES)
def test_token_file_continues_only_what_is_undamaged(tmp_path, tokenizer, interrupted, monkeypatch, damage):
    read, folder = interrupted
    change, continues = PARTIAL_DAMAGES[damage]
    change(folder)
    n_encoded, real = [], tokenize.TextEncoder.encode
    with monkeypatch.context() as patch:
        patch.setattr(
            tokenize.TextEncoder,
            "encode",
            lambda self, pieces: (n_encoded.append(ids) or ids for ids in real(self, pieces)),
        )
        tokens = make_token_file(read, tokenizer, tmp_path / "cache")
    expected = make_token_file(read, tokenizer, tmp_path / "whole")
    assert tokens.path.read_bytes() == expected.path.read_bytes() and not folder.exists()
    assert (sum(map(len, n_encoded)) < len(tokens) / 2) == continues


def test_token_file_of_two_processes_at_once_is_that_of_one(tmp_path, tokenizer, interrupted):
    """A process that finds another one at work leaves the folder of that one alone."""
    read, folder = interrupted
    with (folder.parent / "tokens.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = make_token_file(read, tokenizer, tmp_path / "cache")
    assert folder.is_dir() and len(list(folder.parent.glob("*.partial"))) == 1
    assert tokens.path.read_bytes() == make_token_file(read, tokenizer, tmp_path / "whole").path.read_bytes()


# -------------------------------------------------------------------------------------------------------- text_bytes_from


def test_text_bytes_from_counts_the_bytes_after_a_token(tmp_path, tokenizer):
    texts = ["halo dunia, apa kabar?", "héllo 🌧 hujan"]
    read = corpus_of(tmp_path, *texts)
    tokens = make_token_file(read, tokenizer, tmp_path / "cache")
    end = len(tokenizer(texts[0])["input_ids"])
    last = len(texts[1].encode())
    assert text_bytes_from(0, tokens, read, tokenizer) == len(texts[0]) + last
    assert text_bytes_from(end, tokens, read, tokenizer) == last
    assert text_bytes_from(end + 1, tokens, read, tokenizer) == last
    tail = tokenizer.decode(tokens.ids[3:end].tolist())
    assert text_bytes_from(3, tokens, read, tokenizer) == len(tail) + last


def test_text_bytes_from_ignores_truncation(tmp_path, small_corpus, tokenizer):
    tokens = make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tail = tokenizer.decode(tokens.ids[100:-1].tolist())
    assert text_bytes_from(100, tokens, small_corpus, tokenizer) == len(tail)


def test_text_bytes_from_reads_the_corpus_once(tmp_path, small_corpus, tokenizer, monkeypatch):
    tokens = make_token_file(small_corpus, tokenizer, tmp_path / "cache")
    n_bytes = text_bytes_from(100, tokens, small_corpus, tokenizer)
    monkeypatch.setattr(corpus, "read_documents", lambda *_: iter([["lain"]]))
    assert text_bytes_from(100, tokens, small_corpus, tokenizer) == n_bytes
    [path] = (tmp_path / "cache").glob("*.text_bytes.json")
    path.write_text(path.read_text().replace(str(n_bytes), "1"))
    monkeypatch.undo()
    assert text_bytes_from(100, tokens, small_corpus, tokenizer) == n_bytes


def test_token_file_of_long_texts_has_the_ids_and_bytes_of_one_call(tmp_path, tokenizer, small_parts):
    """The offsets of one call tell the bytes after each token."""
    read = corpus_of(tmp_path, TEXT, "halo", TEXT)
    tokens = make_token_file(read, tokenizer, tmp_path / "cache")
    encodings = [(text, tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)) for text in read.texts()]
    assert tokens.ids.tolist() == sum(([*encoding.ids, tokenizer.eos_token_id] for _, encoding in encodings), [])
    places = [
        (n, character)
        for n, (text, encoding) in enumerate(encodings)
        for character in [*(o[0] for o in encoding.offsets), len(text)]
    ]
    assert len(tokens.marks) > 20 and all(places[token][1] == character for token, character in tokens.marks)
    for token, (n, character) in list(enumerate(places))[::-13]:
        later = [text[character if m == n else 0 :] for m, (text, _) in enumerate(encodings) if m >= n]
        assert token_file._text_bytes_from(token, tokens, read, tokenizer) == len("".join(later).encode())
    assert text_bytes_from(len(tokens), tokens, read, tokenizer) == 0


def test_token_file_falls_back_to_one_call_if_the_ids_contradict_the_cuts(
    tmp_path, tokenizer, small_parts, monkeypatch
):
    read = corpus_of(tmp_path, TEXT, TEXT)
    expected = make_token_file(read, tokenizer, tmp_path / "a")
    real, parts = WordEncoder.encode, []

    def contradict(self, part):
        parts.append(part)
        if len(parts) == 3:
            raise CannotCut
        return real(self, part)

    monkeypatch.setattr(WordEncoder, "encode", contradict)
    tokens = make_token_file(read, tokenizer, tmp_path / "b")
    assert tokens.ids.tolist() == expected.ids.tolist() and len(tokens.marks) == 0 < len(expected.marks)
    assert text_bytes_from(9, tokens, read, tokenizer) == text_bytes_from(9, expected, read, tokenizer)


# ------------------------------------------------------------------------------------------------------- through the door


def wrapped(folder, texts, wrapping):
    """Write texts as the rows of one file, or as a file each; returns what to pass to --corpus."""
    folder.mkdir()
    frame = pandas.DataFrame({"id": range(len(texts)), "text": texts})
    path = folder / f"rows{wrapping}"
    if wrapping == "":
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
        return [str(folder)]
    if wrapping == ".jsonl.zst":
        path.write_bytes(archives.zstd.compress(frame.to_json(orient="records", lines=True).encode()))
    elif ".jsonl" in wrapping:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif ".json" in wrapping:
        frame.to_json(path, orient="records")
    elif ".parquet" in wrapping:
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in wrapping else ",")
    return [str(path)]


WRAPPINGS = ["", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zip", ".json", ".csv", ".csv.gz", ".tsv", ".parquet"]


@pytest.fixture
def train_on(settings, tmp_path):
    def run(texts, wrapping, **changed):
        folder = tmp_path / f"corpus{wrapping}"
        names = wrapped(folder, texts, wrapping) if not folder.exists() else [str(folder)]
        return train(TrainConfig(**{**settings, "corpus": names, **changed}))

    return run


def test_train_gives_one_text_the_same_ids_and_hash_in_every_wrapping(train_on, tmp_path):
    """The rows without text are counted, wherever a format can say so."""
    texts = [TEXT.replace("\r\n", "\n")[at : at + 150] for at in range(0, 1500, 130)] + [
        "",
        "  ",
        'kata "lain", dan\tlain',
    ]
    texts.insert(5, texts[2])
    token_files, ledgers = {}, {}
    for wrapping in WRAPPINGS:
        ledgers[wrapping] = train_on(texts, wrapping, run_name=f"run{wrapping}", max_steps=1)["ledger"]
        token_files[wrapping] = {path.name for path in (tmp_path / "runs" / ".cache").glob("tokens-*.bin")}
    assert all(files == token_files[""] and len(files) == 1 for files in token_files.values())
    expected = {name: value for name, value in ledgers[""].items() if name != "bytes"}
    assert all({**ledger, **expected} == ledger for ledger in ledgers.values())
    counts = [ledgers[".csv"][f"{kind}_documents"] for kind in ("empty", "blank", "duplicate")]
    assert counts == [1, 1, 1] and ledgers[".csv"]["documents"] == len(texts) - 2


def test_train_resumes_after_the_corpus_was_compressed(train_on, tmp_path):
    """As if it had been killed after step 8."""
    texts = [TEXT.replace("\r\n", "\n")[at : at + 300] for at in range(0, 1500, 130)]
    whole = train_on(texts, ".jsonl")
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints" / "step-00000012")
    resumed = train_on(texts, ".csv.gz")
    assert resumed["eval"] == whole["eval"] and resumed["samples"] == whole["samples"]
    with pytest.raises(UserError, match="documents_sha256"):
        train_on(texts[:-1], ".csv")
