"""The claim that all else leans on: the same run by `mori` and by `transformers.Trainer` gives the same bits."""

import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import STORIES, door, flags, needs_stories
from families import FAMILIES, small_model
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mori.bench import compare
from mori.config import CompareConfig, RunFailed, TrainConfig, UserError, checked
from mori.data import windows as data
from mori.model import loading as models
from mori.model import loss

# What is compared against is Trainer as it is today. At the oldest release that is supported, 5.3.0, it differs from that
# in ways that the report shows: see runs/LOG.md.
OLD_TRAINER = Version(transformers.__version__) < Version("5.23")


@pytest.fixture
def both(settings, tmp_path):
    """Run `mori-exact` and `trainer` in this process; returns what each found, and their pair."""

    def run(arms=("mori-exact", "trainer"), **changed):
        config = TrainConfig(
            **{**settings, "precision": "fp32", "max_steps": 200, "eval_steps": 1000, **changed}
        ).resolve()
        found = []
        for arm in arms:
            (tmp_path / arm).mkdir(exist_ok=True)
            found.append(
                {
                    **compare.run_arm(arm, config, tmp_path / arm, time.time()),
                    "model": tmp_path / arm / "model",
                    "error": None,
                }
            )
        return (*found, compare._pair([found[0]], [found[1]], config.precision))

    return run


def assert_equal_to_the_bit(pair: dict, steps: int) -> None:
    assert pair["steps"] == steps
    for of in ("loss", "grad_norm", "learning_rate", "weight"):
        assert pair[f"max_abs_{of}_diff"] == 0.0, pair


CASES = {
    "dropout 0.1": {},
    "no dropout": {"dropout": 0.0},
    "accumulation with a short last window": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3},
    "linear with warm-up": {"lr_scheduler_type": "linear", "warmup_steps": 20},
    "cosine with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 20},
    "constant with warm-up": {"lr_scheduler_type": "constant", "warmup_steps": 20},
    "warm-up as a share": {"warmup_steps": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "other betas": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "several epochs": {"max_steps": -1, "num_train_epochs": 8, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_bit_parity(both, case):
    if OLD_TRAINER and "accumulation" in case:
        pytest.skip("an older Trainer with a newer accelerate divides accumulated gradients once more")
    a, b, pair = both(**CASES[case])
    assert_equal_to_the_bit(pair, pair["steps"])
    assert pair["steps"] >= 200
    assert (
        a["held_out"] == b["held_out"] and a["tokens_trained"] == b["tokens_trained"] and a["targets"] == b["targets"]
    )
    assert pair["timing_valid"]


def test_bit_parity_of_the_preset_from_scratch(both, settings, tmp_path):
    config = TrainConfig(**{**settings, "model": "mini", "block_size": 32})
    tokenizer = models.load_tokenizer("mini", [Path(path).read_text(encoding="utf-8") for path in config.corpus])
    torch.manual_seed(1)
    models.save(models.load_model("mini", models.load_config("mini", tokenizer)), tokenizer, tmp_path / "mini")
    _, _, pair = both(model=str(tmp_path / "mini"), block_size=32, per_device_train_batch_size=2)
    assert_equal_to_the_bit(pair, 200)


@needs_stories
def test_bit_parity_of_a_pretrained_model(both):
    _, _, pair = both(model=str(STORIES), block_size=64)
    assert_equal_to_the_bit(pair, 200)


def test_bit_parity_of_moments_of_eight_bits(both, settings, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.from_pretrained(settings["model"])
    config.n_embd = 64  # so that some tensors are large enough
    torch.manual_seed(1)
    models.save(
        AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(settings["model"]), tmp_path / "wide"
    )
    _, _, pair = both(model=str(tmp_path / "wide"), optim="adamw_bnb_8bit", max_steps=40)
    assert_equal_to_the_bit(pair, 40)


def test_bf16_makes_the_same_operations(both):
    _, _, pair = both(precision="bf16", max_steps=50)
    assert_equal_to_the_bit(pair, 50)


def test_fp16_stays_close_to_trainer_which_computes_in_fp32_on_a_cpu(both):
    """accelerate has no fp16 autocast on a CPU and goes on in fp32 without a word; the report says so."""
    _, trainer, pair = both(precision="fp16", max_steps=50)
    assert 0 < pair["max_relative_loss_diff"] < 1e-3
    assert trainer["settings"]["effective_precision"].startswith("fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_parity_of_the_family(both, tokenizer, tmp_path, family):
    if OLD_TRAINER and family in ("bloom", "mamba"):
        pytest.skip("in an older transformers this family does not heed shift_labels")
    models.save(small_model(family, len(tokenizer)), tokenizer, tmp_path / family)
    _, _, pair = both(model=str(tmp_path / family), max_steps=20)
    assert_equal_to_the_bit(pair, 20)


# ------------------------------------------------------------- the traps, each with a test that would catch it


def test_a_divisor_of_the_micro_batch_would_be_seen(both, monkeypatch):
    """Dividing by this micro-batch's labels instead of the step's is what parity under accumulation rules out."""
    real = data.load_step

    def wrong(*arguments, **keywords):
        micro_batches, n_targets = real(*arguments, **keywords)
        return micro_batches, n_targets // len(micro_batches)

    monkeypatch.setattr(data, "load_step", wrong)
    _, _, pair = both(gradient_accumulation_steps=2, max_steps=3)
    assert pair["max_abs_loss_diff"] > 1 and not pair["timing_valid"]


def test_a_second_shift_would_be_seen(both, monkeypatch):
    """Trainer without `shift_labels` shifts the labels once more; the numbers then differ at the first step."""
    real = compare._TrainerWindows.__getitem__

    def double(self, index):
        window = real(self, index)
        del window["shift_labels"]
        return window

    monkeypatch.setattr(compare._TrainerWindows, "__getitem__", double)
    monkeypatch.setattr(compare, "check_shift_labels", lambda *_: None)
    a, b, pair = both(max_steps=3)
    assert abs(a["metrics"][0]["loss"] - b["metrics"][0]["loss"]) > 1e-3 and pair["max_abs_weight_diff"] > 0


def test_a_model_that_drops_shift_labels_is_noticed(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model)
    window = {"input_ids": torch.arange(16), "labels": torch.arange(1, 17), "shift_labels": torch.arange(1, 17)}
    compare.check_shift_labels(model, window)
    forward = model.forward
    model.forward = lambda shift_labels=None, **rest: forward(**rest)
    with pytest.raises(RunFailed, match="does not heed shift_labels"):
        compare.check_shift_labels(model, window)


def test_the_loss_that_gpt2_logs_itself_is_low_by_one_target_in_a_block(small_model):
    """Trainer counts T labels where the model's own shift leaves T - 1: GPT-2 says (T-1)/T of its loss, Llama does not."""
    model = AutoModelForCausalLM.from_pretrained(small_model).eval()
    block = torch.arange(16)[None]
    with torch.no_grad():
        said = model(block, labels=block, num_items_in_batch=torch.tensor(16.0)).loss
        true = loss.cross_entropy_sum(model(block).logits[:, :-1], block[:, 1:]) / 15
    assert said.item() == pytest.approx(true.item() * 15 / 16, rel=1e-5)


def test_the_course_recipe_trains_on_what_truncation_leaves(both, settings, tmp_path):
    """A corpus in one line is one row: 1,024 tokens of it are kept, cut into blocks; Trainer logs no more than that."""
    text = Path(settings["corpus"][0]).read_text(encoding="utf-8").replace("\n", " ") * 2
    (tmp_path / "line.txt").write_text(text)
    course, ours, pair = both(
        arms=("course", "mori"), corpus=[str(tmp_path / "line.txt")], max_steps=-1, num_train_epochs=2
    )
    assert course["tokens_trained"] == 1024 and course["steps"] == 1024 // 16 // 4 * 2
    assert course["targets"] == 1024 // 16 * 15 * 2
    assert ours["tokens_trained"] > 3000
    assert pair["steps"] is None and pair["max_abs_loss_diff"] is None and not pair["timing_valid"]


# ------------------------------------------------------------------------------------------- the whole command


def test_the_command_leaves_its_report(settings, tmp_path):
    words = flags({**settings, "max_steps": 6, "arms": "mori-exact,mori,trainer,course", "repeats": 2})
    done = door("compare.py", *words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "compare-run"
    found = json.loads((folder / "compare.json").read_text())
    assert set(found["arms"]) == {"mori-exact", "mori", "trainer", "course"} and len(found["pairs"]) == 6
    for arm in found["arms"].values():
        assert arm["error"] is None
        assert {"before", "after"} == set(arm["held_out"]) and arm["tokens_trained"] > 0 and arm["settings"]
        for name in ("tokens_per_second", "first_step_seconds"):
            assert 0 < arm[name]["min"] <= arm[name]["median"] <= arm[name]["max"]
        assert arm["peak_memory_bytes"] > 2**20
    assert_equal_to_the_bit(found["pairs"]["mori-exact|trainer"], 6)
    assert {"speed_ratio", "memory_ratio", "first_step_ratio"} <= set(found["pairs"]["mori|trainer"])
    for arm in found["arms"]:
        assert list((folder / arm).glob("events.out.tfevents.*"))
    events = {path.parent.name for path in folder.rglob("events.out.tfevents.*")}
    assert events == set(found["arms"])  # a second repeat is no run of its own
    report = (folder / "report.md").read_text()
    assert "**`mori-exact` and `trainer` are equal to the last bit" in report
    assert "void" in report and "curves.png" in report and (folder / "curves.png").stat().st_size > 10_000


@pytest.mark.skipif(
    OLD_TRAINER, reason="an older transformers cannot load a model once accelerate is taken away like this"
)
def test_a_failed_arm_is_named_and_the_others_are_compared(settings, tmp_path):
    """Without accelerate Trainer cannot run."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("import sys; sys.modules['accelerate'] = None")
    words = flags({**settings, "max_steps": 3, "arms": ["mori", "trainer"]})
    done = door("compare.py", *words, env={**os.environ, "PYTHONPATH": str(tmp_path / "path")})
    found = json.loads((tmp_path / "runs" / "compare-run" / "compare.json").read_text())
    assert done.returncode == 0 and found["arms"]["mori"]["error"] is None
    assert "accelerate" in found["arms"]["trainer"]["error"] and found["pairs"] == {}
    assert "failed:" in (tmp_path / "runs" / "compare-run" / "report.md").read_text()


def test_mistakes_are_found_before_any_arm_starts(settings, tmp_path):
    with pytest.raises(UserError, match="arm 'trainr'.*repeats"):
        checked(CompareConfig(arms=["mori,trainr"], repeats=0))
    for change in ({"eval_on_start": False}, {"document_mask": True}, {"dtype": "bfloat16"}):
        with pytest.raises(UserError, match=next(iter(change))):
            checked(CompareConfig(**change))
    with pytest.raises(UserError, match="longer than the model's context"):
        compare.compare(CompareConfig(**{**settings, "block_size": 1000}))
    assert not (tmp_path / "runs" / "compare-run").exists()


def test_a_weight_that_is_not_a_number_is_an_infinite_difference(tmp_path):
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", math.nan), ("c", 1.5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([0.0, value])}, tmp_path / name / "model.safetensors")
    assert compare.max_weight_difference(tmp_path / "a", tmp_path / "c") == 0.5
    assert compare.max_weight_difference(tmp_path / "a", tmp_path / "b") == math.inf
    assert compare.max_weight_difference(tmp_path / "a", tmp_path) is None
