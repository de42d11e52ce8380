"""LoRA against PEFT: the same numbers, the same files; freezing; runs that train adapters."""

import copy
import json
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import run_script, stop_after
from families import expected, greedy
from families import small_model as model_of_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_compare import assert_equal_to_the_bit, both  # noqa: F401
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mori.cli import UserError
from mori.model import loading, saving
from mori.model.adapters import lora
from mori.model.adapters.trainable import freeze
from mori.speed.peak import flops_per_token

FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "olmo2",
)


@pytest.fixture
def model_of(tokenizer, tmp_path):
    """A folder with a small model of a family."""

    def folder(family: str):
        saving.save(model_of_family(family, len(tokenizer)), tokenizer, tmp_path / family)
        return tmp_path / family

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_as_with_peft_and_trainer(both, family, model_of):  # noqa: F811
    *_, pair = both(
        model=str(model_of(family)),
        use_peft=True,
        max_steps=100,
        lora_r=4,
        lora_alpha=7.0,
        lora_dropout=0.1,
        gradient_accumulation_steps=2,
    )
    assert_equal_to_the_bit(pair, steps=100)


def test_rank_stabilized_adapters_of_some_layers_train_as_with_peft(both):  # noqa: F811
    *_, pair = both(
        use_peft=True,
        lora_r=4,
        lora_alpha=7.0,
        use_rslora=True,
        lora_target_modules=["c_attn"],
        lora_modules_to_save=["ln_f"],
    )
    assert_equal_to_the_bit(pair, steps=40)


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "learning_rate": 1e-2}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


@pytest.fixture
def trained_adapter(run_train, tmp_path):
    """A folder with an adapter that was trained for a few steps."""
    run_train(**LORA, save_merged=False)
    return tmp_path / "brain"


def test_adapter_folder_loads_with_peft_and_transformers(trained_adapter, small_model):
    with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), trained_adapter)
    ours = loading.load_model(str(trained_adapter), AutoConfig.from_pretrained(small_model))
    assert len(lora.adapted(ours)) == 8
    assert torch.equal(logits_of(with_peft), logits_of(ours))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(trained_adapter)), logits_of(ours))
    assert not torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(small_model)), logits_of(ours))


def test_adapter_of_peft_continues_here(small_model, tokenizer, run_train, tmp_path):
    torch.manual_seed(1)
    settings = LoraConfig(
        r=3,
        lora_alpha=9,
        target_modules=["c_attn"],
        modules_to_save=["ln_f"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    before = logits_of(model)
    ours = loading.load_model(str(tmp_path / "adapter"), AutoConfig.from_pretrained(small_model))
    assert torch.equal(logits_of(ours), before)
    run_train(model=str(tmp_path / "adapter"), save_merged=False, max_steps=3)
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), tmp_path / "brain")
    assert not torch.equal(logits_of(after), before)
    config = json.loads((tmp_path / "brain" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"], config["modules_to_save"]) == (3, ["c_attn"], ["ln_f"])
    assert config["fan_in_fan_out"] and config["base_model_name_or_path"] == str(small_model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_merged_model_equals_model_and_adapter(family, model_of, run_train, tmp_path):
    base = str(model_of(family))
    run_train(**LORA, model=base, save_merged=False)
    adapter = loading.load_model(str(tmp_path / "brain"), AutoConfig.from_pretrained(base))
    beside = logits_of(adapter)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "brain").merge_and_unload()
    run_train(**LORA, model=base, run_name="merged", output_dir=str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(merged), logits_of(peft))
    assert (logits_of(merged) - beside).abs().max() <= 1e-6 * beside.abs().max()
    prompt = torch.tensor([[5, 6, 7]])
    greedy = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    assert torch.equal(merged.generate(prompt, **greedy), adapter.generate(prompt, **greedy))
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == adapter.config.tie_word_embeddings


def test_adapter_run_killed_and_resumed_equals_one_never_killed(run_train, small_model, tmp_path):
    run_train(**LORA, save_merged=False)
    never = load_file(tmp_path / "brain" / "adapter_model.safetensors")
    for name in ("runs", "brain"):
        shutil.rmtree(tmp_path / name)
    stop_after(6, lambda: run_train(**LORA, save_merged=False))
    [checkpoint] = (tmp_path / "runs" / "run" / "checkpoints").iterdir()
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < 100_000
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), checkpoint)
    run_train(**LORA, save_merged=False)
    resumed = load_file(tmp_path / "brain" / "adapter_model.safetensors")
    assert never.keys() == resumed.keys() and all(torch.equal(never[name], resumed[name]) for name in never)


def test_adapter_run_refuses_to_resume_on_a_base_that_has_changed(run_train, model_of, tmp_path):
    base = model_of("llama")
    run_train(**LORA, model=str(base), max_steps=4)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(base)
    with pytest.raises(UserError, match="base_sha256"):
        run_train(**LORA, model=str(base), max_steps=4)


def test_adapters_train_in_fp16_with_a_scaled_loss(run_train, tmp_path):
    summary = run_train(**LORA, precision="fp16", max_steps=40, eval_steps=40)
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"] - 0.05
    assert summary["skipped_steps"] < 10


def test_fused_adapters_equal_peft_up_to_rounding(run_train, tmp_path):
    losses = [
        run_train(**{**LORA, "lora_dropout": 0.0}, dropout=0.0, fused_adapters=fused, run_name=str(fused))["eval"][
            "after"
        ]["loss"]
        for fused in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_fused_adapter_has_autograds_output_and_gradients(p):
    layer = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    base = copy.deepcopy(layer)  # the adapter works in a hook of its layer
    adapter = lora.LoRA(layer, lora.LoRASettings(r=3, lora_alpha=4.0, lora_dropout=p)).double()
    nn.init.normal_(adapter.lora_B.weight)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (False, True):
        adapter.fused = fused
        torch.manual_seed(1)
        y = adapter(x, base(x))
        gradients = torch.autograd.grad(y.sin().sum(), [x, *adapter.parameters()])
        results.append([y, *gradients])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_adapters_of_one_input_keep_it_once(dropout):
    x, kept = torch.randn(64, 32, requires_grad=True), {}
    settings = lora.LoRASettings(r=2, lora_alpha=4.0, lora_dropout=dropout)
    adapters = [lora.LoRA(nn.Linear(32, 32), settings) for _ in range(3)]

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    y = torch.zeros(64, 32)
    graphs = []  # a graph that was let go would give its memory, and with it the address, to the next
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for adapter in adapters:
            adapter.fused = True
            graphs.append(adapter(x, y))
    narrow = 3 * (64 * 2 + 32 * 2 + 2 * 32) * 4  # the low-rank product, A and B
    masks = 3 * x.numel() if dropout else 0  # one byte an element
    assert sum(kept.values()) == x.nbytes + narrow + masks


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"lora_target_modules": ["q_proj"]},
            "q_proj matches no layer of this model; its layers are named c_attn, c_fc, c_proj",
        ),
        ({"lora_modules_to_save": ["nothing"]}, "nothing matches no layer"),
        ({"lora_target_modules": ["lm_head"]}, "the head shares its weight with the embeddings"),
        ({"freeze_trainable_layers": 1}, "contradict each other"),
        ({"model": "mini"}, "starts from random weights"),
        ({"dtype": "bfloat16"}, "base_dtype"),
        ({"base_dtype": "bfloat16", "precision": "fp32"}, "pass --precision bf16"),
        ({"use_peft": False}, "needs use_peft"),
    ],
)
def test_adapter_settings_that_do_not_fit_are_told(changed, message, run_train, tmp_path):
    with pytest.raises(UserError, match=message):
        run_train(**{**LORA, **changed})
    assert not (tmp_path / "runs" / "run").exists()


FREEZES = {
    "the last layer": ({"freeze_trainable_layers": 1}, {"h.1."}),
    "the first layer": ({"freeze_trainable_layers": -1}, {"h.0."}),
    "attention of both layers": ({"freeze_trainable_layers": 2, "freeze_trainable_modules": ["attn"]}, {"attn."}),
    "the last layer and the last norm": (
        {"freeze_trainable_layers": 1, "freeze_extra_modules": ["ln_f"]},
        {"h.1.", "ln_f"},
    ),
}


@pytest.mark.parametrize("name", FREEZES)
def test_frozen_weights_stay_and_the_others_train_as_with_trainer(both, name, small_model):  # noqa: F811
    changed, trained = FREEZES[name]
    ours, _, pair = both(**changed, weight_decay=0.1)
    assert_equal_to_the_bit(pair, steps=40)
    before = AutoModelForCausalLM.from_pretrained(small_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(ours["model"]).state_dict()
    for tensor in before:
        assert torch.equal(before[tensor], after[tensor]) == (not any(part in tensor for part in trained)), tensor


def test_frozen_weights_have_no_moments(run_train, tmp_path):
    run_train(freeze_trainable_layers=1, max_steps=4)
    moments = load_file(tmp_path / "runs" / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "brain")
    assert sum(t.numel() for n, t in moments.items() if n.endswith("exp_avg")) == sum(
        p.numel() for p in model.transformer.h[1].parameters()
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"freeze_trainable_layers": 3}, "the model has 2 layers"),
        (
            {"freeze_trainable_layers": 1, "freeze_trainable_modules": ["self_attn"]},
            "self_attn matches no module; there are attn",
        ),
        ({"freeze_trainable_layers": 1, "freeze_extra_modules": ["lm_head"]}, "lm_head matches no module; there are"),
        ({"freeze_trainable_layers": 0}, "is 0"),
        ({"freeze_extra_modules": ["ln_f"]}, "need freeze_trainable_layers"),
    ],
)
def test_freezing_settings_that_do_not_fit_are_told(changed, message, run_train, tmp_path):
    with pytest.raises(UserError, match=message):
        run_train(**changed)
    assert not (tmp_path / "runs" / "run").exists()


def test_flops_per_token_count_frozen_weights(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model)
    head = model.lm_head.weight.numel()
    layer = sum(p.numel() for p in model.transformer.h[0].parameters())
    norm = sum(p.numel() for p in model.transformer.ln_f.parameters())
    attention = 16 * 32  # T D
    assert flops_per_token(model, 16) == 6 * (2 * layer + norm + head) + 2 * 12 * attention
    freeze(model, 1, ["all"], [])
    assert flops_per_token(model, 16) == 2 * layer + 6 * layer + 4 * (norm + head) + (4 + 12) * attention
    freeze(model, -1, ["all"], [])
    assert flops_per_token(model, 16) == (6 + 4) * layer + 4 * (norm + head) + 2 * 12 * attention


def test_adapters_train_beside_4_bit_weights_and_publish_the_adapter(run_train, model_of, tmp_path):
    base = str(model_of("llama"))
    summary = run_train(**LORA, model=base, load_in_4bit=True, eval_steps=12)
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    never = load_file(tmp_path / "brain" / "adapter_model.safetensors")
    for name in ("runs", "brain"):
        shutil.rmtree(tmp_path / name)
    stop_after(6, lambda: run_train(**LORA, model=base, load_in_4bit=True, eval_steps=12))
    run_train(**LORA, model=base, load_in_4bit=True, eval_steps=12)
    resumed = load_file(tmp_path / "brain" / "adapter_model.safetensors")
    assert all(torch.equal(never[name], resumed[name]) for name in never)
    with pytest.raises(UserError, match="4 bits"):
        run_train(**LORA, model=base, load_in_4bit=True, save_merged=True)


def test_gradients_beside_4_bit_weights_are_those_of_the_dequantized_model(model_of):
    base = str(model_of("llama"))
    config = AutoConfig.from_pretrained(base)
    quantized = loading.load_model(base, config, four_bit=torch.float32)
    plain = loading.load_model(base, config)
    for name, layer in quantized.named_modules():
        if hasattr(layer, "quant_state") or type(layer).__name__ == "Linear4bit":
            plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    gradients = []
    for model in (quantized, plain):
        torch.manual_seed(0)
        lora.add(model, lora.LoRASettings(4, 8))
        for layer in lora.adapted(model).values():
            torch.nn.init.normal_(layer.lora.lora_B.weight, std=0.1)
        ids = torch.arange(40).view(2, 20)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_adapters_with_recomputed_activations_have_the_same_weights(run_train, tmp_path):
    for name, recompute in (("kept", False), ("recomputed", True)):
        run_train(
            **LORA, save_merged=False, gradient_checkpointing=recompute, run_name=name, output_dir=str(tmp_path / name)
        )
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "recomputed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_decoding_beside_adapters_equals_generate(trained_adapter, small_model, tokenizer):
    model = loading.load_model(str(trained_adapter), AutoConfig.from_pretrained(small_model)).eval()
    prompts = [[5, 6, 7], [8, 9]]
    assert greedy(model, prompts, 20) == expected(model, prompts, 20)


@pytest.mark.parametrize(
    "script, words",
    [("generate.py", ["--prompt", "Halo", "--max_new_tokens", "5"]), ("evaluate.py", ["--json", "--block_size", "16"])],
)
def test_scripts_take_an_adapter_folder(script, words, trained_adapter, text_file, tmp_path):
    corpus = ["--corpus", str(text_file), "--logging_dir", str(tmp_path / "cache")] if script == "evaluate.py" else []
    done = run_script(script, "--model", str(trained_adapter), *words, *corpus)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type is"),
        ({"use_dora": True}, "use_dora is true"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern is"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
        ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base does not exist"),
        ({"r": 5}, "differs"),
        ({"r": "many"}, "not an adapter's configuration"),
        ({"target_modules": ["nothing"]}, "nothing matches no layer"),
    ],
)
def test_adapter_folders_that_do_not_fit_are_told(change, message, trained_adapter, run_train, tmp_path):
    path = trained_adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        run_train(model=str(trained_adapter), run_name="next", output_dir=str(tmp_path / "next"))


def test_adapter_continues_in_fp32_beside_a_bf16_base_and_with_its_settings(trained_adapter, run_train, tmp_path):
    options = {"model": str(trained_adapter), "run_name": "next", "output_dir": str(tmp_path / "next"), "max_steps": 2}
    run_train(**options, base_dtype="bfloat16", precision="bf16", save_merged=False)
    tensors = load_file(tmp_path / "next" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for changed in ({"lora_r": 3}, {"lora_alpha": 5.0}, {"lora_target_modules": ["c_fc"]}, {"use_rslora": True}):
        with pytest.raises(UserError, match=f"{next(iter(changed))} is .* but the adapter that continues has"):
            run_train(**{**options, "run_name": "other"}, **changed)


def test_layers_whose_weight_is_read_without_a_call_get_no_adapter(model_of, run_train, tmp_path):
    """Mamba multiplies by the weight of dt_proj itself: an adapter there would never train."""
    mamba = str(model_of("mamba"))
    run_train(**LORA, model=mamba, max_steps=1, save_merged=False)
    tensors = load_file(tmp_path / "brain" / "adapter_model.safetensors")
    assert any("x_proj" in name for name in tensors) and not any("dt_proj" in name for name in tensors)
    with pytest.raises(UserError, match="dt_proj would never train"):
        run_train(**LORA, model=mamba, lora_target_modules=["dt_proj"], run_name="named")


def test_freeze_counts_the_layers_and_not_lists_inside_them(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model)
    for layer in model.transformer.h:
        layer.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    freeze(model, 1, ["all"], [])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"transformer.h.1.{name}" for name, _ in model.transformer.h[1].named_parameters()}


def test_best_adapter_is_published(run_train, tmp_path):
    options = {
        **LORA,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_merged": False,
        "max_steps": 48,
        "eval_steps": 4,
    }
    summary = run_train(**options, load_best_model_at_end=True)
    best = summary["eval"]["best"]["step"]
    assert best < 48
    folder = tmp_path / "runs" / "run" / "checkpoints" / f"step-{best:08d}"
    saved, published = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "brain"))
    assert all(torch.equal(saved[name], published[name]) for name in saved)


def test_export_merges_an_adapter_into_its_base(trained_adapter, small_model, tmp_path):
    out = tmp_path / "merged"
    done = run_script("export.py", "--model", str(trained_adapter), "--merge", "--output", str(out))
    assert done.returncode == 0, done.stderr
    beside = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), trained_adapter))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert (logits_of(merged) - beside).abs().max() <= 1e-6 * beside.abs().max()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    for model, output, message in ((small_model, "other", "holds no adapter"), (trained_adapter, "merged", "exists")):
        done = run_script("export.py", "--model", str(model), "--merge", "--output", str(tmp_path / output))
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_chunked_and_fused_adapters_train_as_trainer_up_to_rounding(both):  # noqa: F811
    *_, pair = both(("mori", "trainer"), **{**LORA, "lora_alpha": 7.0})
    assert pair["max_relative_loss_diff"] < 1e-5
