"""Malformed and hostile inputs, each met as a user would meet it: through the doors, in a process of its own.

Held is a case that ends in time, in bounded memory, well or with one line of error, runs no code that came with the input,
and reads nothing of what lies outside the folder that was named.
"""

import contextlib
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from tests.faults import packed

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 30
MEMORY_BYTES = 1536 << 20  # above what the libraries take themselves
SECRET = "8d41c0ffee-outside-the-folder"
STEPS, SAVE_STEPS = 6, 2


class Place:
    """One case's copy of the good inputs, and what lies beside it: a secret that nobody may read, a canary for code that ran."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.text, self.runs = folder / "model", folder / "text.txt", folder / "runs"
        self.secrets, self.canary = folder / "elsewhere", folder / "canary"

    @property
    def run(self) -> Path:
        """The folder of a run that was stopped after its second checkpoint."""
        return self.runs / "run"

    def train(self, **changed) -> tuple[str, dict]:
        """A call of the door to training, from the case's folder."""
        flags = {
            "model": "model", "corpus": "text.txt", "block_size": 16, "max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 3,
            "eval_steps": STEPS, "max_new_tokens": 2, "prompt": "Halo", "logging_dir": "runs", "run_name": "run",
            "output_dir": "brain", "device": "cpu",
        }  # fmt: skip
        return "train.py", flags | changed

    def speak(self) -> tuple[str, dict]:
        """A call of the door to generation, with the case's model."""
        return "generate.py", {"model": "model", "prompt": "Halo", "max_new_tokens": 2, "device": "cpu"}


@dataclass
class Case:
    """One input: `make` damages a Place by the generator it is given, and returns the door to call with its flags."""

    name: str
    kind: str
    seed: int
    make: Callable[[Place, random.Random], tuple[str, dict]]


# ---------------------------------------------------------------------------------------------------------- malformed


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """`raw`, damaged in one of the ways in which files are."""
    at, data = rng.randrange(len(raw) + 1), bytearray(raw)
    way = rng.randrange(8)
    if way == 0:
        for _ in range(rng.choice((1, 1, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if way == 1:
        return raw[:at]
    if way == 2:
        return raw[at:]
    if way == 3:
        return raw[:at] + rng.randbytes(rng.randrange(1, 200)) + raw[at:]
    if way == 4:
        return raw[:at] + bytes(min(4096, len(raw) - at)) + raw[at + 4096 :]
    if way == 5:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 100, 5000)))
    if way == 6:
        return raw[:at] + raw[at // 2 : at] + raw[at:]
    return rng.choice((b"", b"{}", b"[]", b"null", b'"x"', b"[" * 100_000, b"\xef\xbb\xbf", b"NaN", b'{"a":' * 100_000))


ODD_VALUES = (
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**9, 10**12, 10**30, -(10**9), 0.5, 1e9, 1e308, float("nan"), float("inf"), "",
    "x", "../../etc/passwd", "\ud800", [], [1, 2], [None], {}, {"a": {"b": []}}, [[["global"], 10**9]], "9" * 50, "gelu", "cuda",
)  # fmt: skip


def change_json(path: Path, rng: random.Random, changes: int = 1) -> None:
    """Put odd values in a JSON file, at any depth; now and then, leave a key out."""
    value = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(changes):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            if rng.random() < 0.2:
                del place[key]
            else:
                place[key] = rng.choice(ODD_VALUES)
            break
        if not value:
            break
    path.write_text(json.dumps(value), encoding="utf-8")


def bad_text(place: Place, rng: random.Random):
    """A text that is damaged."""
    place.text.write_bytes(mutated(place.text.read_bytes(), rng))
    return place.train(run_name="other")


def bad_corpus_name(place: Place, rng: random.Random):
    """A word for --corpus that names nothing, or something odd."""
    words = [
        "none.txt", "", " ", "*.md", "?", "[", "[a-", "?.txt", "~nobody/x", "x" * 5000, "a/" * 3000, "/dev/null", "/dev/zero", "model",
        "text.txt/", "text.txt/x", "\\", "%s", "{}", "-", "text.txt\n", "téxt 🌧", "*/" * 30 + "*", "./text.txt", "runs", "brain",
    ]  # fmt: skip
    return place.train(corpus=rng.choice(words), run_name="other")


def odd_corpus_folder(place: Place, rng: random.Random):
    """A folder with texts of which one or two are odd."""
    folder = place.folder / "texts"
    folder.mkdir()
    for number in range(3):
        raw = place.text.read_bytes()
        (folder / f"{number}.txt").write_bytes(raw if rng.random() < 0.6 else mutated(raw, rng))
    if rng.random() < 0.5:
        (folder / "folder.txt").mkdir()
    if rng.random() < 0.3:
        (folder / "loop.txt").symlink_to("loop.txt")
    return place.train(corpus=folder, run_name="other")


def bad_flags(place: Place, rng: random.Random):
    """Values for flags that cannot be, two or three at once."""
    flags = (
        "block_size held_out_fraction per_device_train_batch_size gradient_accumulation_steps learning_rate warmup_steps weight_decay "
        "lr_scheduler_type adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed precision device logging_steps eval_steps save_steps "
        "save_total_limit run_name resume_from_checkpoint temperature top_k top_p repetition_penalty max_new_tokens dropout "
        "num_train_epochs per_device_eval_batch_size max_nonfinite_steps output_dir logging_dir no_such_flag model prompt"
    ).split()
    values = "nan inf -inf -1 0 1e309 1e-309 999999999999 -0 0x10 1_0 ٣ 🌧 None null true a/b ../x [] {} cuda:99 mps x".split()
    values += ["", " ", "x" * 300, "1,2", "--seed"]
    chosen = {rng.choice(flags): rng.choice(values) for _ in range(rng.randrange(1, 4))}
    if chosen.get("num_train_epochs"):
        chosen["max_steps"] = STEPS
    return place.train(**{"run_name": "other", **chosen})


def bad_model_file(place: Place, rng: random.Random):
    """A file of the model's folder, damaged, missing, or a folder."""
    path = rng.choice(sorted(place.model.iterdir()))
    way = rng.random()
    if way < 0.8:
        path.write_bytes(mutated(path.read_bytes(), rng))
    else:
        path.unlink()
        if way > 0.9:
            path.mkdir()
    return rng.choice((place.speak(), place.train(run_name="other")))


def bad_model_setting(place: Place, rng: random.Random):
    """Odd values in the JSON of the model's folder."""
    names = ["config.json"] * 4 + ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    change_json(place.model / rng.choice(names), rng, rng.choice((1, 1, 2, 5)))
    return rng.choice((place.speak(), place.train(run_name="other")))


def bad_weights_header(place: Place, rng: random.Random):
    """A safetensors file whose header says other things than the file holds."""
    path = place.model / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    header[name][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
        (*ODD_VALUES, [2**62, 2**62], [10**12], [-1, 5], [0, 10**12], "F64", "I8")
    )
    text = json.dumps(header).encode()
    length = rng.choice((len(text), len(text), len(text), 0, 2**63, 2**40, len(raw) * 2, len(text) - 1))
    path.write_bytes(struct.pack("<Q", length) + text + raw[8 + struct.unpack("<Q", raw[:8])[0] :])
    return rng.choice((place.speak(), place.train(run_name="other")))


def odd_tokenizer(place: Place, rng: random.Random):
    """A tokenizer that can be loaded, but has no token for unknown words, or ids far apart, or a search that never ends."""
    path = place.model / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    way = rng.randrange(6)
    if way == 0:
        words = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"halo": 0, "a": 1}}
        value["model"] = {"type": "WordPiece", "unk_token": "[UNK]", **words}
    elif way == 1:
        value["model"] = {"type": "WordLevel", "vocab": {"halo": 0}, "unk_token": "<unk>"}
    elif way == 2:
        value["model"] = {"type": "Unigram", "unk_id": rng.choice((None, 5, 0)), "vocab": [["a", -1.0]]}
    elif way == 3:
        vocabulary = value["model"]["vocab"]
        for word in vocabulary:
            vocabulary[word] = rng.choice((0, 2**32 - 1, 70_000, vocabulary[word]))
    elif way == 4:
        value["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        }
        place.text.write_text(("a" * 5000 + "b ") + place.text.read_text(encoding="utf-8"), encoding="utf-8")
    else:
        fill = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        value["padding"] = {"strategy": {"Fixed": 10**9}, **fill}
        value["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(value), encoding="utf-8")
    return rng.choice((place.speak(), place.train(run_name="other")))


def bad_checkpoint(place: Place, rng: random.Random):
    """A file of the newest checkpoint, or of both, damaged."""
    folders = sorted((place.run / "checkpoints").iterdir())
    for folder in folders if rng.random() < 0.3 else folders[-1:]:
        path = rng.choice(sorted(folder.iterdir()))
        if rng.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(mutated(path.read_bytes(), rng))
    return place.train()


def resealed_checkpoint(place: Place, rng: random.Random):
    """The newest checkpoint with another content, and a manifest that vouches for it."""
    folder = sorted((place.run / "checkpoints").iterdir())[-1]
    if rng.random() < 0.7:
        change_json(folder / "state.json", rng, rng.choice((1, 1, 3)))
    else:
        path = folder / rng.choice(("state.json", "model.safetensors", "optimizer.safetensors"))
        path.write_bytes(mutated(path.read_bytes(), rng))
    reseal(folder)
    return place.train()


def reseal(folder: Path) -> None:
    """Write a manifest that matches the changed files of a checkpoint."""
    from mori.checkpoint import checkpoints as checkpoint
    from mori.checkpoint.files import describe

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    checkpoint.write_manifest(folder, manifest["step"], {name: describe(folder / name) for name in manifest["files"]})


def bad_run_file(place: Place, rng: random.Random):
    """What a run leaves beside its checkpoints, damaged."""
    path = place.run / rng.choice(("metrics.jsonl", "config.json", "environment.json", "ledger.json"))
    path.write_bytes(mutated(path.read_bytes(), rng))
    return place.train()


def bad_cache(place: Place, rng: random.Random):
    """The token file of a run that is resumed, damaged; now and then with a seal that fits."""
    from mori.data import token_file

    (path,) = (place.runs / ".cache").glob("tokens-*.bin")
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[8:16])[0]
    header = json.loads(raw[16 : 16 + length])
    if rng.random() < 0.4:
        path.write_bytes(mutated(raw, rng))
        return place.train()
    key = rng.choice(sorted(header))
    header[key] = rng.choice((*ODD_VALUES, "object", "float64", [0, -5], [10**12], ["x"]))
    if rng.random() < 0.3:
        ids = raw[token_file.data_start(length) :]
        header["sha256"] = token_file.header_hash(
            {k: v for k, v in header.items() if k != "sha256"}, [numpy.frombuffer(ids, numpy.uint8)]
        )
    text = json.dumps(header).encode()
    said = rng.choice((len(text), len(text), 2**63, 10**9))
    start = token_file.data_start(len(text))
    head = raw[:8] + struct.pack("<Q", said) + text
    path.write_bytes(head.ljust(start, b"\0") + raw[token_file.data_start(length) :])
    return place.train()


def bad_rows(place: Place, rng: random.Random):
    """The text as rows or subtitles, compressed or not, damaged before or after that."""
    suffix, raw = rng.choice(sorted(packed.as_rows(place.text.read_text(encoding="utf-8")).items()))
    wrapping = rng.choice(sorted(packed.PACKERS))
    pack = packed.PACKERS[wrapping]
    before = rng.random() < 0.5
    content = pack(mutated(raw, rng), f"a{suffix}") if before else mutated(pack(raw, f"a{suffix}"), rng)
    path = place.folder / f"a{suffix}{wrapping}"
    path.write_bytes(content)
    return place.train(corpus=path, run_name="other")


MALFORMED = {
    bad_text: 45, bad_corpus_name: 25, odd_corpus_folder: 15, bad_flags: 50, bad_model_file: 45, bad_model_setting: 60,
    bad_weights_header: 20, odd_tokenizer: 18, bad_checkpoint: 30, resealed_checkpoint: 40, bad_run_file: 15, bad_cache: 30,
    bad_rows: 60,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ hostile


class _Touch:
    """Unpickled by a loader that trusts what it reads, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _config(place: Place, file: str = "config.json", **changed) -> None:
    path = place.model / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}), encoding="utf-8")


def _code(place: Place, name: str) -> None:
    (place.model / name).write_text(f"import os\nos.system('touch {place.canary}')\n", encoding="utf-8")


def _only_bin(place: Place, content: bytes, name: str = "pytorch_model.bin") -> None:
    (place.model / "model.safetensors").unlink()
    (place.model / name).write_bytes(content)


def _zipped_pickle(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    with zipfile.ZipFile(place.model / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"transformer.wte.weight": _Touch(place.canary)}))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def _index(place: Place, shard: object, name: str = "model.safetensors.index.json") -> None:
    (place.model / "model.safetensors").rename(place.model / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"transformer.wte.weight": shard}}
    (place.model / name).write_text(json.dumps(index), encoding="utf-8")


def _link(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # a socket's name may have a hundred bytes
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.fchdir(here)
    os.close(here)


def _sparse(path: Path, size: int = 1 << 40, head: bytes = b"") -> None:
    path.write_bytes(head)
    os.truncate(path, size)


def _header(place: Place, length: int, text: bytes = b"{}", size: int | None = None) -> None:
    path = place.model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text)
    if size:
        os.truncate(path, size)


def _deep(path: Path) -> None:
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000, encoding="utf-8")


def _large_json(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write('{"a": [')
        for _ in range(200):
            file.write("{}," * 349_000)
        file.write("{}]}")


def _texts(place: Place) -> Path:
    folder = place.folder / "texts"
    folder.mkdir()
    shutil.copy(place.text, folder / "a.txt")
    return folder


def _hostile_models() -> Iterator[tuple[str, Callable[[Place], None]]]:
    yield "pickle as weights", lambda p: _only_bin(p, pickle.dumps(_Touch(p.canary)))
    yield "pickle in an archive as weights", _zipped_pickle
    yield "pickle of the first protocol as weights", lambda p: _only_bin(p, pickle.dumps(_Touch(p.canary), 0))
    yield (
        "pickle under the name of safetensors",
        lambda p: (p.model / "model.safetensors").write_bytes(pickle.dumps(_Touch(p.canary))),
    )
    yield (
        "pickled shard",
        lambda p: (
            _only_bin(p, pickle.dumps(_Touch(p.canary)), "s.bin"),
            (p.model / "pytorch_model.bin.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "s.bin"}})
            ),
        ),
    )
    yield (
        "pickle as a distributed checkpoint",
        lambda p: (
            (p.model / ".metadata").write_bytes(pickle.dumps(_Touch(p.canary))),
            (p.model / "model.safetensors").rename(p.model / "shard-00001-model-00001-of-00001.safetensors"),
        ),
    )
    yield "shard above the folder", lambda p: _index(p, "../elsewhere/secret.safetensors")
    yield "shard by absolute path", lambda p: _index(p, str(p.secrets / "secret.safetensors"))
    yield (
        "shard above the folder, pickled",
        lambda p: (
            (p.model / "model.safetensors").unlink(),
            (p.model / "pytorch_model.bin.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "../elsewhere/secret.bin"}})
            ),
        ),
    )
    yield "shard that is no name", lambda p: _index(p, {"a": 1})
    yield "shard with a NUL", lambda p: _index(p, "a\0b")
    yield "config names weights outside", lambda p: _config(p, transformers_weights="../elsewhere/secret.safetensors")
    yield (
        "tokenizer version outside",
        lambda p: _config(p, "tokenizer_config.json", fast_tokenizer_files=["../elsewhere/tokenizer.1.0.json"]),
    )
    yield (
        "tokenizer names a vocabulary outside",
        lambda p: _config(
            p,
            "tokenizer_config.json",
            vocab_file=str(p.secrets / "secret.txt"),
            merges_file=str(p.secrets / "secret.txt"),
        ),
    )
    yield (
        "tokenizer names a gguf outside",
        lambda p: _config(p, "tokenizer_config.json", gguf_file=str(p.secrets / "secret.txt")),
    )
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        yield f"{name} is a link to elsewhere", lambda p, name=name: _link(p.model / name, p.secrets / "secret.txt")
    yield "a folder that is a link to elsewhere", lambda p: _link(p.model / "additional_chat_templates", p.secrets)
    yield "a link to itself", lambda p: _link(p.model / "generation_config.json", "generation_config.json")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        yield f"{name} is a pipe", lambda p, name=name: _fifo(p.model / name)
    yield "tokenizer_config.json is a socket", lambda p: _socket(p.model / "tokenizer_config.json")
    yield "generation_config.json is a device", lambda p: _link(p.model / "generation_config.json", "/dev/zero")
    yield (
        "code for the model",
        lambda p: (
            _config(p, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
            _code(p, "evil.py"),
        ),
    )
    yield (
        "code for the tokenizer",
        lambda p: (
            _config(p, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]}),
            _code(p, "evil.py"),
        ),
    )
    yield (
        "code for generation",
        lambda p: (
            (p.model / "custom_generate").mkdir(),
            _code(p, "custom_generate/generate.py"),
            _config(p, "generation_config.json", custom_generate="custom_generate"),
        ),
    )
    yield "attention from the hub", lambda p: _config(p, attn_implementation="evil/kernel:attention")
    yield (
        "adapter of a model elsewhere",
        lambda p: (p.model / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(p.secrets), "peft_type": "LORA"})
        ),
    )
    yield (
        "quantized by an unknown package",
        lambda p: _config(p, quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    yield (
        "a template that is code",
        lambda p: (p.model / "chat_template.jinja").write_text(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}x{% endfor %}"
        ),
    )
    for key, value in (
        ("n_layer", 10**9), ("n_layer", 1_000_000), ("vocab_size", 10**12), ("vocab_size", 10**7), ("n_positions", 10**9),
        ("n_embd", 2**40), ("num_labels", 10**9), ("n_inner", 10**11), ("n_head", 0), ("layer_norm_epsilon", "x"),
    ):  # fmt: skip
        yield f"config says {key} {value}", lambda p, key=key, value=value: _config(p, **{key: value})
    yield (
        "config makes a list of a billion",
        lambda p: _config(p, model_type="gpt_neo", attention_types=[[["global"], 10**9]]),
    )
    yield "config of 200 MB", lambda p: _large_json(p.model / "config.json")
    yield "tokenizer of 200 MB", lambda p: _large_json(p.model / "tokenizer.json")
    yield "config nested deeply", lambda p: _deep(p.model / "config.json")
    yield "tokenizer nested deeply", lambda p: _deep(p.model / "tokenizer.json")
    yield "tokenizer config nested deeply", lambda p: _deep(p.model / "tokenizer_config.json")
    yield "index nested deeply", lambda p: (_index(p, "x"), _deep(p.model / "model.safetensors.index.json"))
    yield "header of a petabyte", lambda p: _header(p, 1 << 50)
    yield "header of 90 MB", lambda p: _header(p, 90_000_000, b"{" * 90_000_000)
    yield "header as large as a sparse file", lambda p: _header(p, (1 << 40) - 8, size=1 << 40)
    yield (
        "tensor of a terabyte in a sparse file",
        lambda p: (
            _config(p, vocab_size=1 << 31, n_embd=128, n_head=1),
            _sparse(
                p.model / "model.safetensors",
                8 + 300 + (1 << 40),
                struct.pack("<Q", 300)
                + json.dumps(
                    {
                        "transformer.wte.weight": {
                            "dtype": "F32",
                            "shape": [1 << 31, 128],
                            "data_offsets": [0, 1 << 40],
                        }
                    }
                )
                .encode()
                .ljust(300),
            ),
        ),
    )
    yield "sparse weights of a terabyte", lambda p: _only_bin(p, b"") or _sparse(p.model / "pytorch_model.bin")
    yield "sparse tokenizer of a terabyte", lambda p: _sparse(p.model / "tokenizer.json")


def _hostile_texts() -> Iterator[tuple[str, Callable[[Place], dict]]]:
    yield "text is a pipe", lambda p: _fifo(p.text) or {}
    yield "text is a socket", lambda p: _socket(p.text) or {}
    yield "text is a device", lambda p: {"corpus": "/dev/zero"}
    yield "sparse text of a terabyte", lambda p: _sparse(p.text) or {}
    yield "pipe in the corpus folder", lambda p: {"corpus": (f := _texts(p), _fifo(f / "b.txt"))[0]}
    yield (
        "link in the corpus folder to elsewhere",
        lambda p: {"corpus": (f := _texts(p), _link(f / "b.txt", p.secrets / "secret.txt"))[0]},
    )
    yield (
        "link in the corpus folder to a folder elsewhere",
        lambda p: {"corpus": (f := _texts(p), _link(f / "b", p.secrets))[0]},
    )
    yield (
        "link in the corpus folder to a device",
        lambda p: {"corpus": (f := _texts(p), _link(f / "b.txt", "/dev/zero"))[0]},
    )
    for name, write in packed.hostile():
        yield name, lambda p, write=write: {"corpus": write(p.folder)}
    yield "sparse file in the corpus folder", lambda p: {"corpus": (f := _texts(p), _sparse(f / "b.txt"))[0]}


def _with_model(damage: Callable, door: str):
    def make(place: Place, rng: random.Random):
        damage(place)
        return place.speak() if door == "speak" else place.train(run_name="other")

    return make


def _with_text(damage: Callable):
    return lambda place, rng: place.train(**{"run_name": "other", **damage(place)})


def hostile_checkpoint(place: Place, rng: random.Random):
    """A manifest that vouches for a file outside its folder."""
    folder = sorted((place.run / "checkpoints").iterdir())[-1]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["../../../../elsewhere/secret.txt"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return place.train()


def hostile_cache(place: Place, rng: random.Random):
    """A pipe where the token file was."""
    (path,) = (place.runs / ".cache").glob("tokens-*.bin")
    _fifo(path)
    return place.train()


def cases(seed: int) -> list[Case]:
    """All the cases of the campaign, the same for the same seed."""
    rng = random.Random(seed)
    made = [
        Case(f"{make.__name__} {number}", "malformed", rng.randrange(1 << 32), make)
        for make, count in MALFORMED.items()
        for number in range(count)
    ]
    for number, (name, damage) in enumerate(_hostile_models()):
        door = "speak" if number % 2 else "train"
        made.append(Case(f"{name} ({door})", "hostile", seed, _with_model(damage, door)))
    made += [Case(name, "hostile", seed, _with_text(damage)) for name, damage in _hostile_texts()]
    made += [Case(make.__name__, "hostile", seed, make) for make in (hostile_checkpoint, hostile_cache)]
    return made


# -------------------------------------------------------------------------------------------------------- running them


def prepare(folder: Path) -> None:
    """Make the good inputs in `folder`: a model, a text, a run of which the last checkpoint is gone; and the secrets."""
    _in_child(lambda: _prepare(folder), folder / "prepare.log", 120)
    if not (folder / "runs/run/checkpoints").is_dir():
        raise RuntimeError((folder / "prepare.log").read_text())


def _prepare(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from mori.data.files import SHIPPED
    from mori.model.loading import train_tokenizer

    place = Place(folder)
    text = sorted(SHIPPED.glob("*.txt"))[0].read_text(encoding="utf-8")[:2500]
    place.text.write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer([text], 320)
    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), **shape))
    model.save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    place.secrets.mkdir()
    for name in ("secret.txt", "secret.bin", "secret.jinja"):
        (place.secrets / name).write_text((SECRET + " ") * 400)
    shutil.copy(place.model / "model.safetensors", place.secrets / "secret.safetensors")
    shutil.copy(place.model / "tokenizer.json", place.secrets / "tokenizer.1.0.json")
    with contextlib.suppress(SystemExit):
        _through_the_door(*place.train())
    shutil.rmtree(place.run / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(folder / "brain")
    (place.run / "summary.json").unlink()


def meet(case: Case, good: Path) -> dict:
    """Run one case on a copy of the inputs in `good`; what became of it, with `failures` in words (none: it held)."""
    with tempfile.TemporaryDirectory(prefix="mori-input-") as name:
        folder = Path(name).resolve()
        place = Place(folder)
        for part in ("model", "runs", "elsewhere"):
            shutil.copytree(good / part, folder / part)
        shutil.copy(good / "text.txt", folder)
        made = case.make(place, random.Random(case.seed))
        for path in place.secrets.iterdir():
            os.utime(path, (0, path.stat().st_mtime))  # older than its content: the next read moves it (relatime)
        started = time.perf_counter()
        log = folder / "log"
        code, peak = _in_child(lambda: _through_the_door(*made), log, TIMEOUT_SECONDS)
        seconds = time.perf_counter() - started
        said = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith((f"{made[0]}: error: ", f"{made[0]}: failed: "))]
        one_line = len(told) == 1 and lines[-1] == told[0]
        failures = {
            "hang": code is None,
            "traceback": "Traceback" in said,
            f"exit code {code}": code not in (0, 1, 2, None),
            "no single line of error": code in (1, 2) and not one_line,
            "a failure that is a mistake of the input": code == 1 and not (told and "failed" in told[0]),
            "an error and a good end": code == 0 and bool(told),
            f"{peak >> 20} MiB": peak > MEMORY_BYTES,
            "code ran": place.canary.exists(),
            "read outside": any(path.stat().st_atime > 0 for path in place.secrets.iterdir()),
            "a secret came out": SECRET in said or any(_holds_secret(path, place) for path in folder.rglob("*")),
        }
        found = [what for what, is_so in failures.items() if is_so]
        return {"name": case.name, "kind": case.kind, "seed": case.seed, "code": code, "seconds": seconds,
                "peak": peak, "failures": found, "said": lines[-30 if found else -1 :]}  # fmt: skip


def _holds_secret(path: Path, place: Place) -> bool:
    if path.is_symlink() or not path.is_file() or path.is_relative_to(place.secrets) or path.stat().st_size > 1 << 24:
        return False
    return SECRET.encode() in path.read_bytes()


def _through_the_door(script: str, flags: dict) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


def _in_child(action: Callable[[], None], log: Path, timeout: float) -> tuple[int | None, int]:
    """Call `action` in a fork of this process, its output in `log`; the exit code (None: killed in time) and memory taken.

    This process has imported all that is slow, and has run no thread.
    """
    import mori.generation.generate
    import mori.train  # noqa: F401

    sys.stdout.flush()
    sys.stderr.flush()
    before = _rss(os.getpid())
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(log.parent)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            action()
            code = 0
        except SystemExit as leave:
            code = leave.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 70)
    deadline, ended, hung = time.monotonic() + timeout, 0, False
    while not ended:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if not ended and not hung and (time.monotonic() > deadline or _rss(child) > (4 << 30)):
            os.kill(child, signal.SIGKILL)
            hung = True
        time.sleep(0.01)
    return None if hung else os.waitstatus_to_exitcode(status), max(0, usage.ru_maxrss * 1024 - before)


def _rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def atime_moves(folder: Path) -> bool:
    """Whether a read leaves a trace in the file's times here."""
    probe = folder / "probe"
    probe.write_text("x")
    os.utime(probe, (0, probe.stat().st_mtime))
    probe.read_text()
    return probe.stat().st_atime > 0


SMALL = (
    "pickle in an archive as weights", "pickle as weights", "shard above the folder", "config.json is a link", "tokenizer.json is a pipe",
    "code for the model", "config says n_layer 1000000000", "header of a petabyte", "text is a pipe", "link in the corpus folder to elsewhere",
    "sparse text", "bad_cache 0", "bad_model_setting 0", "bad_weights_header 0", "tokenizer version outside", "odd_tokenizer 0", "bad_rows 0", "JSON line of many lists",
)  # fmt: skip


def small(seed: int) -> list[Case]:
    """The few cases that run with every change."""
    return [next(case for case in cases(seed) if case.name.startswith(name)) for name in SMALL]


def run(full: bool, seed: int) -> list[dict]:
    """Run the campaign, or its small part; a row for each kind: name, tried, held, seconds, seed, failures."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="mori-inputs-") as name:
        good = Path(name).resolve()
        if not atime_moves(good):
            raise RuntimeError(f"{good} does not note when a file is read; set TMPDIR to a folder that does")
        prepare(good)
        results = [meet(case, good) for case in (cases(seed) if full else small(seed))]
    rows = []
    for kind in ("malformed", "hostile"):
        mine = [result for result in results if result["kind"] == kind]
        failed = [result for result in mine if result["failures"]]
        rows.append({"name": f"{kind} inputs", "tried": len(mine), "held": len(mine) - len(failed), "seed": seed,
                     "seconds": round(sum(result["seconds"] for result in mine), 1),
                     "peak_mib": max((result["peak"] for result in mine), default=0) >> 20, "failures": failed})  # fmt: skip
    return rows
