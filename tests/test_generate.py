import json

import pytest
import torch
from conftest import STORIES, door, needs_stories
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mori.config import UserError
from mori.generate import decode, generate
from mori.sampling import Sampler

PUBLISHED = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


@pytest.fixture(scope="module")
def small(small_model):
    return AutoModelForCausalLM.from_pretrained(small_model).eval(), AutoTokenizer.from_pretrained(small_model)


@needs_stories
def test_greedy_decoding_gives_the_published_text():
    done = door(
        "generate.py", "--model", STORIES, "--prompt", "", "--temperature", "0", "--max_new_tokens", "200", "--json"
    )
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)
    assert answer["text"].startswith(PUBLISHED) and answer["prompt"] == ""


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bloom", "qwen2", "gemma2", "mixtral", "mamba"])
def test_greedy_ids_equal_generate(family):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=97, pad_token_id=0, eos_token_id=96, bos_token_id=1)
    config.update({k: v for k, v in SIZES.items() if hasattr(config, k)})
    config.update({k: v for k, v in {"num_key_value_heads": 1, "head_dim": 16}.items() if hasattr(config, k)})
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(2, 96, (3, 9))
    theirs = model.generate(prompt, do_sample=False, max_new_tokens=20, attention_mask=torch.ones_like(prompt))
    ours = decode(model, prompt, Sampler(temperature=0), 20, {96})
    for row, expected in zip(ours, theirs[:, 9:].tolist(), strict=True):
        assert row == expected[: expected.index(96) if 96 in expected else None]


def test_a_row_ends_at_its_own_end_of_text(small):
    model, tokenizer = small
    [free] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=12)
    end = free.new_token_ids[5]
    model.generation_config.eos_token_id = [end, 319]
    try:
        [cut] = generate(model, tokenizer, ["Halo"], temperature=0, max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = 0
    assert cut.new_token_ids == free.new_token_ids[: free.new_token_ids.index(end)]
    assert "Halo" + cut.text == tokenizer.decode(tokenizer("Halo")["input_ids"] + cut.new_token_ids)


def test_a_prompt_answers_the_same_whatever_stands_beside_it(small):
    model, tokenizer = small
    alone = generate(model, tokenizer, ["Halo semua"], seed=3, num_return_sequences=2, top_k=20)
    beside = generate(model, tokenizer, ["apa", "Halo semua"], seed=3, num_return_sequences=2, top_k=20)
    assert beside[2:] == alone and alone[0] != alone[1]
    assert generate(model, tokenizer, ["Halo semua"], seed=4, num_return_sequences=2, top_k=20) != alone


def test_text_stops_where_the_context_is_full(small):
    model, tokenizer = small
    ids = tokenizer("halo semua " * 20)["input_ids"][:64]
    for length, expected in ((64, 1), (60, 5), (30, 35)):
        prompt = tokenizer.decode(ids[:length])
        assert len(tokenizer(prompt)["input_ids"]) == length
        model.generation_config.eos_token_id = 10_000  # a token that never comes
        [answer] = generate(model, tokenizer, [prompt], temperature=0, max_new_tokens=500)
        model.generation_config.eos_token_id = 0
        assert len(answer.new_token_ids) == expected
    with pytest.raises(UserError, match="context is 64"):
        generate(model, tokenizer, ["halo semua " * 30])


def test_an_empty_prompt_starts_from_the_beginning_of_text(small):
    model, tokenizer = small
    [answer] = generate(model, tokenizer, [""], temperature=0, max_new_tokens=4)
    expected = decode(model, torch.tensor([[tokenizer.bos_token_id]]), Sampler(temperature=0), 4, {0})
    assert [answer.new_token_ids] == expected
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.bos_token = None
    with pytest.raises(UserError, match="no beginning-of-text token"):
        generate(model, bare, [""])


def test_the_mode_and_the_global_random_state_are_left_as_they_were(small):
    model, tokenizer = small
    model.train()
    before = torch.get_rng_state()
    first = generate(model, tokenizer, ["Halo"], seed=1)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()
    assert generate(model, tokenizer, ["Halo"], seed=1) == first  # dropout was off in both


def test_values_that_cannot_be_are_refused(small):
    with pytest.raises(UserError, match="top_p.*max_new_tokens"):
        generate(*small, ["Halo"], top_p=0.0, max_new_tokens=0)


def test_json_is_all_that_standard_output_holds(small_model):
    words = ("--prompt", "Halo", "Apa", "--num_return_sequences", "2", "--max_new_tokens", "3", "--seed", "5", "--json")
    done = door("generate.py", "--model", small_model, *words)
    answers = json.loads(done.stdout)
    assert [a["prompt"] for a in answers] == ["Halo", "Halo", "Apa", "Apa"]
    assert all(set(a) == {"prompt", "text", "new_token_ids"} for a in answers)
    assert door("generate.py", "--model", small_model, *words).stdout == done.stdout
    shown = door("generate.py", "--model", small_model, *words[:-1]).stdout
    assert answers[0]["prompt"] + answers[0]["text"] in shown


@pytest.mark.parametrize(
    "words, named", [(["--model", "mini"], "to be trained"), (["--model", "./none"], "does not exist")]
)
def test_mistakes_are_one_line(words, named):
    done = door("generate.py", *words)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
