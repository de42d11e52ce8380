"""CPU matmuls by oneDNN and split over the cores, against float64."""

import math

import pytest
import torch
from families import batch, gradients, small_model
from torch import nn

from mori.model import loss
from mori.model.lm import CausalLMLoss
from mori.model.loss import chunked_cross_entropy_sum
from mori.speed import matmul
from mori.speed.matmul import SplitMatvec, choose_library, matmul_context, onednn_matmul

needs_onednn = pytest.mark.skipif(choose_library("onednn") == "torch", reason="this build of PyTorch has no oneDNN")


@pytest.fixture
def onednn_calls(monkeypatch):
    """Send small matmuls to oneDNN as well; the kernels that computed them, in order."""
    calls, linear, weight_gradient = [], matmul._onednn_linear, matmul._weight_gradient
    for name in ("_MIN_MULTIPLICATIONS", "_MIN_TRANSPOSED", "_FEW_ROWS"):
        monkeypatch.setattr(matmul, name, 1)
    monkeypatch.setattr(matmul, "_MAX_COPIED", 10)
    monkeypatch.setattr(matmul, "_onednn_linear", lambda *args: calls.append("linear") or linear(*args))
    monkeypatch.setattr(matmul, "_weight_gradient", lambda *args: calls.append("gradient") or weight_gradient(*args))
    return calls


@needs_onednn
@pytest.mark.parametrize("rows", [2, 3, 21, 23])
def test_onednn_matmul_equals_float64(rows, onednn_calls):
    torch.manual_seed(0)
    wide, bias = torch.randn(rows, 9), torch.randn(5)
    for a in (torch.randn(rows, 7), torch.randn(7, rows).t(), wide[:, :7]):
        for b in (torch.randn(7, 5), torch.randn(5, 7).t()):
            exact, close = a.double() @ b.double(), {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(onednn_matmul(a, b).double(), exact, **close)
            torch.testing.assert_close(onednn_matmul(a, b, bias).double(), exact + bias, **close)
            out, total = torch.full(exact.shape, math.nan), torch.ones(exact.shape)
            with torch.no_grad(), matmul_context("onednn"):
                assert torch.mm(a, b, out=out) is out and total.addmm_(a, b) is total
            torch.testing.assert_close(out.double(), exact, **close)
            torch.testing.assert_close(total.double(), 1 + exact, **close)
    assert onednn_calls


@needs_onednn
def test_onednn_matmul_reads_a_transposed_matrix_in_place(onednn_calls):
    a, b = torch.randn(7, 5), torch.randn(7, 3)
    onednn_matmul(a.t(), b)
    onednn_matmul(a, b.t().contiguous()[:, :5].t())
    assert onednn_calls == ["gradient", "linear"]


@needs_onednn
def test_matmul_context_keeps_loss_and_gradients(any_family, onednn_calls):
    model, (input_ids, labels) = small_model(any_family, 97), batch()
    module = CausalLMLoss(model).eval()
    expected_loss = module(input_ids, labels, torch.tensor(42.0))
    expected = gradients(model, expected_loss)
    assert not onednn_calls
    module.cpu_matmul = "onednn"
    actual_loss = module(input_ids, labels, torch.tensor(42.0))
    count = len(onednn_calls)
    actual = gradients(model, actual_loss)
    assert len(onednn_calls) > count > 0
    torch.testing.assert_close(actual_loss, expected_loss)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        onednn_calls.clear()
        module(input_ids, labels)
    assert not onednn_calls


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_cross_entropy_by_onednn_equals_float64(bias, onednn_calls, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(16, 97, bias), torch.randn(3, 7, 16, requires_grad=True), batch(3, 7)[1]
    exact_head = nn.Linear(16, 97, bias).double()
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = loss.cross_entropy_sum(exact_head(exact_hidden), labels)
    expected = torch.autograd.grad(exact, [exact_hidden, *exact_head.parameters()])
    with matmul_context("onednn"):
        actual_loss = chunked_cross_entropy_sum(hidden, head, labels)
    torch.testing.assert_close(actual_loss.double(), exact)
    actual = torch.autograd.grad(actual_loss, [hidden, *head.parameters()])
    for gradient, exact_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-5)
    assert len(onednn_calls) > 9 and onednn_calls.count("gradient") == 3  # 21 tokens, 8 at once


@pytest.mark.parametrize(
    "setting, speedup, available, expected",
    [
        ("auto", 2.2, True, "onednn"),
        ("auto", 1.4, True, "torch"),
        ("auto", 0.0, False, "torch"),
        ("onednn", 1.0, True, "onednn"),
        ("onednn", 1.0, False, "torch"),
        ("torch", 9.0, True, "torch"),
    ],
)
def test_choose_library_takes_onednn_if_it_is_much_faster(setting, speedup, available, expected, monkeypatch):
    monkeypatch.setattr(matmul, "onednn_speedup", lambda: speedup)
    monkeypatch.setattr(matmul, "_has_onednn", lambda: available)
    assert choose_library(setting) == expected


def test_measuring_matmuls_keeps_random_state_and_threads():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    speedup, peak = matmul.onednn_speedup.__wrapped__(), matmul.cpu_peak_flops("fp32")
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert (0.1 < speedup < 10) == (choose_library("onednn") == "onednn")
    assert 1e8 < peak < 1e14


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("outputs", [4096, 2310, 2309])  # the last one is prime
def test_split_matvec_equals_float64(rows, outputs, two_threads, monkeypatch):
    torch.manual_seed(0)
    x, bias, weight = torch.randn(rows, 1, 768), torch.randn(outputs), torch.randn(outputs, 768)
    matrix, calls, bmm = weight.t().contiguous(), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(1) or bmm(*args))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
    with torch.no_grad(), SplitMatvec():
        for result in (
            torch.nn.functional.linear(x, weight, bias),
            torch.nn.functional.linear(x, weight) + bias,
            torch.addmm(bias, x[:, 0], matrix)[:, None],
        ):
            torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-3)
        assert len(calls) == (1 if outputs == 2309 else 3)
        torch.nn.functional.linear(torch.randn(9, 768), weight)
        torch.nn.functional.linear(x, weight[:100])
        assert len(calls) == (1 if outputs == 2309 else 3)  # many rows, or a small matrix, are not split
