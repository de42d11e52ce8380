"""A sound model folder loads; a malformed or hostile one is refused before it is read."""

import json
import os
import shutil
import struct

import pytest
import torch
from conftest import STORIES, needs_stories
from families import FAMILIES, small_model
from safetensors.torch import load_file
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
        {"id2label": {str(n): f"label {n}" for n in range(2000)}, "label2id": {f"label {n}": n for n in range(2000)}},
    ],
)
def test_check_accepts_numbers_of_real_models(folder, noted):
    change_config(folder, **noted)
    load(folder)


@pytest.mark.parametrize(
    "changed, key",
    [
        ({"num_labels": 2**22}, "num_labels"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, "attention_types"),
        ({"attention_types": [[["global"], 2**23]] * 9}, "attention_types"),
        ({"text_config": {"deep": [{"n": -(10**30)}]}}, "n"),
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


def test_check_refuses_a_pipe_in_a_subfolder(folder):
    (folder / "more").mkdir()
    os.mkfifo(folder / "more" / "x")
    with pytest.raises(UserError, match="neither a plain file"):
        load(folder)
