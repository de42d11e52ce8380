"""Write a model as a GGUF file, which llama.cpp and the programs built on it read; read it back and compare."""

import errno
import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy
import torch
from torch import nn

from mori.checkpoint import files
from mori.checkpoint.tensors import check_finite
from mori.cli import RunFailed, UserError, one_line
from mori.config import PRESETS, ExportConfig
from mori.data.files import find_files
from mori.data.formats import ReadOptions, read_documents
from mori.export import families, vocabulary
from mori.model import loading
from mori.model.adapters.lora import merge

_STORED_AS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_Q8_0_BLOCK = 32  # values that share a scale


def export_gguf(config: ExportConfig) -> Path:
    """Write the model as `config` says; returns the file's path.

    Raises UserError for a model, a tokenizer or a path that cannot be, before anything is written, and RunFailed if the file
    cannot be written.
    """
    name = config.model
    if name in PRESETS:
        raise UserError(f"model {name} has no weights yet; give the folder of a trained model")
    path = Path(config.output or f"{Path(name).resolve().name}-{config.outtype}.gguf")
    check_output(path)
    loading.check_reachable(name)
    tokenizer = loading.load_tokenizer(name, (), config.trust_remote_code)
    model_config = loading.load_config(name, tokenizer, trust_remote_code=config.trust_remote_code)
    families.check(model_config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[families.architecture(model_config)])
    writer.add_name(Path(name).resolve().name)
    writer.add_file_type(_FILE_TYPES[config.outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    families.write_metadata(writer, model_config)
    paths, options = find_files(config.corpus), ReadOptions(config.text_column, config.encoding)

    def texts() -> Iterator[str]:
        documents = itertools.chain.from_iterable(read_documents(path, options) for path in paths)
        return itertools.chain.from_iterable(documents)

    pre_tokenizer = vocabulary.write(writer, tokenizer, model_config, texts)
    model = merge(loading.load_model(name, model_config, config.trust_remote_code)).eval()
    try:
        check_finite(model.state_dict(), dict(model.named_buffers()))
    except FloatingPointError as error:
        raise UserError(f"model {name}: {error}") from None
    vocabulary.write_special_tokens(writer, tokenizer, model)
    shapes = _plan(writer, model, config.outtype)
    files.check_room({path.parent: shapes})
    try:
        files.publish_file(path, lambda staged: _write(writer, staged, model, config.outtype))
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {files.advice(_with_reason(error, path.parent))}") from None
    print(
        f"{path}: {path.stat().st_size / 2**20:,.1f} MiB, {writer.arch}, {config.outtype}, pre-tokenizer {pre_tokenizer}, context "
        f"{families.context_of(model_config)}; every tensor was read back and compared"
    )
    return path


def check_output(path: Path) -> None:
    """Raise UserError if the file cannot be written, or would replace something else than a GGUF file."""
    if path.is_dir():
        raise UserError(f"output: {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"output: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"output: cannot write in {path.parent}; give another path")
    if path.exists():
        with path.open("rb") as file:
            if file.read(4) != gguf.GGUF_MAGIC.to_bytes(4, "little"):
                raise UserError(f"output: {path} is no GGUF file and would be replaced; give another name")


def _plan(writer: gguf.GGUFWriter, model: nn.Module, outtype: str) -> int:
    """Enter all tensors in the file's table of contents; returns their size in bytes."""
    total = 0
    for name, tensor in families.tensors(model):
        kind = _stored_as(name, tensor, outtype)
        if kind == gguf.GGMLQuantizationType.Q8_0:
            shape, dtype = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind), numpy.dtype("uint8")
        else:
            shape, dtype = (
                tuple(tensor.shape),
                numpy.dtype("float32" if kind == gguf.GGMLQuantizationType.F32 else "float16"),
            )
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind)
        total += size
    return total


def _stored_as(name: str, tensor: torch.Tensor, outtype: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor in the file: vectors and learned positions stay in F32, rows that are no whole blocks in F16."""
    kind = _STORED_AS[outtype]
    if tensor.dim() == 1 or name.startswith("position_embd"):
        return gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.size(-1) % _Q8_0_BLOCK:
        return gguf.GGMLQuantizationType.F16
    return kind


def _encoded(
    model: nn.Module, outtype: str
) -> Iterator[tuple[str, numpy.ndarray, numpy.ndarray, gguf.GGMLQuantizationType]]:
    """Each tensor: its name in the file, its values in fp32, its values as stored, its type."""
    for name, tensor in families.tensors(model):
        kind, values = _stored_as(name, tensor, outtype), tensor.detach().float().contiguous().numpy()
        yield name, values, gguf.quantize(values, kind), kind


def _write(writer: gguf.GGUFWriter, staged: Path, model: nn.Module, outtype: str) -> None:
    """Write the file and compare it with the model; one tensor at a time is in memory twice."""
    try:
        writer.write_header_to_file(staged)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, stored, _ in _encoded(model, outtype):
            writer.write_tensor_data(stored)
    finally:
        writer.close()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(staged).tensors}
    for name, values, _, kind in _encoded(model, outtype):
        if not numpy.all(numpy.abs(gguf.dequantize(stored[name].data, kind) - values) <= _tolerance(values, kind)):
            raise UserError(f"{name} does not fit {kind.name}; use --outtype f32")


def _tolerance(values: numpy.ndarray, kind: gguf.GGMLQuantizationType) -> numpy.ndarray | float:
    """How far a stored value may be from the model's: nothing in F32, half a unit in the last place of F16, half a step of Q8_0."""
    if kind == gguf.GGMLQuantizationType.F32:
        return 0.0
    if kind == gguf.GGMLQuantizationType.F16:
        return numpy.maximum(numpy.abs(values) * 2.0**-11, 2.0**-25)
    largest = numpy.abs(values).reshape(*values.shape[:-1], -1, _Q8_0_BLOCK).max(-1, keepdims=True)
    step = largest / 127
    error = step * (0.5 + 1e-3) + 127 * numpy.maximum(step * 2.0**-11, 2.0**-25)  # the scale itself is stored in F16
    return numpy.broadcast_to(error, (*error.shape[:-1], _Q8_0_BLOCK)).reshape(values.shape)


def _with_reason(error: OSError, folder: Path) -> OSError:
    """NumPy's error for a short write has no number; a full disk is its usual cause."""
    if error.errno is None and shutil.disk_usage(folder).free < 1 << 20:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(one_line(error)) if error.errno is None else error
