"""What is in order is not refused; what is not is refused before it is read."""

import json
import os
import struct

import pytest
import torch
from conftest import STORIES, needs_stories
from families import FAMILIES, small_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mori.cli import UserError
from mori.model import files as foreign
from mori.model import loading as models


def load(folder):
    tokenizer = models.load_tokenizer(str(folder), ())
    return models.load_model(str(folder), models.load_config(str(folder), tokenizer))


def copy(folder, to):
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["whole", "sharded", "bin"])
def test_every_family_in_order_is_loaded(tokenizer, tmp_path, family, form):
    model = small_model(family, len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    if form == "bin":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1 or form == "whole"
    loaded = load(tmp_path)
    found = loaded.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


@needs_stories
def test_a_published_model_is_in_order():
    stored = foreign.check_folder(STORIES)
    assert stored.elements == sum(tensor.numel() for tensor in load_file(STORIES / "model.safetensors").values())
    load(STORIES)


def test_the_hub_s_cache_links_to_its_own_blobs(small_model, tmp_path):
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


def test_a_link_inside_the_folder_and_one_to_the_folder_are_followed(small_model, tmp_path):
    folder = copy(small_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


def test_paths_left_over_from_the_author_s_machine_do_no_harm(small_model, tmp_path):
    folder = copy(small_model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "special_tokens_map_file": "/home/author/special_tokens_map.json"}
    path.write_text(json.dumps(settings))
    load(folder)


def test_large_numbers_that_count_nothing_do_no_harm(small_model, tmp_path):
    folder = copy(small_model, tmp_path / "model")
    path = folder / "config.json"
    noted = {"rope_theta": 10**9, "max_position_embeddings_note": 10**8, "total_params": 10**11, "n_ctx": 10**7}
    path.write_text(json.dumps({**json.loads(path.read_text()), **noted}))
    load(folder)


@pytest.mark.parametrize("n_layer, vocabulary", [(5000, 320), (2, 2**19)])
def test_no_model_is_made_that_its_weights_do_not_fill(small_model, tmp_path, n_layer, vocabulary):
    folder = copy(small_model, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layer": n_layer, "vocab_size": vocabulary}))
    with pytest.raises(UserError, match="far larger model than the weights"):
        load(folder)
    assert not torch.nn.modules.module._global_parameter_registration_hooks, "the count ends with the loading"
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
def test_a_header_that_promises_more_than_there_is(tmp_path, damage):
    header = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}

    def write():
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))

    (tmp_path / "config.json").write_text("{}")
    write()
    assert foreign.check_folder(tmp_path) == foreign.Stored(elements=4, tensors=1, longest=2)
    damage(header)
    write()
    with pytest.raises(UserError, match="impossible size|damaged"):
        foreign.check_folder(tmp_path)


def test_a_pipe_deep_in_the_folder_is_never_opened(small_model, tmp_path):
    folder = copy(small_model, tmp_path / "model")
    (folder / "more").mkdir()
    os.mkfifo(folder / "more" / "x")
    with pytest.raises(UserError, match="neither a plain file"):
        load(folder)
