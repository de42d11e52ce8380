"""Models leave mori: folders that transformers 4 loads, GGUF files, uploads to the hub."""

import errno
import itertools
import json
import os
from pathlib import Path

import gguf
import pytest
import torch
from conftest import STORIES, needs_stories, run_script
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Tokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from mori.cli import RunFailed, UserError
from mori.config import ExportConfig
from mori.data.files import SHIPPED
from mori.export import vocabulary
from mori.export.gguf_file import export_gguf
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


# ------------------------------------------------------------------------------------------------- GGUF files
def export(folder: Path, path: Path, outtype: str = "f32", **changed) -> Path:
    return export_gguf(ExportConfig(model=str(folder), output=str(path), outtype=outtype, **changed))


def byte_level(kind: str) -> Tokenizer:
    """A BPE tokenizer that splits text as a published family does: its own expressions, as its tokenizer.json has them."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(contraction + r"\p{N}{1,3}" + rest), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(contraction + r"\p{N}" + rest), "isolated")],
    }[kind]
    bpe = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.txt"))[:3]]
    bpe.train_from_iterator([*texts, *[vocabulary.PROBE, "12 345 678\n\n\n'S 'LL"] * 20], trainer)
    own = kind in ("gpt-2", "smollm")  # merges across the borders show which expressions split
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    )
    return bpe


def save_model(folder: Path, config, tokenizer) -> Path:
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer) + 3  # rows without a token
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.initializer_range = 0.1
    saving.save(AutoModelForCausalLM.from_config(config), tokenizer, folder)
    return folder


def shaped(kind: type, **changed):
    """A small Llama or Mistral."""
    return kind(**{**SHAPE, "max_position_embeddings": 128, **changed})


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPORTED = {
    "gpt2": lambda: GPT2Config(n_positions=64, n_embd=64, n_layer=2, n_head=2, n_inner=96),
    "gpt2-untied": lambda: GPT2Config(n_positions=64, n_embd=64, n_layer=2, n_head=2, tie_word_embeddings=False),
    "llama": lambda: shaped(LlamaConfig, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "llama-tied": lambda: shaped(LlamaConfig, tie_word_embeddings=True, num_key_value_heads=4, head_dim=32),
    "llama-biases": lambda: shaped(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama-3": lambda: shaped(LlamaConfig, rope_parameters=LLAMA_3),
    "llama-linear": lambda: shaped(LlamaConfig, rope_parameters=LINEAR),
    "mistral": lambda: shaped(MistralConfig, sliding_window=None),
}


@pytest.fixture(params=EXPORTED)
def exported_model(request, tokenizer, tmp_path) -> Path:
    """The folder of a small model whose tensors have no round values."""
    folder = save_model(tmp_path / "model", EXPORTED[request.param](), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    saving.save(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_export_gguf_stores_every_tensor(exported_model, tmp_path, outtype):
    path = export(exported_model, tmp_path / "m.gguf", outtype)
    model = AutoModelForCausalLM.from_pretrained(exported_model)
    heads, kv_heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    kv_heads = getattr(model.config, "num_key_value_heads", kv_heads)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.GPT2 if model.config.model_type == "gpt2" else gguf.MODEL_ARCH.LLAMA, 2
    )
    for name, parameter in model.named_parameters():  # tied weights once
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if (
            model.config.model_type == "gpt2"
            and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
            and values.dim() == 2
        ):
            values = values.T
        if ".q_proj." in name or ".k_proj." in name:  # rows 2i and 2i + 1 are rows i and i + d/2
            n_heads = heads if ".q_proj." in name else kv_heads
            values = torch.cat([torch.cat([head[::2], head[1::2]]) for head in values.chunk(n_heads)])
        exact = outtype == "f32" or parameter.dim() == 1 or name == "transformer.wpe.weight"
        expected = parameter.detach() if exact else parameter.detach().half().float()
        if exact or outtype == "f16":
            assert torch.equal(values, expected), name
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
            assert (values - parameter).abs().max() <= 0.57 * parameter.abs().max() / 127, name  # its scale is in F16
    assert stored.keys() <= {"rope_freqs.weight"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-linear", "mistral"])
def test_export_gguf_is_read_by_transformers(family, tokenizer, tmp_path):
    config = EXPORTED[family]()
    if family == "gpt2":
        config.n_inner, config.n_positions = None, 1024  # transformers reads neither from GGUF
    folder = save_model(tmp_path / "model", config, tokenizer)
    export(folder, tmp_path / "m.gguf")
    config = {name: value for name, value in read_json(folder / "config.json").items() if "rope" in name}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = torch.arange(1, 40)[None]
    if family == "llama-linear":  # transformers reads no scaling from GGUF
        fields = {field.name: field.contents() for field in gguf.GGUFReader(tmp_path / "m.gguf").fields.values()}
        assert fields["llama.rope.scaling.type"] == "linear" and fields["llama.rope.scaling.factor"] == 2.0
        assert fields["llama.rope.freq_base"] == config["rope_theta"] == 500.0
        return
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(reloaded(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe"])
def test_export_gguf_names_the_pre_tokenizer(kind, tmp_path):
    own = PreTrainedTokenizerFast(tokenizer_object=byte_level(kind), eos_token="<|eos|>")
    folder = save_model(tmp_path / "model", EXPORTED["llama"](), own)
    fields = {
        field.name: field.contents() for field in gguf.GGUFReader(export(folder, tmp_path / "m.gguf")).fields.values()
    }
    assert fields["tokenizer.ggml.pre"] == kind and fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.tokens"][: len(own)] == own.convert_ids_to_tokens(range(len(own)))
    assert fields["tokenizer.ggml.eos_token_id"] == own.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[own.eos_token_id] == gguf.TokenType.CONTROL and kinds[-1] == gguf.TokenType.UNUSED


def test_export_gguf_refuses_a_tokenizer_that_llama_cpp_does_not_know(tmp_path):
    own = PreTrainedTokenizerFast(tokenizer_object=byte_level("qwen2"), eos_token="<|eos|>")
    folder = save_model(tmp_path / "model", EXPORTED["llama"](), own)
    with pytest.raises(UserError, match="other ids than each pre-tokenizer"):
        export(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*m.gguf*"))


@needs_stories
def test_export_gguf_gives_the_published_text_in_llama_cpp(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    expected = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=120, eos_token_id=-1)[0].tolist()
    llama = llama_cpp.Llama(str(export(STORIES, tmp_path / "m.gguf", "f16")), n_ctx=256, verbose=False)
    for text in ("Once upon a time", vocabulary.PROBE):
        assert llama.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"]
    stream = llama.generate([1], temp=0.0, repeat_penalty=1.0, top_k=1)
    assert [1, *itertools.islice(stream, 120)] == expected
    assert "Once upon a time, there was a little girl named Lily." in tokenizer.decode(expected)


def test_export_gguf_gives_the_same_logits_in_llama_cpp(exported_model, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llama = llama_cpp.Llama(str(export(exported_model, tmp_path / "m.gguf")), n_ctx=64, logits_all=True, verbose=False)
    ids = list(range(1, 60))
    llama.eval(ids)
    model = AutoModelForCausalLM.from_pretrained(exported_model).eval()
    expected = model(torch.tensor([ids])).logits[0]
    scores = torch.tensor(llama.scores[: len(ids)])
    assert (scores - expected).abs().max() < 0.02 * expected.abs().max()


def test_export_gguf_keeps_an_earlier_file(small_model, tmp_path):
    path = export(small_model, tmp_path / "m.gguf", "f16")
    first = path.read_bytes()
    export(small_model, path, "f32")
    assert (tmp_path / "m.gguf.previous").read_bytes() == first != path.read_bytes()
    export(small_model, path, "f32")
    assert (tmp_path / "m.gguf.previous.1").read_bytes() == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "m.gguf.previous", "m.gguf.previous.1"]


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--model", "mini"], "has no weights yet"),
        (["--model", "absent/"], "model"),
        (["--output", "absent/m.gguf"], "folder absent does not exist"),
        (["--output", "."], "is a folder"),
        (["--output", "notes.txt"], "is no GGUF file and would be replaced"),
        (["--outtype", "q4_0"], "outtype"),
        (["--corpus", "absent.txt"], "absent.txt"),
    ],
)
def test_export_refuses_in_one_line(small_model, tmp_path, words, reason):
    (tmp_path / "notes.txt").write_text("mine")
    done = run_script("export.py", "--model", small_model, *words, cwd=tmp_path)
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_export_gguf_writes_a_file_through_the_command(small_model, tmp_path):
    done = run_script("export.py", "--model", small_model, "--outtype", "q8_0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = f"{small_model.name}-q8_0.gguf"
    assert [path.name for path in tmp_path.iterdir()] == [name] and name in done.stdout


@pytest.mark.parametrize(
    "config, reason",
    [
        (lambda: GPTNeoXConfig(**SHAPE), "gpt2, llama, mistral"),
        (lambda: GPT2Config(n_embd=64, n_layer=1, n_head=2, activation_function="relu"), "activation_function"),
        (lambda: GPT2Config(n_embd=64, n_layer=1, n_head=2, scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"),
        (
            lambda: shaped(LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}),
            "dynamic",
        ),
    ],
)
def test_export_gguf_refuses_models_that_llama_cpp_computes_otherwise(tokenizer, tmp_path, config, reason):
    folder = save_model(tmp_path / "model", config(), tokenizer)
    with pytest.raises(UserError, match=reason):
        export(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*m.gguf*"))


@pytest.mark.parametrize("value, reason", [(1e5, "does not fit F16"), (float("nan"), "not finite")])
def test_export_gguf_refuses_values_that_the_file_cannot_hold(small_model, tokenizer, tmp_path, value, reason):
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.transformer.wte.weight.data[5, 5] = value
    saving.save(model, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match=reason):
        export(tmp_path / "model", tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.glob("*m.gguf*"))


def test_export_gguf_onto_a_full_disk_leaves_the_earlier_file(small_model, tmp_path, monkeypatch):
    path = export(small_model, tmp_path / "m.gguf", "f16")
    first = path.read_bytes()

    def write_tensor_data(self, tensor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_tensor_data)
    with pytest.raises(RunFailed, match="No space left on device; make room"):
        export(small_model, path, "f32")
    assert path.read_bytes() == first and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
