"""What a GGUF file says about a family of models: its architecture, its metadata, its tensors.

The keys are those of the GGUF specification (ggml, docs/gguf.md); the names of the tensors come from the package `gguf`.
"""

from collections.abc import Iterator

import gguf
import torch
from torch import nn

from mori.checkpoint.tensors import distinct
from mori.cli import UserError

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as (in, out)
# The values for which llama.cpp computes what the model computes.
_ACCEPTED = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish")},
    "mistral": {"hidden_act": ("silu", "swish")},
}
_SCALINGS = {
    "default": gguf.RopeScalingType.NONE,
    "linear": gguf.RopeScalingType.LINEAR,
    "llama3": gguf.RopeScalingType.NONE,  # written as a tensor of factors
}


def check(config) -> None:
    """Raise UserError unless llama.cpp computes what a model with this configuration computes."""
    kind = config.model_type
    if kind not in _ACCEPTED:
        raise UserError(f"format gguf takes models of the types {', '.join(_ACCEPTED)}; this one is a {kind}")
    for name, values in _ACCEPTED[kind].items():
        if getattr(config, name) not in values:
            raise UserError(f"format gguf: llama.cpp computes no {kind} whose {name} is {getattr(config, name)!r}")
    if kind != "gpt2":
        rotary = config.rope_parameters
        if rotary["rope_type"] not in _SCALINGS or rotary.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"format gguf takes rotary positions of the types {', '.join(_SCALINGS)} over whole heads; this model's are "
                f"{ {name: value for name, value in rotary.items() if name != 'rope_theta'} }"
            )


def architecture(config) -> gguf.MODEL_ARCH:
    """The architecture of the file; Mistral's is Llama's."""
    return gguf.MODEL_ARCH.GPT2 if config.model_type == "gpt2" else gguf.MODEL_ARCH.LLAMA


def context_of(config) -> int:
    """The context that the file names: texts longer than a sliding window would be computed without it."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def write_metadata(writer: gguf.GGUFWriter, config) -> None:
    """Write the shape of the model."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rotary, width = config.rope_parameters, _head_width(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(_SCALINGS["linear"])
        writer.add_rope_scaling_factor(rotary["factor"])


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by their names in the file, laid out as llama.cpp expects them; tied weights once.

    Raises UserError for a tensor that the architecture does not know.
    """
    config = model.config
    names = gguf.get_tensor_name_map(architecture(config), config.num_hidden_layers)
    for name, tensor in distinct(model.state_dict()).items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise UserError(f"format gguf has no place for the tensor {name} of a {config.model_type}")
        yield new_name, _laid_out(name, tensor, config)
    if config.model_type != "gpt2" and config.rope_parameters["rope_type"] == "llama3":
        width = _head_width(config)
        steps = torch.arange(0, width, 2, dtype=torch.float32) / width
        plain = 1 / config.rope_parameters["rope_theta"] ** steps
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq.float()


def _laid_out(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """The tensor as llama.cpp expects it."""
    if config.model_type == "gpt2":
        return tensor.T if name.endswith(_CONV1D) else tensor
    if ".q_proj." in name:
        return interleave_rotary(tensor, config.num_attention_heads)
    return interleave_rotary(tensor, config.num_key_value_heads) if ".k_proj." in name else tensor


def interleave_rotary(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Order the rows of each head so that the pairs which are rotated together are neighbours.

    transformers rotates rows i and i + d/2 of a head of width d, llama.cpp rows 2i and 2i + 1.
    """
    return tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _head_width(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
