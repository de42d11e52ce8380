"""The same run with `mori-exact` and with `transformers.Trainer` gives the same bits; the report of a comparison."""

import gc
import importlib.util
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import STORIES, flags, needs_a_gpu, needs_stories, run_script
from families import FAMILIES, small_model
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mori.train
from mori.bench import arms, compare, harness
from mori.bench.options import CompareConfig
from mori.cli import RunFailed, UserError, checked
from mori.config import TrainConfig
from mori.model import loading, saving
from mori.model import loss as losses

# The reference is today's Trainer. The oldest supported release, 5.3.0, differs from it; the report shows how.
OLD_TRAINER = Version(transformers.__version__) < Version("5.17")


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Trainer collects garbage at the end of every run; without the imported modules that takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def both(settings, tmp_path):
    """Run two arms in this process; returns the result of each, and their comparison."""

    def run(names=("mori-exact", "trainer"), **changed):
        config = TrainConfig(**{**settings, "precision": "fp32", "max_steps": 40, "eval_steps": 1000, **changed})
        results = []
        for arm in names:
            (tmp_path / arm).mkdir(exist_ok=True)
            result = arms.run_arm(arm, config.resolve(), tmp_path / arm, time.time())
            results.append({**result, "model": tmp_path / arm / "model", "error": None})
        return (*results, compare.compare_arms([results[0]], [results[1]], config.precision))

    return run


def assert_equal_to_the_bit(pair: dict, steps: int) -> None:
    assert pair["steps"] == steps
    for name in ("loss", "grad_norm", "learning_rate", "weight"):
        assert pair[f"max_abs_{name}_diff"] == 0.0, pair


CASES = {
    "dropout 0.1": {},
    "no dropout": {"dropout": 0.0},
    "accumulation with a short last window": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3},
    "linear with warm-up": {"lr_scheduler_type": "linear", "warmup_steps": 10},
    "cosine with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 10},
    "constant": {"lr_scheduler_type": "constant"},
    "constant with warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10},
    "restarts": {
        "lr_scheduler_type": "cosine_with_restarts",
        "warmup_steps": 5,
        "lr_scheduler_kwargs": {"num_cycles": 3},
    },
    "AdamW without its fused kernel": {"optim": "adamw_torch", "weight_decay": 0.1},
    "SGD": {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1},
    "RMSprop": {"optim": "rmsprop"},
    "Adagrad": {"optim": "adagrad"},
    "warm-up as a share": {"warmup_steps": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
    "no clipping": {"max_grad_norm": 0.0},
    "other betas": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "several epochs": {"max_steps": -1, "num_train_epochs": 8, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_mori_exact_equals_trainer_with_option(both, case):
    if OLD_TRAINER and "accumulation" in case:
        pytest.skip("an older Trainer with a newer accelerate divides accumulated gradients once more")
    ours, trainer, pair = both(**CASES[case])
    assert_equal_to_the_bit(pair, pair["steps"])
    assert pair["steps"] >= (200 if case == "several epochs" else 40)  # more than an epoch
    assert all(ours[name] == trainer[name] for name in ("held_out", "tokens_trained", "targets"))
    assert pair["timing_valid"]


def test_mori_exact_equals_trainer_from_scratch(both, settings, tmp_path):
    config = TrainConfig(**{**settings, "model": "mini", "block_size": 32})
    tokenizer = loading.load_tokenizer("mini", [Path(path).read_text(encoding="utf-8") for path in config.corpus])
    torch.manual_seed(1)
    saving.save(loading.load_model("mini", loading.load_config("mini", tokenizer)), tokenizer, tmp_path / "mini")
    _, _, pair = both(model=str(tmp_path / "mini"), block_size=32, max_steps=12)
    assert_equal_to_the_bit(pair, 12)


@needs_stories
def test_mori_exact_equals_trainer_on_a_pretrained_model(both):
    _, _, pair = both(model=str(STORIES), block_size=64, max_steps=20)
    assert_equal_to_the_bit(pair, 20)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_mori_exact_equals_trainer_with_bitsandbytes(optim, both, settings, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.from_pretrained(settings["model"])
    config.n_embd = 64  # bitsandbytes keeps small tensors in 32 bits
    torch.manual_seed(1)
    saving.save(
        AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(settings["model"]), tmp_path / "wide"
    )
    _, _, pair = both(model=str(tmp_path / "wide"), optim=optim, max_steps=20)
    assert_equal_to_the_bit(pair, 20)


def test_mori_exact_equals_trainer_in_bf16(both):
    _, _, pair = both(precision="bf16", max_steps=20)
    assert_equal_to_the_bit(pair, 20)


@needs_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mori_exact_on_a_gpu_equals_trainer(both, deterministic, precision):
    """Under deterministic algorithms to the bit."""
    _, _, pair = both(device="cuda", precision=precision, max_steps=20, temperature=0.0)
    assert_equal_to_the_bit(pair, 20)


@needs_a_gpu
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 1e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("arm", ["mori-exact", "mori"])
def test_losses_on_a_gpu_are_close_to_those_of_trainer(both, arm, precision, tolerance):
    """With the usual algorithms, which add some gradients in no fixed order."""
    _, _, pair = both((arm, "trainer"), device="cuda", precision=precision, max_steps=20, dropout=0.0)
    assert pair["steps"] == 20 and pair["max_relative_loss_diff"] <= tolerance


def test_trainer_reports_that_fp16_on_a_cpu_is_fp32(both):
    """accelerate has no fp16 autocast on a CPU and computes in fp32 without a warning."""
    _, trainer, pair = both(precision="fp16", max_steps=20)
    assert 0 < pair["max_relative_loss_diff"] < 1e-3
    assert trainer["settings"]["effective_precision"].startswith("fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_mori_exact_equals_trainer_for_the_family(both, tokenizer, tmp_path, family):
    """The one test that walks all families: losses, norms, learning rates and weights over ten steps."""
    if OLD_TRAINER and family in ("bloom", "mamba"):
        pytest.skip("in an older transformers this family ignores shift_labels")
    saving.save(small_model(family, len(tokenizer)), tokenizer, tmp_path / family)
    _, _, pair = both(model=str(tmp_path / family), max_steps=10)
    assert_equal_to_the_bit(pair, 10)


# ------------------------------------------------------------------- mistakes that the comparison must show


def test_comparison_shows_the_divisor_of_a_micro_batch(both, monkeypatch):
    """With accumulation, the divisor is the number of labels in the step, not in the micro-batch."""
    load_step = mori.train.load_step

    def wrong(*arguments, **keywords):
        micro_batches, n_targets = load_step(*arguments, **keywords)
        return micro_batches, n_targets // len(micro_batches)

    monkeypatch.setattr(mori.train, "load_step", wrong)
    _, _, pair = both(gradient_accumulation_steps=2, max_steps=3)
    assert pair["max_abs_loss_diff"] > 1 and not pair["timing_valid"]


def test_comparison_shows_a_second_shift(both, monkeypatch):
    """Trainer without `shift_labels` shifts the labels again; the numbers then differ at the first step."""
    item = arms.TrainerWindows.__getitem__

    def shifted_twice(self, index):
        window = item(self, index)
        del window["shift_labels"]
        return window

    monkeypatch.setattr(arms.TrainerWindows, "__getitem__", shifted_twice)
    monkeypatch.setattr(arms, "check_shift_labels", lambda *_: None)
    a, b, pair = both(max_steps=3)
    assert abs(a["metrics"][0]["loss"] - b["metrics"][0]["loss"]) > 1e-3 and pair["max_abs_weight_diff"] > 0


def test_check_shift_labels_raises_for_a_model_that_ignores_them(small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model)
    window = {"input_ids": torch.arange(16), "labels": torch.arange(1, 17), "shift_labels": torch.arange(1, 17)}
    arms.check_shift_labels(model, window)
    forward = model.forward
    model.forward = lambda shift_labels=None, **rest: forward(**rest)
    with pytest.raises(RunFailed, match="ignores shift_labels"):
        arms.check_shift_labels(model, window)


def test_gpt2_loss_divides_by_one_target_too_many(small_model):
    """Trainer counts T labels, the model's own shift leaves T - 1 targets: GPT-2 reports (T-1)/T of its loss."""
    model = AutoModelForCausalLM.from_pretrained(small_model).eval()
    block = torch.arange(16)[None]
    with torch.no_grad():
        reported = model(block, labels=block, num_items_in_batch=torch.tensor(16.0)).loss
        correct = losses.cross_entropy_sum(model(block).logits[:, :-1], block[:, 1:]) / 15
    assert reported.item() == pytest.approx(correct.item() * 15 / 16, rel=1e-5)


def test_course_arm_trains_on_the_truncated_line(both, settings, tmp_path):
    """A corpus in one line is one row: 1,024 of its tokens remain, and Trainer's shift drops one target per block."""
    text = Path(settings["corpus"][0]).read_text(encoding="utf-8").replace("\n", " ") * 2
    (tmp_path / "line.txt").write_text(text)
    course, ours, pair = both(("course", "mori"), corpus=[str(tmp_path / "line.txt")], max_steps=-1, num_train_epochs=2)
    assert course["tokens_trained"] == 1024 and course["steps"] == 1024 // 16 // 4 * 2
    assert course["targets"] == 1024 // 16 * 15 * 2
    assert ours["tokens_trained"] > 3000
    assert pair["steps"] is None and pair["max_abs_loss_diff"] is None and not pair["timing_valid"]


# ------------------------------------------------------------------------------------------- compare() and its report


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the arms in this process, which saves their imports; an arm in the returned list fails."""
    failing = []

    def run(arm, command, *_, **__):
        if arm in failing:
            raise RunFailed(f"{arm} failed: ImportError: needs accelerate")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        arms.main(command[2])
        return ""

    monkeypatch.setattr(harness, "run_process", run)
    return failing


def test_compare_reports_every_arm_and_repeat(in_this_process, settings, tmp_path):
    names = {"mori-exact", "mori", "trainer", "course"}
    compare.compare(
        CompareConfig(**{**settings, "max_steps": 6, "arms": ["mori-exact,mori", "trainer,course"], "repeats": 2})
    )
    folder = tmp_path / "runs" / "compare-run"
    comparison = json.loads((folder / "compare.json").read_text())
    assert set(comparison["arms"]) == names and len(comparison["pairs"]) == 6
    for arm in comparison["arms"].values():
        assert arm["error"] is None
        assert {"before", "after"} == set(arm["held_out"]) and arm["tokens_trained"] > 0 and arm["settings"]
        for name in ("tokens_per_second", "first_step_seconds"):
            assert 0 < arm[name]["min"] < arm[name]["median"] < arm[name]["max"]
        assert arm["peak_memory_bytes"] > 2**20
    assert_equal_to_the_bit(comparison["pairs"]["mori-exact|trainer"], 6)
    assert {"speed_ratio", "memory_ratio", "first_step_ratio"} <= set(comparison["pairs"]["mori|trainer"])
    events = {path.parent.name for path in folder.rglob("events.out.tfevents.*")}
    assert events == names  # TensorBoard shows one run per arm, not one per repeat
    report = (folder / "report.md").read_text()
    assert "**`mori-exact` and `trainer` are equal to the last bit" in report
    assert "void" in report and "curves.png" in report and (folder / "curves.png").stat().st_size > 10_000


def test_compare_runs_each_arm_in_a_new_process(settings, tmp_path):
    done = run_script("compare.py", *flags({**settings, "max_steps": 6, "arms": "mori-exact,trainer"}))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "compare-run"
    assert_equal_to_the_bit(json.loads((folder / "compare.json").read_text())["pairs"]["mori-exact|trainer"], 6)
    assert all((folder / arm / "output.txt").stat().st_size for arm in ("mori-exact", "trainer"))


def test_compare_names_a_failed_arm_and_compares_the_others(in_this_process, settings, tmp_path):
    in_this_process.append("trainer")
    config = {**settings, "max_steps": 3}
    compare.compare(CompareConfig(**config, arms=["mori", "trainer"]))
    folder = tmp_path / "runs" / "compare-run"
    comparison = json.loads((folder / "compare.json").read_text())
    assert comparison["arms"]["mori"]["error"] is None and comparison["pairs"] == {}
    assert re.fullmatch(r"trainer failed: .*accelerate \(see .*output.txt\)", comparison["arms"]["trainer"]["error"])
    assert "trainer failed" in (folder / "report.md").read_text()
    with pytest.raises(RunFailed, match="every arm failed"):
        compare.compare(CompareConfig(**config, arms=["trainer"]))


def test_compare_reports_mistakes_before_any_arm_starts(settings, tmp_path):
    with pytest.raises(UserError, match="repeats.*arm 'trainr'"):
        checked(CompareConfig(arms=["mori,trainr"], repeats=0))
    for change in ({"eval_on_start": False}, {"document_mask": True}, {"dtype": "bfloat16"}):
        with pytest.raises(UserError, match=next(iter(change))):
            checked(CompareConfig(**change))
    with pytest.MonkeyPatch.context() as patched:
        find_spec = importlib.util.find_spec
        patched.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else find_spec(name))
        for arm in ("trainer", "trainer-tuned", "course"):
            with pytest.raises(UserError, match=f"arm {arm} needs accelerate: pip install accelerate"):
                compare.compare(CompareConfig(**settings, arms=["mori", arm]))
    with pytest.raises(UserError, match="longer than the model's context"):
        compare.compare(CompareConfig(**{**settings, "block_size": 1000}))
    assert not (tmp_path / "runs" / "compare-run").exists()


def test_max_weight_difference_of_nan_is_infinite(tmp_path):
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", math.nan), ("c", 1.5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([0.0, value])}, tmp_path / name / "model.safetensors")
    assert compare.max_weight_difference(tmp_path / "a", tmp_path / "c") == 0.5
    assert compare.max_weight_difference(tmp_path / "a", tmp_path / "b") == math.inf
    assert compare.max_weight_difference(tmp_path / "a", tmp_path) is None
