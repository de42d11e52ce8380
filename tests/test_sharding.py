"""FSDP2: ranks that share one model train as one process that has it whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, weights
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from mori.config import TrainConfig
from mori.distributed import unloaded
from mori.model import loading
from mori.train import train
from tests.families import FAMILIES, small_model

WORKER = ["torch.distributed.run", "--standalone", "tests/sharding_worker.py"]


def on_ranks(ranks: int, runs: list[dict], folder: Path) -> list[dict]:
    """What rank 0 of `ranks` saw of some runs."""
    place = folder / f"{ranks}.json"
    place.write_text(json.dumps(runs))
    launch = [sys.executable, "-m", WORKER[0], f"--nproc-per-node={ranks}", *WORKER[1:], str(place)]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(place.with_suffix(".results").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Folders with a GPT-2 and a Llama; neither the vocabulary nor the widths can be divided by 4 ranks without a rest."""
    shapes = {
        "gpt2": {"n_embd": 30, "n_layer": 3, "n_head": 2, "n_positions": 64},
        "llama": {
            "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False,
        },
    }  # fmt: skip
    folders = {}
    for kind, shape in shapes.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + 1, bos_token_id=0, eos_token_id=0, **shape)
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


STEPS = 50
# What each case changes; the windows of a step are eight in all.
CASES = {
    "gpt2": {"model": "gpt2"},
    "llama": {"model": "llama", "gradient_accumulation_steps": 2},
    "weights kept until the backward pass": {"model": "llama", "fsdp": "shard_grad_op"},
    "hybrid": {"model": "gpt2", "fsdp": "hybrid_shard", "gradient_accumulation_steps": 2, "LOCAL_WORLD_SIZE": "1"},
    "adapters": {"model": "llama", "use_peft": True, "lora_r": 4, "save_merged": True},
    "last layer": {"model": "gpt2", "freeze_trainable_layers": 1},
    "recomputed activations": {"model": "llama", "gradient_checkpointing": True},
    "compiled layers": {"model": "llama", "torch_compile": True},
    "own loss and attention": {"model": "gpt2", "chunked_loss": False, "mask_free_attention": False},
    "no clipping, another optimizer": {"model": "gpt2", "max_grad_norm": 0.0, "optim": "adamw_torch"},
}
IN_16_BITS = {
    "bf16": {"model": "llama", "precision": "bf16"},
    "fp16": {"model": "gpt2", "precision": "fp16", "overflow_at": 7},
}


@pytest.fixture(scope="module")
def common(text_file, models) -> dict:
    """The settings of every run."""
    return {
        "corpus": [str(text_file)], "block_size": 16, "held_out_fraction": 0.1, "max_steps": STEPS, "learning_rate": 1e-3,
        "dropout": 0.0, "max_grad_norm": 0.5, "eval_steps": 25, "save_strategy": "no", "logging_steps": 1,
        "max_new_tokens": 5, "max_eval_windows": 0, "prompt": ["Halo"],
    }  # fmt: skip


def settings_of(case: dict, common: dict, models: dict, folder: Path, name: str, ranks: int) -> dict:
    """The settings of one case on some ranks."""
    settings = {
        **common,
        "fsdp": "full_shard",
        **case,
        "model": models[case["model"]],
        "run_name": name.replace(" ", "-"),
    }
    settings["per_device_train_batch_size"] = 8 // ranks // settings.get("gradient_accumulation_steps", 1)
    return {**settings, "logging_dir": str(folder / "runs"), "output_dir": str(folder / settings["run_name"])}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, common, models) -> dict[int, dict]:
    """The results of all cases on two ranks, and of some on four; trained by one of several test processes, for all of them."""
    is_one_of_many = "PYTEST_XDIST_WORKER" in os.environ
    folder = (
        tmp_path_factory.getbasetemp().parent / "sharding" if is_one_of_many else tmp_path_factory.mktemp("sharding")
    )
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "2").exists():
            for ranks, names in {2: [*CASES, *IN_16_BITS], 4: ["gpt2", "llama", "hybrid"]}.items():
                (folder / str(ranks)).mkdir()
                train_on(ranks, [*names, "repeated"], common, models, folder / str(ranks))
    return {ranks: json.loads((folder / f"{ranks}/all.json").read_text()) for ranks in (2, 4)}


def train_on(ranks: int, names: list[str], common: dict, models: dict, folder: Path) -> None:
    """Train some cases on some ranks; `all.json` in `folder` then holds what rank 0 saw, and the folder of each model."""
    cases = {**CASES, **IN_16_BITS, "repeated": CASES["gpt2"]}
    runs = [settings_of(cases[name], common, models, folder, name, ranks) for name in names]
    if ranks == 4:
        next(run for run in runs if "LOCAL_WORLD_SIZE" in run)["LOCAL_WORLD_SIZE"] = "2"
    seen = on_ranks(ranks, runs, folder)
    results = {
        name: {**result, "folder": run["output_dir"]} for name, run, result in zip(names, runs, seen, strict=True)
    }
    (folder / "all.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, common, models):
    """A function that trains a case in one process, once, and returns its metrics and the folder of its model."""
    results = {}
    folder = tmp_path_factory.mktemp("one-process")

    def of(name: str) -> dict:
        if name not in results:
            case = {key: value for key, value in CASES[name].items() if key not in ("fsdp", "LOCAL_WORLD_SIZE")}
            settings = settings_of(case, common, models, folder, name, 1) | {"fsdp": "none"}
            summary = train(TrainConfig(**settings))
            lines = (Path(settings["logging_dir"]) / settings["run_name"] / "metrics.jsonl").read_text().splitlines()
            losses = [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]
            results[name] = {**summary, "losses": losses, "folder": settings["output_dir"]}
        return results[name]

    return of


@pytest.mark.parametrize("ranks, name", [*((2, name) for name in CASES), (4, "gpt2"), (4, "llama"), (4, "hybrid")])
def test_ranks_that_share_a_model_train_as_one_process(ranks, name, sharded, whole):
    result, expected = sharded[ranks][name], whole(name)
    assert len(result["losses"]) == STEPS
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=1e-6, atol=0)
    own, others = weights(Path(result["folder"])), weights(Path(expected["folder"]))
    assert own.keys() == others.keys()
    for tensor in own:
        torch.testing.assert_close(own[tensor], others[tensor], rtol=0, atol=1e-5, msg=tensor)
    for when in ("before", "after"):
        assert result["eval"][when]["loss"] == pytest.approx(expected["eval"][when]["loss"], rel=1e-6)
        assert result["samples"][when] == expected["samples"][when]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_a_model_repeat_a_run_to_the_bit(ranks, sharded):
    first, second = sharded[ranks]["gpt2"], sharded[ranks]["repeated"]
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    one, other = weights(Path(first["folder"])), weights(Path(second["folder"]))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_share_of_weights_and_moments(ranks, sharded):
    for name in ("gpt2", "llama"):
        [weight_bytes, moment_bytes], whole_bytes = sharded[ranks][name]["held"], sharded[ranks][name]["whole"]
        assert whole_bytes / ranks <= weight_bytes <= 1.1 * whole_bytes / ranks  # the first rank has the larger parts
        assert moment_bytes == 2 * weight_bytes


def test_shared_model_in_bf16_stays_near_fp32(sharded):
    in_16, in_32 = (torch.tensor(sharded[2][name]["losses"]) for name in ("bf16", "llama"))
    torch.testing.assert_close(in_16, in_32, rtol=1e-2, atol=0)


def test_overflow_on_one_rank_skips_the_step_on_all(sharded):
    """The gradient scaler of each rank sees its own part of the gradient alone."""
    result = sharded[2]["fp16"]
    assert result["skipped"] == 1 and result["scale"] == 2.0**15
    torch.testing.assert_close(
        torch.tensor(result["losses"][:8]), torch.tensor(sharded[2]["gpt2"]["losses"][:8]), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize(
    "settings", [{"optim": "muon"}, {"optim": "adafactor"}, {"load_in_4bit": True, "use_peft": True}]
)
def test_fsdp_refuses_what_needs_whole_weights(settings):
    config = TrainConfig(model="somewhere", fsdp="full_shard", **settings)
    assert any("fsdp" in mistake for mistake in config.mistakes())
    assert not any("fsdp" in mistake for mistake in TrainConfig(model="somewhere", **settings).mistakes())


@pytest.mark.parametrize("family", FAMILIES)
def test_unloaded_model_reads_what_transformers_loads(family, tmp_path):
    """Where it is not sure of that, it leaves loading to transformers."""
    model = small_model(family, 97)
    model.save_pretrained(tmp_path)
    config = loading.load_config(str(tmp_path), None)
    result = unloaded.unloaded(tmp_path, config, TrainConfig())
    expected = loading.load_model(str(tmp_path), config)
    if result is None:
        assert family not in ("gpt2", "llama", "qwen2", "mistral", "gemma2")
        return
    own, places = result
    assert all(parameter.is_meta for parameter in own.parameters())
    unloaded.allocate(own, torch.device("cpu"))
    unloaded.read(own, places)
    state, buffers = own.state_dict(), dict(own.named_buffers())
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in [*expected.state_dict().items(), *expected.named_buffers()]:
        assert torch.equal(state[name] if name in state else buffers[name], tensor), name
    assert (own.get_output_embeddings() is None) == (expected.get_output_embeddings() is None)


def test_unloaded_model_takes_the_weights_of_a_base_model_and_refuses_unknown_ones(tmp_path):
    model = small_model("gpt2", 97)
    model.transformer.save_pretrained(tmp_path)  # as the first models on the hub: no prefix before the names
    config = AutoConfig.from_pretrained(tmp_path)
    own, places = unloaded.unloaded(tmp_path, config, TrainConfig())
    assert places["transformer.wte.weight"][1] == "wte.weight"
    config.n_embd = 64
    assert unloaded.unloaded(tmp_path, config, TrainConfig()) is None
