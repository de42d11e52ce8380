"""The model with its loss: attention without a mask, documents kept apart, compiling in place, no host sync in a step."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from families import batch, gradients, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mori.config import TrainConfig
from mori.evaluate import first_nonfinite_tensor
from mori.generation.generate import generate
from mori.model import lm, loading, loss
from mori.model.lm import MASK_FREE, CausalLMLoss
from mori.model.variants import build_module
from mori.train import train


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_mask_free_attention_calls_sdpa_causally_without_a_mask(mask_free_family, compiled, monkeypatch):
    model, (input_ids, labels) = small_model(mask_free_family, 97), batch()
    module, _ = build_module(model, TrainConfig(block_size=24), batch(), CPU)
    calls, sdpa = [], F.scaled_dot_product_attention

    def record(*args, attn_mask=None, is_causal=False, **_):
        calls.append((args[3] if len(args) > 3 else attn_mask, is_causal))

    def recorded_sdpa(*args, **kwargs):
        record(*args, **kwargs)
        return sdpa(*args, **kwargs)

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.target is sdpa:
                record(*node.args, **node.kwargs)
        return graph.forward

    if compiled:
        torch._dynamo.reset()
        module.compile_trunk(len(input_ids), backend=backend)
    else:
        monkeypatch.setattr(F, "scaled_dot_product_attention", recorded_sdpa)
    module(input_ids, labels).backward()
    assert len(calls) >= (1 if compiled else 2) and set(calls) == {(None, True)}  # one graph may serve both layers


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_as_loaded_restores_attention_for_generating_and_saving(compiled, tokenizer, tmp_path):
    model, expected = small_model("gpt2", len(tokenizer)), small_model("gpt2", len(tokenizer))
    model.config.pad_token_id = expected.config.pad_token_id = 5
    module, _ = build_module(model, TrainConfig(block_size=24, fused_activations=False), batch(), CPU)
    graphs = []
    if compiled:
        torch._dynamo.reset()
        module.compile_trunk(2, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        module(*batch()).backward()
    count = len(graphs)
    assert module.mask_free and model.config._attn_implementation == MASK_FREE
    with module.as_loaded():
        assert model.config._attn_implementation == "sdpa" and model.config.pad_token_id == 5
        texts = generate(model, tokenizer, ["Halo semua", "Lama"], temperature=0, max_new_tokens=5)
        model.save_pretrained(tmp_path)
    assert [t.new_token_ids for t in texts] == [
        t.new_token_ids for t in generate(expected, tokenizer, ["Halo semua", "Lama"], temperature=0, max_new_tokens=5)
    ]
    assert module.mask_free and model.config._attn_implementation == MASK_FREE and len(graphs) == count
    assert MASK_FREE not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.pad_token_id == 5


def test_compiled_module_compiles_once_for_all_batch_sizes(monkeypatch):
    """A smaller batch is padded: the last one of an epoch, and all of them once memory ran out."""
    model, (input_ids, labels) = small_model("llama", 97), batch(4)
    module, _ = build_module(model, TrainConfig(block_size=24), batch(), CPU)
    expected, short = module(input_ids[:3], labels[:3]), (input_ids[:3, :7], labels[:3, :7])
    expected_short = module(*short)
    graphs = []
    torch._dynamo.reset()
    module.compile_trunk(4, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for rows in (4, 4):
        module(input_ids[:rows], labels[:rows], torch.tensor(9.0)).backward()
    count = len(graphs)
    for rows in (4, 3, 1, 4):
        value = module(input_ids[:rows], labels[:rows])
        value.backward()
        if rows == 3:
            torch.testing.assert_close(value, expected)
    module.eval()
    torch.testing.assert_close(module(*short), expected_short)  # an evaluation is not compiled
    module.train()
    assert 0 < count == len(graphs)
    rows, chunked = [], loss.chunked_cross_entropy_sum
    monkeypatch.setattr(lm, "chunked_cross_entropy_sum", lambda x, *rest: rows.append(len(x)) or chunked(x, *rest))
    module.rows = 2
    for size in (2, 2, 1):
        module(input_ids[:size], labels[:size]).backward()
    assert rows == [2, 2, 2]


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that are created inside."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.sizes += [o.numel() for o in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(o)]
        return out


def test_chunked_loss_creates_no_tensor_of_all_logits(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 32)
    model, (input_ids, labels) = small_model("gpt2", 320), batch(4, 48, 320)  # 4 * 48 * 320 is more than any weight
    module, _ = build_module(model, TrainConfig(block_size=48), batch(), CPU)
    with Allocations() as allocated:
        module(input_ids, labels, torch.tensor(9.0)).backward()
    assert 0 < max(allocated.sizes) < labels.numel() * 320
    module.chunked_loss = False
    with Allocations() as allocated:
        module(input_ids, labels, torch.tensor(9.0)).backward()
    assert max(allocated.sizes) >= labels.numel() * 320


class HostSyncs(TorchDispatchMode):
    """The shapes of the tensors whose values the host reads inside: `.item()`, `bool(tensor)`, `.tolist()`."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [None, 5], ids=["no padding", "padding token"])
def test_train_reads_nothing_from_the_device_between_logs(settings, padding, monkeypatch):
    counts, load_config = {}, loading.load_config

    def with_padding(*args, **kwargs):
        config = load_config(*args, **kwargs)
        config.pad_token_id = padding
        return config

    monkeypatch.setattr(loading, "load_config", with_padding)
    config = TrainConfig(**{**settings, "max_steps": 9, "logging_steps": 4, "eval_steps": 100, "save_steps": 100})
    with HostSyncs() as syncs:

        def on_step(step: int, _) -> None:
            counts[step] = len(syncs.shapes)
            syncs.shapes.clear()

        train(config, on_step)
    assert counts[4] > 0 and counts[8] > 0
    assert [counts[step] for step in (2, 3, 5, 6, 7)] == [0] * 5


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_first_nonfinite_tensor_names_the_module(compiled):
    model, (input_ids, labels) = small_model("gpt2", 97), batch(2, 16)
    model.transformer.h[1].mlp.c_fc.bias.data.fill_(10.0)
    model.transformer.h[1].mlp.c_proj.weight.data.fill_(3e38)  # finite, but its products are not
    module = CausalLMLoss(model, chunked_loss=True)
    module.use_mask_free_attention()
    if compiled:
        torch._dynamo.reset()
        module.compile_trunk(2, backend="eager")
        module(input_ids, labels)
    name = first_nonfinite_tensor(module, [(input_ids, labels)], torch.tensor(32.0), CPU)
    assert name.startswith("the output of transformer.h.1.mlp.")
    assert module.compiled == compiled


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_document_mask_gives_each_document_its_own_loss(mask_free_family, compiled):
    model, separator = small_model(mask_free_family, 97), 5
    model.config.output_router_logits = False
    for part in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    config = TrainConfig(block_size=24, document_mask=True, chunked_loss=mask_free_family != "cohere")
    input_ids, _ = batch(2, 24)
    input_ids[0, [7, 15]] = input_ids[1, [0, 22]] = separator
    labels = input_ids.roll(-1, 1)
    module, description = build_module(model, config, batch(), CPU, separators=(separator,))
    assert "documents kept apart" in description and "mask-free" not in description
    if compiled:
        torch._dynamo.reset()
        module.compile_trunk(2, backend="eager")
    parts = [(0, 0, 7), (0, 7, 15), (0, 15, 24), (1, 0, 22), (1, 22, 24)]
    with torch.compiler.set_stance("force_eager"):
        alone = sum(
            F.cross_entropy(model(input_ids[row : row + 1, a:b]).logits[0], labels[row, a:b], reduction="sum")
            for row, a, b in parts
        )
    torch.testing.assert_close(module(input_ids, labels), alone)
    expected = gradients(model, alone)
    actual = gradients(model, module(input_ids, labels))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-5)
