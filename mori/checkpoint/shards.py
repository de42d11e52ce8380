"""The part of a whole tensor that belongs to this rank: of a DTensor some rows, of any other tensor all."""

import torch
from torch.distributed.tensor import DTensor, Shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(tensor: torch.Tensor) -> slice:
    """The rows of the whole tensor that this rank has: of N ranks each has 1/N of them, rounded up, as long as there are any.

    So does FSDP2 divide them, as `torch.chunk`.
    """
    if not isinstance(tensor, DTensor):
        return slice(None)
    [dimension] = [number for number, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    n_rows, ranks = len(tensor), tensor.device_mesh.size(dimension)
    part = -(-n_rows // ranks)
    start = min(part * tensor.device_mesh.get_local_rank(dimension), n_rows)
    return slice(start, min(start + part, n_rows))


@torch.no_grad()
def read(tensor: torch.Tensor, stored) -> None:
    """Copy this rank's part of a whole tensor in a file, `safe_open(...).get_slice(name)`, into `tensor`."""
    local(tensor).copy_(stored[rows(tensor) if tensor.dim() else ...])
