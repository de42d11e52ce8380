"""Runs whose ranks share the weights (`--fsdp`): what they save and publish."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mori import optim
from mori.checkpoint import checkpoints
from tests.faults.common import Lab, end, free_port, patched, together

SHARED = {"fsdp": "full_shard"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder for runs, with a model and a text."""
    return Lab(tmp_path_factory.mktemp("lab"))


def run(lab: Lab, name: str, ranks: int = 2, before=lambda: None, code: int = 0, **options) -> None:
    ended = together(lab.config(name, **options), ranks, before)
    assert ended.code == code, ended.text


def tensors(folder, stem: str = "model") -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob(f"{stem}*.safetensors")) for name, t in load_file(path).items()}


def last(lab: Lab, name: str):
    return checkpoints.published(lab.checkpoints(name))[-1]


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_shared_weights_are_published_in_parts_that_transformers_loads(lab):
    run(lab, "plain", **SHARED)
    brain = lab.folder / "plain" / "brain"
    parts = tensors(brain)
    assert_equal(parts, tensors(last(lab, "plain")))
    assert len(list(brain.glob("*.safetensors"))) == 2
    loaded = AutoModelForCausalLM.from_pretrained(brain).state_dict()
    for name, tensor in parts.items():
        assert torch.equal(loaded[name], tensor), name
    for path in brain.glob("*.safetensors"):  # a half and a tensor
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(sizes) <= sum(t.nbytes for t in parts.values()) / 2 + max(sizes)


def test_shared_weights_are_published_with_their_adapters_merged(lab):
    """W + B A alpha / r, transposed as GPT-2 stores it."""
    run(lab, "merged", use_peft=True, lora_r=2, lora_alpha=6, lora_target_modules=["c_attn", "c_proj"], **SHARED)
    adapters, base = tensors(last(lab, "merged"), "adapter_model"), tensors(lab.model)
    published = tensors(lab.folder / "merged" / "brain")
    changed = 0
    for name, tensor in published.items():
        expected = base[name]
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in adapters:
            changed += 1
            expected = expected + (adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"] * 3).T
        torch.testing.assert_close(tensor, expected, msg=name)
    assert changed == 6


def test_shared_adapters_are_published_as_one_file(lab):
    run(lab, "adapters", use_peft=True, lora_r=2, save_merged=False, **SHARED)
    assert_equal(
        tensors(lab.folder / "adapters" / "brain", "adapter_model"), tensors(last(lab, "adapters"), "adapter_model")
    )


def test_async_save_of_shared_weights_writes_the_same_checkpoints(lab):
    run(lab, "sync", save_total_limit=9, **SHARED)
    run(lab, "async", save_total_limit=9, async_save=True, **SHARED)
    for theirs in checkpoints.published(lab.checkpoints("sync")):
        ours = lab.checkpoints("async") / theirs.name
        checkpoints.verify(ours)
        described = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (ours, theirs)]
        assert {**described[0], "state.json": ""} == {**described[1], "state.json": ""}
    assert len(checkpoints.published(lab.checkpoints("async"))) == 3
    assert_equal(tensors(lab.folder / "async" / "brain"), tensors(lab.folder / "sync" / "brain"))


def test_best_of_shared_weights_is_published(lab):
    run(lab, "best", learning_rate=0.5, eval_steps=2, save_steps=6, load_best_model_at_end=True, **SHARED)
    summary = json.loads((lab.run_dir("best") / "summary.json").read_text())
    best = checkpoints.folder_of(lab.checkpoints("best"), summary["published_step"])
    assert summary["published_step"] < 12
    assert_equal(tensors(lab.folder / "best" / "brain"), tensors(best))


@pytest.mark.parametrize("kind", ["full_shard", "hybrid_shard"])
def test_stopped_run_of_shared_weights_resumes_to_the_same_bits(lab, kind, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options = {"fsdp": kind, "ranks": 4 if kind == "hybrid_shard" else 2, "eval_steps": 12}
    run(lab, f"whole-{kind}", **options)
    stop = patched(optim, "set_learning_rate", 6, lambda: signal.raise_signal(signal.SIGTERM))
    run(lab, kind, before=stop, code=130, **options)
    assert last(lab, kind).name == "step-00000006"
    run(lab, kind, **options)
    for stem in ("model", "optimizer"):
        assert_equal(tensors(last(lab, kind), stem), tensors(last(lab, f"whole-{kind}"), stem))


def test_checkpoint_of_shared_weights_resumes_in_one_process_and_back(lab):
    """Another number of ranks has the same windows, and another order of sums."""
    options = {"eval_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dropout": 0.0}
    run(lab, "two", **SHARED, **options)
    stop = patched(optim, "set_learning_rate", 4, lambda: signal.raise_signal(signal.SIGTERM))
    run(lab, "changing", before=stop, code=130, **SHARED, **options)
    alone = options | {"gradient_accumulation_steps": 4}
    run(lab, "changing", ranks=1, before=stop, code=130, **alone)
    assert last(lab, "changing").name == "step-00000008"
    run(lab, "changing", **SHARED, **options)
    actual, expected = (tensors(lab.folder / name / "brain") for name in ("changing", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def losses(lab: Lab, name: str) -> dict[int, float]:
    """The logged training losses by step."""
    lines = (lab.run_dir(name) / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record}


def test_run_goes_on_with_other_numbers_of_ranks_that_share_weights_or_not(lab):
    """4 ranks, 2, 3 and 1: a step keeps its eight windows, and the sums another order."""
    options = {
        "eval_steps": 12,
        "per_device_train_batch_size": 2,
        "dropout": 0.0,
        "logging_steps": 1,
        "max_eval_windows": 0,
    }
    run(lab, "four", ranks=4, **SHARED, **options)
    stop = patched(optim, "set_learning_rate", 3, lambda: signal.raise_signal(signal.SIGTERM))
    for step, ranks, kind in [(3, 4, SHARED), (6, 2, {}), (9, 3, SHARED), (12, 1, {})]:
        run(
            lab,
            "elastic",
            ranks=ranks,
            before=stop if step < 12 else lambda: None,
            code=130 if step < 12 else 0,
            **kind,
            **options,
        )
        assert last(lab, "elastic").name == f"step-{step:08}"
    actual, expected = losses(lab, "elastic"), losses(lab, "four")
    assert list(actual) == list(range(1, 13)) == list(expected)
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-6), step
    ledgers = [json.loads((lab.run_dir(name) / "summary.json").read_text())["ledger"] for name in ("elastic", "four")]
    assert ledgers[0] == ledgers[1]


def on_nodes(folders: list[Path], text_file: Path, wait_for_step: int | None = None) -> None:
    """Train with torchrun in each of `folders`, which share nothing; kill all of it once a step is logged, if one is given."""
    port, logs = free_port(), [folder / "runs/run/metrics.jsonl" for folder in folders]
    config = {
        "model": "model", "corpus": text_file, "fsdp": "full_shard", "block_size": 16, "max_steps": 40, "save_steps": 4,
        "logging_steps": 1, "eval_steps": 40, "max_new_tokens": 2, "learning_rate": 1e-3, "dropout": 0.0, "logging_dir": "runs",
        "run_name": "run", "output_dir": "brain",
    }  # fmt: skip
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=a"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        str(ROOT / "scripts/train.py"),
        *flags(config),
    ]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = {"env": environment, "start_new_session": True, "stdout": subprocess.DEVNULL}
    nodes = [subprocess.Popen(command, cwd=folder, **options) for folder in folders]
    try:
        while wait_for_step and not any(
            log.exists() and f'"step": {wait_for_step},' in log.read_text() for log in logs
        ):
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.05)
        assert wait_for_step or [node.wait(timeout=200) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            end(node)


def test_nodes_that_share_weights_but_no_disk_resume_after_both_are_killed(small_model, text_file, tmp_path):
    """Each keeps its rank's files; in the resumed run the other node may be the main one."""
    whole, killed = ([tmp_path / name / node for node in "ab"] for name in ("whole", "killed"))
    for folder in [*whole, *killed]:
        shutil.copytree(small_model, folder / "model")
    on_nodes(whole, text_file)
    on_nodes(killed, text_file, wait_for_step=6)
    names = [
        {path.name for path in (folder / "runs/run/checkpoints/step-00000004").glob("*.safetensors")}
        for folder in killed
    ]
    assert len(names[0]) == len(names[1]) == 2 and not names[0] & names[1]
    on_nodes(killed[::-1], text_file)
    [expected], [resumed] = (
        [tensors(f / "brain") for f in folders if (f / "brain").exists()] for folders in (whole, killed)
    )
    assert_equal(resumed, expected)
