"""Models leave mori: folders that transformers 4 loads, GGUF files, uploads to the hub."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Tokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
)

from mori.model import loading, saving

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
PLAIN = {"rope_type": "default", "rope_theta": 300.0}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- folders that transformers 4 loads
def test_save_of_mini_names_what_other_programs_read(tokenizer, tmp_path):
    model = loading.load_model("mini", loading.load_config("mini", tokenizer))
    saving.save(model, tokenizer, tmp_path)
    settings, config = read_json(tmp_path / "tokenizer_config.json"), read_json(tmp_path / "config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["pad_token"] == settings["eos_token"] == "<|endoftext|>"
    assert config["pad_token_id"] == config["eos_token_id"] == 0 < config["vocab_size"] == len(tokenizer)
    assert config["n_ctx"] == config["n_positions"] == 512
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Halo semua, é 😀 123"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"] and reloaded.pad_token_id == 0
    padded = reloaded([text, "Halo"], padding=True, return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(**padded).logits.isfinite().all()


def test_save_names_additional_special_tokens(small_model, tokenizer, tmp_path):
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    own = GPT2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    own.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    saving.save(AutoModelForCausalLM.from_pretrained(small_model), own, tmp_path)
    settings = read_json(tmp_path / "tokenizer_config.json")
    assert settings["additional_special_tokens"] == ["<|user|>"] and "extra_special_tokens" not in settings
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|user|>" in reloaded.all_special_tokens
    assert reloaded("a<|user|>b")["input_ids"] == own("a<|user|>b")["input_ids"]


@pytest.mark.parametrize(
    "config, fields",
    [
        (LlamaConfig(**SHAPE, rope_parameters=PLAIN), {"rope_theta": 300.0}),
        (
            LlamaConfig(**SHAPE, rope_parameters=LINEAR),
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            PhiConfig(**SHAPE, rope_parameters={**PLAIN, "partial_rotary_factor": 0.25}),
            {"rope_theta": 300.0, "partial_rotary_factor": 0.25},
        ),
        (
            GPTNeoXConfig(**SHAPE, rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}),
            {"rotary_emb_base": 500.0, "rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            Gemma3TextConfig(**SHAPE, rope_parameters={"full_attention": LINEAR, "sliding_attention": PLAIN}),
            {
                "rope_theta": 500.0,
                "rope_local_base_freq": 300.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
    ],
    ids=["default", "linear", "partial", "gpt_neox", "gemma3"],
)
def test_save_names_rotary_positions_as_transformers_4_reads_them(tokenizer, tmp_path, config, fields):
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config).eval()
    saving.save(model, tokenizer, tmp_path)
    written = read_json(tmp_path / "config.json")
    assert {name: written.get(name) for name in fields} == fields
    ids = torch.arange(1, 40)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
