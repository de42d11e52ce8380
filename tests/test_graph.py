"""Steps of one shape, which a GPU captures as a CUDA graph. Without a GPU, `FakeGraph` replays on fixed input tensors instead."""

import pytest
import torch
from conftest import needs_a_gpu
from families import CAPTURED, expected, greedy, prompts_of
from families import small_model as model_of
from test_decode import change_weights
from transformers import AutoModelForCausalLM

from mori.config import SamplingConfig
from mori.generation import replaying_reader
from mori.generation.decode import decode
from mori.generation.sampler import Sampler
from mori.speed.replay import Graph, Replay

# Learned positions; rotary positions; a mask only in padded batches; a sliding window, which is not captured; states.
REPRESENTATIVES = ["gpt2", "llama", "falcon", "gemma2", "mamba", "qwen3_5_text"]


class FakeGraph:
    """Like a graph: warms up, copies the inputs to their places, then runs only the recorded calls, on the same tensors."""

    created: list["FakeGraph"] = []

    def __init__(self, replay: Replay, inputs: list[torch.Tensor]):
        self.replay, self.inputs, self.launches = replay, [tensor.clone() for tensor in inputs], 0
        self.created.append(self)
        replay(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.launches += 1
        for own, tensor in zip(self.inputs, inputs, strict=True):
            assert own.shape == tensor.shape
            own.copy_(tensor)
        return self.replay(*self.inputs)


@pytest.fixture
def graphs(monkeypatch) -> list[FakeGraph]:
    """Decode as on a GPU; the graphs that were captured."""
    monkeypatch.setattr(replaying_reader, "uses_graphs", lambda device: True)
    monkeypatch.setattr(replaying_reader, "Graph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "created", [])
    return FakeGraph.created


@pytest.fixture
def long_model():
    """A Llama with a context of 512."""
    config = model_of("llama", 97).config
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_graph_greedy_ids_equal_generate(family, graphs):
    model = model_of(family, 97).eval()
    model.generation_config.eos_token_id = None
    for lengths, count in (((9,), 40), ((1,), 30), ((30,), 34), ((9, 9, 9), 20), ((3, 9, 6), 30), ((5, 2, 1), 30)):
        prompts = prompts_of(*lengths)
        assert greedy(model, prompts, count) == expected(model, prompts, count), lengths
    launches = sum(graph.launches for graph in graphs)
    assert (launches > 100) == (family in CAPTURED | {"falcon"}), launches


def test_graph_is_captured_again_for_larger_buffers(graphs, long_model):
    prompts = prompts_of(7, 4)
    assert greedy(long_model, prompts, 300) == expected(long_model, prompts, 300)
    assert len(graphs) == 3  # for buffers of 136, 280 and 568 tokens
    assert sum(graph.launches for graph in graphs) > 290


def test_graph_of_each_text_has_its_own_buffers(graphs, long_model):
    """Two texts in turn."""
    [prompt] = prompts_of(9)
    sampler = Sampler([0], SamplingConfig(temperature=0))
    steps = list(zip(*(decode(long_model, [prompt], sampler, 40) for _ in range(2)), strict=True))
    for number in range(2):
        assert [[step[number][0][0] for step in steps]] == expected(long_model, [prompt], 40)
    assert len(graphs) == 2


@pytest.mark.parametrize("change", ["in place", "other memory", "other parameters", "another type"])
def test_graph_uses_the_weights_of_the_moment(change, graphs, long_model):
    [prompt] = prompts_of(9)
    greedy(long_model, [prompt], 20)
    change_weights(long_model, change)
    assert greedy(long_model, [prompt], 20) == expected(long_model, [prompt], 20)


def test_graph_reads_no_uninitialized_memory(graphs, long_model, monkeypatch):
    """What is behind the mask must be a number: zero times NaN is NaN."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(torch.nan))
    [prompt] = prompts_of(9)
    assert greedy(long_model, [prompt], 30) == expected(long_model, [prompt], 30)
    assert sum(graph.launches for graph in graphs) > 25


def test_graph_failing_capture_leaves_the_replay(graphs, long_model, monkeypatch):
    def fail(replay, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replaying_reader, "Graph", fail)
    prompts = prompts_of(9, 5)
    assert greedy(long_model, prompts, 40) == expected(long_model, prompts, 40)


def test_graph_with_other_logits_is_not_used(graphs, long_model, monkeypatch):
    monkeypatch.setattr(replaying_reader, "Graph", lambda replay, inputs: lambda *given: replay(*given) * 1.1)
    prompts = prompts_of(9)
    assert greedy(long_model, prompts, 40) == expected(long_model, prompts, 40)


@pytest.mark.parametrize("use_graphs", [False, True])
def test_replay_with_other_logits_is_not_used(use_graphs, long_model, request):
    """The replay lacks operations that a recording cannot see."""
    if use_graphs:
        request.getfixturevalue("graphs")

    def hook(head, args, logits):
        with torch._C.DisableTorchFunction():
            logits.mul_(torch.linspace(-1, 1, logits.size(-1)))

    long_model.get_output_embeddings().register_forward_hook(hook)
    [prompt] = prompts_of(9)
    assert greedy(long_model, [prompt], 40) == expected(long_model, [prompt], 40)


def test_graph_steps_need_no_host_sync(graphs, long_model, monkeypatch):
    """Neither the step nor the usual controls read a value from the device; only each block of ids is read."""
    [prompt] = prompts_of(9)
    config = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2)
    sampler = Sampler([1], config)
    sampler._windowed = False  # as on a GPU
    reads = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, m=method, n=name: reads.append(n) or m(self, *a))
    blocks = decode(long_model, [prompt], sampler, 48, steps_at_once=8)
    next(blocks)  # records, captures and checks
    reads.clear()
    assert len(list(blocks)) == 5 and reads == ["tolist"] * 5


@needs_a_gpu
@pytest.mark.parametrize("family", sorted(CAPTURED))
def test_graph_on_a_gpu_greedy_ids_equal_generate(family, monkeypatch):
    captured = []

    def capture(*arguments) -> Graph:
        graph = Graph(*arguments)  # may fail
        captured.append(graph)
        return graph

    monkeypatch.setattr(replaying_reader, "Graph", capture)
    model = model_of(family, 97).eval().cuda()
    model.generation_config.eos_token_id = None
    for lengths, count in (((9,), 40), ((1,), 30), ((9, 9, 9), 20), ((3, 9, 6), 30)):
        prompts = prompts_of(*lengths)
        assert greedy(model, prompts, count, steps_at_once=8) == expected(model, prompts, count), lengths
    assert captured
