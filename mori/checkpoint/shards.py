"""Tensors of which every rank has some rows (`DTensor`): gathered whole on the rank that writes them, read row by row.

A checkpoint holds whole tensors, so it depends neither on the number of ranks nor on how they divide a tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mori.checkpoint.tensors import HostMemory


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, in the same memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def rows(tensor: torch.Tensor) -> slice:
    """The rows of the whole tensor that this rank has: of N ranks each has 1/N of them, rounded up, as long as there are any.

    So does FSDP2 divide them, as `torch.chunk`.
    """
    if not isinstance(tensor, DTensor):
        return slice(None)
    if (dimension := _dimension(tensor)) is None:
        return slice(None)
    n_rows, ranks = len(tensor), tensor.device_mesh.size(dimension)
    part = -(-n_rows // ranks)
    start = min(part * tensor.device_mesh.get_local_rank(dimension), n_rows)
    return slice(start, min(start + part, n_rows))


@torch.no_grad()
def read(tensor: torch.Tensor, stored) -> None:
    """Copy this rank's part of a whole tensor in a file, `safe_open(...).get_slice(name)`, into `tensor`."""
    local(tensor).copy_(stored[rows(tensor) if tensor.dim() else ...])


def owners(tensors: Mapping[str, torch.Tensor], ranks: int) -> dict[str, int]:
    """The rank that writes each tensor: of DTensors, consecutive ones of about the same size each; plain ones belong to rank 0."""
    total = sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, DTensor))
    owner, before = {}, 0
    for name, tensor in tensors.items():
        owner[name] = 0
        if isinstance(tensor, DTensor) and total:
            owner[name] = min(int((before + tensor.nbytes / 2) * ranks / total), ranks - 1)
            before += tensor.nbytes
    return owner


def file_names(name: str, owner: Mapping[str, int]) -> dict[int, str]:
    """The file of each rank that writes tensors: parts of the file `name`, numbered as transformers does, or that file itself."""
    ranks = sorted({0, *owner.values()})
    stem, suffix = Path(name).stem, Path(name).suffix
    if len(ranks) == 1:
        return {0: name}
    return {rank: f"{stem}-{n:05d}-of-{len(ranks):05d}{suffix}" for n, rank in enumerate(ranks, start=1)}


def index(tensors: Mapping[str, torch.Tensor], owner: Mapping[str, int], parts: Mapping[int, str]) -> bytes:
    """The index of a model in several files, as transformers reads it (`model.safetensors.index.json`)."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: parts[rank] for name, rank in owner.items()}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2).encode()


def owned(
    file: str, tensors: Mapping[str, torch.Tensor], owner: Mapping[str, int], memory: HostMemory
) -> dict[str, torch.Tensor]:
    """The tensors that this rank owns, whole, in host memory. Collective if there are DTensors, which are gathered one at a time."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    copies = {}
    for name, tensor in tensors.items():
        whole = gather(tensor, owner[name]) if isinstance(tensor, DTensor) else tensor if owner[name] == rank else None
        if whole is not None:
            copies |= memory.copy(file, {name: whole})
    return copies


def gather(tensor: DTensor, owner: int) -> torch.Tensor | None:
    """The whole tensor on the rank `owner`, None on others; the ranks that share a copy of it with the owner must call this.

    Raises TypeError if it is divided otherwise than by rows, or holds sums that are not complete.
    """
    part, rank = local(tensor), dist.get_rank()
    if (dimension := _dimension(tensor)) is None:
        return part if rank == owner else None
    group = tensor.device_mesh.get_group(dimension)
    ranks = dist.get_process_group_ranks(group)
    if owner not in ranks:
        return None  # the owner's group has a copy of the whole tensor, too
    length = -(-len(tensor) // len(ranks))  # of all parts but the last
    padded = part.new_empty(length, *part.shape[1:])
    padded[: len(part)] = part
    whole = part.new_empty(length * len(ranks), *part.shape[1:]) if rank == owner else None
    if padded.numel():
        parts = None if whole is None else [_bytes(rows) for rows in whole.split(length)]
        dist.gather(_bytes(padded), parts, dst=owner, group=group)
    return None if whole is None else whole[: len(tensor)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor; backends do not exchange all types."""
    return tensor.view(-1).view(torch.uint8)


def _dimension(tensor: DTensor) -> int | None:
    """The dimension of the mesh over which the rows of a tensor are divided; None if each rank has all of them."""
    divided = [number for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not divided:
        return None
    if len(divided) > 1 or not tensor.placements[divided[0]].is_shard(0):
        raise TypeError(f"a tensor cannot be saved with the placements {tensor.placements}")
    return divided[0]
