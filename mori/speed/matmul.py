"""Products of matrices on all cores of a CPU: cut into a batch of smaller ones, or by another library than PyTorch takes.

The library under PyTorch (MKL, in torch 2.13) shares one product out among its threads, and a batch of products one by one. The
second is faster. With few rows (a token that is decoded is one row) the reading of the large matrix is what takes time, and only a
batch is read by all cores: 2 to 3 times as fast for one row, 1.1 to 1.6 times for eight. With many rows, as in training, the threads
of one product wait for each other: a batch is 1.1 to 1.4 times as fast, to the same bits.

MKL leaves the vectors of 512 bits of other makers' processors alone. oneDNN, which PyTorch brings along for other types, uses them:
where they are as wide in the hardware (AMD's Zen 5), it is 2.2 times as fast, to other last bits (all figures: runs/LOG.md).
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from mori.speed.attention import LONG, causal_attention

ROWS = 8  # of more rows than this a product is no longer bound by memory
ELEMENTS = 1 << 18  # in a smaller matrix there is nothing to share
_PARTS = 64
_PIECE = 64  # rows: with less of them in a part, the other matrix is made ready for too little work
_TRAINED_ROWS = 128
_HELD_UP = 1.5  # times as long as the whole product, at the worst that was measured: 1.4
_FAR_FASTER = 1.5  # times: oneDNN is 2.2 times as fast or, elsewhere, 1.3 times at most; nothing lies near this border
_MULTIPLICATIONS = 1 << 21  # with fewer of them, calling oneDNN costs what it saves
_AT_ONCE = 1 << 21  # numbers of a result that has to be copied into place
_TURNED = 1 << 19  # numbers of a matrix that oneDNN had better read as it lies than have turned by one thread


class OnAllCores(TorchFunctionMode):
    """While it is entered, `linear` and `addmm` of few rows with a large fp32 matrix are cut into parts.

    The sums are the same numbers added in another order where a matrix of `addmm` is cut along them.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not kwargs and len(args) >= 2:
            if function is linear and _worth(args[0], args[1]):
                return linear_in_parts(*args)
            if function is torch.addmm and len(args) == 3 and args[1].dim() == 2 and _worth(args[1], args[2]):
                return addmm_in_parts(*args)
        return function(*args, **(kwargs or {}))


def _worth(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == matrix.dtype == torch.float32
        and matrix.numel() >= ELEMENTS
        and x.numel() <= ROWS * x.size(-1)
        and matrix.is_contiguous()
        and torch.get_num_threads() > 1
        and not torch.is_autocast_enabled("cpu")
    )


def linear_in_parts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear(x, weight, bias)`, `(..., O)`, with the rows of `weight` `(O, I)` in parts; as it is where they have no divisor."""
    outputs, inputs = weight.shape
    parts = next((n for n in range(torch.get_num_threads(), _PARTS) if outputs % n == 0), 1)
    if parts == 1:
        return linear(x, weight, bias)
    rows = x.reshape(-1, inputs)  # (N, I)
    pieces = weight.view(parts, outputs // parts, inputs).transpose(1, 2)  # (P, I, O / P)
    found = torch.bmm(rows.expand(parts, *rows.shape), pieces).transpose(0, 1)  # (N, P, O / P)
    found = found.reshape(*x.shape[:-1], outputs)
    return found if bias is None else found + bias


def addmm_in_parts(bias: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`addmm(bias, x, matrix)`, `(N, O)`, with the rows of `matrix` `(I, O)` in parts whose products are added up."""
    inputs, outputs = matrix.shape
    parts = torch.get_num_threads()
    if inputs % parts:
        return torch.addmm(bias, x, matrix)
    pieces = x.view(len(x), parts, inputs // parts).transpose(0, 1)  # (P, N, I / P)
    return torch.bmm(pieces, matrix.view(parts, inputs // parts, outputs)).sum(0) + bias


class Products(NamedTuple):
    """A way to compute the large products of training."""

    name: str  # which a checkpoint notes
    words: str
    worth: Callable[[torch.Tensor, int], bool]  # for rows `(N, I)` and the number of columns
    product: Callable[..., torch.Tensor]  # see `cut_product`
    add_product_: Callable[..., torch.Tensor]  # see `cut_add_product_`
    attention: bool  # whether that of long windows is made of batched products, see `_attention`


class FastProducts(TorchFunctionMode):
    """While it is entered, `linear` and `addmm` of many rows with an fp32 matrix, and their gradients, are computed so."""

    def __init__(self, products: Products):
        super().__init__()
        self.products = products

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not kwargs and len(args) >= 2:
            if function is linear and self._many(args[0], args[1], args[1].size(0)):
                x, weight, bias = (*args, None)[:3]
                found = _Product.apply(x.flatten(0, -2), weight, bias, True, self.products)
                return found.unflatten(0, x.shape[:-1])
            if function is torch.addmm and len(args) == 3 and args[1].dim() == args[2].dim() == 2:
                bias, x, matrix = args
                if self._many(x, matrix, matrix.size(1)):
                    return _Product.apply(x, matrix, bias, False, self.products)
        if function is scaled_dot_product_attention and self.products.attention:
            return _attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _many(self, x: torch.Tensor, matrix: torch.Tensor, columns: int) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == matrix.dtype == torch.float32
            and x.dim() > 1
            and self.products.worth(x, columns)
            and not torch.is_autocast_enabled("cpu")
        )


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention`, by ourselves where it is causal and no more, over a long window."""
    if (
        is_causal
        and attn_mask is None
        and dropout_p == 0.0
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.dim() == key.dim() == value.dim() == 4
        and LONG <= query.size(2) == key.size(2) == value.size(2)
        and (enable_gqa or query.size(1) == key.size(1))
        and not torch.is_autocast_enabled("cpu")
    ):
        return causal_attention(query, key, value, scale)
    options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    return scaled_dot_product_attention(query, key, value, **options, scale=scale, enable_gqa=enable_gqa)


def many_rows() -> int:
    """From how many rows on a product of training is worth cutting."""
    return _TRAINED_ROWS * torch.get_num_threads()


class _Product(torch.autograd.Function):
    """`x @ matrix + bias`, with `matrix` `(I, O)` as `addmm` has it, or `(O, I)` as `linear` has it."""

    @staticmethod
    def forward(ctx, x, matrix, bias, turned, products):
        ctx.save_for_backward(x, matrix)
        ctx.turned, ctx.product = turned, products.product
        return ctx.product(x, matrix.t() if turned else matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        product = ctx.product
        x, matrix = ctx.saved_tensors  # (N, I)
        of_x, of_matrix, of_bias = ctx.needs_input_grad[:3]
        grad_x = product(grad, matrix if ctx.turned else matrix.t()) if of_x else None
        grad_matrix = (product(grad.t(), x) if ctx.turned else product(x.t(), grad)) if of_matrix else None
        return grad_x, grad_matrix, grad.sum(0) if of_bias else None, None, None


def cut_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`a @ b + bias`, `(M, N)`, with the rows of `a` `(M, K)` in parts, one for each thread, where that is worth it.

    Each thread makes the whole of `b` `(K, N)` ready for itself: if that is much the larger, its columns are cut instead.
    `bias` is `(N)`; `out`, if given, is contiguous.
    """
    out = a.new_empty(len(a), b.size(1)) if out is None else out
    cut, parts = _cut(a)
    if cut and 2 * len(a) <= b.size(1) and len(a) < len(b) and b.size(1) % parts == 0:
        return _by_columns(a, b, bias, out, parts)
    if cut:
        pieces, whole, into = _in_parts(a[:cut], parts), b.expand(parts, *b.shape), _in_parts(out[:cut], parts)
        torch.bmm(pieces, whole, out=into) if bias is None else torch.baddbmm(bias, pieces, whole, out=into)
    if cut < len(a):
        a, into = a[cut:], out[cut:]
        torch.mm(a, b, out=into) if bias is None else torch.addmm(bias, a, b, out=into)
    return out


def _by_columns(a, b, bias, out, parts: int) -> torch.Tensor:
    whole, pieces = a.expand(parts, *a.shape), b.unflatten(1, (parts, -1)).transpose(0, 1)  # (P, M, K), (P, K, N / P)
    found = torch.bmm(whole, pieces) if bias is None else torch.baddbmm(bias.view(parts, 1, -1), whole, pieces)
    out.unflatten(1, (parts, -1)).copy_(found.transpose(0, 1))
    return out


def cut_add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add `a @ b` to `total` `(M, N)`, which is contiguous, in place; cut as in `cut_product`."""
    cut, parts = _cut(a)
    if cut:
        _in_parts(total[:cut], parts).baddbmm_(_in_parts(a[:cut], parts), b.expand(parts, *b.shape))
    if cut < len(a):
        total[cut:].addmm_(a[cut:], b)
    return total


def _cut(a: torch.Tensor) -> tuple[int, int]:
    """How many rows of `a` to share out, and in how many parts; the rest is less than a row for each."""
    parts = torch.get_num_threads()
    of_mkl = a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()
    return (len(a) - len(a) % parts if of_mkl and parts > 1 and len(a) >= _PIECE * parts else 0), parts


def _in_parts(rows: torch.Tensor, parts: int) -> torch.Tensor:
    return rows.unflatten(0, (parts, -1))  # (P, M / P, ...)


def _onednn_product(a, b, bias=None, out=None):
    """As `cut_product`; `a` and `b` may be turned."""
    if bias is None and a.t().is_contiguous() and a.numel() >= _TURNED:
        found = _sum_of_rows(a.t(), b)
        return found if out is None else out.copy_(found)
    if out is None:
        return _linear(a, b.t(), bias)
    rows = max(1, _AT_ONCE // b.size(1))
    for part, into in zip(a.split(rows), out.split(rows), strict=True):
        into.copy_(_linear(part, b.t(), bias))
    return out


def _onednn_add_product_(total, a, b):
    rows = max(1, _AT_ONCE // b.size(1))
    for part, into in zip(a.split(rows), total.split(rows), strict=True):
        into.add_(_linear(part, b.t()))
    return total


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear(x, weight, bias)` by oneDNN, through the operation that PyTorch's compiler takes for it. Knows no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _sum_of_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a.t() @ b`, `(I, O)`, of `a` `(N, I)` and `b` `(N, O)`, as oneDNN computes the gradient of a weight."""
    found, rows = None, max(1, 4 * _AT_ONCE // a.size(1))
    for part, other in zip(a.split(rows), b.split(rows), strict=True):  # each is copied
        part, other = part.to_mkldnn(), other.to_mkldnn()
        one, _ = torch.ops.aten.mkldnn_linear_backward_weights(part, other, b, False)
        found = one if found is None else found.add_(one)
    return found


def _worth_cutting(x: torch.Tensor, columns: int) -> bool:
    return x.numel() >= many_rows() * x.size(-1)


def _worth_onednn(x: torch.Tensor, columns: int) -> bool:
    return x.numel() > ROWS * x.size(-1) and x.numel() * columns >= _MULTIPLICATIONS


CUT = Products("cut", "products cut among threads", _worth_cutting, cut_product, cut_add_product_, False)
ONEDNN = Products(
    "onednn", "products by oneDNN, long attention in blocks", _worth_onednn, _onednn_product, _onednn_add_product_, True
)


class Race(NamedTuple):
    """Seconds of a product whole, cut and by oneDNN, where there is one; its operations; whether whole and cut have the same bits."""

    whole: float
    cut: float
    onednn: float | None
    operations: int
    equal: bool

    @property
    def best(self) -> float:
        """Seconds of the fastest."""
        return min(self.whole, self.cut, self.onednn or self.whole)


@functools.cache  # once a process: the choice and the peak are of one measurement
def race() -> Race:
    """Compute a product in each way, the best of five in turn."""
    parts = torch.get_num_threads()
    a, b = _random(2 * many_rows(), 768), _random(768, -(-768 // parts) * parts)
    ways = [torch.mm, cut_product] + ([_onednn_product] if _has_onednn() else [])
    seconds, found = _best_of_five(ways, a, b, time.perf_counter)
    by_columns = _by_columns(a, b, None, torch.empty_like(found[0]), parts)
    equal = all(torch.equal(found[0], one) for one in (found[1], by_columns))
    return Race(*seconds[:2], seconds[2] if len(ways) > 2 else None, 2 * a.numel() * b.size(1), equal)


def _random(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0))  # a run's own random numbers must not move


def _best_of_five(ways, a, b, clock: Callable[[], float]) -> tuple[list[float], list[torch.Tensor]]:
    """Of `a @ b` in each of `ways`, in turn: the seconds by `clock`, and what came out."""
    best, found = [float("inf")] * len(ways), [a] * len(ways)
    for _ in range(5):
        for number, way in enumerate(ways):
            began = clock()
            found[number] = way(a, b)
            best[number] = min(best[number], clock() - began)
    return best, found


def _has_onednn() -> bool:
    """Whether this build of PyTorch has it, with the two operations that are used, and they do what they should."""
    a, b = torch.arange(1.0, 7).view(2, 3), torch.arange(3.0, 15).view(3, 4)
    try:
        return torch.equal(_linear(a, b.t()), a @ b) and torch.equal(_sum_of_rows(a.t().contiguous(), b), a @ b)
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def onednn_speed() -> float:
    """How many times as fast as by PyTorch itself a product is by oneDNN; 0.0 where there is none.

    By the time that one thread computes. By the clock on the wall, what else the machine does would now and then decide, and the same
    command is to have the same weights.
    """
    if not _has_onednn():
        return 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (own, by_onednn), _ = _best_of_five(
            (torch.mm, _onednn_product), _random(256, 768), _random(768, 768), time.thread_time
        )
    finally:
        torch.set_num_threads(threads)
    return own / by_onednn


def fastest(rows: int, noted: str | None = None) -> Products | None:
    """How to compute the products of training, of so many rows, on this machine; None as PyTorch does.

    oneDNN's last bits are its own: a run that has begun goes on as it began, of which `noted` is the name ("" for None). Else they are
    cut where that comes to the same bits, so that it does not matter to a result who finds so, in good time. Cut ones are the faster
    over a run, but not at each moment: one slow core, which a whole product may happen to do without, holds them up for seconds. So
    they need not win the race.
    """
    speed = onednn_speed()
    if speed > _FAR_FASTER if noted is None else speed and noted == ONEDNN.name:
        return ONEDNN
    found, several = race(), torch.get_num_threads() > 1 and torch.backends.mkl.is_available()
    if several and rows >= many_rows() and found.equal and found.cut < _HELD_UP * found.whole:
        return CUT
    return None
