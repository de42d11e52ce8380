"""The fast path: the same loss and gradients, without masks, whole logits, or questions to the device."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import weights
from families import FAMILIES, small_model
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mori.config import TrainConfig, UserError
from mori.diagnose import first_bad_tensor
from mori.distributed import Runtime
from mori.model import loading as models
from mori.model import loss
from mori.model import options as fast
from mori.model.loss import chunked_cross_entropy_sum
from mori.speed import matmul as products
from mori.train import train

CPU = Runtime(torch.device("cpu"), 0, 1, "fp32")
MASK_FREE = [
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "granite",
    "cohere",
    "olmo2",
    "olmoe",
    "qwen3_moe",
]
if Version(transformers.__version__) >= Version("5.24"):
    MASK_FREE.append("gptj")


def batch(rows: int = 2, length: int = 24, vocabulary: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[0, 3:9] = -100
    return torch.randint(0, vocabulary, (rows, length)), labels


def gradients(module: nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk, width", [(7, 12), (16, 12), (1000, 12), (7, 130), (1000, 130)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_give_the_loss_and_gradients_of_whole_logits_in_float64(chunk, width, bias, dtype, monkeypatch):
    """In bf16 under autocast, with fp32 weights, as training does."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    weight_type = torch.float64 if dtype == torch.float64 else torch.float32
    head = nn.Linear(width, 31, bias=bias).to(weight_type)
    hidden = torch.randn(3, 16, width, dtype=weight_type, requires_grad=True)
    _, labels = batch(3, 16, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = chunked_cross_entropy_sum(hidden, head, labels) / 42
    ours.backward()
    exact_head = nn.Linear(width, 31, bias=bias).double()
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_head(exact_hidden).flatten(0, 1), labels.flatten(), reduction="sum") / 42
    exact.backward()
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = [(ours, exact), (hidden.grad, exact_hidden.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(head.parameters(), exact_head.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).abs().max() <= close * theirs.abs().max()


@pytest.mark.parametrize("vocabulary", [31, 64, 130])  # beside, on, and beyond a multiple of 64
def test_chunks_bear_tokens_whose_probability_is_nothing_in_fp32(vocabulary):
    torch.manual_seed(0)
    head, hidden = nn.Linear(12, vocabulary), 300 * torch.randn(2, 24, 12)
    hidden[1] = 0
    _, labels = batch(2, 24, vocabulary)
    exact = F.cross_entropy(head.double()(hidden.double()).flatten(0, 1), labels.flatten(), reduction="none")
    assert exact.max() > 200  # exp(-104) is 0 in fp32
    found = chunked_cross_entropy_sum(hidden, head.float(), labels)
    torch.testing.assert_close(found.double(), exact.sum(), rtol=1e-6, atol=0)


def test_chunks_without_gradients_and_for_frozen_heads(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    head, hidden = nn.Linear(6, 11), torch.randn(2, 9, 6, requires_grad=True)
    _, labels = batch(2, 9, 11)
    whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        torch.testing.assert_close(chunked_cross_entropy_sum(hidden, head, labels), whole)
    assert operations.get_total_flops() == 2 * 18 * 6 * 11  # the logits, and nothing for a gradient
    head.requires_grad_(False)
    expected = torch.autograd.grad(whole, hidden)[0]
    chunked_cross_entropy_sum(hidden, head, labels).backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_gives_each_family_the_loss_and_gradients_of_its_own(family, monkeypatch):
    """Those with scaled or capped logits, windows, or a mask of their own are left as they are, where they must be."""
    monkeypatch.setattr(loss, "CHUNK", 16)
    model, (input_ids, labels) = small_model(family, 97), batch()
    config = TrainConfig(block_size=24, dropout=0.0)
    own = models.CausalLMLoss(model).eval()
    expected_loss = own(input_ids, labels, torch.tensor(42.0))
    expected = gradients(model, expected_loss)
    module, chosen = fast.training_module(model, config, input_ids, labels, CPU)
    module.eval()
    found_loss = module(input_ids, labels, torch.tensor(42.0))
    torch.testing.assert_close(found_loss, expected_loss)
    found = gradients(model, found_loss)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)
    assert ("without a mask" in chosen) == (family in MASK_FREE)
    assert ("in chunks" in chosen) == (family not in ("gemma2", "granite", "cohere", "mixtral", "olmoe", "qwen3_moe"))
    assert model.config._attn_implementation != models.MASK_FREE  # who saves it, or generates, finds its own


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", MASK_FREE)
def test_sdpa_sees_no_mask_and_is_causal(family, compiled, monkeypatch):
    model, (input_ids, labels) = small_model(family, 97), batch()
    module, _ = fast.training_module(model, TrainConfig(block_size=24), input_ids, labels, CPU)
    calls, sdpa = [], F.scaled_dot_product_attention

    def note(*args, attn_mask=None, is_causal=False, **_):
        calls.append((args[3] if len(args) > 3 else attn_mask, is_causal))

    def spy(*args, **kwargs):
        note(*args, **kwargs)
        return sdpa(*args, **kwargs)

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.target is sdpa:
                note(*node.args, **node.kwargs)
        return graph.forward

    if compiled:
        torch._dynamo.reset()
        module.compile_trunk(len(input_ids), backend=backend)
    else:
        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    module(input_ids, labels).backward()
    assert len(calls) >= (1 if compiled else 2) and set(calls) == {(None, True)}  # one graph may serve both layers


def test_nothing_is_compiled_again_after_the_second_step(monkeypatch):
    """The last batch of an epoch has fewer windows, and so have all once memory ran out, which must not be filled up again."""
    model, (input_ids, labels) = small_model("llama", 97), batch(4)
    module, _ = fast.training_module(model, TrainConfig(block_size=24), input_ids, labels, CPU)
    expected = module(input_ids[:3], labels[:3])
    compiled = []
    torch._dynamo.reset()
    module.compile_trunk(4, backend=lambda graph, _: compiled.append(1) or graph.forward)
    for rows in (4, 4):
        module(input_ids[:rows], labels[:rows], torch.tensor(9.0)).backward()
    twice = len(compiled)
    for rows in (4, 3, 1, 4):
        found = module(input_ids[:rows], labels[:rows])
        found.backward()
        if rows == 3:
            torch.testing.assert_close(found, expected)
    assert 0 < twice == len(compiled)
    rows, real = [], models.chunked_cross_entropy_sum
    monkeypatch.setattr(models, "chunked_cross_entropy_sum", lambda x, *rest: rows.append(len(x)) or real(x, *rest))
    module.rows = 2
    for size in (2, 2, 1):
        module(input_ids[:size], labels[:size]).backward()
    assert rows == [2, 2, 2]


def test_a_compiler_that_fails_does_not_end_the_run():
    model, (input_ids, labels) = small_model("llama", 97), batch()
    module, _ = fast.training_module(model, TrainConfig(block_size=24), input_ids, labels, CPU)
    expected = module(input_ids, labels)

    def broken(graph, _):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    module.compile_trunk(2, backend=broken)
    torch.testing.assert_close(module(input_ids, labels), expected)


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that are made while it is entered."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.sizes += [o.numel() for o in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(o)]
        return out


def test_no_tensor_of_all_logits_is_made_in_a_step(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 32)
    model, (input_ids, labels) = small_model("gpt2", 320), batch(4, 48, 320)  # 4 * 48 * 320 is more than any weight
    module, _ = fast.training_module(model, TrainConfig(block_size=48), input_ids, labels, CPU)
    with Allocations() as made:
        module(input_ids, labels, torch.tensor(9.0)).backward()
    assert 0 < max(made.sizes) < labels.numel() * 320
    module.chunked_loss = False
    with Allocations() as made:
        module(input_ids, labels, torch.tensor(9.0)).backward()
    assert max(made.sizes) >= labels.numel() * 320


class Questions(TorchDispatchMode):
    """What the host asks of a tensor's values: `.item()`, `bool(tensor)`, `.tolist()`."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.asked.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [None, 5], ids=["no padding", "a token for padding"])
def test_the_host_asks_nothing_between_two_log_points(settings, padding, monkeypatch):
    asked, real = {}, models.load_config

    def load_config(*arguments, **changed):
        config = real(*arguments, **changed)
        config.pad_token_id = padding
        return config

    monkeypatch.setattr(models, "load_config", load_config)
    config = TrainConfig(**{**settings, "max_steps": 9, "logging_steps": 4, "eval_steps": 100, "save_steps": 100})
    with Questions() as questions:

        def on_step(step: int, _) -> None:
            asked[step] = len(questions.asked)
            questions.asked.clear()

        train(config, on_step)
    assert asked[4] > 0 and asked[8] > 0
    assert [asked[step] for step in (2, 3, 5, 6, 7)] == [0] * 5


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_goes_bad_in_a_pass_is_named(compiled):
    model, (input_ids, labels) = small_model("gpt2", 97), batch(2, 16)
    model.transformer.h[1].mlp.c_fc.bias.data.fill_(10.0)
    model.transformer.h[1].mlp.c_proj.weight.data.fill_(3e38)  # finite, but its products are not
    module = models.CausalLMLoss(model, chunked_loss=True, mask_free=True)
    if compiled:
        torch._dynamo.reset()
        module.compile_trunk(2, backend="eager")
        module(input_ids, labels)
    found = first_bad_tensor(module, [(input_ids, labels)], torch.tensor(32.0), CPU)
    assert found.startswith("the output of transformer.h.1.mlp.")
    assert bool(module._compiled) == compiled


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", MASK_FREE)
def test_documents_kept_apart_have_the_loss_that_each_has_alone(family, compiled):
    model, separator = small_model(family, 97), 5
    model.config.output_router_logits = False
    for part in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    config = TrainConfig(block_size=24, document_mask=True, chunked_loss=family != "cohere")
    input_ids, _ = batch(2, 24)
    input_ids[0, [7, 15]] = input_ids[1, [0, 22]] = separator
    labels = input_ids.roll(-1, 1)
    module, chosen = fast.training_module(model, config, input_ids, labels, CPU, separator)
    assert "documents kept apart" in chosen and "without a mask" not in chosen
    if compiled:
        module.compile_trunk(2, backend="eager")
    parts = [(0, 0, 7), (0, 7, 15), (0, 15, 24), (1, 0, 22), (1, 22, 24)]
    alone = [
        F.cross_entropy(model(input_ids[row : row + 1, a:b]).logits[0], labels[row, a:b], reduction="sum")
        for row, a, b in parts
    ]
    ours = module(input_ids, labels)
    torch.testing.assert_close(ours, sum(alone))
    expected = gradients(model, sum(alone))
    found = gradients(model, module(input_ids, labels))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "mamba", "mistral", "gpt2"])
def test_where_documents_cannot_be_kept_apart_it_is_said(family):
    """Without positions to give, without attention, with a window that is shorter; and without a token between documents."""
    model, (input_ids, labels) = small_model(family, 97), batch()
    separator = None if family == "gpt2" else 5
    with pytest.raises(UserError, match="document_mask: documents cannot be kept apart"):
        fast.training_module(model, TrainConfig(block_size=24, document_mask=True), input_ids, labels, CPU, separator)


def test_a_run_with_documents_kept_apart(run_train, tmp_path):
    """The same windows, other losses; and no run goes on with the other setting."""
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("Halo semua, selamat datang kembali. " * (number + 3), encoding="utf-8")
    plain, apart = (
        run_train(run_name=name, corpus=[str(tmp_path)], document_mask=name == "apart") for name in ("plain", "apart")
    )
    assert apart["ledger"] == plain["ledger"]
    assert apart["eval"]["after"]["loss"] != plain["eval"]["after"]["loss"]
    with pytest.raises(UserError, match="document_mask"):
        run_train(run_name="apart", corpus=[str(tmp_path)])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bf16_give_each_family_nearly_the_same_loss(family):
    where = Runtime(torch.device("cpu"), 0, 1, "bf16")
    model, (input_ids, labels) = small_model(family, 97), batch()
    chosen = []
    for stored in (False, True):
        if stored:
            models.store_in_bfloat16(model)
        module, said = fast.training_module(model, TrainConfig(block_size=24, dropout=0.0), input_ids, labels, where)
        with where.autocast():
            chosen.append((module.eval()(input_ids, labels, torch.tensor(42.0)), said))
    (wide, said), (narrow, said_of_narrow) = chosen
    assert ("in chunks" in said) == ("in chunks" in said_of_narrow)
    torch.testing.assert_close(narrow, wide, rtol=2e-2, atol=0)
    found = gradients(model, narrow)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_gradient_checkpointing_gives_the_same_weights(run_train, way, tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "fastest", lambda *_: way[0])
    run_train(run_name="all", output_dir=str(tmp_path / "all"))
    times = len(way[1])
    run_train(run_name="again", output_dir=str(tmp_path / "again"), gradient_checkpointing=True)
    assert times > 0 and len(way[1]) > 1.2 * times  # what is computed again is computed the same way
    one, other = weights(tmp_path / "all"), weights(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_without_gradient_checkpointing_is_named():
    model, (input_ids, labels) = small_model("llama", 97), batch()
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match="gradient_checkpointing"):
            fast.training_module(model, TrainConfig(gradient_checkpointing=True), input_ids, labels, CPU)
    finally:
        type(model).supports_gradient_checkpointing = before


def test_a_loss_that_would_be_another_is_left_alone(monkeypatch):
    """Here the trunk's output is what the head sees, but the fast path is made to lose a part of the loss."""
    model, (input_ids, labels) = small_model("llama", 97), batch()
    monkeypatch.setattr(models, "chunked_cross_entropy_sum", lambda *args: 0.99 * chunked_cross_entropy_sum(*args))
    module, chosen = fast.training_module(model, TrainConfig(block_size=24), input_ids, labels, CPU)
    assert not module.chunked_loss and not module.mask_free and "another" in chosen


def test_every_choice_can_be_switched_off():
    model, (input_ids, labels) = small_model("gpt2", 97), batch()
    off = {name: False for name in ("chunked_loss", "mask_free_attention", "fused_activations", "fast_products")}
    off = TrainConfig(block_size=24, **off)
    module, chosen = fast.training_module(model, off, input_ids, labels, CPU)
    assert chosen == "nothing" and not module.chunked_loss and not module.mask_free
    assert not any(isinstance(inner, nn.GELU) for inner in module.modules())


def test_operations_of_a_token_counted_by_hand_and_by_pytorch():
    """6 for every weight but the positions', and 12 T D for each layer; PyTorch's counter leaves out biases and norms."""
    model, (input_ids, labels) = small_model("gpt2", 97), batch(1)
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    assert fast.flops_per_token(model, 24) == 6 * weights + 12 * 24 * 32 * 2
    module = models.CausalLMLoss(model)
    with FlopCounterMode(display=False) as counted:
        module(input_ids, labels).backward()
    small = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1 and "wpe" not in name)
    assert counted.get_total_flops() == pytest.approx(24 * (fast.flops_per_token(model, 24) - 6 * small), rel=0.05)


@pytest.fixture
def cut_all(monkeypatch):
    """Cut every product among three, as large machines do large ones; returns how often it was done."""
    parts = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(products, "_PIECE", 1)
    monkeypatch.setattr(products, "_TRAINED_ROWS", 1)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    in_parts = products._in_parts
    monkeypatch.setattr(products, "_in_parts", lambda *args: parts.append(args[1]) or in_parts(*args))
    return parts


@pytest.fixture
def onednn_all(monkeypatch):
    """Compute every product of more than a few rows by oneDNN, large results in pieces; returns how often that was done."""
    done, linear, of_rows = [], products._linear, products._sum_of_rows
    for name in ("_MULTIPLICATIONS", "_TURNED", "ROWS"):
        monkeypatch.setattr(products, name, 1)
    monkeypatch.setattr(products, "_AT_ONCE", 10)
    monkeypatch.setattr(products, "_linear", lambda *args: done.append("linear") or linear(*args))
    monkeypatch.setattr(products, "_sum_of_rows", lambda *args: done.append("of rows") or of_rows(*args))
    return done


needs_onednn = pytest.mark.skipif(not products._has_onednn(), reason="this build of PyTorch brings no oneDNN")
WAYS = ["cut_all", pytest.param("onednn_all", marks=needs_onednn)]


@pytest.fixture(params=WAYS)
def way(request):
    """Each way to compute products, forced on small ones; with the list in which it leaves a trace."""
    done = request.getfixturevalue(request.param)
    return (products.CUT if request.param == "cut_all" else products.ONEDNN), done


@pytest.mark.parametrize("rows", [2, 3, 21, 23])
def test_a_product_is_the_product(rows, way):
    torch.manual_seed(0)
    wide, bias = torch.randn(rows, 9), torch.randn(5)
    for a in (torch.randn(rows, 7), torch.randn(7, rows).t(), wide[:, :7]):
        for b in (torch.randn(7, 5), torch.randn(5, 7).t()):
            check_product(way[0], a, b, bias)
    assert bool(way[1]) == (rows >= 3 or way[0] is products.ONEDNN)


@needs_onednn
def test_onednn_reads_a_turned_matrix_as_it_lies(onednn_all):
    a, b = torch.randn(7, 5), torch.randn(7, 3)
    products.ONEDNN.product(a.t(), b)
    products.ONEDNN.product(a, b.t().contiguous()[:, :5].t())
    assert onednn_all == ["of rows", "linear"]


@pytest.mark.parametrize(
    "rows, inner, columns, by_columns", [(3, 7, 12, True), (3, 7, 11, False), (3, 3, 12, False), (7, 8, 12, False)]
)
def test_where_the_second_matrix_is_the_larger_its_columns_are_cut(rows, inner, columns, by_columns, cut_all):
    torch.manual_seed(0)
    a, b, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    products.cut_product(a, b)
    assert bool(cut_all) != by_columns
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            check_product(products.CUT, left, right, bias)


def check_product(way, a, b, bias):
    exact = a.double() @ b.double()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(way.product(a, b).double(), exact, **close)
    torch.testing.assert_close(way.product(a, b, bias).double(), exact + bias, **close)
    out, total = torch.full(exact.shape, math.nan), torch.ones(exact.shape)
    assert way.product(a, b, out=out) is out and way.add_product_(total, a, b) is total
    torch.testing.assert_close(out.double(), exact, **close)
    torch.testing.assert_close(way.product(a, b, bias, out).double(), exact + bias, **close)
    torch.testing.assert_close(total.double(), 1 + exact, **close)


@pytest.mark.parametrize("turned", [False, True], ids=["addmm", "linear"])
def test_the_gradients_of_a_cut_product(turned, cut_all):
    torch.manual_seed(0)
    x, matrix, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((8, 4), (4, 6), (6,)))

    def product(x, matrix, bias=None):
        return products._Product.apply(x, matrix.t() if turned else matrix, bias, turned, products.CUT)

    assert torch.autograd.gradcheck(product, (x, matrix, bias))
    assert torch.autograd.gradcheck(product, (x, matrix))


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_products_give_each_family_its_loss_and_gradients(family, way):
    (products_by, done), model, (input_ids, labels) = way, small_model(family, 97), batch()
    module = models.CausalLMLoss(model).eval()
    expected_loss = module(input_ids, labels, torch.tensor(42.0))
    expected = gradients(model, expected_loss)
    assert not done
    module.products = products_by
    found_loss = module(input_ids, labels, torch.tensor(42.0))
    times = len(done)
    found = gradients(model, found_loss)
    assert len(done) > times > 0
    torch.testing.assert_close(found_loss, expected_loss)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done.clear()
        module(input_ids, labels)
    assert not done


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_in_chunks_by_each_way(bias, way, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(16, 97, bias), torch.randn(3, 7, 16, requires_grad=True), batch(3, 7)[1]
    parameters = [hidden, *head.parameters()]
    exact_head = nn.Linear(16, 97, bias).double()
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = loss.cross_entropy_sum(exact_head(exact_hidden), labels)
    expected = torch.autograd.grad(exact, [exact_hidden, *exact_head.parameters()])
    found_loss = chunked_cross_entropy_sum(hidden, head, labels, way[0])
    torch.testing.assert_close(found_loss.double(), exact)
    for found, gradient in zip(torch.autograd.grad(found_loss, parameters), expected, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-5)
    assert len(way[1]) > 9 and (way[0] is products.CUT or way[1].count("of rows") == 3)  # 21 tokens, 8 at once


@pytest.mark.parametrize("found", [products.CUT, products.ONEDNN, None], ids=["cut", "onednn", "none"])
@pytest.mark.parametrize(
    "asked, dtype, safe",
    [
        ({}, torch.float32, True),
        ({}, torch.float64, False),
        ({"fast_products": False}, torch.float32, False),
        ({"torch_compile": True}, torch.float32, False),
    ],
)
def test_fast_products_are_taken_only_where_that_is_safe(asked, dtype, safe, found, monkeypatch):
    seen = []
    monkeypatch.setattr(fast, "fastest", lambda *args: seen.append(args) or found)
    config, model = TrainConfig(**{"block_size": 24, **asked}), small_model("gpt2", 97).to(dtype)
    module, chosen = fast.training_module(model, config, *batch(), CPU, products="noted")
    assert seen == ([(4 * 24, "noted")] if safe else [])
    assert module.products == (found if safe else None)
    assert ("products" in chosen) == (safe and found is not None)
    assert ("attention in blocks" in chosen) == (safe and found is products.ONEDNN)


def test_products_that_change_the_loss_are_not_taken(monkeypatch):
    wrong = products.ONEDNN._replace(worth=lambda *_: True, product=lambda *args, **_: 2 * products.cut_product(*args))
    monkeypatch.setattr(fast, "fastest", lambda *_: wrong)
    module, chosen = fast.training_module(small_model("gpt2", 97), TrainConfig(block_size=24), *batch(), CPU)
    assert module.products is None and "nothing more" in chosen


def test_the_race_of_products_draws_none_of_the_run_s_random_numbers():
    before = torch.get_rng_state()
    race, speed = products.race.__wrapped__(), products.onednn_speed.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)
    assert (0.1 < speed < 10) == products._has_onednn() == (race.onednn is not None)
    assert all(1e6 < race.operations / seconds < 1e14 for seconds in (race.whole, race.cut, race.best))
    assert race.best == min(race.whole, race.cut, *([race.onednn] if race.onednn else []))


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, "cut"),
        ({"cut": 2.8}, "cut"),
        ({"cut": 3.2}, None),
        ({"equal": 1.0000001}, None),
        ({"equal_by_columns": 1.0000001}, None),
        ({"rows": 383}, None),
        ({"threads": 1}, None),
        ({"onednn": 0.6}, "onednn"),
        ({"onednn": 0.7}, "cut"),
        ({"onednn": 0.6, "cut": 0.1}, "onednn"),
        ({"onednn": 0.6, "threads": 1, "rows": 16}, "onednn"),
        ({"onednn": 0.6, "noted": "onednn"}, "onednn"),
        ({"onednn": 9, "noted": "onednn"}, "onednn"),
        ({"onednn": 0.6, "noted": "cut"}, "cut"),
        ({"onednn": 0.6, "noted": ""}, "cut"),
        ({"onednn": None}, "cut"),
        ({"onednn": None, "noted": "onednn"}, "cut"),
    ],
    ids=str,
)
def test_which_products_are_taken(change, expected, monkeypatch):
    """A cut product need not win its race but be the same; oneDNN must be far faster, and is kept to."""
    asked = {"cut": 1, "equal": 1, "equal_by_columns": 1, "rows": 384, "threads": 3, "onednn": 2, "noted": None}
    asked |= change
    whole, computed = 2 if asked["cut"] > 1 else 1, [0.0]

    def takes(seconds, found):
        computed[0] += seconds
        return torch.full((1,), float(found))

    threads = [asked["threads"]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch, "mm", lambda a, b: takes(whole, 1))
    monkeypatch.setattr(products, "cut_product", lambda a, b: takes(asked["cut"], asked["equal"]))
    monkeypatch.setattr(products, "_by_columns", lambda *args: takes(0, asked["equal_by_columns"]))
    monkeypatch.setattr(products, "_onednn_product", lambda a, b: takes(asked["onednn"], 1))
    monkeypatch.setattr(products, "_has_onednn", lambda: asked["onednn"] is not None)
    monkeypatch.setattr(products.time, "thread_time", lambda: computed[0] if threads[-1] == 1 else 0.0)
    for name in ("race", "onednn_speed"):
        monkeypatch.setattr(products, name, getattr(products, name).__wrapped__)
    speed = products.onednn_speed()
    assert speed == pytest.approx(whole / asked["onednn"] if asked["onednn"] else 0.0)
    assert threads[-1] == asked["threads"]
    monkeypatch.setattr(products.time, "perf_counter", lambda: computed[0])
    found = products.fastest(asked["rows"], asked["noted"])
    assert (found and found.name) == expected


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"steps": 0.99}, False),
        ({"name": "NVIDIA A100-SXM4-80GB", "steps": 0.32}, True),
        ({"name": "NVIDIA A100-SXM4-80GB", "steps": 0.31}, False),
        ({"name": "a GPU of another maker"}, True),
        ({"name": "a GPU of another maker", "steps": 0.99}, False),
        ({"precision": "fp32", "steps": 0.99}, False),
        ({"world_size": 2}, False),
        ({"device": "cpu"}, False),
        ({"capability": (6, 1)}, False),
        ({"triton": None}, False),
        ({"mask_free": False}, False),
        ({"gradient_checkpointing": True}, False),
    ],
    ids=str,
)
def test_a_run_is_compiled_by_itself_only_where_it_is_long_on_one_gpu(change, expected, monkeypatch):
    """`steps` is a share of those that take an H100 1,200 s at 40 % of 989e12 operations a second."""
    asked = {"name": "NVIDIA H100 80GB HBM3", "steps": 1.01, "precision": "bf16", "world_size": 1, "device": "cuda"}
    asked |= {"capability": (9, 0), "triton": object(), "mask_free": True, "gradient_checkpointing": False, **change}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: asked["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: asked["capability"])
    real = fast.importlib.util.find_spec  # other libraries ask it too
    monkeypatch.setattr(
        fast.importlib.util, "find_spec", lambda name, *rest: asked["triton"] if name == "triton" else real(name, *rest)
    )
    module = models.CausalLMLoss(small_model("gpt2", 97), mask_free=asked["mask_free"])
    config = TrainConfig(
        block_size=24, gradient_accumulation_steps=3, gradient_checkpointing=asked["gradient_checkpointing"]
    )
    tokens = 1200 * 0.4 * 989e12 / fast.flops_per_token(module.model, 24)
    steps = int(asked["steps"] * tokens / (3 * 4 * 24))
    where = Runtime(torch.device(asked["device"]), 0, asked["world_size"], asked["precision"])
    assert fast._compiling_pays(module, config, where, steps) == expected


@pytest.mark.parametrize(
    "asked, pays, expected", [(None, True, 1), (None, False, 0), (False, True, 0), (True, False, 1)]
)
def test_whether_to_compile_is_said_or_found(asked, pays, expected, monkeypatch):
    compiled, seen = [], []
    monkeypatch.setattr(fast, "_compiling_pays", lambda *args: seen.append(args[-1]) or pays)
    monkeypatch.setattr(models.CausalLMLoss, "compile_trunk", lambda self, rows: compiled.append(rows))
    config = TrainConfig(block_size=24, torch_compile=asked)
    _, chosen = fast.training_module(small_model("gpt2", 97), config, *batch(), CPU, steps=70)
    assert compiled == expected * [config.per_device_train_batch_size] and ("compiled" in chosen) == bool(expected)
    assert seen == ([70] if asked is None else [])
