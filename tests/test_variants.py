"""The variants of a training step: each one's loss and gradients are the model's own, and each is off where it is not safe."""

import copy
import weakref

import pytest
import torch
from conftest import CPU, assert_equal_weights, stop_after, weights
from families import MASK_FREE, batch, gradients, small_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mori import distributed, run
from mori.cli import UserError
from mori.config import TrainConfig
from mori.distributed import Runtime
from mori.model import lm, loading, loss, variants
from mori.model.lm import CausalLMLoss, attends_to_all_before
from mori.model.loss import chunked_cross_entropy_sum
from mori.model.variants import build_module, may_compile, takes_onednn
from mori.speed import fused, matmul
from mori.speed.fused import fuse_activations, fuse_layers
from mori.speed.peak import flops_per_token


def test_build_module_keeps_loss_and_gradients(any_family, monkeypatch):
    """Scaled or capped logits, sliding windows and masks of the model's own keep their variant off."""
    monkeypatch.setattr(loss, "CHUNK", 16)
    model, (input_ids, labels) = small_model(any_family, 97), batch()
    own = CausalLMLoss(model).eval()
    expected_loss = own(input_ids, labels, torch.tensor(42.0))
    expected = gradients(model, expected_loss)
    module, description = build_module(model, TrainConfig(block_size=24, dropout=0.0), batch(), CPU)
    module.eval()
    actual_loss = module(input_ids, labels, torch.tensor(42.0))
    torch.testing.assert_close(actual_loss, expected_loss)
    actual = gradients(model, actual_loss)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-6)
    assert ("mask-free" in description) == (any_family in MASK_FREE)
    plain_head = any_family not in ("gemma2", "granite", "cohere", "mixtral", "olmoe", "qwen3_moe")
    assert ("chunked loss" in description) == plain_head


def test_build_module_with_bf16_weights_keeps_the_loss_nearly(any_family):
    runtime = Runtime(torch.device("cpu"), 0, 1, "bf16")
    model, (input_ids, labels) = small_model(any_family, 97), batch()
    results = []
    for narrow in (False, True):
        if narrow:
            loading.store_in_bfloat16(model)
        module, description = build_module(model, TrainConfig(block_size=24, dropout=0.0), batch(), runtime)
        with runtime.autocast():
            results.append((module.eval()(input_ids, labels, torch.tensor(42.0)), "chunked loss" in description))
        module.use_own_attention()
    (wide, wide_chunked), (narrow, narrow_chunked) = results
    assert wide_chunked == narrow_chunked
    torch.testing.assert_close(narrow, wide, rtol=2e-2, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, narrow).values())


def test_build_module_switches_every_variant_off():
    flags = {"chunked_loss": False, "mask_free_attention": False, "fused_activations": False}
    module, description = build_module(small_model("gpt2", 97), TrainConfig(block_size=24, **flags), batch(), CPU)
    assert description == "nothing" and not module.chunked_loss and not module.mask_free
    assert not any(isinstance(inner, nn.GELU) for inner in module.modules())


@pytest.mark.parametrize("wrong", ["loss", "nan", "matmul"])
def test_build_module_keeps_the_model_if_the_loss_check_fails(wrong, monkeypatch):
    if wrong != "matmul":
        factor = 0.99 if wrong == "loss" else torch.nan
        monkeypatch.setattr(lm, "chunked_cross_entropy_sum", lambda *args: factor * chunked_cross_entropy_sum(*args))
    else:
        onednn_matmul = matmul.onednn_matmul
        monkeypatch.setattr(matmul, "onednn_matmul", lambda *args, **kwargs: 2 * onednn_matmul(*args, **kwargs))
        monkeypatch.setattr(matmul, "_MIN_MULTIPLICATIONS", 1)
    model = small_model("llama", 97)
    module, description = build_module(model, TrainConfig(block_size=24), batch(), CPU, cpu_matmul="onednn")
    assert not module.chunked_loss and not module.mask_free and module.cpu_matmul == "torch"
    assert "the loss check failed" in description and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["bloom", "mamba", "mistral", "gpt2"])
def test_build_module_refuses_a_document_mask_it_cannot_keep(family):
    """No positions to give, no attention, a shorter window, no token between documents."""
    separators = () if family == "gpt2" else (5,)
    config = TrainConfig(block_size=24, document_mask=True)
    with pytest.raises(UserError, match="document_mask: .* cannot keep documents apart"):
        build_module(small_model(family, 97), config, batch(), CPU, separators=separators)


def test_document_mask_changes_the_losses_and_cannot_change_in_a_resumed_run(run_train, tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("Halo semua, selamat datang kembali. " * (number + 3), encoding="utf-8")
    plain, apart = (
        run_train(run_name=name, corpus=[str(tmp_path)], document_mask=name == "apart") for name in ("plain", "apart")
    )
    assert apart["ledger"] == plain["ledger"]
    assert apart["eval"]["after"]["loss"] != plain["eval"]["after"]["loss"]
    with pytest.raises(UserError, match="document_mask"):
        run_train(run_name="apart", corpus=[str(tmp_path)])


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_gradient_checkpointing_keeps_the_weights(library, run_train, tmp_path, monkeypatch):
    if library == "onednn" and matmul.choose_library("onednn") == "torch":
        pytest.skip("this build of PyTorch has no oneDNN")
    calls, onednn_linear = [], matmul._onednn_linear
    monkeypatch.setattr(matmul, "_MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(matmul, "_onednn_linear", lambda *args: calls.append(args[0].size(1)) or onednn_linear(*args))
    run_train(run_name="kept", output_dir=str(tmp_path / "kept"), cpu_matmul=library)
    count = sum(size in (32, 128) for size in calls)  # of the model's layers; others measure the machine
    run_train(run_name="again", output_dir=str(tmp_path / "again"), cpu_matmul=library, gradient_checkpointing=True)
    assert (count > 0) == (library == "onednn")
    assert sum(size in (32, 128) for size in calls) >= 2.2 * count  # the recomputation uses the same library
    kept, recomputed = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert kept.keys() == recomputed.keys() and all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_build_module_names_a_model_without_gradient_checkpointing(monkeypatch):
    model = small_model("llama", 97)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing"):
        build_module(model, TrainConfig(gradient_checkpointing=True), batch(), CPU)


@pytest.mark.parametrize(
    "changed, dtype, precision, expected",
    [
        ({}, torch.float32, "fp32", True),
        ({}, torch.float32, "bf16", False),
        ({}, torch.float64, "fp32", False),
        ({"torch_compile": True}, torch.float32, "fp32", False),
    ],
)
def test_takes_onednn_needs_fp32_without_compiler(changed, dtype, precision, expected):
    runtime = Runtime(torch.device("cpu"), 0, 1, precision)
    assert takes_onednn(small_model("gpt2", 97).to(dtype), TrainConfig(**changed), runtime) == expected


def test_flops_per_token_equals_a_count_by_hand_and_by_pytorch():
    """6 for every weight but the positions', and 12 T D for each layer; PyTorch's counter leaves out biases and norms."""
    model, (input_ids, labels) = small_model("gpt2", 97), batch(1)
    count = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    assert flops_per_token(model, 24) == 6 * count + 12 * 24 * 32 * 2
    with FlopCounterMode(display=False) as counter:
        CausalLMLoss(model)(input_ids, labels).backward()
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1 and "wpe" not in name)
    assert counter.get_total_flops() == pytest.approx(24 * (flops_per_token(model, 24) - 6 * vectors), rel=0.05)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"world_size": 2}, False),
        ({"device": "cpu"}, False),
        ({"capability": (6, 1)}, False),
        ({"triton": None}, False),
        ({"mask_free": False}, False),
        ({"gradient_checkpointing": True}, False),
    ],
    ids=str,
)
def test_may_compile_needs_one_gpu_that_the_compiler_knows(change, expected, monkeypatch):
    case = {"world_size": 1, "device": "cuda", "capability": (9, 0), "triton": object(), "mask_free": True}
    case |= {"gradient_checkpointing": False, **change}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case["capability"])
    find_spec = variants.importlib.util.find_spec  # other libraries call it too
    monkeypatch.setattr(
        variants.importlib.util,
        "find_spec",
        lambda name, *rest: case["triton"] if name == "triton" else find_spec(name, *rest),
    )
    module = CausalLMLoss(small_model("gpt2", 97))
    if case["mask_free"]:
        module.use_mask_free_attention()
    config = TrainConfig(block_size=24, gradient_checkpointing=case["gradient_checkpointing"])
    runtime = Runtime(torch.device(case["device"]), 0, case["world_size"], "bf16")
    assert may_compile(module, config, runtime) == expected


@pytest.mark.parametrize(
    "setting, kept, expected", [(None, True, 1), (None, False, 0), (False, False, 0), (True, False, 1)]
)
def test_build_module_compiles_as_the_flag_or_the_checkpoint_says(setting, kept, expected, monkeypatch):
    compiled = []
    monkeypatch.setattr(CausalLMLoss, "compile_trunk", lambda self, rows: compiled.append(rows))
    config = TrainConfig(block_size=24, torch_compile=setting)
    _, description = build_module(small_model("gpt2", 97), config, batch(), CPU, compiled=kept)
    assert compiled == expected * [config.per_device_train_batch_size] and ("compiled" in description) == bool(expected)


def test_train_compiles_when_the_measured_speed_says_that_it_pays(run_train, tmp_path, monkeypatch, capsys):
    """At the second log; a resumed run keeps the choice. The compiler runs without optimizations, so no weight changes."""
    compiled, compile_trunk = [], CausalLMLoss.compile_trunk

    def count(module, rows):
        torch._dynamo.reset()
        compiled.append(rows)
        compile_trunk(module, rows, backend="eager")

    monkeypatch.setattr(CausalLMLoss, "compile_trunk", count)
    monkeypatch.setattr(run, "may_compile", lambda *args: True)
    options = {"max_steps": 12, "logging_steps": 3, "save_steps": 4}
    run_train(**options, run_name="short", output_dir=str(tmp_path / "short"))  # a run of seconds
    assert not compiled
    monkeypatch.setattr(run, "WORTH_COMPILING_SECONDS", 0)
    run_train(**options, run_name="long", output_dir=str(tmp_path / "long"))
    assert len(compiled) == 1 and "step 6: compiled" in capsys.readouterr().out
    stop_after(9, lambda: run_train(**options))
    run_train(**options)
    assert len(compiled) == 3  # at step 6, and at the start of the resumed run
    assert_equal_weights(tmp_path / "short", tmp_path / "long")
    assert_equal_weights(tmp_path / "long", tmp_path / "brain")


@pytest.mark.parametrize(
    "family, changed, expected",
    [("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, True), ("gpt2", {}, False), ("llama", {}, True),
     ("llama", {"attention_dropout": 0.1}, False), ("mistral", {}, False)],
)  # fmt: skip
def test_cudnn_attention_is_left_to_models_without_mask_and_dropout(family, changed, expected):
    model = small_model(family, 97)
    for name, value in changed.items():
        setattr(model.config, name, value)
    module = CausalLMLoss(model)
    if attends_to_all_before(model, 24):
        module.use_mask_free_attention()
    assert variants._suits_cudnn_attention(module) == expected


def test_build_module_says_that_nothing_was_compiled(monkeypatch):
    """Dynamo runs code that it cannot trace as it is, without an error."""
    compile_trunk = CausalLMLoss.compile_trunk
    monkeypatch.setattr(CausalLMLoss, "compile_trunk", lambda self, rows: compile_trunk(self, rows, backend="eager"))
    descriptions = []
    for traceable in (True, False):
        torch._dynamo.reset()
        model = small_model("llama", 97)
        if not traceable:
            model.base_model.forward = torch.compiler.disable(model.base_model.forward)
        module, description = build_module(model, TrainConfig(block_size=24, torch_compile=True), batch(), CPU)
        descriptions.append(description.rpartition(", ")[2])
        assert module.compiled == traceable
    assert descriptions == ["compiled", "not compiled: the compiler cannot trace the model"]


def test_train_continues_uncompiled_if_the_compiler_fails_later(run_train, tmp_path, monkeypatch, capsys):
    """After memory ran out, the smaller micro-batch needs other code."""
    graphs, forward, compile_trunk = [], CausalLMLoss.forward, CausalLMLoss.compile_trunk

    def backend(graph, _):
        graphs.append(graph)
        if len(graphs) > 1:
            raise RuntimeError("no code for this size")
        return graph.forward

    def limited(module, input_ids, *args):
        if module.training and len(args) > 1 and len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(module, input_ids, *args)

    options = {"dropout": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 6}
    monkeypatch.setattr(CausalLMLoss, "forward", limited)
    run_train(**options, run_name="eager", output_dir=str(tmp_path / "eager"))
    torch._dynamo.reset()
    monkeypatch.setattr(CausalLMLoss, "compile_trunk", lambda self, rows: compile_trunk(self, rows, backend=backend))
    run_train(**options, torch_compile=True)
    printed = capsys.readouterr().out
    assert ", compiled\n" in printed and len(graphs) == 2
    assert printed.count("WARNING: no longer compiled: ") == 1 and "no code for this size" in printed
    assert_equal_weights(tmp_path / "eager", tmp_path / "brain")


def test_build_module_says_why_the_compiler_failed_and_runs_without(monkeypatch):
    def broken(graph, _):
        raise RuntimeError("no compiler here")

    compile_trunk = CausalLMLoss.compile_trunk
    monkeypatch.setattr(CausalLMLoss, "compile_trunk", lambda self, rows: compile_trunk(self, rows, backend=broken))
    torch._dynamo.reset()
    model, (input_ids, labels) = small_model("llama", 97), batch()
    expected = CausalLMLoss(model)(input_ids, labels)
    random_state = torch.get_rng_state()
    module, description = build_module(model, TrainConfig(block_size=24, torch_compile=True), batch(), CPU)
    assert "not compiled: " in description and "no compiler here" in description
    torch.testing.assert_close(module(input_ids, labels), expected)
    assert torch.equal(torch.get_rng_state(), random_state) and all(p.grad is None for p in model.parameters())
    assert not distributed.out_of_memory(RuntimeError(description))


class Gated(nn.Module):
    """A gated MLP, or one that only looks like it."""

    def __init__(self, adds: bool):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act_fn, self.adds = nn.SiLU(), adds

    def forward(self, x):
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(gate + up if self.adds else gate * up)


class Norm(nn.Module):
    """An RMS norm, or one that subtracts the mean as well."""

    def __init__(self, centers: bool):
        super().__init__()
        self.weight, self.eps, self.centers = nn.Parameter(torch.rand(4)), 1e-3, centers

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centers else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class TwoLayers(nn.Module):
    """An MLP whose dropout comes last, or one that drops before its second layer."""

    def __init__(self, drops_inside: bool):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 8), nn.Linear(8, 4), nn.GELU()
        self.dropout, self.drops_inside = nn.Dropout(0.5), drops_inside

    def forward(self, x):
        inner = self.act(self.first(x))
        return self.second(self.dropout(inner)) if self.drops_inside else self.dropout(self.second(inner))


@pytest.mark.parametrize("layer, name", [(Gated, "gates"), (Norm, "norms"), (TwoLayers, "MLPs")])
def test_fuse_layers_replaces_what_computes_the_same_and_nothing_else(layer, name):
    layers, random_state = nn.ModuleList([layer(False), layer(True)]), torch.get_rng_state()
    assert fuse_layers(layers) == [f"fused {name}"]
    assert [module.forward.__class__.__name__ == "partial" for module in layers] == [True, False]
    assert torch.equal(torch.get_rng_state(), random_state)


class GatedWithDropout(Gated):
    """A gated MLP whose output is dropped by a function that no child shows."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_fuse_layers_leaves_a_gated_mlp_with_dropout_alone():
    assert not fuse_layers(nn.ModuleList([GatedWithDropout(False).eval()]))


@pytest.mark.parametrize("layer", [Gated, Norm, TwoLayers])
@pytest.mark.parametrize("x_trains", [True, False])
def test_fused_layers_have_the_gradients_of_autograd(layer, x_trains, monkeypatch):
    monkeypatch.setattr(fused, "_MIN_RECOMPUTED", 0)
    own = layer(False).double()
    replaced = copy.deepcopy(own)
    assert fuse_layers(replaced)
    results = []
    for module in (own, replaced):
        x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(
            x_trains
        )
        torch.manual_seed(2)  # of dropout
        module(x).sin().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(results[1][not x_trains :], results[0][not x_trains :])


@pytest.mark.parametrize(
    "layer, recompute, kept_rows",
    [(Gated, True, 2 * 8 + 4), (Gated, False, 2 * 8 + 4 + 8), (Norm, True, 4 + 1), (TwoLayers, True, 8 + 4)],
)
def test_fused_layers_keep_their_inputs_alone(layer, recompute, kept_rows, monkeypatch):
    """Of an MLP its input and what the activation takes, of a gated one gate and up, and unless it is computed again their
    product; of a norm its input and a number a row."""
    monkeypatch.setattr(fused, "_MIN_RECOMPUTED", 0)
    module, x, kept = layer(False).eval(), torch.randn(50, 4, requires_grad=True), {}
    fuse_layers(module, recompute)

    def pack(tensor):
        if tensor.data_ptr() not in {parameter.data_ptr() for parameter in module.parameters()}:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert sum(kept.values()) == 50 * kept_rows * 4


@pytest.mark.parametrize(
    "layer, last, recompute", [(Gated, "down_proj", True), (Gated, "down_proj", False), (TwoLayers, "second", True)]
)
def test_the_input_of_the_last_layer_is_kept_only_where_it_is_not_computed_again(layer, last, recompute, monkeypatch):
    monkeypatch.setattr(fused, "_MIN_RECOMPUTED", 50 * 8)
    module, inputs = layer(False), []
    fuse_layers(module, recompute)
    getattr(module, last).register_forward_pre_hook(lambda layer, args: inputs.append(weakref.ref(args[0])))
    y = module(torch.randn(50, 4))
    assert (inputs[0]() is None) == recompute
    y.sum().backward()
    y = module(torch.randn(49, 4))
    assert (inputs[1]() is None) == (recompute and layer is Gated)  # an activation alone is small enough to be kept


@pytest.mark.parametrize(
    "family, names",
    [
        ("llama", ["fused gates", "fused norms"]),
        ("qwen3", ["fused gates", "fused norms"]),
        ("gemma2", ["fused gates", "fused norms"]),
        ("phi3", ["fused gates", "fused norms"]),
        ("gpt2", ["fused MLPs"]),
        ("falcon", ["fused MLPs"]),
        ("phi", ["fused MLPs"]),
        ("bloom", []),
    ],
)
def test_fuse_layers_recognizes_layers_in_families(family, names):
    model = small_model(family, 97)
    fuse_activations(model)
    assert fuse_layers(model) == names
