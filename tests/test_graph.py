"""A step of one shape, which a GPU captures as one graph. Without a GPU the list of its calls, on fixed memory, stands for the graph."""

import pytest
import torch
import transformers
from families import FAMILIES, expected, greedy, prompts_of
from families import small_model as model_of
from packaging.version import Version
from transformers import AutoModelForCausalLM

from mori.generation import decode
from mori.speed.replay import Replay

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# Those whose step is the same list of calls everywhere in the text.
CAPTURED = set("gpt2 gpt_neox opt falcon phi llama qwen2 qwen3 gemma granite cohere olmo2 stablelm smollm3".split())
OLD = Version(transformers.__version__) < Version("5.23")
needs_one_shape = pytest.mark.skipif(OLD, reason="this release of transformers computes positions in Python: no graph")
if Version(transformers.__version__) >= Version("5.24"):
    CAPTURED.add("gptj")


class StandIn:
    """What a graph is to its user: inputs are copied in, and then nothing but what was recorded happens, at the same places."""

    made = 0

    def __init__(self, replay: Replay, inputs: list[torch.Tensor]):
        type(self).made += 1
        self.replay, self.inputs = replay, [tensor.clone() for tensor in inputs]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            assert own.shape == given.shape
            own.copy_(given)
        return self.replay(*self.inputs)


@pytest.fixture
def captured(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(decode, "_one_shape", lambda device, autocast: not autocast)
    monkeypatch.setattr(decode, "Graph", StandIn)
    launches = []
    inside = StandIn.__call__
    monkeypatch.setattr(StandIn, "__call__", lambda self, *inputs: launches.append(self) or inside(self, *inputs))
    return launches


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_generate(family, captured):
    model = model_of(family, 97).eval()
    model.generation_config.eos_token_id = None
    model.config.output_router_logits = False
    for lengths, count in (((9,), 40), ((1,), 30), ((30,), 34), ((9, 9, 9), 20), ((3, 9, 6), 30), ((5, 2, 1), 30)):
        prompts = prompts_of(*lengths)
        assert greedy(model, prompts, count) == expected(model, prompts, count), lengths
    assert (len(captured) > 150) == (family in CAPTURED and not OLD), len(captured)


@pytest.fixture
def long_model():
    config = model_of("llama", 97).config
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@needs_one_shape
def test_a_text_that_outgrows_its_buffers_is_captured_anew(captured, long_model):
    StandIn.made = 0
    prompts = prompts_of(7, 4)
    assert greedy(long_model, prompts, 300) == expected(long_model, prompts, 300)
    assert StandIn.made == 3 and len(captured) > 290  # for 136, 280 and 568 tokens


@needs_one_shape
def test_a_graph_serves_the_next_texts_of_its_kind(captured, long_model):
    StandIn.made = 0
    for lengths in ((9,), (30,), (2,)):
        prompts = prompts_of(*lengths)
        assert greedy(long_model, prompts, 60) == expected(long_model, prompts, 60)
    assert StandIn.made == 1 and len({id(graph) for graph in captured}) == 1
    assert greedy(long_model, prompts_of(9, 9), 20) and StandIn.made == 2
    assert len(decode._kept[long_model]) == 1  # buffers are large: only the last ones are kept
    [prompt] = prompts_of(200)  # the buffers must grow, and the graph with them
    assert greedy(long_model, [prompt], 60) == expected(long_model, [prompt], 60)
    assert StandIn.made == 3


def test_two_texts_drawn_in_turn_do_not_write_into_each_other(captured, long_model):
    [prompt] = prompts_of(9)
    wanted = [row for _ in range(2) for row in expected(long_model, [prompt], 40)]
    readers = [decode.decode(long_model, [prompt], decode.Sampler([0], temperature=0.0), 40) for _ in range(2)]
    drawn = list(zip(*readers, strict=True))
    assert [[step[i][0][0] for step in drawn] for i in range(2)] == wanted


@pytest.mark.parametrize("change", ["in place", "other memory", "other parameters", "another type"])
def test_a_graph_is_given_up_with_the_weights_it_knew(change, captured, long_model):
    [prompt] = prompts_of(9)
    greedy(long_model, [prompt], 20)
    for module in long_model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            other = weight.detach() + 0.3 * torch.randn_like(weight)
            if change == "in place":
                weight.data.copy_(other)
            elif change == "other memory":
                weight.data = other
            elif change == "other parameters":
                setattr(module, name, torch.nn.Parameter(other))
            else:
                weight.data = other.double()
    for _ in range(2):
        assert greedy(long_model, [prompt], 20) == expected(long_model, [prompt], 20)


@needs_one_shape
def test_what_a_diverged_text_left_behind_does_no_harm(captured, long_model):
    [prompt] = prompts_of(9)
    wanted = expected(long_model, [prompt], 30)
    assert greedy(long_model, [prompt], 30) == wanted
    embedding = long_model.get_input_embeddings().weight
    sound = embedding.detach()[5].clone()
    embedding.data[5] = torch.nan
    with pytest.raises(FloatingPointError):
        greedy(long_model, [[*prompt, 5] * 5], 3)
    embedding.data[5] = sound
    before = len(captured)
    assert greedy(long_model, [prompt], 30) == wanted
    assert len(captured) - before > 25


def test_a_step_that_cannot_be_captured_is_replayed(captured, long_model, monkeypatch):
    def cannot(replay, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode, "Graph", cannot)
    prompts = prompts_of(9, 5)
    assert greedy(long_model, prompts, 40) == expected(long_model, prompts, 40)


def test_a_wrong_graph_is_not_used(captured, long_model, monkeypatch):
    monkeypatch.setattr(decode, "Graph", lambda replay, inputs: lambda *given: replay(*given) * 1.1)
    prompts = prompts_of(9)
    assert greedy(long_model, prompts, 40) == expected(long_model, prompts, 40)


@needs_one_shape
def test_a_kept_graph_that_became_wrong_is_recorded_anew(captured, long_model, monkeypatch):
    [prompt] = prompts_of(9)
    greedy(long_model, [prompt], 20)
    StandIn.made, first = 0, captured[0]
    inside = StandIn.__call__
    monkeypatch.setattr(StandIn, "__call__", lambda self, *given: inside(self, *given) * (1.1 if self is first else 1))
    assert greedy(long_model, [prompt], 30) == expected(long_model, [prompt], 30)
    assert StandIn.made == 1


@pytest.mark.parametrize("road", ["replay", "graph"])
def test_a_replay_that_is_not_the_model_is_not_used(road, long_model, request):
    """What a recording cannot see is missing from the replay."""
    if road == "graph":
        request.getfixturevalue("captured")

    def hook(head, given, logits):
        with torch._C.DisableTorchFunction():
            logits.mul_(torch.linspace(-1, 1, logits.size(-1)))

    long_model.get_output_embeddings().register_forward_hook(hook)
    [prompt] = prompts_of(9)
    assert greedy(long_model, [prompt], 40) == expected(long_model, [prompt], 40)


def test_the_host_reads_nothing_between_blocks(captured, long_model, monkeypatch):
    """Neither the step nor the usual controls ask the device for a value."""
    [prompt] = prompts_of(9)
    greedy(long_model, [prompt], 20)
    sampler = decode.Sampler([1], temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2)
    sampler._windowed = False  # as on a GPU
    reads = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
        inside = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, i=inside, n=name: reads.append(n) or i(self, *a))
    blocks = decode.decode(long_model, [prompt], sampler, 48, steps_at_once=8)
    next(blocks)
    del reads[:]
    assert len(list(blocks)) == 5 and reads == ["tolist"] * 5


@needs_a_gpu
@pytest.mark.parametrize("family", sorted(CAPTURED))
def test_on_a_gpu_greedy_ids_equal_generate(family):
    model = model_of(family, 97).eval().cuda()
    model.generation_config.eos_token_id = None
    for lengths, count in (((9,), 40), ((1,), 30), ((9, 9, 9), 20), ((3, 9, 6), 30)):
        prompts = prompts_of(*lengths)
        assert greedy(model, prompts, count, steps_at_once=8) == expected(model, prompts, count), lengths
    assert OLD or any(isinstance(kept[1], decode.Graph) for kept in decode._kept[model].values())
