"""Corpus formats: the same texts in every wrapping, and what is told about files that are damaged or something else."""

import bz2
import codecs
import encodings.aliases
import gzip
import io
import json
import lzma
import random
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pandas
import pyarrow
import pytest
from conftest import flags, run_script
from pyarrow import parquet

from mori.bench.options import CompareConfig
from mori.cli import UserError, checked
from mori.config import EvaluateConfig, TrainConfig
from mori.data import files, formats
from mori.data.files import find_files
from mori.data.formats import ReadOptions, archives, read_documents

TEXTS = ['halo, dunia\nbaris "dua"\n', "", None, "kété 🌧 hujan\r\nturun", "a\tb;c", " \n ", "42"]
EXPECTED = ["" if text is None else text.replace("\r\n", "\n") for text in TEXTS]


def zipped(raw: bytes, name: str) -> bytes:
    """An archive as a Mac makes it, with a file beside the wanted one that is hidden."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("texts/", b"")
        archive.writestr(f"__MACOSX/texts/._{name}", b"\0")
        archive.writestr(f"texts/{name}", raw)
        archive.writestr("texts/cover.png", b"\0")
    return buffer.getvalue()


WRAPPINGS = {
    "": lambda raw, name: raw,
    ".gz": lambda raw, name: gzip.compress(raw[:400]) + gzip.compress(raw[400:]) * (len(raw) > 400),
    ".bz2": lambda raw, name: bz2.compress(raw),
    ".xz": lambda raw, name: lzma.compress(raw),
    ".zst": lambda raw, name: archives.zstd.compress(raw[:400]) + archives.zstd.compress(raw[400:]) * (len(raw) > 400),
    ".zip": zipped,
    ".zip.gz": lambda raw, name: gzip.compress(zipped(raw, name)),
}


def parquet_bytes(frame: pandas.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, row_group_size=3)
    return buffer.getvalue()


def with_texts(texts: list) -> dict[str, bytes]:
    """The texts as rows, in the bytes of a file of each suffix that holds rows, as pandas writes them."""
    frame = pandas.DataFrame({"id": range(len(texts)), "text": texts, "url": "x"})
    quoted = {"index": False, "na_rep": ""}
    return {
        "jsonl": frame.to_json(orient="records", lines=True).encode(),
        "ndjson": frame.to_json(orient="records", lines=True, force_ascii=False).encode("utf-8-sig"),
        "json": frame.to_json(orient="records", indent=2).encode(),
        "lines.json": frame.to_json(orient="records", lines=True).encode("utf-16"),
        "strings.json": json.dumps(texts).encode(),
        "csv": frame.to_csv(**quoted).encode("utf-8-sig"),
        "semicolons.csv": frame.to_csv(**quoted, sep=";", lineterminator="\r\n").encode(),
        "tsv": frame.to_csv(**quoted, sep="\t").encode("utf-16"),
        "parquet": parquet_bytes(frame),
    }


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts_of(path: Path, **options) -> list[str]:
    return ["".join(chunks) for chunks in read_documents(path, ReadOptions(**options))]


def refusal(path: Path, **options) -> str:
    """The one line that tells why a file is not read; it names the file."""
    with pytest.raises(UserError) as error:
        texts_of(path, **options)
    message = str(error.value)
    assert "\n" not in message and path.name in message and len(message) < 500
    return message


# ---------------------------------------------------------------------------------------------------------- every format


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_read_documents_gives_the_same_rows_in_every_format_and_compression(tmp_path, monkeypatch, wrapping, block):
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", block)
    for name, raw in with_texts(TEXTS).items():
        path = write(tmp_path / f"rows.{name}{wrapping.upper()}", WRAPPINGS[wrapping](raw, f"rows.{name}"))
        assert texts_of(path) == EXPECTED, path
        assert formats.has_format(path)


@pytest.mark.parametrize("seed", range(3))
def test_read_documents_gives_random_rows_as_pandas_does(tmp_path, seed):
    rng = random.Random(seed)
    alphabet = "ab ,;\t\"\n'\\{}[]:0é🌧\r\u2028<&\ufeff"
    texts = ["x" + "".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(50)]
    texts = [text.replace("\r", "\r\n") for text in texts]
    for name, raw in with_texts(texts).items():
        path = write(tmp_path / f"rows.{name}", raw)
        assert texts_of(path) == [text.replace("\r\n", "\n") for text in texts], name
        if name in ("csv", "semicolons.csv", "tsv"):
            separator = {"csv": ",", "tsv": "\t"}.get(name, ";")
            codec = "utf-16" if name == "tsv" else "utf-8-sig"
            frame = pandas.read_csv(path, sep=separator, encoding=codec, keep_default_na=False, lineterminator="\n")
            assert [text.replace("\r\n", "\n") for text in frame["text"]] == texts_of(path)


def test_read_documents_streams_rows_in_flat_memory(tmp_path):
    row = {"text": "halo dunia " * 90}
    for name, separator, edges in (("jsonl", "\n", ("", "")), ("json", ",\n", ("[", "]"))):
        raw = edges[0] + separator.join([json.dumps(row)] * 15_000) + edges[1]
        path = write(tmp_path / f"rows.{name}.gz", gzip.compress(raw.encode(), 1))
        tracemalloc.start()
        assert sum(len(chunk) for chunks in read_documents(path) for chunk in chunks) == 15_000 * len(row["text"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20 < len(raw) / 1.5


def test_read_documents_gives_a_long_row_in_chunks(tmp_path):
    text = "panjang sekali " * 200_000
    for name, raw in with_texts([text]).items():
        ((*chunks,),) = read_documents(write(tmp_path / f"rows.{name}", raw))
        assert "".join(chunks) == text and max(map(len, chunks)) <= 1 << 20, name


def test_read_documents_bounds_the_length_of_a_row(tmp_path, monkeypatch):
    for module in (formats.text, formats.rows, formats.json_values):
        monkeypatch.setattr(module, "MAX_LINE_CHARACTERS", 1 << 20)
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", 1 << 16)
    for name, raw in with_texts(["x", "y" * (3 << 20)]).items():
        if name != "parquet":
            assert "MiB" in (message := refusal(write(tmp_path / f"a.{name}", raw))) or "field limit" in message


def test_formats_a_new_one_is_found_in_folders_globs_archives_and_names(tmp_path, monkeypatch):
    """A made-up format: text written backwards."""
    monkeypatch.setitem(formats.FORMATS, ".back", lambda file, name, options: [[file.read().decode()[::-1]]])
    path = write(tmp_path / "texts" / "a.BACK", "oamex olah")
    write(tmp_path / "packed" / "a.back.gz", gzip.compress(b"oamex olah"))
    write(tmp_path / "packed" / "a.zip", zipped(b"oamex olah", "a.back"))
    for name, n_files in ((path, 1), (path.parent, 1), (path.parent / "*", 1), (tmp_path / "packed", 2)):
        paths = find_files([str(name)])
        assert [texts_of(path) for path in paths] == [["halo xemao"]] * n_files
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no file of a known format \(\.txt .*\.parquet .*\.back"):
        find_files([str(tmp_path / "empty")])


def test_formats_a_file_of_unknown_suffix_is_text(tmp_path):
    assert texts_of(write(tmp_path / "a.log", "# halo")) == texts_of(write(tmp_path / "a", "# halo")) == ["# halo"]
    assert not formats.has_format(tmp_path / "a.log") and not formats.has_format(tmp_path / "a.log.gz")
    assert "not UTF-8" in refusal(write(tmp_path / "a.log", b"\xff\xfa"))


def test_formats_an_unreadable_file_is_reported(tmp_path, monkeypatch):
    def fail(file, name, options):
        yield ["halo"]
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(formats.FORMATS, ".bad", fail)
    assert "cannot read" in refusal(write(tmp_path / "t.bad", "x"))
    monkeypatch.setitem(formats.FORMATS, ".bad", lambda file, name, options: [fail(file, name, options)])
    assert refusal(tmp_path / "t.bad").endswith("t.bad: Input/output error")
    assert refusal(tmp_path / "missing.jsonl").endswith("missing.jsonl: No such file or directory")


@pytest.mark.parametrize(
    "name, advice",
    [
        ("a.pdf", "pdftotext a.pdf a.txt"),
        ("a.DOCX", "save it as .txt"),
        ("a.epub", "pandoc -t plain a.epub -o a.txt"),
        ("a.html", "is markup"),
        ("a.html.gz", "is markup"),
        ("a.xlsx", "save it as .csv"),
        ("a.tar.gz", "unpack it"),
        ("a.mp4", "transcribe it"),
        ("a.ass", "ffmpeg -i a.ass a.srt"),
        ("a.arrow", "to_parquet"),
    ],
)
def test_find_files_says_what_to_do_with_a_file_that_no_format_reads(tmp_path, name, advice):
    path = write(tmp_path / name, "x")
    with pytest.raises(UserError, match=advice) as error:
        find_files([str(path)])
    assert name in str(error.value) and advice in refusal(path)
    write(tmp_path / "b.txt", "halo")
    assert find_files([str(tmp_path)]) == [tmp_path / "b.txt"]


def test_find_files_names_the_extra_of_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(archives, "zstd", None)
    for name, extra in (("a.parquet", "parquet"), ("a.parquet.gz", "parquet"), ("a.txt.zst", "zstd")):
        with pytest.raises(UserError, match=rf'pip install "mori\[{extra}\]"'):
            find_files([str(write(tmp_path / name, b"x"))])
    path = write(tmp_path / "a.zip", zipped(b"x", "a.parquet"))
    assert 'pip install "mori[parquet]"' in refusal(path)


# -------------------------------------------------------------------------------------------------------------- encodings


def test_read_text_removes_the_byte_order_mark_and_carriage_returns(tmp_path):
    text = "\ufeffsatu 🌧\r\ndua\rtiga"
    for codec in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        path = write(tmp_path / codec, text.encode(codec))
        assert texts_of(path) == texts_of(path, encoding="latin-1") == ["satu 🌧\ndua\rtiga"]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
def test_read_text_does_not_depend_on_the_block_size(tmp_path, monkeypatch, block):
    raw = "\ufeff".encode() + "halo dunia, apa kabar? héllo 🌧 hujan\r\nturun 今日は\r lagi \r\n".encode() * 30 + b"\r"
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", block)
    text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    assert texts_of(write(tmp_path / "a", raw)) == [text]
    assert texts_of(write(tmp_path / "a", text.encode("utf-16"))) == [text]
    for at in (50, 100, 101, len(raw)):
        damaged = raw[:at] + "é".encode()[:1] + raw[at:]
        with pytest.raises(UnicodeDecodeError) as decoding:
            damaged.decode()
        assert f"offset {decoding.value.start};" in refusal(write(tmp_path / "b", damaged))
    assert "NUL byte at offset 50;" in refusal(write(tmp_path / "b", raw[:50] + b"\0" + raw[50:]))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"abc\0def", "looks binary: a NUL byte at offset 3"),
        (
            "aé".encode() + b"\xff tail",
            "is not UTF-8: byte 0xff at offset 3; save it as UTF-8, or .* --encoding latin-1",
        ),
        ("halo".encode("utf-16-le"), "NUL byte at offset 1; .* --encoding utf-16-le"),
        ("halo".encode("utf-16")[:-1], "is not utf-16-le: byte 0x6f at offset 8;"),
    ],
)
def test_read_text_refuses_what_is_not_text(tmp_path, content, message):
    refused = refusal(write(tmp_path / "t.txt", content))
    assert re.search(message, refused), refused


def test_encoding_takes_every_text_codec_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", 3)
    taken = 0
    for codec in sorted({*encodings.aliases.aliases.values()}):
        config = TrainConfig(encoding=codec)
        try:
            raw = "halo, dunia: 42".encode(codec)
        except LookupError:  # from bytes to bytes
            assert any("no text encoding" in mistake for mistake in config.mistakes()), codec
            continue
        assert texts_of(write(tmp_path / "a.txt", raw), encoding=codec) == ["halo, dunia: 42"], codec
        assert not config.mistakes()
        taken += 1
    assert taken > 80


@pytest.mark.parametrize("codec", ["shift_jis", "gb18030", "euc_kr", "cp1252", "utf-16-le", "utf-7", "ascii"])
def test_encoding_tells_the_offset_of_a_byte_that_does_not_decode(tmp_path, monkeypatch, codec):
    raw = "halo dunia, apa kabar?".encode(codec)
    raw += {"cp1252": b"\x81", "utf-16-le": b"\x00\xdc", "utf-7": b"+\xff"}.get(codec, b"\xff") + "x".encode(codec)
    with pytest.raises(UnicodeDecodeError) as decoding:
        raw.decode(codec)
    for block in (1, 2, 7, 1 << 20):
        monkeypatch.setattr(formats.text, "BLOCK_BYTES", block)
        message = refusal(write(tmp_path / "a.txt", raw), encoding=codec)
        assert f"is not {codecs.lookup(codec).name}: byte" in message
        assert abs(int(message.split("offset ")[1].split(";")[0]) - decoding.value.start) <= (codec == "utf-7")


@pytest.mark.parametrize("config", [TrainConfig, EvaluateConfig])
@pytest.mark.parametrize(
    "encoding, advice",
    [
        ("latn1", "did you mean latin1?"),
        ("cp125", "did you mean cp125"),
        ("hex", "no text encoding"),
        ("?", "known are"),
    ],
)
def test_encoding_that_python_lacks_is_told_with_the_nearest(config, encoding, advice):
    with pytest.raises(UserError) as error:
        checked(config(encoding=encoding))
    assert advice in str(error.value)


def test_encoding_applies_to_rows_and_subtitles_but_not_to_parquet(tmp_path):
    texts = ["kété", "çà"]
    for name, raw in with_texts(texts).items():
        if name == "json" or name == "csv":
            raw = raw.decode("utf-8-sig").encode("latin-1")
        assert texts_of(write(tmp_path / f"a.{name}", raw), encoding="latin-1") == texts or name == "semicolons.csv"
    cue = "1\n00:00:01,000 --> 00:00:02,000\nkété\n".encode("latin-1")
    assert texts_of(write(tmp_path / "a.srt", cue), encoding="latin-1") == ["kété"]
    assert "--encoding" in refusal(tmp_path / "a.srt")


# ------------------------------------------------------------------------------------------------------------------ rows


def rows(*values) -> str:
    return "\n".join(map(json.dumps, values))


@pytest.mark.parametrize(
    "content, options, expected",
    [
        (rows({"text": "a", "body": "b"}), "", ["a"]),
        (rows({"text": "a", "body": "b"}), "body", ["b"]),
        (rows({"id": 1, "body": "b", "tags": ["x"]}, {"id": 2, "body": None}), "", ["b", ""]),
        (rows({"id": "1", "body": "b"}, {"id": "2", "body": "3"}), "", ["b", "3"]),
        (rows({"id": "1"}), "", ["1"]),
        (rows("a", "b\r\nc"), "", ["a", "b\nc"]),
        (rows("a", {"text": "b"}), "", ["a", "b"]),
        (rows(*30 * ["a"], {"body": "b"}), "", [*30 * ["a"], "b"]),
        ("\n\n" + rows({"text": "a"}) + "\n\n", "", ["a"]),
        ("", "", []),
    ],
)
def test_json_lines_take_the_text_column(tmp_path, content, options, expected):
    assert texts_of(write(tmp_path / "a.jsonl", content), text_column=options) == expected


CHAT = [{"role": "user", "content": "halo"}]


@pytest.mark.parametrize(
    "content, column, message",
    [
        (rows({"body": "x"}), "txt", "a.jsonl line 1 has no column 'txt', it has 'body'"),
        (rows({"text": "x"}, {"body": "x"}), "", "a.jsonl line 2 has no column 'text', it has 'body'"),
        (rows({"title": "x", "body": "x"}), "", "several of text: choose with --text_column among 'title', 'body'"),
        (rows({"n": 1}), "", "none of text: 'n'"),
        (rows({"text": "a"}, {"text": 3}), "", "a.jsonl line 2: 'text' is a number, must be text"),
        (rows({"text": "4"}, {"text": 3}), "", "a.jsonl line 2: 'text' is a number, must be text"),
        (rows({"text": ["a"], "b": "x"}), "", "a.jsonl line 1: 'text' is a list, must be text"),
        (rows({"text": {"a": 1}}), "", "'text' is an object"),
        (rows({"id": "x", "messages": CHAT}), "", "holds chats ('messages')"),
        (rows({"conversations": CHAT}), "conversations", "holds chats ('conversations')"),
        (rows("a", 3), "", "a.jsonl line 2 is a number, must be an object or a string"),
        (rows(["a"]), "", "a.jsonl line 1 is a list"),
        ('{"text": "a"}\n{"text": "b"', "", "a.jsonl line 2 is not JSON: Expecting ',' delimiter (character 13)"),
        ('{"text": "a"}{"text": "b"}', "", "a.jsonl line 1 is not JSON: Extra data (character 14)"),
        ('{"text": "\\ud83c"}', "", r"a.jsonl line 1 holds half a character, '\ud83c'"),
        ('{"n": ' + "9" * 5000 + "}", "", "a.jsonl line 1 is not JSON"),
        ("[" * 200_000, "", "a.jsonl line 1 is not JSON"),
    ],
)
def test_json_lines_refuse_a_row_without_text_column(tmp_path, content, column, message):
    assert message in refusal(write(tmp_path / "a.jsonl", content), text_column=column)


@pytest.mark.parametrize("block", [1, 4, 30, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_values_equal_those_of_the_json_module(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr(formats.text, "BLOCK_BYTES", block)
    values = [
        {"text": 'a"\\\né🌧', "n": -1.5e-3},
        {"text": "", "deep": [{}, [], [1, {"x": None}]]},
        {"text": 9 * "panjang "},
    ]
    path = write(tmp_path / "a.json", json.dumps(values, indent=indent))
    with path.open("rb") as file:
        chunks = formats.text.decoded(file, "a.json", ReadOptions())
        assert [value for _, value in formats.json_values.JsonValues(chunks, "a.json")] == values
    numbers = write(tmp_path / "n.json", "[12, 345 ,6789]")
    with numbers.open("rb") as file:
        chunks = formats.text.decoded(file, "n.json", ReadOptions())
        assert [value for _, value in formats.json_values.JsonValues(chunks, "n.json")] == [12, 345, 6789]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            '{"version": "1", "data": [{"text": "a"}]}',
            "one object with 'version', 'data', not a list of rows; save 'data' alone",
        ),
        ("", "is empty"),
        (json.dumps({"messages": CHAT}), "line 1 holds chats ('messages')"),
        ('[{"text": "a"},\n{"text": "b"}', "line 2 is not JSON: the list does not end; the file is cut off"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2 is not JSON: '{' after an item"),
        ('[{"text": "a"}]\n[]', "line 2 is not JSON: text after the end of the list"),
        ('[{"text": "a"},\n{"text": b}' + 90 * " " + "]", "line 2 is not JSON: Expecting value"),
        ('[\n{"text": "a', "line 2 is not JSON: Unterminated string starting at; the file is cut off"),
        ('[[{"text": "a"}]]', "line 1 is a list, must be an object or a string"),
    ],
)
def test_json_refuses_what_is_no_list_of_rows(tmp_path, content, message):
    assert message in refusal(write(tmp_path / "a.json", content))


def test_json_takes_a_single_object_as_a_row(tmp_path):
    assert texts_of(write(tmp_path / "a.json", '{"text": "a", "tags": ["x"]}')) == ["a"]
    assert texts_of(write(tmp_path / "a.json", '{"body": "a", "tags": ["x"]}'), text_column="body") == ["a"]
    assert texts_of(write(tmp_path / "a.json", '{"id": 1, "body": "a"}')) == ["a"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("id,text\n1,halo\n2,halo, dunia\n", "a.csv line 3 has 3 fields, the header 2"),
        ('text,id\n"halo\ndunia",1\nhalo\n', "a.csv line 4 has 1 field, the header 2"),
        ('id,text\n1,"halo\n2,dunia\n', "a.csv line 2 is no row: unexpected end of data"),
        ('id,text\n1,"halo" dunia\n', "a.csv line 2 is no row: ',' expected after '\"'"),
        ("title,body\na,b\n", "choose with --text_column among 'title', 'body'"),
    ],
)
def test_csv_refuses_a_row_that_does_not_fit_its_header(tmp_path, content, message):
    assert message in refusal(write(tmp_path / "a.csv", content))


def test_csv_takes_one_column_and_fields_of_any_length(tmp_path):
    long = "kata " * 100_000
    assert texts_of(write(tmp_path / "a.csv", f'kalimat\n"halo, dunia"\n\n{long}\n""\n')) == ["halo, dunia", long, ""]


def test_parquet_takes_the_text_types_of_arrow_and_refuses_others(tmp_path):
    path = tmp_path / "a.parquet"
    types = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for data_type in types:
        texts = pyarrow.array(["a", None, "b", "a"]).cast(data_type)
        parquet.write_table(pyarrow.table({"body": texts, "n": [1, 2, 3, 4]}), path)
        assert texts_of(path) == ["a", "", "b", "a"]
    parquet.write_table(pyarrow.table({"messages": [CHAT], "id": ["x"]}), path)
    assert "holds chats ('messages')" in refusal(path)
    parquet.write_table(pyarrow.table({"text": [["a"]], "body": ["x"]}), path)
    assert "'text' is list<" in refusal(path)
    assert "has no column 'txt', it has 'text', 'body'" in refusal(path, text_column="txt")
    assert texts_of(path, text_column="body") == ["x"]


# ------------------------------------------------------------------------------------------------------------- subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500 X1:40 X2:600 Y1:20 Y2:50
<i>Halo</i> <font color="#ffff00">semuanya,</font>
{\\an8}selamat datang.

2
00:00:03,000 --> 00:00:04,000
Apa &amp; kabar? 3 < 4 &lt;b&gt; <3

3
00:01:03,500 --> 01:00:04,000

2024 itu
tahun yang

aneh!
4
01:00:05,000 --> 01:00:06,000
Ya!

5
01:00:06,000 --> 01:00:07,000
Ya!
"""
VTT = """WEBVTT - judul
Kind: captions
Language: id

STYLE
::cue(b) { color: red }

REGION
id:bawah

NOTE catatan
dua baris

pembuka
00:01.000 --> 00:02.500 align:start position:0%
<v Mori>Halo <c.yellow>semuanya,</c></v>
selamat datang.

00:00:03.000 --> 00:00:04.000
Apa &amp; kabar? 3 < 4 &lt;b&gt; <3

NOTE

01:03.500 --> 01:00:04.000
2024 itu
tahun yang
aneh!

01:00:05.000 --> 01:00:06.000
Ya!

01:00:06.000 --> 01:00:07.000
Ya!"""
SPOKEN = "Halo semuanya, selamat datang.\nApa & kabar? 3 < 4 <b> <3 2024 itu tahun yang aneh!\nYa!\nYa!"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_subtitles_give_the_spoken_text_alone(tmp_path, line_end):
    for name, content in (("a.srt", SRT), ("a.vtt", VTT)):
        assert texts_of(write(tmp_path / name, "\ufeff" + content.replace("\n", line_end))) == [SPOKEN]


def rolling(spoken: list[str], blank: str) -> list[tuple[float, float, list[str]]]:
    """Cues as automatic captions have them: a line is spoken below the one before, then stands alone for 10 ms."""
    cues = []
    for number, line in enumerate(spoken):
        above = spoken[number - 1] if number else blank
        cues.append((2.0 * number, 2.0 * number + 1.99, [above, line]))
        cues.append((2.0 * number + 1.99, 2.0 * number + 2.0, [line, blank]))
    return cues


@pytest.mark.parametrize("repeats", [False, True])
def test_subtitles_read_rolling_lines_once(tmp_path, repeats):
    spoken = ["halo semuanya selamat", "datang di siaran", "datang di siaran", "malam ini kita akan"]
    spoken = spoken if repeats else [*dict.fromkeys(spoken)]
    vtt, srt = "WEBVTT\nKind: captions\n", ""
    for number, (start, end, (above, below)) in enumerate(rolling(spoken, " "), start=1):
        times = f"00:00:{start:06.3f} --> 00:00:{end:06.3f}"
        timed = below.replace(" ", "<00:00:00.480><c> ", 1) + "</c>" if number % 2 else below
        vtt += f"\n{times} align:start position:0%\n{above}\n{timed}\n"
        srt += f"{number}\n{times.replace('.', ',')}\n{above.strip()}\n{below.strip()}\n\n"
    expected = " ".join(spoken)
    assert texts_of(write(tmp_path / "a.vtt", vtt)) == texts_of(write(tmp_path / "a.srt", srt)) == [expected]


def test_subtitles_keep_a_line_that_is_said_again_after_a_pause(tmp_path):
    content = "00:01.000 --> 00:02.000\nya\n\n00:05.000 --> 00:06.000\nya\ntentu\n"
    assert texts_of(write(tmp_path / "a.srt", content)) == ["ya ya tentu"]


def test_subtitles_roll_up_over_three_lines(tmp_path):
    spoken = [f"baris {number}" for number in range(8)]
    content = "".join(
        f"{n}\n00:00:{n:02}.0 --> 00:00:{n + 1:02}.0\n" + "\n".join(spoken[max(0, n - 2) : n + 1]) + "\n\n"
        for n in range(len(spoken))
    )
    assert texts_of(write(tmp_path / "a.srt", content)) == [" ".join(spoken)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.srt", "Halo semuanya.\n", "line 1: 'Halo semuanya.' stands in no cue"),
        ("a.srt", SRT + "\n6\n", "line 25: '6' stands in no cue"),
        ("a.srt", SRT + "\n6\n01:00:08,000 -", "line 25: '6' stands in no cue"),
        ("a.vtt", VTT + "\n\n01:00:08.000 --> ", "line 35: '01:00:08.000 --> ' stands in no cue"),
        ("a.vtt", "WEBVTT\n\nhalo\n", "line 3: 'halo' stands in no cue"),
    ],
)
def test_subtitles_refuse_text_outside_of_cues(tmp_path, name, content, message):
    assert message in refusal(write(tmp_path / name, content))


# ---------------------------------------------------------------------------------------------------------------- archives


def test_zip_gives_its_members_as_a_folder_does(tmp_path):
    members = {
        "b.txt": b"b",
        "a/z.jsonl": b'"z1"\n"z2"',
        "a/.hidden.txt": b"h",
        "a/b.csv.gz": gzip.compress(b"text\nx\n"),
    }
    members |= {"c.pdf": b"\0", "d.bin": b"\0", "B.srt": SRT.encode()}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
            write(tmp_path / "folder" / name, raw)
    in_folder = [text for path in find_files([str(tmp_path / "folder")]) for text in texts_of(path)]
    assert texts_of(tmp_path / "a.zip") == in_folder == [SPOKEN, "x", "z1", "z2", "b"]


def test_zip_refuses_what_is_encrypted_nested_or_without_text(tmp_path):
    raw = zipped(b"halo", "a.txt")
    path = write(tmp_path / "a.zip", raw)
    assert texts_of(path) == ["halo"]
    encrypted = raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    assert "texts/a.txt is encrypted" in refusal(write(path, encrypted))
    assert "archive in an archive" in refusal(write(path, zipped(raw, "b.zip")))
    assert "holds no file of a known format" in refusal(write(path, zipped(b"x", "a.png")))
    assert "a.zip: texts/a.jsonl line 1 is not JSON" in refusal(write(path, zipped(b"halo", "a.jsonl")))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_compressed_files_may_hold_an_empty_text(tmp_path, wrapping):
    for outer in ("", ".gz", ".zip"):
        if wrapping and not wrapping.startswith(".zip"):
            raw = WRAPPINGS[outer](WRAPPINGS[wrapping](b"", "a.txt"), f"a.txt{wrapping}")
            assert texts_of(write(tmp_path / f"a.txt{wrapping}{outer}", raw)) == [""]


def test_zst_takes_the_largest_window(tmp_path):
    packer = archives.zstd.ZstdCompressor(options={archives.zstd.CompressionParameter.window_log: 31})
    raw = packer.compress(b"halo", packer.CONTINUE) + packer.flush()
    with pytest.raises(archives.zstd.ZstdError, match="too much memory"):
        archives.zstd.decompress(raw)
    assert texts_of(write(tmp_path / "a.txt.zst", raw)) == ["halo"]


@pytest.mark.parametrize("wrapping", [".gz", ".bz2", ".xz", ".zst", ".zip"])
def test_compressed_files_that_are_cut_off_or_empty_are_told(tmp_path, wrapping):
    content = b"halo dunia apa kabar"
    raw = WRAPPINGS[wrapping](content, "a.txt")
    path = tmp_path / f"a.txt{wrapping}"
    assert texts_of(write(path, raw)) == ["halo dunia apa kabar"]
    for length in range(len(raw)):
        refusal(write(path, raw[:length]))
    assert "damaged" in refusal(write(path, b"halo dunia, apa kabar?"))


# ------------------------------------------------------------------------------------------------------------------- fuzz


def samples() -> dict[str, bytes]:
    return {
        **with_texts(['halo, "dunia"\nbaris', None, "kété 🌧"]),
        "txt": b"halo\r\n",
        "srt": SRT.encode(),
        "vtt": VTT.encode(),
    }


@pytest.mark.parametrize("name", samples())
def test_read_documents_gives_documents_or_one_line_for_every_prefix(tmp_path, name):
    raw = samples()[name]
    path = write(tmp_path / f"a.{name}", raw)
    whole = texts_of(path)
    for length in range(0, len(raw), 1 if len(raw) < 1000 else 7):
        write(path, raw[:length])
        try:
            texts = texts_of(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert len(texts) <= len(whole) and name not in ("json", "strings.json", "parquet"), "a cut list is damage"
        for text, original in zip(texts, whole, strict=False):
            assert original.startswith(text.rstrip("\r\n")) or name in ("srt", "vtt")


@pytest.mark.parametrize("name", samples())
def test_read_documents_gives_documents_or_one_line_for_damaged_bytes(tmp_path, name):
    rng = random.Random(name)
    raw = samples()[name]
    for number in range(150):
        data = bytearray(raw) if number % 5 else bytearray(rng.randbytes(rng.choice((1, 7, 100, 3000))))
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(6)] = rng.randbytes(rng.randrange(6))
        wrapping = rng.choice((*WRAPPINGS, ""))
        path = write(tmp_path / f"a.{name}{wrapping}", WRAPPINGS[wrapping](bytes(data), f"a.{name}"))
        if wrapping and rng.random() < 0.5:
            packed = bytearray(path.read_bytes())
            packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
            write(path, bytes(packed))
        try:
            texts_of(path)
        except UserError as error:
            assert "\n" not in str(error)


# --------------------------------------------------------------------------------------------------------- standard input


@pytest.fixture
def standard_input(monkeypatch):
    """Sets the bytes that come from standard input."""

    def give(content: bytes) -> None:
        files._copy_of_standard_input.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    yield give
    files._copy_of_standard_input.cache_clear()


def test_find_files_copies_standard_input_once(standard_input):
    standard_input("halo\r\ndunia 🌧".encode())
    (path,) = find_files(["-"])
    assert texts_of(path) == texts_of(path) == ["halo\ndunia 🌧"]
    assert find_files(["-", "-"]) == [path]


def test_find_files_refuses_standard_input_that_it_cannot_read_right(standard_input, monkeypatch):
    standard_input(b'{"text": "halo"}\n{"text": "dunia"}\n')
    with pytest.raises(UserError, match="this is JSON; save it as a file with the suffix .jsonl"):
        find_files(["-"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="only one process can read"):
        find_files(["-"])
    assert any("standard input" in mistake for mistake in CompareConfig(corpus=["-"]).mistakes())


# --------------------------------------------------------------------------------------------------------------- the doors


def token_files(runs: str) -> list[str]:
    return [path.name for path in Path(runs, ".cache").glob("tokens-*.bin")]


def test_training_gives_the_same_numbers_in_every_format(tmp_path, settings, run_train, text_file):
    """One token file serves all wrappings, so that their ids are equal; held-out text is read in them, too."""
    texts = [*text_file.read_text(encoding="utf-8").split(". "), None, "", "\n"]
    wrappings = {"jsonl": ".gz", "json": ".zst", "csv": "", "tsv": ".zip", "parquet": ""}
    losses = set()
    for number, (name, wrapping) in enumerate(wrappings.items()):
        path = write(tmp_path / f"rows.{name}{wrapping}", WRAPPINGS[wrapping](with_texts(texts)[name], f"rows.{name}"))
        summary = run_train(corpus=[str(path)], validation_file=[str(path)], run_name=f"{number}", max_steps=2)
        losses.add(json.dumps(summary["eval"]["after"]["loss"]))
        assert len(token_files(settings["logging_dir"])) == len(losses) == 1, path
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        write(tmp_path / "texts" / f"{number:02}.txt", text or "")
    run_train(corpus=[str(tmp_path / "texts")], run_name="plain", max_steps=2)
    assert len(token_files(settings["logging_dir"])) == 1


def test_scripts_take_a_column_an_encoding_and_standard_input(tmp_path, settings, text_file):
    text = text_file.read_text(encoding="utf-8").replace("—", "-").replace("…", ".") + "é"
    settings |= {"max_steps": 2, "corpus": ["-"]}
    trained = run_script("train.py", *flags(settings), input=text)
    assert trained.returncode == 0, trained.stderr
    table = pandas.DataFrame({"judul": ["x"], "isi": [text]})
    table.to_csv(tmp_path / "a.csv.gz", index=False, encoding="cp1252")
    words = ["--model", settings["model"], "--corpus", tmp_path / "a.csv.gz", "--logging_dir", settings["logging_dir"]]
    words += ["--block_size", "16"]
    refused = run_script("evaluate.py", *words, "--encoding", "cp1252")
    assert refused.returncode == 2 and "--text_column among 'judul', 'isi'" in refused.stderr
    assert "Traceback" not in refused.stderr and refused.stderr.count("\n") == 2  # the first line says what is loaded
    assert run_script("evaluate.py", *words, "--text_column", "isi").stderr.count("is not UTF-8") == 1
    scored = run_script("evaluate.py", *words, "--encoding", "cp1252", "--text_column", "isi")
    assert scored.returncode == 0, scored.stderr
    assert len(token_files(settings["logging_dir"])) == 1
