"""What may change between start and resume: all that leaves the windows of each step and the model the same."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_equal_weights, flags, stop_after, wait_for, weights
from families import FAMILIES, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mori import optim
from mori.checkpoint import checkpoints, writing
from mori.checkpoint.files import rehearse_publication
from mori.cli import UserError
from mori.config import TrainConfig
from mori.distributed import Runtime
from mori.model import saving
from mori.state import State
from mori.tracking.loggers import read_metrics

NOTE = "will not be equal to the bit"


def losses(tmp_path, name: str) -> torch.Tensor:
    lines = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
    return torch.tensor([line["train/loss"] for line in lines if "train/loss" in line])


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "per_device_train_batch_size (4, 2)"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps (1, 4)"),
        ({"precision": "bf16"}, "precision ('fp32', 'bf16')"),
        ({"precision": "fp16"}, "precision ('fp32', 'fp16')"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing (False, True)"),
        ({"chunked_loss": False}, "chunked_loss (True, False)"),
        ({"mask_free_attention": False, "fused_activations": False}, "mask_free_attention (True, False)"),
    ],
)
def test_resume_with_other_rounding_goes_on_and_says_so(run_train, tmp_path, capsys, changed, named):
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"), dropout=0.0)
    stop_after(8, lambda: run_train(dropout=0.0))
    capsys.readouterr()
    assert run_train(dropout=0.0, **changed)["steps"] == 12
    told = capsys.readouterr().err
    assert told.count(NOTE) == 1 and named in told
    tolerance = 2e-2 if "precision" in changed else 1e-4
    assert torch.allclose(losses(tmp_path, "run"), losses(tmp_path, "whole"), rtol=tolerance)
    run_train(dropout=0.0, **changed)  # from here on these are its settings
    assert NOTE not in capsys.readouterr().err


def test_resume_from_fp16_in_fp32_drops_the_scaler(run_train, capsys):
    stop_after(8, lambda: run_train(precision="fp16"))
    assert run_train(precision="fp32")["steps"] == 12
    assert "precision ('fp16', 'fp32')" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [4, 2])
def test_resume_from_two_ranks_on_one(run_train, settings, tmp_path, capsys, batch_size):
    """The windows of each step are the same, so are the losses; also with the flags of the two ranks."""
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"), dropout=0.0, per_device_train_batch_size=4)
    words = flags({**settings, "dropout": 0.0, "per_device_train_batch_size": 2, "logging_steps": 3, "max_steps": 12})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen([*torchrun, "scripts/train.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "runs" / "run" / "checkpoints" / "step-00000004" / "manifest.json", process)
    process.terminate()
    process.wait()
    last = checkpoints.published(tmp_path / "runs" / "run" / "checkpoints")[-1]
    if last.name == "step-00000012":  # it was faster than the signal
        shutil.rmtree(last)
    run_train(dropout=0.0, per_device_train_batch_size=batch_size)
    told = capsys.readouterr().err
    assert "world_size (2, 1)" in told and told.count(NOTE) == 1 and "A step keeps its 4 windows." in told
    assert ("per_device_train_batch_size (2, 4)" in told) == (batch_size == 4)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.allclose(weights(tmp_path / "brain")[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_state_is_loaded_by_another_number_of_ranks(world_size):
    """The mean of the losses over the ranks, and the counters, are the same."""
    model = torch.nn.Linear(2, 2)
    config = TrainConfig(model="m").resolve()

    def state(rank: int, size: int) -> State:
        runtime, optimizer = Runtime(torch.device("cpu"), rank, size, "fp32"), optim.build_optimizer(model, config)
        return State(config, runtime, model, optimizer, optim.Schedule(config, 0, 9), started=0.0)

    saved = state(0, 1).state_dict() | {"config": {}}
    own = saved["ranks"][0]
    saved["ranks"] = [own | {"unlogged_losses": values} for values in ([1.0, 5.0], [3.0, 6.0], [8.0, 1.0])]
    loaded = [state(rank, world_size) for rank in range(world_size)]
    for one in loaded:
        one.load_state_dict(saved)
    mean = sum(torch.stack(one.losses) for one in loaded) / world_size
    assert torch.allclose(mean, torch.tensor([4.0, 4.0]))


@pytest.mark.parametrize("path", ["moved", "./link", "relative"])
def test_moved_model_resumes_to_the_same_weights(run_train, small_model_folder, tmp_path, monkeypatch, capsys, path):
    first = str(small_model_folder)
    run_train(model=first, run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(8, lambda: run_train(model=first))
    monkeypatch.chdir(tmp_path)
    if path == "moved":
        small_model_folder.rename(tmp_path / "moved")
    elif path == "./link":
        (tmp_path / "link").symlink_to(small_model_folder)
    else:
        path = str(small_model_folder.relative_to(tmp_path))
    run_train(model=path)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    told = capsys.readouterr().err
    assert told.count(f"the model was {first} and is {path} now") == 1 and NOTE not in told


@pytest.fixture
def small_model_folder(small_model, tmp_path):
    return shutil.copytree(small_model, tmp_path / "a model")


def test_resume_refuses_another_model_under_another_name(run_train, small_model_folder, tmp_path):
    stop_after(8, lambda: run_train(model=str(small_model_folder)))
    other = shutil.copytree(small_model_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "n_head": 1}))
    with pytest.raises(UserError, match=r"model \('.*a model', '.*other'\)"):
        run_train(model=str(other))


@pytest.mark.parametrize("changed", [{"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 2}])
def test_resume_refuses_other_windows_in_a_step(run_train, changed):
    stop_after(8, run_train)
    [(name, value)] = changed.items()
    with pytest.raises(
        UserError,
        match=rf"{name} \(\d, {value}\).*windows in a step \(4, {8 if value == 2 and name[0] == 'g' else 2}\)",
    ):
        run_train(**changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_is_a_folder_that_transformers_loads(family, tokenizer, tmp_path):
    model = small_model(family, len(tokenizer))
    beside = rehearse_publication(
        tmp_path / "brain", lambda folder: saving.save(model, tokenizer, folder, rehearsal=True)
    )
    beside = {name: content for name, content in beside.items() if not name.endswith(".safetensors")}
    optimizer = torch.optim.AdamW(model.parameters())
    folder = writing.save(tmp_path / "root", 1, model=model, optimizer=optimizer, state={}, beside=beside)
    checkpoints.verify(folder)
    loaded, expected = AutoModelForCausalLM.from_pretrained(folder).state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(folder)("Halo semua").input_ids == tokenizer("Halo semua").input_ids


def test_checkpoint_trains_and_is_verified_pruned_and_resumed(run_train, tmp_path):
    run_train(save_total_limit=1)
    [*_, folder] = checkpoints.published(tmp_path / "runs/run/checkpoints")
    assert len(checkpoints.published(folder.parent)) <= 2
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(checkpoints.CorruptCheckpoint, match="tokenizer.json"):
        checkpoints.verify(folder)
    shutil.copy(tmp_path / "brain" / "tokenizer.json", folder)
    assert_equal_weights(folder, tmp_path / "brain")
    assert run_train(model=str(folder), run_name="more", output_dir=str(tmp_path / "more"), max_steps=1)["steps"] == 1
