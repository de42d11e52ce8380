"""How long a text the model can see."""

from torch import nn

# The names of the limit, the usual one first; those without a hard limit, such as RWKV's context_length, are not among them.
_LIMITS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "max_sequence_length", "seq_length",
    "model_max_length", "n_ctx",
)  # fmt: skip


def context_length(config) -> int | None:
    """The longest text that the model can see, in tokens; None without a limit.

    Rotary positions of the type "dynamic" are stretched as the text grows (transformers' `modeling_rope_utils`).
    """
    text = config.get_text_config()
    if "dynamic" in _rope_types(text):
        return None
    limits = [getattr(text, name, None) for name in _LIMITS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def usable_context(model: nn.Module, explicit_positions: bool) -> int | None:
    """`context_length` without the positions that a learned table keeps for padding, unless the caller counts positions from 0.

    RoBERTa's kind counts from its padding token's id on; ProphetNet also looks up the position after the last.
    """
    context = context_length(model.config)
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == context
        if table and module.padding_idx is not None and not explicit_positions:
            return context - module.padding_idx - 1 - hasattr(model.config, "ngram")
    return context


def rope_depends_on_length(config) -> bool:
    """Whether the rotary positions of all tokens change when the text passes a length."""
    return not {"dynamic", "longrope"}.isdisjoint(_rope_types(config.get_text_config()))


def _rope_types(text) -> set[str]:
    """The types of rotary positions: one for all layers, or one for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}
