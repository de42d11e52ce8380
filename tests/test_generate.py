import json

import pytest
import torch
import transformers
from conftest import STORIES, needs_stories, run_script
from families import FAMILIES, expected, greedy, prompts_of
from families import small_model as model_of
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from mori.cli import UserError
from mori.generation.decode import _Reader, decode
from mori.generation.generate import TextStream, generate
from mori.generation.sampling import Sampler
from mori.model.loading import train_tokenizer
from mori.speed import matmul as products
from mori.speed.matmul import OnAllCores
from mori.speed.replay import Recording, Replay

PUBLISHED = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


@pytest.fixture(scope="module")
def small(small_model):
    return AutoModelForCausalLM.from_pretrained(small_model).eval(), AutoTokenizer.from_pretrained(small_model)


@needs_stories
def test_greedy_decoding_gives_the_published_text():
    done = run_script(
        "generate.py", "--model", STORIES, "--prompt", "", "--temperature", "0", "--max_new_tokens", "200", "--json"
    )
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)
    assert answer["text"].startswith(PUBLISHED) and answer["prompt"] == ""


REPLAYED = set("gpt2 gpt_neox phi llama qwen2 qwen3 gemma granite cohere olmo2 stablelm smollm3".split())


OLD = Version(transformers.__version__) < Version("5.23")
CACHE = "past_key_values" if Version(transformers.__version__) < Version("5.24") else "cache"
if CACHE == "cache":
    REPLAYED.add("gptj")


@pytest.fixture
def replays(monkeypatch):
    """How many steps were replayed so far."""
    done = []
    inside = _Reader._replayed
    monkeypatch.setattr(_Reader, "_replayed", lambda self, newest: done.append(1) or inside(self, newest))
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_generate(family, replays):
    model = model_of(family, 97).eval()
    model.generation_config.eos_token_id = None
    model.config.output_router_logits = False
    for lengths, count in (((9,), 40), ((1,), 30), ((30,), 34), ((9, 9, 9), 20), ((3, 9, 6), 30)):
        prompts = prompts_of(*lengths)
        assert greedy(model, prompts, count) == expected(model, prompts, count), lengths
    assert (len(replays) > 100) == (family in REPLAYED and not OLD), len(replays)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen2"])
def test_two_hundred_tokens_and_the_whole_context(family):
    torch.manual_seed(0)
    config = model_of(family, 97).config
    config.max_position_embeddings = 256
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    for lengths, count in (((5,), 200), ((250,), 6), ((2, 40), 200)):
        assert greedy(model, prompts_of(*lengths), count) == expected(model, prompts_of(*lengths), count)
    full = prompts_of(256)
    assert greedy(model, full, 1) == [[model(torch.tensor(full)).logits[0, -1].argmax().item()]]


def test_blocks_of_steps_give_the_same_ids():
    model, prompts = model_of("llama", 97).eval(), prompts_of(3, 7)
    assert greedy(model, prompts, 21, steps_at_once=8) == greedy(model, prompts, 21)


@pytest.mark.skipif(OLD, reason="this release of transformers computes positions in Python: nothing is replayed")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_replayed_step_gives_the_logits_of_the_model_to_the_bit(family, monkeypatch):
    model, [prompt] = model_of(family, 97).eval(), prompts_of(5)
    seen = []
    inside = _Reader._replayed
    monkeypatch.setattr(
        _Reader, "_replayed", lambda self, newest: seen.append(inside(self, newest).clone()) or seen[-1]
    )
    [new] = greedy(model, [prompt], 20)
    cache, logits = None, []
    with torch.no_grad():
        for unread in ([prompt], *([[token]] for token in new)):
            out = model(input_ids=torch.tensor(unread), use_cache=True, **{CACHE: cache})
            cache, logits = out[CACHE], [*logits, out.logits[:, -1]]
    assert len(seen) > 15 and all(torch.equal(a, b) for a, b in zip(seen[1:], logits[3:-1], strict=True))


def test_a_replay_follows_what_grows():
    """Sums over a text that is longer at each replay, beside what keeps its shape."""

    def function(text: torch.Tensor) -> torch.Tensor:
        grown = (text + 1).view(-1)
        return (text[:, :1] * 2).view(-1) + (grown * grown.view(1, -1)).sum()

    texts = [torch.randn(1, length) for length in range(3, 8)]
    recordings, results = [], []
    for text in texts[:2]:
        recordings.append(Recording([text]))
        with recordings[-1]:
            results.append(function(text))
    assert recordings[1].same_as(recordings[0])
    replay = Replay(recordings[1], recordings[0], results[1])
    assert all(torch.equal(replay(text), function(text)) for text in texts)


def test_a_replay_under_autocast_has_its_types():
    bias, weight, rows = torch.randn(6), torch.randn(4, 6), [torch.randn(1, 4) for _ in range(4)]

    def function(row: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, row, weight).view(-1) + 1

    with torch.autocast("cpu", dtype=torch.bfloat16):
        recordings, results = [], []
        for row in rows[:2]:
            recordings.append(Recording([row]))
            with recordings[-1]:
                results.append(function(row))
        replay = Replay(recordings[1], recordings[0], results[1])
        assert all(torch.equal(replay(row), function(row)) for row in rows)


def test_a_step_that_depends_on_its_place_is_not_replayed(replays, monkeypatch):
    """A model that counts its calls in Python gives other calls each time; one that looks at a value cannot be recorded."""
    for change in (
        lambda logits, calls: logits + len(calls),
        lambda logits, calls: logits + (1 if logits[0, 0, 0] > 0 else 2),
    ):
        model, calls = model_of("llama", 97).eval(), []
        inside = model.lm_head.forward
        monkeypatch.setattr(
            model.lm_head,
            "forward",
            lambda x, inside=inside, change=change, calls=calls: calls.append(1) or change(inside(x), calls),
        )
        prompts = prompts_of(5)
        assert greedy(model, prompts, 12) == expected(model, prompts, 12)
        assert not replays


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
    for length, count in ((64, 1), (60, 5), (30, 35)):
        prompt = tokenizer.decode(ids[:length])
        assert len(tokenizer(prompt)["input_ids"]) == length
        model.generation_config.eos_token_id = 10_000  # a token that never comes
        [answer] = generate(model, tokenizer, [prompt], temperature=0, max_new_tokens=500)
        model.generation_config.eos_token_id = 0
        assert len(answer.new_token_ids) == count and answer.finish_reason == "context"
    with pytest.raises(UserError, match="context is 64"):
        generate(model, tokenizer, ["halo semua " * 30])


def test_an_empty_prompt_starts_from_the_beginning_of_text(small):
    model, tokenizer = small
    [answer] = generate(model, tokenizer, [""], temperature=0, max_new_tokens=4)
    [ids] = greedy(model, [[tokenizer.bos_token_id]], 4)
    assert answer.new_token_ids == ids[: ids.index(0) if 0 in ids else None]
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
    done = run_script("generate.py", "--model", small_model, *words)
    answers = json.loads(done.stdout)
    assert [a["prompt"] for a in answers] == ["Halo", "Halo", "Apa", "Apa"]
    assert all(set(a) == {"prompt", "text", "new_token_ids", "finish_reason"} for a in answers)
    assert run_script("generate.py", "--model", small_model, *words).stdout == done.stdout
    shown = run_script("generate.py", "--model", small_model, *words[:-1]).stdout
    assert answers[0]["prompt"] + answers[0]["text"] in shown


@pytest.mark.parametrize(
    "words, named", [(["--model", "mini"], "to be trained"), (["--model", "./none"], "does not exist")]
)
def test_mistakes_are_one_line(words, named):
    done = run_script("generate.py", *words)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_many_prompts_are_one_batch_and_each_answers_as_if_alone(small):
    prompts = ["Halo semua, selamat datang", "apa", "Terima kasih sudah datang di stream ini", "ya"]
    how = {"seed": 9, "num_return_sequences": 2, "top_k": 30, "max_new_tokens": 12}
    together = generate(*small, prompts, **how)
    assert together == [answer for prompt in prompts for answer in generate(*small, [prompt], **how)]
    assert together == generate(*small, prompts, batch_size=3, **how)
    assert [answer.prompt for answer in together] == [prompt for prompt in prompts for _ in range(2)]


def test_a_long_prompt_is_cropped_from_the_left_when_asked(small):
    model, tokenizer = small
    text = "halo semua " * 30
    [answer] = generate(model, tokenizer, [text], crop_prompt=True, temperature=0, max_new_tokens=1)
    last = tokenizer(text)["input_ids"][-64:]
    assert answer.new_token_ids == [model(torch.tensor([last])).logits[0, -1].argmax().item()]


def test_text_slides_on_where_the_context_is_full(small):
    """The same ids as a loop that reads the newer half again whenever the context is full."""
    model, tokenizer = small
    model.generation_config.eos_token_id = 10_000
    prompts = ["Halo semua", "Terima kasih sudah datang"]
    answers = generate(model, tokenizer, prompts, on_full_context="slide", temperature=0, max_new_tokens=150)
    model.generation_config.eos_token_id = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        known, length = list(ids), len(ids)
        for _ in range(150):
            if len(known) > 64:
                known = known[-32:]
            with torch.no_grad():
                known.append(model(torch.tensor([known])).logits[0, -1].argmax().item())
            ids.append(known[-1])
        assert answer.new_token_ids == ids[length:] and answer.finish_reason == "length"


def test_stop_strings_end_the_text_across_token_borders(small):
    model, tokenizer = small
    [free] = generate(model, tokenizer, ["Halo"], seed=2, max_new_tokens=40)
    stops = [free.text[at : at + 3] for at in range(4, len(free.text) - 3, 5)]
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
        assert stopped[-1] and not any(stopped[:-1])  # transformers would have stopped at the same token


def test_what_a_model_brings_is_honoured_and_flags_go_before(small):
    model, tokenizer = small
    model.generation_config.top_k, model.generation_config.max_new_tokens = 1, 7
    try:
        brought = generate(model, tokenizer, ["Halo"], seed=1)
        given = generate(model, tokenizer, ["Halo"], seed=1, top_k=0, max_new_tokens=5)
    finally:
        model.generation_config.top_k = model.generation_config.max_new_tokens = None
    assert brought == generate(model, tokenizer, ["Halo"], seed=1, top_k=1, max_new_tokens=7)
    assert given == generate(model, tokenizer, ["Halo"], seed=1, max_new_tokens=5) != brought
    assert len(generate(model, tokenizer, ["Halo"], seed=1)[0].new_token_ids) > 7  # nothing is hidden: no top_k of 50


def test_what_a_model_brings_is_shown(small_model, tmp_path):
    import shutil

    shutil.copytree(small_model, tmp_path / "brain")
    path = tmp_path / "brain" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 0.6, "top_k": 40}))
    done = run_script(
        "generate.py", "--model", tmp_path / "brain", "--prompt", "Halo", "--top_k", "3", "--max_new_tokens", "3"
    )
    assert "generation_config.json: temperature 0.6 (flags go before)" in done.stderr


def test_time_is_up(small):
    [answer] = generate(*small, ["Halo"], max_time=1e-9, max_new_tokens=50)
    assert answer.finish_reason == "time" and len(answer.new_token_ids) == 1


@pytest.mark.parametrize(
    "controls, named",
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
def test_settings_that_cannot_be_are_named(small, controls, named):
    with pytest.raises(UserError, match=named):
        generate(*small, ["Halo"], **controls)


def test_a_model_that_has_diverged_is_named(small_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_model), AutoTokenizer.from_pretrained(small_model)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(model, tokenizer, ["Halo"], temperature=temperature)
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "no_repeat_ngram_size": 2, "dry_multiplier": 1.0}
    for name, value in penalties.items():  # on a GPU several tokens are drawn before one is looked at
        sampler = Sampler([0], **{name: value})
        with pytest.raises(FloatingPointError, match="not finite"):
            next(decode(model, [[5, 6, 7]], sampler, 16, steps_at_once=8))


TEXTS = [
    "Halo semua, selamat datang di stream kali ini! Jangan lupa makan ya, hehe...",
    "Wah 😀😃 keren banget 👩‍👩‍👧 mantap 🇮🇩🇮🇩!! é ñ ü",
    "日本語とKoreaの한국어 и русский العربية हिन्दी mixed\n\ttabs  and   spaces \ufffd end",
    "😀" * 60 + " panjang " * 80,
]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of SentencePiece's kind: words begin with ▁, and what it does not know is spelled in bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz,.!", "an", "▁s", "la", "▁h"]:
        vocabulary.setdefault(piece, len(vocabulary) + 1)
    inner = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("a", "n"), ("▁", "s"), ("l", "a"), ("▁", "h")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    from tokenizers import normalizers

    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_the_final_text_character_by_character(kind, text):
    tokenizer = train_tokenizer([TEXTS[0]], 300) if kind == "byte-level" else byte_fallback_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) / 2
    for prompt_length in (1, 2, 7):
        prompt = ids[:prompt_length] if kind == "byte-level" else [1, *ids[:prompt_length]]
        for stop in (len(ids), len(ids) - 1, len(ids) - 2, len(ids) // 2, len(ids) // 2 + 1):
            new = ids[prompt_length:stop]
            stream = TextStream(tokenizer, prompt)
            pieces = [stream.add(token) for token in new]
            whole = tokenizer.decode(prompt + new, clean_up_tokenization_spaces=False, skip_special_tokens=True)
            start = len(tokenizer.decode(prompt, clean_up_tokenization_spaces=False, skip_special_tokens=True))
            assert "".join(pieces) + stream.rest() == whole[start:]
            if text is not TEXTS[2]:
                assert "\ufffd" not in "".join(pieces[5:])  # never half a character
            if text is TEXTS[0]:
                assert sum(map(bool, pieces)) > len(new) / 4  # it is told as it is born


def test_a_single_answer_is_streamed_and_prompts_may_stand_in_a_file(small_model, tmp_path):
    words = ["--model", small_model, "--max_new_tokens", "8", "--seed", "3"]
    [answer] = json.loads(run_script("generate.py", *words, "--prompt", "Halo", "--json").stdout)
    assert run_script("generate.py", *words, "--prompt", "Halo").stdout == "Halo" + answer["text"] + "\n"
    path = tmp_path / "prompts.txt"
    path.write_text("Halo\n\nApa kabar\n", encoding="utf-8")
    answers = json.loads(run_script("generate.py", *words, "--prompt_file", path, "--json").stdout)
    assert [a["prompt"] for a in answers] == ["Halo", "Apa kabar"] and answers[0] == answer
    done = run_script("generate.py", *words, "--prompt_file", tmp_path / "none.txt")
    assert done.returncode == 2 and "none.txt" in done.stderr and done.stderr.count("\n") == 1


def test_a_kept_replay_is_the_model_s_own_step_or_is_given_up():
    """Texts one after the other, two in turn, and then with other weights: the ids are those of `generate()` every time."""
    model, prompt = model_of("gpt2", 97).eval(), [5, 3, 9]
    model.generation_config.eos_token_id = None
    assert greedy(model, [prompt], 12) == expected(model, [prompt], 12) == greedy(model, [prompt], 12)
    one, other = (decode(model, [prompt], Sampler([0], temperature=0.0), 12) for _ in range(2))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 12

    def to_other_parameters(weight, module, name):
        setattr(module, name, torch.nn.Parameter(weight + 0.3 * torch.randn_like(weight)))

    def to_other_memory(weight, module, name):
        weight.data = weight + 0.3 * torch.randn_like(weight)

    def in_place(weight, module, name):
        weight.data.add_(0.3 * torch.randn_like(weight))

    def to_another_type(weight, module, name):
        weight.data = weight.double()

    for change in (to_other_parameters, to_other_memory, in_place, to_another_type):
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                change(weight, module, name)
        assert greedy(model, [prompt], 12) == expected(model, [prompt], 12) == greedy(model, [prompt], 12)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("outputs", [4096, 2310, 2309])  # the last is a prime
def test_products_in_parts_are_the_products(rows, outputs, two_threads, monkeypatch):
    torch.manual_seed(0)
    x, bias, weight = torch.randn(rows, 1, 768), torch.randn(outputs), torch.randn(outputs, 768)
    matrix, cut, bmm = weight.t().contiguous(), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: cut.append(1) or bmm(*args))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
    with torch.no_grad(), OnAllCores():
        for found in (
            torch.nn.functional.linear(x, weight, bias),
            torch.nn.functional.linear(x, weight) + bias,
            torch.addmm(bias, x[:, 0], matrix)[:, None],
        ):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
        assert len(cut) == (1 if outputs == 2309 else 3)
        torch.nn.functional.linear(torch.randn(9, 768), weight)
        torch.nn.functional.linear(x, weight[:100])
        assert len(cut) == (1 if outputs == 2309 else 3)  # many rows, or a small matrix, are left alone


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_greedy_ids_equal_generate_where_products_are_cut(family, two_threads, monkeypatch):
    monkeypatch.setattr(products, "ELEMENTS", 1)
    cut, in_parts = [], products.linear_in_parts
    monkeypatch.setattr(products, "linear_in_parts", lambda *args: cut.append(1) or in_parts(*args))
    model, prompts = model_of(family, 96).eval(), prompts_of(3, 9)
    model.generation_config.eos_token_id = None
    assert greedy(model, prompts, 20) == expected(model, prompts, 20)
    assert greedy(model, prompts[1:], 20) == expected(model, prompts[1:], 20)
    assert cut
