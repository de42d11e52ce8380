"""Tensors of which every rank has a part (`DTensor`): gathered whole on the rank that writes them, cut again when they are read.

A checkpoint holds whole tensors, so it depends neither on the number of ranks nor on how they divide a tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mori.checkpoint.tensors import HostMemory


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

    Raises TypeError if it is divided in more than one way, or holds sums that are not complete.
    """
    local, rank = tensor.detach().to_local(), dist.get_rank()
    if (cut := _cut(tensor)) is None:
        return local if rank == owner else None
    mesh_dim, dim = cut
    group = tensor.device_mesh.get_group(mesh_dim)
    ranks = dist.get_process_group_ranks(group)
    if owner not in ranks:
        return None  # the owner's group has a copy of the whole tensor, too
    length = tensor.shape[dim]
    rows = -(-length // len(ranks))  # of all parts but the last
    local = local.movedim(dim, 0)
    padded = local.new_empty(rows, *local.shape[1:])
    padded[: len(local)] = local
    whole = local.new_empty(rows * len(ranks), *local.shape[1:]) if rank == owner else None
    parts = [_bytes(part) for part in whole.split(rows)] if whole is not None and whole.numel() else None
    if padded.numel():
        dist.gather(_bytes(padded), parts, dst=owner, group=group)
    return None if whole is None else whole[:length].movedim(0, dim)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor; backends do not exchange all types."""
    return tensor.view(-1).view(torch.uint8)


def _cut(tensor: DTensor) -> tuple[int, int] | None:
    """The dimension of the mesh over which a tensor is divided, and that of the tensor; None if each rank holds all of it."""
    cuts = [(number, placement) for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not cuts:
        return None
    if len(cuts) > 1 or not cuts[0][1].is_shard():
        raise TypeError(f"a tensor cannot be saved with the placements {tensor.placements}")
    return cuts[0][0], cuts[0][1].dim


def part_of_this_rank(tensor: torch.Tensor) -> tuple[slice, ...]:
    """The index in the whole tensor of what this rank holds of it: everything if it is plain."""
    if not isinstance(tensor, DTensor) or (cut := _cut(tensor)) is None:
        return ()
    mesh_dim, dim = cut
    length, ranks = tensor.shape[dim], tensor.device_mesh.size(mesh_dim)
    rows = -(-length // ranks)
    first = min(rows * tensor.device_mesh.get_local_rank(mesh_dim), length)
    return (*[slice(None)] * dim, slice(first, min(first + rows, length)))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, in the same memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
