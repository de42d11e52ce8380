"""Products of a few rows with a large matrix, on all cores of a CPU.

A token that is decoded is one row, and such a product is bound by the reading of the matrix. The libraries under PyTorch
(MKL, in torch 2.13) do it on one core, or share it badly among several; cut into a batch of smaller products it is read by all of
them at once: 2 to 3 times as fast for one row, 1.1 to 1.6 times for eight (runs/LOG.md).
"""

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

ROWS = 8  # of more rows than this a product is no longer bound by memory
ELEMENTS = 1 << 18  # in a smaller matrix there is nothing to share
_PARTS = 64


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
