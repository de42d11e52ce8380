"""Prompts to completions."""

import pytest
import torch
from families import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.stopping_criteria import StopStringCriteria

from mori.cli import UserError
from mori.generation.generate import generate


def test_generate_row_ends_at_its_own_end_of_text(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    [free] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=12)
    end = free.new_token_ids[5]
    model.generation_config.eos_token_id = [end, 319]
    try:
        [cut] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = 0
    assert cut.new_token_ids == free.new_token_ids[: free.new_token_ids.index(end)]
    assert "Halo" + cut.text == tokenizer.decode(tokenizer("Halo")["input_ids"] + cut.new_token_ids)


def test_generate_text_does_not_depend_on_other_prompts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = generate(model, tokenizer, ["Halo semua"], seed=3, num_return_sequences=2, top_k=20)
    together = generate(model, tokenizer, ["apa", "Halo semua"], seed=3, num_return_sequences=2, top_k=20)
    assert together[2:] == alone and alone[0] != alone[1]
    assert generate(model, tokenizer, ["Halo semua"], seed=4, num_return_sequences=2, top_k=20) != alone


def test_generate_stops_when_the_context_is_full(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer("halo semua " * 20)["input_ids"][:64]
    for length, count in ((64, 1), (60, 5), (30, 35)):
        prompt = tokenizer.decode(ids[:length])
        assert len(tokenizer(prompt)["input_ids"]) == length
        model.generation_config.eos_token_id = 10_000  # never drawn
        [answer] = generate(model, tokenizer, [prompt], temperature=0, max_new_tokens=500)
        model.generation_config.eos_token_id = 0
        assert len(answer.new_token_ids) == count and answer.finish_reason == "context"
    with pytest.raises(UserError, match="context is 64"):
        generate(model, tokenizer, ["halo semua " * 30])


def test_generate_empty_prompt_starts_from_the_beginning_of_text(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    [answer] = generate(model, tokenizer, [""], temperature=0, max_new_tokens=4)
    [ids] = greedy(model, [[tokenizer.bos_token_id]], 4)
    assert answer.new_token_ids == ids[: ids.index(0) if 0 in ids else None]
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.bos_token = None
    with pytest.raises(UserError, match="no beginning-of-text token"):
        generate(model, bare, [""])


def test_generate_switches_cudnn_attention_off_for_its_own_time(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    enabled = []
    hook = model.register_forward_hook(lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    generate(model, tokenizer, ["Halo"], max_new_tokens=2)
    hook.remove()
    assert enabled and not any(enabled) and torch.backends.cuda.cudnn_sdp_enabled()


def test_generate_leaves_mode_and_global_rng_unchanged(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    before = torch.get_rng_state()
    first = generate(model, tokenizer, ["Halo"], seed=1)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()
    assert generate(model, tokenizer, ["Halo"], seed=1) == first  # dropout was off in both


def test_generate_reports_all_invalid_values(model_and_tokenizer):
    with pytest.raises(UserError, match="top_p.*max_new_tokens"):
        generate(*model_and_tokenizer, ["Halo"], top_p=0.0, max_new_tokens=0)


def test_generate_batches_give_the_texts_of_single_prompts(model_and_tokenizer):
    prompts = ["Halo semua, selamat datang", "apa", "Terima kasih sudah datang di stream ini", "ya"]
    settings = {"seed": 9, "num_return_sequences": 2, "top_k": 30, "max_new_tokens": 12}
    together = generate(*model_and_tokenizer, prompts, **settings)
    assert together == [answer for prompt in prompts for answer in generate(*model_and_tokenizer, [prompt], **settings)]
    assert together == generate(*model_and_tokenizer, prompts, batch_size=3, **settings)
    assert [answer.prompt for answer in together] == [prompt for prompt in prompts for _ in range(2)]


def test_generate_crop_prompt_keeps_the_end(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "halo semua " * 30
    [answer] = generate(model, tokenizer, [text], crop_prompt=True, temperature=0, max_new_tokens=1)
    last = tokenizer(text)["input_ids"][-64:]
    assert answer.new_token_ids == [model(torch.tensor([last])).logits[0, -1].argmax().item()]


def test_generate_slides_when_the_context_is_full(model_and_tokenizer):
    """The ids are those of a loop that reads the newer half again whenever the context is full."""
    model, tokenizer = model_and_tokenizer
    model.generation_config.eos_token_id = 10_000
    prompts = ["Halo semua", "Terima kasih sudah datang"]
    answers = generate(model, tokenizer, prompts, on_full_context="slide", temperature=0, max_new_tokens=150)
    model.generation_config.eos_token_id = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        window, length = list(ids), len(ids)
        for _ in range(150):
            if len(window) > 64:
                window = window[-32:]
            with torch.no_grad():
                window.append(model(torch.tensor([window])).logits[0, -1].argmax().item())
            ids.append(window[-1])
        assert answer.new_token_ids == ids[length:] and answer.finish_reason == "length"


def test_generate_stop_strings_end_the_text_across_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    [free] = generate(model, tokenizer, ["Halo"], seed=2, max_new_tokens=40)
    stops = [free.text[start : start + 3] for start in range(4, len(free.text) - 3, 5)]
    stops = [stop for stop in stops if stop.isascii() and stop.isprintable()][:6]
    assert len(stops) > 2
    for stop in stops:
        pieces = []
        [cut] = generate(
            model,
            tokenizer,
            ["Halo"],
            seed=2,
            max_new_tokens=40,
            stop_strings=[stop, "never"],
            on_text=lambda _, piece, pieces=pieces: pieces.append(piece),
        )
        assert cut.text == free.text[: free.text.index(stop)] == "".join(pieces)
        assert cut.finish_reason == "stop_string"
        assert cut.new_token_ids == free.new_token_ids[: len(cut.new_token_ids)]
        criteria, prompt = StopStringCriteria(tokenizer, [stop]), tokenizer("Halo")["input_ids"]
        stopped = [
            criteria(torch.tensor([prompt + cut.new_token_ids[:n]]), None).item()
            for n in range(1, len(cut.new_token_ids) + 1)
        ]
        assert stopped[-1] and not any(stopped[:-1])  # at the same token as transformers


def test_generate_takes_defaults_from_the_model(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.generation_config.top_k, model.generation_config.max_new_tokens = 1, 7
    try:
        from_model = generate(model, tokenizer, ["Halo"], seed=1)
        overridden = generate(model, tokenizer, ["Halo"], seed=1, top_k=0, max_new_tokens=5)
    finally:
        model.generation_config.top_k = model.generation_config.max_new_tokens = None
    assert from_model == generate(model, tokenizer, ["Halo"], seed=1, top_k=1, max_new_tokens=7)
    assert overridden == generate(model, tokenizer, ["Halo"], seed=1, max_new_tokens=5) != from_model
    assert len(generate(model, tokenizer, ["Halo"], seed=1)[0].new_token_ids) > 7  # no hidden top_k of 50


def test_generate_max_time_ends_the_text(model_and_tokenizer):
    [answer] = generate(*model_and_tokenizer, ["Halo"], max_time=1e-9, max_new_tokens=50)
    assert answer.finish_reason == "time" and len(answer.new_token_ids) == 1


@pytest.mark.parametrize(
    "controls, message",
    [
        ({"suppress_tokens": [9999]}, "vocabulary ends at"),
        ({"bad_words_ids": [[1, 9999]]}, "vocabulary ends at"),
        ({"no_such": 1}, "no control no_such"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens 9 is more"),
        ({"sequence_bias": [[1, 2]]}, "pairs of token ids"),
        ({"stop_strings": [""]}, "empty text"),
        ({"exponential_decay_length_penalty": [3.0]}, "two numbers"),
    ],
)
def test_generate_reports_invalid_settings(model_and_tokenizer, controls, message):
    with pytest.raises(UserError, match=message):
        generate(*model_and_tokenizer, ["Halo"], **controls)


def test_generate_reports_a_diverged_model(small_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_model), AutoTokenizer.from_pretrained(small_model)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(model, tokenizer, ["Halo"], temperature=temperature)
