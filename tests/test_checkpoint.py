"""Checkpoints: complete on disk or not there, verified, set aside when damaged, pruned."""

import hashlib
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mori.checkpoint import checkpoints as checkpoint
from mori.checkpoint import writing
from mori.checkpoint.files import replace_folder, write
from mori.checkpoint.tensors import DTYPES, serialized
from mori.cli import UserError


class Tied(nn.Module):
    """A model whose head is its embedding, with a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, ids):
        return self.head(self.embedding(ids))


def trained(steps: int, seed: int):
    """A `Tied` model and its AdamW after `steps` steps."""
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(root, step: int, steps: int = 1, **state):
    """Save a model after `steps` steps as the checkpoint of `step`."""
    model, optimizer = trained(steps, 0)
    return writing.save(root, step, model=model, optimizer=optimizer, state=state)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


THREE = ["step-00000001", "step-00000002", "step-00000003"]


@pytest.fixture
def root(tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, step, steps=step, note=step)
    return tmp_path


def test_load_gives_the_saved_tensors_and_state(root):
    expected_model, expected_optimizer = trained(3, 0)
    model, optimizer = trained(0, 1)
    folder = checkpoint.newest(root, pytest.fail)
    checkpoint.load_tensors(folder, model, optimizer)
    assert torch.equal(model.head.weight, expected_model.head.weight) and model.head.weight is model.embedding.weight
    for loaded, expected in zip(optimizer.state.values(), expected_optimizer.state.values(), strict=True):
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    assert checkpoint.load_state(folder)["note"] == 3


def test_save_gives_files_the_permissions_of_the_umask(root):
    old = os.umask(0o027)
    try:
        folder = save(root, 9)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
def test_newest_sets_a_damaged_checkpoint_aside_and_takes_the_one_before(root, name, damage):
    path = root / "step-00000003" / name
    raw = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    else:
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"")
    messages = []
    assert checkpoint.newest(root, messages.append).name == "step-00000002"
    assert (root / "step-00000003.corrupt").is_dir()
    assert len(messages) == 1 and name in messages[0]


def test_newest_keeps_an_earlier_damaged_checkpoint_of_the_same_step(root):
    for content in ("one", "two"):
        folder = root / "step-00000003"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(content)
        checkpoint.newest(root, lambda message: None)
    asides = (root / name / "state.json" for name in ("step-00000003.corrupt", "step-00000003.corrupt.1"))
    assert {path.read_text() for path in asides} == {"one", "two"}


def test_newest_refuses_to_start_over_if_all_checkpoints_are_damaged(root):
    for folder in checkpoint.published(root):
        (folder / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match="no whole checkpoint"):
            checkpoint.newest(root, lambda message: None)
    assert checkpoint.newest(root / "nowhere", pytest.fail) is None


def test_verify_refuses_a_manifest_that_names_a_file_elsewhere(root):
    folder = root / "step-00000003"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["../step-00000002/state.json"] = files.pop("state.json")
    checkpoint.write_manifest(folder, 3, files)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="not what was written"):
        checkpoint.verify(folder)


def test_newest_refuses_a_checkpoint_under_the_name_of_another_step(root):
    shutil.rmtree(root / "step-00000003")
    shutil.copytree(root / "step-00000001", root / "step-00000003")
    messages = []
    assert checkpoint.newest(root, messages.append).name == "step-00000002"
    assert "belongs to step 1" in messages[0]


def test_load_refuses_another_model(root):
    model = nn.Linear(4, 7)
    with pytest.raises(UserError, match="another model"):
        checkpoint.load_tensors(root / "step-00000003", model, torch.optim.AdamW(model.parameters()))


def test_save_leaves_nothing_behind_when_the_disk_is_full(root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "sync", full)
    with pytest.raises(OSError, match="No space"):
        save(root, 4)
    assert names(root) == THREE


def test_save_renames_the_checkpoint_after_syncing_all_of_it(root, monkeypatch):
    synced, real = [], os.fsync

    def watched(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (root / "step-00000004").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", watched)
    folder = save(root, 4)
    *before, (last, there) = synced
    assert last == str(root) and there  # the list of names in the parent is synced after the rename
    assert not any(there for _, there in before)
    staged = root / ".step-00000004.partial"
    assert {name for name, _ in before} == {str(staged), *(str(staged / path.name) for path in folder.iterdir())}


def test_serialized_tensors_are_read_by_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 3).T,
        "é": torch.ones(1),
    }
    description = write(tmp_path / "t", serialized(tensors))
    read = load_file(tmp_path / "t")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    raw = (tmp_path / "t").read_bytes()
    assert description == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def test_save_does_not_publish_files_that_do_not_read_back(root, monkeypatch):
    monkeypatch.setattr(os, "write", lambda handle, block, real=os.write: real(handle, bytes(len(block))))
    with pytest.raises(checkpoint.CorruptCheckpoint, match="step-00000004.partial"):
        save(root, 4)
    assert names(root) == THREE


def test_newest_does_not_take_a_file_without_read_permission_for_damage(root, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "describe", denied)
    with pytest.raises(UserError, match="cannot be read by this user"):
        checkpoint.newest(root, pytest.fail)
    assert len(checkpoint.published(root)) == 3


def test_prune_deletes_only_folders_with_exactly_the_files_of_a_checkpoint(root):
    (root / "step-00000001" / "notes.txt").write_text("mine")
    (root / "step-00000002" / "state.json").unlink()
    checkpoint.prune(root, keep=1, best_step=None)
    assert names(root) == THREE


def test_clean_removes_what_a_killed_save_or_prune_left(root):
    for name in (".step-00000004.partial", ".step-00000001.pruned", ".mine"):
        (root / name).mkdir()
        (root / name / "state.json").write_text("{}")
    checkpoint.clean(root)
    assert names(root) == [".mine", *THREE]


def test_prune_keeps_the_newest_and_the_best(root):
    checkpoint.prune(root, keep=1, best_step=1)
    assert names(root) == ["step-00000001", "step-00000003"]


def test_replace_folder_keeps_the_old_folder_beside_the_new(tmp_path):
    final = tmp_path / "brain"
    for content in ("one", "two", "three"):
        staged = tmp_path / "staged"
        staged.mkdir()
        (staged / "w").write_text(content)
        replace_folder(staged, final)
    assert (final / "w").read_text() == "three" and (tmp_path / "brain.previous" / "w").read_text() == "two"
    assert (tmp_path / "brain.previous.1" / "w").read_text() == "one"
    assert names(tmp_path) == ["brain", "brain.previous", "brain.previous.1"]
