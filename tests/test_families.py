"""Models that read, remember or count otherwise than most: each is asked, not listed."""

import pytest
import torch
from conftest import CPU
from families import batch, expected, greedy, prompts_of, small_config, small_model
from transformers import AutoModelForCausalLM

from mori import train as train_module
from mori.cli import UserError
from mori.config import TrainConfig
from mori.generation import reader as reader_module
from mori.generation.generate import generate
from mori.generation.reader import reads_padded_alike
from mori.generation.replaying_reader import ReplayingReader
from mori.model import loading, saving
from mori.model.context import context_length, usable_context
from mori.model.probes import check_causal, check_positions

PROMPTS = ["Halo", "Halo semua, selamat datang", "Game ini"]
# No token twice: an untrained model would repeat one, and hide nearly all mistakes.
CONTROLS = {"max_new_tokens": 24, "min_new_tokens": 24, "no_repeat_ngram_size": 1}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 4.0,
    "original_max_position_embeddings": 16, "short_mscale": 1.0, "long_mscale": 1.0,
}  # fmt: skip


def model_with(family: str, **changes) -> torch.nn.Module:
    """A small model of `family` whose configuration has `changes`, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family, 320, **changes)).eval()
    model.generation_config.eos_token_id = None
    return model


def library_ids(model, tokenizer, prompt: str, **controls) -> list[int]:
    """The new ids of transformers' `generate()` for one prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    return model.generate(ids, do_sample=False, pad_token_id=0, **controls)[0, ids.size(1) :].tolist()


# A mask that the model drops, a state, positions counted from the padding, an indexer, caches of their own.
@pytest.mark.parametrize("family", ["mamba", "rwkv", "bart", "deepseek_v32", "prophetnet", "minimax", "reformer"])
def test_generate_unequal_prompts_equal_single_texts_of_transformers(family, tokenizer):
    model = model_with(family)
    completions = generate(model, tokenizer, PROMPTS, temperature=0, **CONTROLS)
    for completion in completions:
        ids = library_ids(model, tokenizer, completion.prompt, **CONTROLS)
        assert completion.new_token_ids == ids[: len(completion.new_token_ids)] and len(ids) == 24


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "falcon"])
def test_reads_padded_alike_keeps_usual_models_in_one_batch(family):
    assert reads_padded_alike(small_model(family, 320).eval(), prompts_of(2, 9, 5), 64)


def test_reads_padded_alike_is_false_if_the_model_rejects_padding(monkeypatch):
    model = small_model("llama", 320).eval()

    def forward(attention_mask=None, **rest):
        assert attention_mask is None
        return type(model).forward(model, **rest)

    monkeypatch.setattr(model, "forward", forward)
    assert not reads_padded_alike(model, prompts_of(2, 9), 64)


@pytest.mark.parametrize("family", ["minimax", "xlstm", "reformer", "openai-gpt", "phi3", "bamba"])
def test_reader_of_other_caches_gives_the_ids_of_generate(family):
    model = model_with(family)
    for prompts in (prompts_of(7), prompts_of(1), prompts_of(5, 5)):
        assert greedy(model, prompts, 20) == expected(model, prompts, 20)


def test_reader_of_xlm_asks_the_model_for_its_inputs():
    model = model_with("xlm", causal=True)
    assert greedy(model, prompts_of(7), 20) == expected(model, prompts_of(7), 20)


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "mamba"])
def test_reader_carries_a_state_so_that_no_text_is_read_twice(family, monkeypatch):
    model, lengths, forward = model_with(family), [], type(model_with(family)).forward

    def spy(self, input_ids=None, **rest):
        lengths.append(input_ids.size(1))
        return forward(self, input_ids=input_ids, **rest)

    reader = reader_module.Reader(model, torch.zeros(1, 1, dtype=torch.long), 64)
    monkeypatch.setattr(model, "forward", spy.__get__(model))
    ids = torch.tensor(prompts_of(9))
    for length in (6, 7, 8, 9):
        reader.read(ids[:, :length])
    assert lengths == [6, 1, 1, 1]


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_reader_reads_again_where_long_rope_begins(family):
    model = model_with(family, rope_parameters=LONGROPE, original_max_position_embeddings=16, sliding_window=None)
    for length in (5, 15, 16, 17):
        prompts = prompts_of(length)
        assert greedy(model, prompts, 24) == expected(model, prompts, 24)


def test_generate_with_dynamic_rope_goes_on_past_the_trained_length(tokenizer):
    model = model_with("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert context_length(model.config) is None
    [completion] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=90)
    assert completion.finish_reason == "length"
    assert completion.new_token_ids == library_ids(model, tokenizer, "Halo", max_new_tokens=90)


@pytest.mark.parametrize(
    "family, limit",
    [
        ("mpt", 64),
        ("whisper", 64),
        ("dbrx", 64),
        ("openai-gpt", 64),
        ("prophetnet", 62),
        ("bloom", None),
        ("xlnet", None),
    ],
)
def test_usable_context_is_found_under_every_name(family, limit, tokenizer):
    model = model_with(family)
    assert usable_context(model, explicit_positions=False) == limit
    if limit:
        [completion] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=90, min_new_tokens=90)
        assert completion.finish_reason == "context"


def test_check_positions_counts_those_that_roberta_keeps_for_padding():
    model = model_with("roberta", is_decoder=True, pad_token_id=1)
    check_positions(model, 62)
    model(input_ids=torch.full((1, 62), 5))
    with pytest.raises(UserError, match="longer than the 62 positions"):
        check_positions(model, 63)


@pytest.mark.parametrize("family", ["mpt", "whisper"])
def test_training_names_a_block_longer_than_the_context(family, run_train, tokenizer, tmp_path):
    saving.save(small_model(family, 320), tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="block_size 65 is longer than the model's context of 64"):
        run_train(model=str(tmp_path / "model"), block_size=65)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("bert-generation", {}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("xlnet", {}),
        ("xlm", {"is_decoder": True}),
        ("cpmant", {}),
        ("bert", {}),
    ],
)
def test_check_causal_refuses_a_model_that_sees_later_tokens(family, changes):
    model = model_with(family, **changes)
    with pytest.raises(UserError, match="model x is a .* that reads text in both directions"):
        check_causal(model, "x", batch(vocabulary=320)[0])


@pytest.mark.parametrize(
    "family, changes",
    [
        ("xlm", {"causal": True}),
        ("bert-generation", {"is_decoder": True}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("bart", {}),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
        ("mamba", {}),
        ("deepseek_v4", {}),
    ],
)
def test_check_causal_accepts_causal_models_with_the_usual_loss(family, changes):
    model = model_with(family, **changes)
    assert check_causal(model, "x", batch(vocabulary=320)[0]) == "" and not model.training


@pytest.mark.parametrize("family, changes", [("bamba", {"z_loss_coefficient": 0.1}), ("prophetnet", {})])
def test_check_causal_names_a_model_with_another_objective(family, changes):
    assert "has another training loss" in check_causal(model_with(family, **changes), "x", batch(vocabulary=320)[0])


def test_check_causal_refuses_a_model_that_needs_more_than_text(monkeypatch):
    def forward(pixels=None, **_):
        raise ValueError("pixels cannot be None.")

    model = small_model("llama", 320)
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(
        UserError, match="LlamaForCausalLM that cannot be trained on text alone: .*pixels cannot be None"
    ):
        check_causal(model, "x", batch(vocabulary=320)[0])


def test_load_config_accepts_xlm_with_causal(tmp_path, tokenizer):
    saving.save(model_with("xlm", causal=True), tokenizer, tmp_path)
    assert loading.load_config(str(tmp_path), tokenizer).causal


def test_training_says_that_another_objective_is_not_used(run_train, tokenizer, tmp_path, capsys):
    saving.save(model_with("bamba", z_loss_coefficient=0.1), tokenizer, tmp_path / "model")
    run_train(model=str(tmp_path / "model"), max_steps=1)
    assert "WARNING: BambaForCausalLM has another training loss" in capsys.readouterr().out


def test_training_of_a_model_without_layers_in_its_config(run_train, tokenizer, tmp_path):
    """BLT describes its layers in the configurations of its parts."""
    saving.save(small_model("blt", 320), tokenizer, tmp_path / "model")
    summary = run_train(model=str(tmp_path / "model"), max_steps=2)
    assert summary["steps"] == 2 and "no sample" not in summary["samples"]["after"][0]


@pytest.mark.parametrize(
    "error", [AttributeError("no layer"), AssertionError(), NotImplementedError("cache"), KeyError(3)]
)
def test_training_goes_on_if_no_sample_can_be_drawn(error, run_train, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train_module, "generate", fail)
    summary = run_train(max_steps=2)
    assert summary["steps"] == 2 and summary["samples"]["after"][0].startswith("(no sample")


def test_training_numbers_do_not_depend_on_an_evaluation_that_draws_random_numbers(run_train, monkeypatch, tmp_path):
    losses = []
    for number, draws in enumerate((0, 3)):
        evaluate = train_module.evaluate
        with monkeypatch.context() as patch:
            patch.setattr(
                train_module,
                "evaluate",
                lambda *a, draws=draws, real=evaluate, **k: (torch.rand(draws), real(*a, **k))[1],
            )
            summary = run_train(run_name=f"run{number}", output_dir=str(tmp_path / f"brain{number}"), max_steps=3)
        losses.append(summary["eval"]["after"]["loss"])
    assert losses[0] == losses[1]


def test_replay_in_bf16_splits_into_given_sizes(monkeypatch):
    model, steps, replayed = model_with("gpt_bigcode"), [], ReplayingReader.replayed
    monkeypatch.setattr(ReplayingReader, "replayed", lambda *args: steps.append(1) or replayed(*args))
    for prompts in (prompts_of(9), prompts_of(5, 5)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert greedy(model, prompts, 20) == expected(model, prompts, 20)
    assert steps


@pytest.mark.parametrize(
    "controls",
    [
        {"forced_eos_token_id": 7},
        {"begin_suppress_tokens": []},
        {"min_length": 15},
        {"suppress_tokens": []},
    ],
)
def test_generate_obeys_controls_of_the_models_own_file(controls, tokenizer):
    model = model_with("gpt2")
    unset = library_ids(model, tokenizer, "Halo", max_new_tokens=20)
    model.generation_config.eos_token_id = end = 7 if "forced_eos_token_id" in controls else unset[4]
    for name, value in controls.items():
        setattr(model.generation_config, name, [unset[0], 50256] if name.endswith("suppress_tokens") else value)
    [completion] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=20)
    ids = library_ids(model, tokenizer, "Halo", max_new_tokens=20)
    assert completion.new_token_ids == (ids[: ids.index(end)] if end in ids else ids)
    assert completion.new_token_ids != unset[:4]


def test_training_config_of_probes_leaves_the_model_in_training_mode():
    model = small_model("gpt2", 97).train()
    with CPU.autocast():
        check_causal(model, TrainConfig().model, batch()[0])
    assert model.training


def test_reader_splits_matvecs_of_recorded_steps_only(monkeypatch):
    """A mode intercepts every call of a step in Python; a replay keeps what it chose without it."""
    modes, mode = [], reader_module.SplitMatvec
    monkeypatch.setattr(reader_module, "SplitMatvec", lambda: modes.append(1) or mode())
    for family, replayed in (("mistral", False), ("rwkv", False), ("llama", True)):
        modes.clear()
        greedy(model_with(family), prompts_of(5), 20)
        assert bool(modes) == replayed and len(modes) < 10, family
