"""The micro-batch as a CUDA graph. Without a GPU, `FakeStepGraph` captures nothing and calls the function on fixed inputs."""

import pytest
import torch
from conftest import assert_equal_weights
from torch import nn

from mori import run
from mori.speed.step_graph import StepGraph


class FakeStepGraph(StepGraph):
    """Counts captures and launches, and checks that a launch finds every gradient at its address of the capture."""

    counts: dict[str, int] = {}
    failure: RuntimeError | None = None

    def __init__(self, enabled, on_failure):
        super().__init__(True, on_failure)

    def _warm_up(self, function, tensors):
        return function(*tensors)

    def _capture(self, function, tensors):
        if self.failure:
            raise self.failure
        self.counts["captures"] += 1
        parameters = function.args[0].weights.parameters
        addresses, inputs = [p.grad.data_ptr() for p in parameters], [tensor.clone() for tensor in tensors]

        def launch(*tensors):
            self.counts["launches"] += 1
            assert [p.grad.data_ptr() for p in parameters] == addresses
            for place, tensor in zip(inputs, tensors, strict=True):
                place.copy_(tensor)
            return function(*inputs)

        return launch


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """Train as on a GPU with --cuda_graphs; how many captures and launches there were."""
    monkeypatch.setattr(run, "StepGraph", FakeStepGraph)
    monkeypatch.setattr(FakeStepGraph, "counts", {"captures": 0, "launches": 0})
    return FakeStepGraph.counts


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_step_graph_keeps_the_weights(run_train, tmp_path, counts, precision):
    """Also over short micro-batches at the end of an epoch, which run as they are, and over accumulation."""
    options = {"precision": precision, "gradient_accumulation_steps": 3, "num_train_epochs": 3, "max_steps": -1}
    summary = run_train(**options)
    assert counts["captures"] == 1 and counts["launches"] > 2 * summary["steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "StepGraph", StepGraph)
        run_train(**options, run_name="plain", output_dir=str(tmp_path / "plain"))
    assert_equal_weights(tmp_path / "plain", tmp_path / "brain")


def test_step_graph_is_captured_again_after_memory_ran_out(run_train, tmp_path, counts, monkeypatch, capsys):
    forward, calls = nn.Module.__call__, []

    def fail_once(module, *args, **kwargs):
        if type(module).__name__ == "CausalLMLoss" and module.training:
            calls.append(1)
            if len(calls) == 9:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", fail_once)
    run_train(per_device_train_batch_size=4, max_steps=14)
    assert "memory ran out" in capsys.readouterr().out
    assert counts["captures"] == 2 and counts["launches"] > 12


def test_step_graph_that_cannot_be_captured_runs_without(run_train, tmp_path, counts, monkeypatch, capsys):
    monkeypatch.setattr(
        FakeStepGraph, "failure", RuntimeError("operation not permitted when stream is capturing\nmore")
    )
    run_train()
    monkeypatch.setattr(run, "StepGraph", StepGraph)
    run_train(run_name="plain", output_dir=str(tmp_path / "plain"))
    assert capsys.readouterr().out.count("no CUDA graph: operation not permitted when stream is capturing") == 1
    assert_equal_weights(tmp_path / "plain", tmp_path / "brain")
