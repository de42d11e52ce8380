"""Faults of saving and publishing show before the first step, and leave everything as it was."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_equal_weights, stop_after
from safetensors.torch import load_file

from mori.checkpoint import files, writing
from mori.cli import UserError
from mori.model import loading


@pytest.fixture
def change_model(monkeypatch):
    """Call a function with every model that is loaded."""
    real = loading.load_model

    def change(action):
        monkeypatch.setattr(loading, "load_model", lambda *a: (model := real(*a), action(model))[0])

    return change


def everything_in(folder) -> dict:
    """The content and the time of change of each file in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def no_steps(tmp_path) -> bool:
    """Whether a run ended before its first step, and left no part of a checkpoint or a model."""
    leftovers = [path for path in tmp_path.rglob(".*") if path.suffix == ".partial"]
    return not leftovers and not list((tmp_path / "runs" / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "number, remedy", [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EIO, "mend that")]
)
@pytest.mark.parametrize("call", ["write", "mkdir", "fsync"])
def test_failed_call_is_told_before_the_first_step(run_train, tmp_path, monkeypatch, number, remedy, call):
    run_train(max_steps=2, run_name="earlier")
    before = everything_in(tmp_path / "brain")
    real = getattr(os, call)

    def failing(what, *rest, **options):
        name = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        if ".partial" in name and ".json.partial" not in name:
            raise OSError(number, os.strerror(number))
        return real(what, *rest, **options)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(UserError, match=f"{os.strerror(number)}.*; {remedy} and run the same command again"):
        run_train()
    monkeypatch.undo()
    assert no_steps(tmp_path) and everything_in(tmp_path / "brain") == before


@pytest.mark.parametrize("moment", range(0, 60, 4))
def test_killed_rehearsal_leaves_nothing_that_the_next_start_keeps(run_train, tmp_path, monkeypatch, moment):
    """Like a power cut: no clean-up runs either."""
    run_train(max_steps=2, run_name="earlier")
    before, names = everything_in(tmp_path / "brain"), sorted(path.name for path in tmp_path.iterdir())
    calls, real = [], {name: getattr(os, name) for name in ("write", "rename", "mkdir", "fsync", "unlink")}

    class Killed(BaseException):
        pass

    def counted(name):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) > moment:
                raise Killed
            return real[name](*arguments, **options)

        return call

    def cut(*arguments, **options):
        for name in real:
            monkeypatch.setattr(os, name, counted(name))
        return rehearse(*arguments, **options)

    rehearse = files.rehearse_publication
    monkeypatch.setattr("mori.output.rehearse_publication", cut)
    with pytest.raises(Killed):
        run_train(max_steps=2)
    monkeypatch.undo()
    assert everything_in(tmp_path / "brain") == before
    run_train(max_steps=2)
    assert [path for path in tmp_path.rglob(".*") if path.suffix == ".partial"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "brain.previous"])


@pytest.mark.parametrize("free, told", [(30_000, "has room for 0.0 MiB"), (10_000_000, "")])
def test_disk_without_room_for_a_checkpoint_and_the_model_is_told(run_train, tmp_path, monkeypatch, free, told):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=free))
    if not told:
        run_train(max_steps=1)
        return
    with pytest.raises(UserError, match=told):
        run_train()
    assert no_steps(tmp_path)


def test_room_that_the_check_asks_for_is_what_a_run_takes(run_train, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("mori.preflight.check_room", asked.append)
    run_train(max_steps=1)
    [sizes] = asked
    saved = sum(path.stat().st_size for path in (tmp_path / "runs/run/checkpoints/step-00000001").iterdir())
    brain = (tmp_path / "brain" / "model.safetensors").stat().st_size
    checkpoint, model = sizes.values()
    assert 0.8 * saved < checkpoint <= saved and 0.8 * brain < model <= brain


def add_waves(model) -> None:
    model.register_buffer("waves", torch.polar(torch.ones(8), torch.arange(8).float()))
    model.register_buffer("turned", torch.polar(torch.ones(4, 2), torch.ones(4, 2)).T.conj())


def test_complex_buffer_is_saved_resumed_and_published(run_train, change_model, tmp_path):
    change_model(add_waves)
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(8, run_train)
    run_train()
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    expected = torch.nn.Module()
    add_waves(expected)
    for path in (tmp_path / "brain", tmp_path / "runs/run/checkpoints/step-00000012"):
        saved = load_file(path / "model.safetensors")
        for name, buffer in expected.named_buffers():
            assert torch.equal(saved[name], buffer) and saved[name].dtype == torch.complex64


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64])
def test_buffers_of_every_type_that_safetensors_writes_are_saved(run_train, change_model, tmp_path, dtype):
    change_model(lambda model: model.register_buffer("table", torch.arange(6).to(dtype)))
    run_train(max_steps=1)
    for folder in (tmp_path / "brain", tmp_path / "runs/run/checkpoints/step-00000001"):
        table = load_file(folder / "model.safetensors")["table"]
        assert table.dtype == dtype and torch.equal(table.float(), torch.arange(6).float())


def test_infinity_in_a_buffer_is_saved_and_published(run_train, change_model, tmp_path):
    mask = torch.full((4, 4), -torch.inf).triu(1)
    change_model(lambda model: model.register_buffer("causal", mask.clone()))
    run_train(max_steps=1)
    for folder in (tmp_path / "brain", tmp_path / "runs/run/checkpoints/step-00000001"):
        assert torch.equal(load_file(folder / "model.safetensors")["causal"], mask)


def share_memory(model) -> None:
    first, second = model.transformer.h[0].mlp.c_fc, model.transformer.h[1].mlp.c_fc
    second.weight = first.weight


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.register_buffer("waves", torch.zeros(3, dtype=torch.complex128)),
        lambda model: model.register_buffer("sparse", torch.eye(3).to_sparse()),
        share_memory,
    ],
    ids=["complex128", "sparse", "shared"],
)
def test_model_that_cannot_be_saved_is_told_before_the_first_step(run_train, change_model, tmp_path, change):
    """`save_pretrained` cannot write it either."""
    change_model(change)
    with pytest.raises(UserError, match="this model cannot be saved|the model cannot be saved"):
        run_train()
    assert no_steps(tmp_path) and not (tmp_path / "brain").exists()


def test_generation_config_that_contradicts_itself_is_published_as_it_is(run_train, change_model, tmp_path):
    """transformers refuses to write a temperature without sampling, unless the file was loaded so."""
    change_model(lambda model: model.generation_config.update(do_sample=False, temperature=0.9, top_p=0.6))
    run_train(max_steps=1)
    for folder in (tmp_path / "brain", tmp_path / "runs/run/checkpoints/step-00000001"):
        written = json.loads((folder / "generation_config.json").read_text())
        assert written["temperature"] == 0.9 and written["top_p"] == 0.6 and not written.get("do_sample")


def test_rehearsal_writes_one_element_of_each_type(tmp_path, monkeypatch):
    model = torch.nn.Linear(1000, 1000)
    model.register_buffer("count", torch.zeros(5, dtype=torch.int64))
    optimizer = torch.optim.AdamW(model.parameters())
    written, real = [], os.write
    monkeypatch.setattr(os, "write", lambda handle, block: (written.append(len(block)), real(handle, block))[1])
    size = writing.rehearse(tmp_path / "root", model=model, optimizer=optimizer, beside={"a/b": b"text"})
    assert sum(written) < 2000 and size >= 4 * 1001 * 1000 and os.listdir(tmp_path / "root") == []
