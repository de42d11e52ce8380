"""Tensors as a safetensors file, written with one tensor in host memory at a time."""

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import nn
from torch.distributed.tensor import DTensor

MODEL = "model.safetensors"  # transformers' name for the weights of a model
# https://huggingface.co/docs/safetensors, "Format"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_PART = 1 << 14  # elements; PyTorch computes so few in the calling thread alone


def distinct(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep tensors that share memory (tied weights) once, under their first name; of DTensors, those that are the same object."""
    first = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            key = id(tensor)  # a part without elements has no address
        elif isinstance(tensor, torch.Tensor) and tensor.numel():
            key = tensor.data_ptr(), tensor.shape, tensor.stride()
        else:
            key = name
        first.setdefault(key, (name, tensor))
    return dict(first.values())


def check_storable(tensors: dict[str, torch.Tensor]) -> None:
    """Raise TypeError for a value that the file format cannot hold."""
    for name, tensor in tensors.items():
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            raise TypeError(f"{name} cannot be saved: it is a {type(tensor).__name__}, not a plain tensor")
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
            raise TypeError(f"{name} cannot be saved: {tensor.dtype}, {tensor.layout}, on {tensor.device}")


def check_finite(tensors: dict[str, torch.Tensor], buffers: Container[str] = ()) -> None:
    """Raise FloatingPointError for NaN or infinity; an infinity in one of `buffers` may be a mask."""
    for name, tensor in tensors.items():
        # Parts that stay in the cache, and in this thread: another thread may be training.
        parts = tensor.detach().flatten().split(_PART) if tensor.is_cpu else [tensor]
        if any(part.isnan().any() if name in buffers else not part.isfinite().all() for part in parts):
            raise FloatingPointError(f"{name} is not finite")


def serialized(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in blocks: the header with its length, then the bytes of each tensor in order."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header["__metadata__"] = {"format": "pt"}  # for transformers
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        stored = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = stored.as_strided((stored.numel(),), (1,))  # reshape() may keep the stride of a single element
        yield memoryview(flat.view(torch.uint8).numpy())


def _names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, in the order in which they were saved."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


class Saved:
    """The tensors of one or several safetensors files, read one at a time; a file at once if the file system refuses mmap.

    Raises SafetensorError if a file is damaged.
    """

    def __init__(self, paths: Iterable[Path]):
        self._sources = {}
        for path in paths:
            try:
                source = safe_open(path, "pt")
            except (OSError, RuntimeError, SafetensorError):
                source = load(path.read_bytes())
            self._sources |= dict.fromkeys(_names(path), source)

    def kinds(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """The shape and the type of each tensor."""
        kinds, dtypes = {}, {name: dtype for dtype, name in DTYPES.items()}
        for name, source in self._sources.items():
            if isinstance(source, dict):
                kinds[name] = source[name].shape, source[name].dtype
            else:
                part = source.get_slice(name)
                kinds[name] = torch.Size(part.get_shape()), dtypes.get(part.get_dtype())
        return kinds

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor, or some rows of it alone."""
        source = self._sources[name]
        if rows == slice(None):
            return source[name] if isinstance(source, dict) else source.get_tensor(name)
        return source[name][rows] if isinstance(source, dict) else source.get_slice(name)[rows]


class HostMemory:
    """Host memory that holds copies of tensors, and is reused by the next copies: fresh memory costs a page fault per page."""

    def __init__(self):
        self._copies: dict[tuple[str, ...], torch.Tensor] = {}

    def copy(self, file: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the tensors of a file by name, in the place of the last copies of the same file."""
        copies = {}
        for name, tensor in tensors.items():
            copy = self._copies.get((file, name))
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            if tensor.is_cpu and tensor.is_contiguous():
                numpy.copyto(_memory(copy), _memory(tensor))  # in the calling thread alone: another may be training
            else:
                copy.copy_(tensor.detach(), non_blocking=True)
            copies[name] = self._copies[file, name] = copy
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies


def _memory(tensor: torch.Tensor) -> numpy.ndarray:
    """The bytes of a contiguous tensor, in the same memory."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()
