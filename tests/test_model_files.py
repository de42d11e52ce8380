"""A sound model folder loads; a malformed or hostile one is refused before it is read."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import struct
import threading
from pathlib import Path

import pytest
import torch
from conftest import STORIES, needs_stories, run_script
from families import FAMILIES, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mori.cli import UserError
from mori.model import loading as models
from mori.model.files import Stored, check_folder


def load(folder):
    tokenizer = models.load_tokenizer(str(folder), ())
    return models.load_model(str(folder), models.load_config(str(folder), tokenizer))


@pytest.fixture
def folder(small_model, tmp_path):
    """A copy of the small model."""
    return shutil.copytree(small_model, tmp_path / "model")


def change_config(folder, **changed) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["whole", "sharded", "bin"])
def test_check_accepts_every_family(tokenizer, tmp_path, family, form):
    model = small_model(family, len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    if form == "bin":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1 or form == "whole"
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@needs_stories
def test_check_accepts_a_published_model():
    stored = check_folder(STORIES)
    assert stored.elements == sum(tensor.numel() for tensor in load_file(STORIES / "model.safetensors").values())
    load(STORIES)


def test_check_follows_links_to_the_blobs_of_the_hub_cache_only(small_model, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in small_model.iterdir():
        (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    load(snapshot)
    (tmp_path / "outside").write_text("{}")
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to("../../../outside")
    with pytest.raises(UserError, match="leads out"):
        load(snapshot)


def test_check_follows_links_inside_the_folder_and_to_the_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


def test_check_accepts_paths_that_exist_only_on_the_author_s_machine(folder):
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "special_tokens_map_file": "/home/author/special_tokens_map.json"}
    path.write_text(json.dumps(settings))
    load(folder)


@pytest.mark.parametrize(
    "noted",
    [
        {"rope_theta": 1e9, "total_params": 1e11, "model_max_length": 1e30},
        {"n_ctx": 10_485_760, "rope_theta": 10_000_000, "original_max_position_embeddings": 4_194_304},
        {"training_date": 20250114, "num_train_tokens": 3 * 10**12, "notes": {"n_layer": 10**9, "seed": 2**63}},
        {"model_type": "llama", "rope_theta": 10**9, "eos_token_id": 2**24 + 1, "max_position_embeddings": 2**25},
        {
            "model_type": "llama",
            "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 10**8, "rope_theta": 10**9},
        },
        {"id2label": {str(n): f"label {n}" for n in range(2000)}, "label2id": {f"label {n}": n for n in range(2000)}},
    ],
)
def test_check_accepts_numbers_of_real_models(folder, noted):
    change_config(folder, **noted)
    assert check_folder(folder).tensors > 0
    if noted.get("model_type", "gpt2") == "gpt2":
        load(folder)


@pytest.mark.parametrize(
    "changed, key",
    [
        ({"num_labels": 2**22}, "num_labels"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 2**23]] * 9}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": [{"deep": [{"n": -(10**30)}]}]}, "n"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 10**9}, "first_k_dense_replace"),
    ],
)
def test_check_refuses_integers_that_make_huge_lists(folder, changed, key):
    change_config(folder, **changed)
    with pytest.raises(UserError, match=f"the integer {key} in config.json is too large"):
        load(folder)


@pytest.mark.parametrize("n_layer, vocabulary", [(5000, 320), (2, 2**19), (2, 2**24), (2**24, 320)])
def test_loading_refuses_a_model_that_its_weights_do_not_fill(folder, small_model, n_layer, vocabulary):
    change_config(folder, n_layer=n_layer, vocab_size=vocabulary)
    with pytest.raises(UserError, match="far larger model than the weights"):
        load(folder)
    assert not torch.nn.modules.module._global_parameter_registration_hooks, "the hooks are removed after loading"
    AutoModelForCausalLM.from_pretrained(small_model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header["a"].update(shape=[2**40, 2**40]),
        lambda header: header["a"].update(shape=[-2, -2]),
        lambda header: header["a"].update(dtype="F64"),
        lambda header: header["a"].update(data_offsets=[0, 10**6]),
        lambda header: header["a"].update(data_offsets="x"),
        lambda header: header.update(a=None),
    ],
)
def test_check_refuses_a_header_that_does_not_match_the_file(tmp_path, damage):
    header = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}

    def write():
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))

    (tmp_path / "config.json").write_text("{}")
    write()
    assert check_folder(tmp_path) == Stored(elements=4, tensors=1)
    damage(header)
    write()
    with pytest.raises(UserError, match="impossible size|damaged"):
        check_folder(tmp_path)


def links_beside(folder):
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/python3").symlink_to("/usr/bin/env")
    (folder / "debug-core.log").symlink_to("/nowhere/debug-core.log")
    (folder / "notes.txt").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "venv/pipe")


def settings_beside(folder):
    (folder / "wandb_config.json").write_text("{not json")
    (folder / "trainer_config.json").write_text('{"log_file": "/etc/hostname"}')
    with (folder / "trainer_state.json").open("wb") as file:
        file.truncate(1 << 30)


def weights_beside(folder):
    """Files of another format, or of another program."""
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "text_encoder.index.json").write_text("[]")
    (folder / "optimizer.bin").write_bytes(b"x")
    (folder / "optimizer.safetensors").write_bytes(b"\xff" * 16)
    with (folder / "consolidated.safetensors").open("wb") as file:
        file.truncate(1 << 42)
    (folder / "shard-00000.pt").write_bytes(b"x")


@pytest.mark.parametrize("beside", [links_beside, settings_beside, weights_beside])
def test_check_looks_only_at_what_is_loaded(folder, beside):
    before = check_folder(folder)
    beside(folder)
    load(folder)
    assert check_folder(folder) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "spiece.model"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_check_refuses_a_link_or_a_pipe_in_the_place_of_a_loaded_file(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="leads out" if kind == "link" else "neither a plain file"):
        check_folder(folder)


def test_check_reads_the_weights_that_the_config_names(folder):
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    change_config(folder, transformers_weights="own.safetensors")
    (folder / "model.safetensors").write_bytes(b"x")
    assert check_folder(folder).tensors > 0


def hub_cache(folder: Path, model: Path) -> Path:
    """A cache of the hub that holds `model` under the name someone/tiny."""
    root = folder / "hub" / "models--someone--tiny"
    shutil.copytree(model, root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    return folder


def test_cached_model_asks_an_unavailable_hub_once_and_takes_local_files(small_model, tmp_path):
    questions = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    questions.append(1)
                    connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {**os.environ, "HF_HOME": str(hub_cache(tmp_path, small_model)), "HF_ENDPOINT": endpoint}
        env |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        words = ("--model", "someone/tiny", "--prompt", "Halo", "--max_new_tokens", "2")
        result = run_script("generate.py", *words, env=env)
    assert result.returncode == 0 and result.stdout.startswith("Halo"), result.stderr
    assert result.stderr.count("note: the hub is not available") == 1 and "local cache" in result.stderr
    assert len(questions) <= 2  # the client may repeat a connection that was closed


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_pointer_of_git_lfs_is_named_with_the_mend(small_model, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 1044992\n")
    with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS .* git lfs pull"):
        models.check_reachable(str(folder))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrapped_models_are_taken_off(small_model, tmp_path, capsys, prefix):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    tensors = load_file(small_model / "model.safetensors")
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    config = models.load_config(str(folder), None)
    model = models.load_model(str(folder), config)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert "which is taken off" in capsys.readouterr().err
    wrapped.popitem()
    save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not hold all its weights"):
        models.load_model(str(folder), config)


def test_tokenizer_model_alone_names_sentencepiece(small_model, tmp_path):
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is at hand")
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match="takes sentencepiece: pip install sentencepiece"):
        models.load_tokenizer(str(folder), ())
