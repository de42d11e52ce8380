"""Several ranks on one machine, started by torchrun, and the environment that describes them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, flags, weights

from mori import distributed
from mori.cli import UserError
from mori.distributed import ranks, restarted, start
from mori.distributed.ranks import _store_of_this_start

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]


@pytest.mark.parametrize("adapters", [{}, {"use_peft": True, "lora_r": 4}, {"freeze_trainable_layers": 1}])
def test_two_ranks_train_a_model_with_unused_parameters_as_one_rank_does(
    adapters, run_train, settings, model_with_unused_parameters, tmp_path
):
    options = {
        **adapters,
        "model": str(model_with_unused_parameters),
        "dropout": 0.0,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
    }
    run_train(**options, per_device_train_batch_size=4)
    words = {**settings, **options, "per_device_train_batch_size": 2, "run_name": "ranks", "output_dir": tmp_path / "b"}
    done = subprocess.run([*TORCHRUN, *flags(words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(tmp_path / "brain"), weights(tmp_path / "b")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_start_ignores_what_earlier_starts_left_in_the_store():
    """torchrun's store outlives its restarts, and a node that joins late has another number of restarts than the others."""
    store = dist.HashStore()
    store.append("arrivals", "killed-before-it-was-answered ")
    for size in (3, 2, 4):  # nodes leave and join
        with ThreadPoolExecutor(size) as pool:
            parts = list(pool.map(lambda rank, size=size: _store_of_this_start(store, rank, size, 10), range(size)))
        assert not any(part.check(["key"]) for part in parts)
        parts[0].set("key", "value")
        assert all(part.check(["key"]) for part in parts)


def test_start_gives_up_ranks_that_do_not_come():
    with pytest.raises(dist.DistStoreError, match="not all 2 ranks"):
        _store_of_this_start(dist.HashStore(), 0, 2, 0)


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_start_binds_a_rank_to_its_gpu(device, backend, monkeypatch):
    """A bound NCCL connects in `start`: its errors show before anything is loaded."""
    joined = []
    environment = {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(ranks, "_store_of_this_start", lambda store, *_: store)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    runtime = distributed.start(device)
    [(joined_backend, options)] = joined
    assert joined_backend == backend and options["device_id"] == (runtime.device if device == "cuda" else None)
    assert runtime.device == torch.device("cuda:1" if device == "cuda" else "cpu") and runtime.rank == 3


@pytest.mark.parametrize(
    "variables, phrase",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', must be a whole number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK 2.* do not fit"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT 99999"),
    ],
)
def test_start_names_the_variable_that_is_wrong(variables, phrase, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=phrase) as mistake:
        start("cpu")
    assert "\n" not in str(mistake.value)


def test_start_takes_an_empty_variable_as_unset(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
    assert start("cpu").world_size == 1 and not restarted()
