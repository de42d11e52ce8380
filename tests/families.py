"""Small random models of many families, for the tests that go through all of them."""

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from mori.config import SamplingConfig
from mori.generation.decode import decode
from mori.generation.sampler import Sampler


def _named(value, names: str) -> dict:
    return dict.fromkeys(names.split(), value)


# What makes a model small, under all the names that configurations have for it.
SMALL = {
    **_named(
        32,
        "hidden_size n_embd d_model dim_model word_embed_proj_dim emb_dim embedding_size embedding_dim lru_width "
        "input_embedding_size output_embedding_size hidden_size_global ffn_hidden_size adapter_out_dim",
    ),
    **_named(
        4,
        "num_attention_heads n_head num_heads n_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads "
        "linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num",
    ),
    **_named(
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_group num_expert_group topk_group "
        "num_experts_per_tok num_experts_per_token moe_k moe_topk",
    ),
    **_named(
        8,
        "head_dim dim_head d_head swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim index_head_dim attention_head_size rotary_dim kv_lora_rank q_lora_rank "
        "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size local_attention "
        "index_topk hidden_size_per_layer_input",
    ),
    **_named(
        48,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner feed_forward_size "
        "intermediate_size_mlp dense_intermediate_size",
    ),
    **_named(
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
    ),
    **_named(
        64,
        "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions context_length model_max_length",
    ),
    **_named(4, "state_size mamba_d_state ssm_state_size time_step_rank chunk_size mamba_chunk_size"),
    **_named(2, "n_layer num_layers n_layers decoder_layers num_decoder_layers num_blocks depth"),
    **_named(2, "encoder_layers num_encoder_layers"),
    **_named(0.1, "initializer_range init_std"),
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TWO_KINDS = ["sliding_attention", "full_attention"]
# Types whose parts depend on each other in a way of their own.
PARTICULAR = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"layer_types": _TWO_KINDS, "rope_parameters": dict.fromkeys(_TWO_KINDS, _ROPE)},
    "dbrx": {
        "rope_parameters": _ROPE,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "deepseek_v4": {"num_key_value_heads": 1, "o_lora_rank": 8, "o_groups": 2},
    "dory": {
        "num_hidden_layers": 4, "layer_types": 2 * _TWO_KINDS, "n_input_layers": 1, "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {
        "swa_kv_lora_rank": 8, "swa_q_lora_rank": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": 2 * _TWO_KINDS, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 4},
    "roc_bert": {
        "pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "chunk_size": 16, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# family -> what is particular about it here. Scaled logits, capped logits, tied and untied heads, and experts with their
# router loss are among them on purpose.
FAMILIES = {
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {"tie_word_embeddings": False},
    "gptj": {},
    "opt": {},
    "bloom": {},
    "falcon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"rope_scaling": None, "pad_token_id": 0},
    "llama": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0},
    "olmo2": {"pad_token_id": 0},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {"pad_token_id": 0},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "olmoe": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "qwen3_moe": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "mamba": {},
}
# The families whose every layer sees all tokens before, through PyTorch's SDPA.
MASK_FREE = [
    "gpt2", "gpt_neox", "opt", "phi", "llama", "qwen2", "qwen3", "gemma", "granite", "cohere", "olmo2", "olmoe", "qwen3_moe",
]  # fmt: skip
# The families whose decoding step makes the same calls at every position, so that a GPU can capture it. Falcon's does too, but
# it indexes by a list, which is copied from the host.
CAPTURED = set("gpt2 gpt_neox opt phi llama qwen2 qwen3 gemma granite cohere olmo2 stablelm smollm3 mamba".split())
CAPTURED.update({"mamba2", "qwen3_5_text"} & set(CONFIG_MAPPING))
if Version(transformers.__version__) >= Version("5.24"):
    MASK_FREE.append("gptj")
    CAPTURED.add("gptj")
# Tests walk these without --full: Conv1D and tied heads, capped logits and sliding windows, experts with a router loss.
REPRESENTATIVES, MASK_FREE_REPRESENTATIVES = ["gpt2", "gemma2", "qwen3_moe"], ["gpt2", "llama", "qwen3_moe"]


def small_config(model_type: str, vocabulary: int, **changes):
    """A configuration of `model_type`, a few thousand parameters large, with `changes`."""
    changes = FAMILIES.get(model_type, {}) | changes
    return CONFIG_MAPPING[model_type](**{**_small_fields(CONFIG_MAPPING[model_type], vocabulary), **changes})


def _small_fields(config_class: type, vocabulary: int) -> dict:
    """The fields that make a configuration small, those of the configurations inside it among them."""
    default = config_class()
    known = default.to_dict()
    fields = {name: value for name, value in SMALL.items() if name in known}
    if known.get("kv_lora_rank") or known.get("num_key_value_heads") == known.get("num_attention_heads"):
        fields |= {name: 4 for name in ("num_key_value_heads",) if name in known}
    fields |= _few_layers(known)
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            fields[name] = _small_fields(type(part), vocabulary)
    fields |= {
        name: vocabulary for name in known if name.endswith("vocab_size") or name == "vocab_size_per_layer_input"
    }
    fields |= {name: 0 for name in ("bos_token_id", "eos_token_id") if name in known}
    if known.get("pad_token_id") is not None:
        fields["pad_token_id"] = 0
    return fields | PARTICULAR.get(config_class.model_type, {})


def _few_layers(known: dict) -> dict:
    """One layer of each kind that the lists of a configuration have, at least two."""
    count = known.get("num_hidden_layers")
    if not isinstance(count, int):
        return {}
    lists = {name: value for name, value in known.items() if isinstance(value, list) and len(value) == count > 2}
    kept = sorted({value.index(kind) for value in lists.values() for kind in value if not isinstance(kind, float)})[:6]
    kept += [layer for layer in range(count) if layer not in kept][: max(0, 2 - len(kept))]
    return {name: [value[i] for i in sorted(kept)] for name, value in lists.items()} | {"num_hidden_layers": len(kept)}


def small_model(family: str, vocabulary: int) -> torch.nn.Module:
    """A model of `family` with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(family, vocabulary))


def greedy(model, prompts: list[list[int]], count: int, **how) -> list[list[int]]:
    """Our ids after `prompts`."""
    rows = [[] for _ in prompts]
    sampler = Sampler(range(len(prompts)), SamplingConfig(temperature=0), device=model.device)
    for new_ids in decode(model, prompts, sampler, count, **how):
        for row, ids in zip(rows, new_ids, strict=True):
            row += ids
    return rows


def expected(model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The ids of `generate()`."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return out[:, longest:].tolist()


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(2, 96, (length,), generator=generator).tolist() for length in lengths]


def batch(rows: int = 2, length: int = 24, vocabulary: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    """Random `input_ids` and `labels` `(B, T)`; six labels are ignored."""
    torch.manual_seed(1)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[0, 3:9] = -100
    return torch.randint(0, vocabulary, (rows, length)), labels


def gradients(module: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of `value` by the parameters of `module`."""
    module.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
