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


def make(steps: int, seed: int):
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2, 3):
        model, optimizer = make(step, 0)
        checkpoint.save(
            tmp_path, step, model=model.state_dict(), optimizer=optimizer.state_dict(), state={"note": step}
        )
    return tmp_path


def test_what_is_loaded_is_what_was_saved(saved):
    expected_model, expected_optimizer = make(3, 0)
    model, optimizer = make(0, 1)
    folder = checkpoint.newest(saved, pytest.fail)
    checkpoint.load_tensors(folder, model, optimizer)
    assert torch.equal(model.head.weight, expected_model.head.weight) and model.head.weight is model.embedding.weight
    for a, b in zip(optimizer.state.values(), expected_optimizer.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert checkpoint.load_state(folder)["note"] == 3


def test_files_have_the_permissions_of_the_umask(saved):
    old = os.umask(0o027)
    try:
        model, optimizer = make(1, 0)
        folder = checkpoint.save(saved, 9, model=model.state_dict(), optimizer=optimizer.state_dict(), state={})
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(saved, name, damage):
    path = saved / "step-00000003" / name
    raw = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    else:
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"")
    said = []
    assert checkpoint.newest(saved, said.append).name == "step-00000002"
    assert (saved / "step-00000003.corrupt").is_dir()
    assert len(said) == 1 and name in said[0]


def test_a_second_damaged_checkpoint_of_a_step_does_not_delete_the_first(saved):
    for content in ("one", "two"):
        folder = saved / "step-00000003"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(content)
        checkpoint.newest(saved, lambda message: None)
    asides = (saved / name / "state.json" for name in ("step-00000003.corrupt", "step-00000003.corrupt.1"))
    assert {path.read_text() for path in asides} == {"one", "two"}


def test_with_none_whole_the_run_is_not_started_over(saved):
    for folder in checkpoint.published(saved):
        (folder / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match="no whole checkpoint"):
            checkpoint.newest(saved, lambda message: None)
    assert checkpoint.newest(saved / "nowhere", pytest.fail) is None


def test_a_manifest_cannot_name_a_file_elsewhere(saved):
    path = saved / "step-00000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000002/state.json"] = manifest["files"].pop("state.json")
    manifest["seal"] = checkpoint._seal(manifest["files"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CorruptCheckpoint, match="not what was written"):
        checkpoint.verify(path.parent)


def test_a_checkpoint_under_another_ones_name_is_told(saved):
    shutil.rmtree(saved / "step-00000003")
    shutil.copytree(saved / "step-00000001", saved / "step-00000003")
    said = []
    assert checkpoint.newest(saved, said.append).name == "step-00000002"
    assert "belongs to step 1" in said[0]


def test_another_models_checkpoint_is_refused(saved):
    other = nn.Linear(4, 7)
    with pytest.raises(UserError, match="another model"):
        checkpoint.load_tensors(saved / "step-00000003", other, torch.optim.AdamW(other.parameters()))


def test_a_failed_save_leaves_nothing_behind(saved, monkeypatch):
    model, optimizer = make(1, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, 4, model=model.state_dict(), optimizer=optimizer.state_dict(), state={})
    assert [p.name for p in sorted(saved.iterdir())] == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_checkpoint_appears_by_one_rename_when_all_of_it_is_on_disk(saved, monkeypatch):
    synced, real = [], os.fsync

    def watched(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (saved / "step-00000004").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", watched)
    model, optimizer = make(1, 0)
    folder = checkpoint.save(saved, 4, model=model.state_dict(), optimizer=optimizer.state_dict(), state={})
    *before, (last, there) = synced
    assert last == str(saved) and there  # the parent's list of names comes after the rename
    assert not any(there for _, there in before)
    staged = saved / ".step-00000004.partial"
    assert {name for name, _ in before} == {str(staged), *(str(staged / path.name) for path in folder.iterdir())}


def test_safetensors_reads_what_is_written_here(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in checkpoint._DTYPES}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).T,
        "é": torch.ones(1),
    }
    described = checkpoint.write(tmp_path / "t", checkpoint._serialized(tensors))
    read = load_file(tmp_path / "t")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    raw = (tmp_path / "t").read_bytes()
    assert described == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def test_what_does_not_read_back_is_not_published(saved, monkeypatch):
    monkeypatch.setattr(os, "write", lambda handle, block, real=os.write: real(handle, bytes(len(block))))
    model, optimizer = make(1, 0)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="step-00000004.partial"):
        checkpoint.save(saved, 4, model=model.state_dict(), optimizer=optimizer.state_dict(), state={})
    assert [p.name for p in sorted(saved.iterdir())] == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_file_that_may_not_be_read_is_no_damage(saved, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_described", denied)
    with pytest.raises(UserError, match="may not be read"):
        checkpoint.newest(saved, pytest.fail)
    assert len(checkpoint.published(saved)) == 3


def test_only_our_own_whole_folders_are_pruned(saved):
    (saved / "step-00000001" / "notes.txt").write_text("mine")
    (saved / "step-00000002" / "state.json").unlink()
    checkpoint.prune(saved, keep=1, best_step=None)
    assert [p.name for p in checkpoint.published(saved)] == ["step-00000001", "step-00000002", "step-00000003"]


def test_what_a_kill_left_is_cleaned_up(saved):
    for name in (".step-00000004.partial", ".step-00000001.pruned", ".mine"):
        (saved / name).mkdir()
        (saved / name / "state.json").write_text("{}")
    checkpoint.clean(saved)
    assert [p.name for p in sorted(saved.iterdir())] == [".mine", *(f"step-0000000{n}" for n in (1, 2, 3))]


def test_another_optimizers_checkpoint_is_refused(saved):
    model, optimizer = make(1, 0)
    state = optimizer.state_dict()
    state["state"][0] = {"exp_avg": torch.zeros(3)}
    folder = checkpoint.save(saved, 4, model=model.state_dict(), optimizer=state, state={})
    with pytest.raises(UserError, match="another optimizer"):
        checkpoint.load_tensors(folder, *make(0, 1))


def test_pruning_keeps_the_newest_and_the_best(saved):
    checkpoint.prune(saved, keep=1, best_step=1)
    assert [p.name for p in checkpoint.published(saved)] == ["step-00000001", "step-00000003"]


def test_a_folder_is_replaced_and_the_old_one_stays_beside_it(tmp_path):
    final = tmp_path / "brain"
    for content in ("one", "two", "three"):
        staged = tmp_path / "staged"
        staged.mkdir()
        (staged / "w").write_text(content)
        checkpoint.replace_folder(staged, final)
    assert (final / "w").read_text() == "three" and (tmp_path / "brain.previous" / "w").read_text() == "two"
    assert (tmp_path / "brain.previous.1" / "w").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["brain", "brain.previous", "brain.previous.1"]
