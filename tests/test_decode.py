"""Decoding: greedy ids equal those of `generate()`, with and without replay."""

import functools
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, expected, greedy, prompts_of, small_config
from families import small_model as model_of
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Cache, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from mori.config import SamplingConfig
from mori.generation.decode import decode
from mori.generation.replaying_reader import ReplayingReader
from mori.generation.sampler import Sampler
from mori.speed import matmul

CACHE = "past_key_values" if Version(transformers.__version__) < Version("5.24") else "cache"
REPLAYED = set("gpt2 gpt_neox phi llama qwen2 qwen3 gemma granite cohere olmo2 stablelm smollm3".split())
REPLAYED |= set("gpt_neo gptj opt falcon olmoe qwen3_moe bloom mamba".split())


def known(families: str) -> list[str]:
    """Those of `families` that this release of transformers has."""
    return [family for family in families.split() if family in CONFIG_MAPPING]


@pytest.fixture
def replays(monkeypatch):
    """The logits of all replayed steps."""
    logits, replayed = [], ReplayingReader.replayed
    monkeypatch.setattr(
        ReplayingReader, "replayed", lambda self, newest: logits.append(replayed(self, newest).clone()) or logits[-1]
    )
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_greedy_ids_equal_generate(family, replays):
    model = model_of(family, 97).eval()
    model.generation_config.eos_token_id = None
    model.config.output_router_logits = False
    for lengths, count in (((9,), 40), ((1,), 30), ((30,), 34), ((9, 9, 9), 20), ((3, 9, 6), 30)):
        prompts = prompts_of(*lengths)
        assert greedy(model, prompts, count) == expected(model, prompts, count), lengths
    assert (len(replays) > 100) == (family in REPLAYED), len(replays)


@pytest.mark.parametrize("family", known("mistral gemma3_text phi3 starcoder2 gemma4_text lfm3 dory inkling_text"))
def test_decode_replays_sliding_windows_while_the_text_fits(family, replays):
    config = small_config(family, 97, sliding_window=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    for lengths, count, fits in (((9,), 22, True), ((9,), 40, False), ((31,), 9, False), ((3, 9, 6), 22, True)):
        replays.clear()
        assert greedy(model, prompts_of(*lengths), count) == expected(model, prompts_of(*lengths), count)
        assert bool(replays) == fits, (lengths, count)


STATES = "mamba2 falcon_mamba bamba granitemoehybrid jamba lfm2_moe qwen3_5_text qwen3_next falcon_h1 zamba2 nemotron_h"


@pytest.mark.parametrize("kind", known(f"{STATES} bart biogpt mpt whisper"))
def test_decode_replays_states_and_models_that_count_positions_themselves(kind, replays):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind, 97)).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    for prompts in (prompts_of(9), prompts_of(1), prompts_of(6, 6)):
        replays.clear()
        assert greedy(model, prompts, 30) == expected(model, prompts, 30)
        assert len(replays) == 27, "all steps but two, after the prompt's pass, are replayed"


def test_decode_tries_growing_numbers_once_for_the_same_lengths(replays, monkeypatch):
    """Bloom's numbers grow with the text; a longer text is tried again, and one that begins earlier."""
    tried, replays_the_end = [], ReplayingReader._replays_the_end
    monkeypatch.setattr(ReplayingReader, "_replays_the_end", lambda self: tried.append(1) or replays_the_end(self))
    model, checks = model_of("bloom", 97).eval(), []
    for prompt, count in ((9, 20), (9, 20), (12, 10), (9, 30), (9, 20), (5, 20), (5, 24)):
        greedy(model, prompts_of(prompt), count)
        checks.append(len(tried))
    assert checks == [1, 1, 1, 2, 2, 3, 4]


def _first_state(cache: Cache) -> torch.Tensor:
    state = cache.layers[0].recurrent_states[0]
    return torch.zeros(1) if state is None else state


def _halve_unseen(cache: Cache) -> int:
    with torch._C.DisableTorchFunction():
        _first_state(cache).mul_(0.5)
    return 1


@pytest.mark.parametrize(
    "family, factor",
    [
        ("bloom", lambda cache: 1 if cache.get_seq_length() < 25 else -1),
        ("mamba", lambda cache: 1 if _first_state(cache).sum() < 0 else -1),
        ("mamba", _halve_unseen),
    ],
    ids=["it depends on the length", "it depends on a state", "a kernel that PyTorch does not see writes a state"],
)
def test_decode_does_not_replay_a_step_that_changes(family, factor, replays, monkeypatch):
    model = model_of(family, 97).eval()
    model.generation_config.eos_token_id = None
    forward = model.base_model.forward

    def changed(*args, **kwargs):
        by = factor(next(value for value in kwargs.values() if isinstance(value, Cache)))
        out = forward(*args, **kwargs)
        return replace(out, last_hidden_state=out.last_hidden_state * by)

    monkeypatch.setattr(model.base_model, "forward", changed)
    prompts = prompts_of(9)
    assert greedy(model, prompts, 30) == expected(model, prompts, 30)
    assert not replays


def test_decode_does_not_record_a_model_that_keeps_more_than_a_column_for_each_token(replays):
    """CPM-Ant puts a prompt that it learned before each text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("cpmant", 97)).eval()
    model.generation_config.eos_token_id = None
    assert greedy(model, prompts_of(9), 30) == expected(model, prompts_of(9), 30)
    assert not replays


def test_decode_does_not_record_a_model_again_that_cannot_be_replayed(monkeypatch):
    """Its logits depend on a value. Padded texts are tried by themselves."""
    recorded, original = [], ReplayingReader._recorded
    monkeypatch.setattr(ReplayingReader, "_recorded", lambda self, *a: recorded.append(1) or original(self, *a))
    model, again = model_of("llama", 97).eval(), model_of("llama", 97).eval()
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: forward(x) + (1 if forward(x)[0, 0, 0] > 0 else 2))
    counts = []
    for prompts in (prompts_of(5), prompts_of(7), prompts_of(5, 7), prompts_of(4, 6)):
        assert greedy(model, prompts, 12) == expected(model, prompts, 12)
        counts.append(len(recorded))
    assert counts[0] == counts[1] > 0 and counts[1] < counts[2] == counts[3]
    greedy(again, prompts_of(5), 12)
    assert len(recorded) > counts[3]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen2"])
def test_decode_fills_the_whole_context(family):
    torch.manual_seed(0)
    config = model_of(family, 97).config
    config.max_position_embeddings = 256
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    for lengths, count in (((5,), 200), ((250,), 6), ((2, 40), 200)):
        assert greedy(model, prompts_of(*lengths), count) == expected(model, prompts_of(*lengths), count)
    full = prompts_of(256)
    assert greedy(model, full, 1) == [[model(torch.tensor(full)).logits[0, -1].argmax().item()]]


def test_decode_steps_at_once_give_the_same_ids():
    model, prompts = model_of("llama", 97).eval(), prompts_of(3, 7)
    assert greedy(model, prompts, 21, steps_at_once=8) == greedy(model, prompts, 21)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decode_replayed_logits_equal_the_model_to_the_bit(family, replays):
    model, [prompt] = model_of(family, 97).eval(), prompts_of(5)
    [new] = greedy(model, [prompt], 20)
    cache, logits = None, []
    with torch.no_grad():
        for unread in ([prompt], *([[token]] for token in new)):
            out = model(input_ids=torch.tensor(unread), use_cache=True, **{CACHE: cache})
            cache, logits = out[CACHE], [*logits, out.logits[:, -1]]
    # All steps but the prompt and two recordings; the last token is not read.
    assert len(replays) == 17 and all(map(torch.equal, replays, logits[3:-1]))


@pytest.mark.parametrize("change, replayed", [(lambda n: n, 17), (lambda n: min(n, 15), 0), (lambda n: n % 15, 0)])
def test_decode_replays_numbers_that_grow_with_the_text_to_its_end(change, replayed, replays, monkeypatch):
    """Every third logit is raised by a number that the length of the text decides."""
    model, forward = model_of("llama", 97).eval(), LlamaForCausalLM.forward

    @functools.wraps(forward)
    def changed(self, *args, **inputs):
        output = forward(self, *args, **inputs)
        raised = change(inputs[CACHE].get_seq_length()) * (torch.arange(97) % 3 == 0)
        return CausalLMOutputWithPast(logits=output.logits + raised, **{CACHE: inputs[CACHE]})

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    prompts = prompts_of(5)
    assert greedy(model, prompts, 20) == expected(model, prompts, 20)
    assert len(replays) == replayed


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, calls: logits + len(calls),  # other calls each time
        lambda logits, calls: logits + (1 if logits[0, 0, 0] > 0 else 2),  # depends on a value
    ],
)
def test_decode_does_not_replay_a_step_that_depends_on_its_position(change, replays, monkeypatch):
    model, calls = model_of("llama", 97).eval(), []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: calls.append(1) or change(forward(x), calls))
    prompts = prompts_of(5)
    assert greedy(model, prompts, 12) == expected(model, prompts, 12)
    assert not replays


def test_decode_of_two_texts_in_turn_keeps_them_apart():
    model, prompts = model_of("gpt2", 97).eval(), prompts_of(9, 5)
    model.generation_config.eos_token_id = None
    sampler = Sampler([0], SamplingConfig(temperature=0))
    steps = list(zip(*(decode(model, [prompt], sampler, 12) for prompt in prompts), strict=True))
    for number, prompt in enumerate(prompts):
        assert [[step[number][0][0] for step in steps]] == expected(model, [prompt], 12)


@pytest.mark.parametrize("change", ["in place", "other memory", "other parameters", "another type"])
def test_decode_uses_the_weights_of_the_moment(change):
    model, [prompt] = model_of("gpt2", 97).eval(), prompts_of(9)
    model.generation_config.eos_token_id = None
    greedy(model, [prompt], 12)
    change_weights(model, change)
    assert greedy(model, [prompt], 12) == expected(model, [prompt], 12)


def change_weights(model: torch.nn.Module, change: str) -> None:
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            changed = weight.detach() + 0.3 * torch.randn_like(weight)
            if change == "in place":
                weight.data.copy_(changed)
            elif change == "other memory":
                weight.data = changed
            elif change == "other parameters":
                setattr(module, name, torch.nn.Parameter(changed))
            else:
                weight.data = changed.double()


@pytest.mark.parametrize(
    "controls",
    [{"repetition_penalty": 1.2}, {"frequency_penalty": 0.5}, {"no_repeat_ngram_size": 2}, {"dry_multiplier": 1.0}],
    ids=str,
)
def test_decode_reports_a_diverged_model_after_several_steps(controls):
    """On a GPU several tokens are drawn before the host reads one: until then, failed draws do no harm."""
    model = model_of("gpt2", 97).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        next(decode(model, [[5, 6, 7]], Sampler([0], SamplingConfig(**controls)), 16, steps_at_once=8))


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_decode_with_split_matvec_gives_the_ids_of_generate(family, two_threads, monkeypatch):
    monkeypatch.setattr(matmul, "_LARGE_MATRIX", 1)
    calls, original = [], matmul.split_linear
    monkeypatch.setattr(matmul, "split_linear", lambda *args: calls.append(1) or original(*args))
    model, prompts = model_of(family, 96).eval(), prompts_of(3, 9)
    model.generation_config.eos_token_id = None
    assert greedy(model, prompts, 20) == expected(model, prompts, 20)
    assert greedy(model, prompts[1:], 20) == expected(model, prompts[1:], 20)
    assert calls
