"""Joining the ranks."""

import pytest
import torch
import torch.distributed as dist

from mori import distributed


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_start_binds_a_rank_to_its_gpu(device, backend, monkeypatch):
    """A bound NCCL connects in `start`: its errors show before anything is loaded."""
    joined = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    runtime = distributed.start(device)
    [(joined_backend, options)] = joined
    assert joined_backend == backend and options["device_id"] == (runtime.device if device == "cuda" else None)
    assert runtime.device == torch.device("cuda:1" if device == "cuda" else "cpu") and runtime.rank == 3
