"""Faster fp32 matmuls on a CPU: oneDNN in training, a batch over all cores while decoding.

PyTorch's own library (MKL) uses AVX2 on processors of other makers; oneDNN, which PyTorch ships too, uses their AVX-512. And MKL
reads a large matrix on one core if it is multiplied with a single row; a batch of smaller matmuls is read by all cores.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_FEW_ROWS = 8  # up to here, reading the matrix takes longer than the arithmetic
_LARGE_MATRIX = 1 << 18  # elements; a smaller one is not worth splitting
_MAX_PARTS = 64
_ONEDNN_SPEEDUP = 1.5  # measured: 2.2 on processors where oneDNN pays, at most 1.3 on others
_MIN_MULTIPLICATIONS = 1 << 21  # below, the call overhead of oneDNN exceeds the gain
_MAX_COPIED = 1 << 21  # elements of a result that has to be copied into place, at once
_MIN_TRANSPOSED = 1 << 19  # elements from which oneDNN should read a transposed matrix as it lies


def choose_library(setting: str) -> str:
    """Resolve `config.cpu_matmul`: "onednn" or "torch". `auto` takes oneDNN if it is at least 1.5 times as fast here."""
    if setting == "auto":
        return "onednn" if onednn_speedup() > _ONEDNN_SPEEDUP else "torch"
    return setting if setting == "torch" or _has_onednn() else "torch"


def matmul_context(library: str) -> contextlib.AbstractContextManager:
    """The context in which large fp32 matmuls on a CPU, and their gradients, are computed by `library`."""
    return OneDNNMatmul() if library == "onednn" else contextlib.nullcontext()


def library_in_use() -> str:
    """The library of the `matmul_context` around this call, for a backward pass, which runs outside of it."""
    return "onednn" if OneDNNMatmul.entered else "torch"


class SplitMatvec(TorchFunctionMode):
    """Inside this context, `linear` and `addmm` of few rows with a large fp32 matrix are split into a batch, one part a core.

    Splitting `addmm` adds the same numbers in another order.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not kwargs and len(args) >= 2:
            if function is linear and _worth_splitting(args[0], args[1]):
                return split_linear(*args)
            if function is torch.addmm and len(args) == 3 and args[1].dim() == 2 and _worth_splitting(args[1], args[2]):
                return split_addmm(*args)
        return function(*args, **(kwargs or {}))


def _worth_splitting(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == matrix.dtype == torch.float32
        and matrix.numel() >= _LARGE_MATRIX
        and x.numel() <= _FEW_ROWS * x.size(-1)
        and matrix.is_contiguous()
        and torch.get_num_threads() > 1
        and not torch.is_autocast_enabled("cpu")
    )


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear(x, weight, bias)`, `(..., O)`, split over output features, at least one part per thread.

    Falls back to plain `linear` if no number of parts divides the rows of `weight` `(O, I)`.
    """
    outputs, inputs = weight.shape
    parts = next((n for n in range(torch.get_num_threads(), _MAX_PARTS) if outputs % n == 0), 1)
    if parts == 1:
        return linear(x, weight, bias)
    rows = x.reshape(-1, inputs)  # (N, I)
    blocks = weight.view(parts, outputs // parts, inputs).transpose(1, 2)  # (P, I, O / P)
    result = torch.bmm(rows.expand(parts, *rows.shape), blocks).transpose(0, 1)  # (N, P, O / P)
    result = result.reshape(*x.shape[:-1], outputs)
    return result if bias is None else result + bias


def split_addmm(bias: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`addmm(bias, x, matrix)`, `(N, O)`, split over input features, one part per thread; the parts are added up.

    Falls back to plain `addmm` if the number of threads does not divide the rows of `matrix` `(I, O)`.
    """
    inputs, outputs = matrix.shape
    parts = torch.get_num_threads()
    if inputs % parts:
        return torch.addmm(bias, x, matrix)
    blocks = x.view(len(x), parts, inputs // parts).transpose(0, 1)  # (P, N, I / P)
    return torch.bmm(blocks, matrix.view(parts, inputs // parts, outputs)).sum(0) + bias


class OneDNNMatmul(TorchFunctionMode):
    """Inside this context, oneDNN computes `linear`, `addmm`, and gradient-free `mm` and `addmm_` of many fp32 rows."""

    entered = 0  # the number of these contexts around the code that runs

    def __enter__(self):
        OneDNNMatmul.entered += 1
        return super().__enter__()

    def __exit__(self, *error):
        OneDNNMatmul.entered -= 1
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is linear and len(args) >= 2 and not kwargs and _worth_onednn(args[0], args[1], args[1].size(0)):
            x, weight, bias = (*args, None)[:3]
            return _Linear.apply(x.flatten(0, -2), weight, bias, True).unflatten(0, x.shape[:-1])
        if function is torch.addmm and len(args) == 3 and not kwargs and args[1].dim() == args[2].dim() == 2:
            bias, x, matrix = args
            if _worth_onednn(x, matrix, matrix.size(1)):
                return _Linear.apply(x, matrix, bias, False)
        if not torch.is_grad_enabled():
            if function is torch.mm and not kwargs.keys() - {"out"} and _worth_onednn(*args, args[1].size(1)):
                return onednn_matmul(*args, **kwargs)
            if function is torch.Tensor.addmm_ and not kwargs and _worth_onednn(*args[1:], args[2].size(1)):
                return _onednn_addmm_(*args)
        return function(*args, **kwargs)


def _worth_onednn(x: torch.Tensor, matrix: torch.Tensor, columns: int) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == matrix.dtype == torch.float32
        and x.dim() > 1
        and x.numel() > _FEW_ROWS * x.size(-1)
        and x.numel() * columns >= _MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """`x @ matrix + bias` by oneDNN; `matrix` is `(I, O)` as in `addmm`, or `(O, I)`, `transposed`, as in `linear`."""

    @staticmethod
    def forward(ctx, x, matrix, bias, transposed):
        needs_x, needs_matrix = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if needs_matrix else None, matrix if needs_x else None
        )  # a frozen weight keeps no input
        ctx.transposed = transposed
        return onednn_matmul(x, matrix.t() if transposed else matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, matrix = ctx.saved_tensors  # (N, I)
        needs_x, needs_matrix, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_matrix = None
        if needs_x:
            grad_x = onednn_matmul(grad, matrix if ctx.transposed else matrix.t())
        if needs_matrix:
            grad_matrix = onednn_matmul(grad.t(), x) if ctx.transposed else onednn_matmul(x.t(), grad)
        return grad_x, grad_matrix, grad.sum(0) if needs_bias else None, None


def onednn_matmul(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`a @ b + bias`, `(M, N)`, by oneDNN without gradients; `a` `(M, K)` and `b` `(K, N)` may be transposed views.

    `bias` is `(N)`; `out`, if given, is contiguous.
    """
    if bias is None and a.t().is_contiguous() and a.numel() >= _MIN_TRANSPOSED:
        result = _weight_gradient(a.t(), b)
        return result if out is None else out.copy_(result)
    if out is None:
        return _onednn_linear(a, b.t(), bias)
    rows = max(1, _MAX_COPIED // b.size(1))
    for a_rows, out_rows in zip(a.split(rows), out.split(rows), strict=True):
        out_rows.copy_(_onednn_linear(a_rows, b.t(), bias))
    return out


def _onednn_addmm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total.addmm_(a, b)` for contiguous `total` `(M, N)`."""
    rows = max(1, _MAX_COPIED // b.size(1))
    for a_rows, total_rows in zip(a.split(rows), total.split(rows), strict=True):
        total_rows.add_(_onednn_linear(a_rows, b.t()))
    return total


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear(x, weight, bias)` through the operation that PyTorch's compiler emits for oneDNN; not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _weight_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a.t() @ b`, `(I, O)`, of `a` `(N, I)` and `b` `(N, O)`, as oneDNN computes the gradient of a weight."""
    total, rows = None, max(1, 4 * _MAX_COPIED // a.size(1))
    for a_rows, b_rows in zip(a.split(rows), b.split(rows), strict=True):  # both are copied to oneDNN's layout
        a_rows, b_rows = a_rows.to_mkldnn(), b_rows.to_mkldnn()
        gradient, _ = torch.ops.aten.mkldnn_linear_backward_weights(a_rows, b_rows, b, False)
        total = gradient if total is None else total.add_(gradient)
    return total


def _has_onednn() -> bool:
    """Whether this build of PyTorch has the two oneDNN operations, and they compute matmuls."""
    a, b = torch.arange(1.0, 7).view(2, 3), torch.arange(3.0, 15).view(3, 4)
    try:
        return torch.equal(_onednn_linear(a, b.t()), a @ b) and torch.equal(
            _weight_gradient(a.t().contiguous(), b), a @ b
        )
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def onednn_speedup() -> float:
    """PyTorch's own time for a matmul, divided by oneDNN's; 0.0 without oneDNN.

    CPU time of one thread: wall-clock time depends on what else the machine does, and the same command should choose the same
    library.
    """
    if not _has_onednn():
        return 0.0
    with one_thread():
        torch_seconds, onednn_seconds = best_of_five((256, 768, 768), time.thread_time)
    return torch_seconds / onednn_seconds


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The context in which PyTorch computes with one thread, whose CPU time is what a computation costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cpu_peak_flops(precision: str) -> float:
    """Operations per second of a large matmul in fp32 or bf16 on this CPU, by the faster library."""
    rows = 256 * torch.get_num_threads()
    return 2 * rows * 768 * 768 / min(best_of_five((rows, 768, 768), time.perf_counter, precision))


def best_of_five(shape: tuple[int, int, int], clock: Callable[[], float], precision: str = "fp32") -> list[float]:
    """The least seconds by `clock` of a matmul of `shape` (M, K, N): PyTorch's own, and in fp32 oneDNN's if there is one."""
    generator = torch.Generator().manual_seed(0)  # the run's random numbers must not move
    a, b = torch.rand(shape[:2], generator=generator), torch.rand(shape[1:], generator=generator)
    libraries = (torch.mm, onednn_matmul) if precision == "fp32" and _has_onednn() else (torch.mm,)
    if precision == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
    best = [float("inf")] * len(libraries)
    for _ in range(5):
        for number, matmul in enumerate(libraries):
            start = clock()
            matmul(a, b)
            best[number] = min(best[number], clock() - start)
    return best
