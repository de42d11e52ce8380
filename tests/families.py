"""Small random models of many families, for the tests that go through all of them."""

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from mori.config import SamplingConfig
from mori.generation.decode import decode
from mori.generation.sampler import Sampler

# What makes a model small, under all the names that configurations have for it.
SMALL = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48,
    "max_position_embeddings": 64, "n_positions": 64, "rotary_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "sliding_window": 8, "state_size": 4, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
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
if Version(transformers.__version__) >= Version("5.24"):
    MASK_FREE.append("gptj")
# Tests walk these without --full: Conv1D and tied heads, capped logits and sliding windows, experts with a router loss.
REPRESENTATIVES, MASK_FREE_REPRESENTATIVES = ["gpt2", "gemma2", "qwen3_moe"], ["gpt2", "llama", "qwen3_moe"]


def small_config(family: str, vocabulary: int):
    """A configuration of `family`, a few thousand parameters large."""
    known = AutoConfig.for_model(family).to_dict()
    sizes = {name: value for name, value in SMALL.items() if name in known}
    words = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    return AutoConfig.for_model(family, **{**sizes, **words, **FAMILIES[family]})


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
