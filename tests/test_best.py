"""The best weights, early stopping, and events by epoch: compared with transformers' own code where it has them."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_equal_weights, flags, run_script, stop_after, weights
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from mori import distributed
from mori.bench import arms
from mori.bench.options import CompareConfig
from mori.cli import UserError
from mori.config import TrainConfig
from mori.data.windows import Batches
from mori.evaluate import evaluate
from mori.model import loading
from mori.model.lm import CausalLMLoss
from mori.prepare import prepare
from mori.state import Best
from mori.tracking.loggers import read_metrics

NAN, INF = math.nan, math.inf
RISING = {"eval_steps": 2, "max_steps": 12, "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("patience, threshold", [(1, 0.0), (2, 0.0), (2, 0.15), (3, 0.5)])
@pytest.mark.parametrize(
    "losses",
    [
        [3.0, 2.9, 2.8, 2.9, 2.85, 2.7, 2.75, 2.74, 2.73, 2.72],
        [NAN, 3.0, NAN, 2.0, 2.0, 2.0, 2.0],
        [INF, 3.0, 2.9, INF, NAN, NAN, 2.0],
        [NAN, NAN, NAN, NAN],
        [2.0, 2.1, 2.2, 1.9, 1.8, 1.7, 1.6, 1.5],
        [5.0, 4.5, 4.4, 4.3, 4.2, 4.1],
    ],
)
def test_best_counts_as_the_callback_of_transformers(losses, patience, threshold):
    ours = Best(TrainConfig(early_stopping_patience=patience, early_stopping_threshold=threshold))
    callback, state = EarlyStoppingCallback(patience, threshold), TrainerState()
    args = SimpleNamespace(
        metric_for_best_model="loss",
        greater_is_better=False,
        save_strategy=SaveStrategy.STEPS,
        load_best_model_at_end=True,
    )
    trainer = SimpleNamespace(args=args, state=state)
    for step, loss in enumerate(losses, start=1):
        control, state.global_step = TrainerControl(), step
        callback.on_evaluate(args, state, control, {"eval_loss": loss})
        is_new = Trainer._determine_best_metric(trainer, metrics={"eval_loss": loss}, trial=None)
        ours.observe({"step": step, "loss": loss})
        assert ours.out_of_patience == control.should_training_stop
        assert ours.without_improvement == callback.early_stopping_patience_counter
        assert ours.is_of(step) == is_new
        assert (ours.evaluation or {}).get("step") == state.best_global_step


def losses_of(folder) -> dict[int, float]:
    """The held-out loss at each step after the first evaluation."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line["eval/loss"] for line in lines if line["step"] and "eval/loss" in line}


def test_load_best_publishes_the_weights_of_the_lowest_loss(run_train, tmp_path, capsys):
    """The interval of saves would keep none of them; the last line names the best of a run without the flag."""
    summary = run_train(**RISING, load_best_model_at_end=True, save_steps=100, save_total_limit=1)
    losses = losses_of(tmp_path / "runs/run")
    best = min((step for step in losses if not math.isnan(losses[step])), key=losses.get)
    assert summary["published_step"] == summary["eval"]["best"]["step"] == best < 12
    root = tmp_path / "runs/run/checkpoints"
    assert {path.name for path in root.iterdir()} == {f"step-{best:08d}", "step-00000012"}
    saved, published = (
        load_file(folder / "model.safetensors") for folder in (root / f"step-{best:08d}", tmp_path / "brain")
    )
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    assert run_train(**RISING, load_best_model_at_end=True, save_steps=100, save_total_limit=1) == summary
    assert "is finished" in capsys.readouterr().out
    assert run_train(**RISING, save_steps=100)["published_step"] == 12  # the same run, without the flag
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"better at step {best} (") and told.endswith(f"--model {root / f'step-{best:08d}'}")
    last = load_file(root / "step-00000012/model.safetensors")
    published = load_file(tmp_path / "brain/model.safetensors")
    assert all(torch.equal(last[name], published[name]) for name in last)
    assert run_train(**RISING, load_best_model_at_end=True)["published_step"] == best


def test_damaged_best_checkpoint_leaves_the_last_weights(run_train, tmp_path, capsys):
    best = run_train(**RISING, save_strategy="steps", save_steps=2)["eval"]["best"]["step"]
    root = tmp_path / "runs/run/checkpoints"
    (root / f"step-{best:08d}" / "model.safetensors").write_bytes(b"damaged")
    assert run_train(**RISING, load_best_model_at_end=True)["published_step"] == 12
    printed = capsys.readouterr().out
    assert "WARNING: the best checkpoint cannot be published" in printed
    assert (root / f"step-{best:08d}.corrupt").is_dir()
    run_train(**RISING, load_best_model_at_end=True)
    assert "is finished" in capsys.readouterr().out


def test_early_stop_resumes_to_the_same_end_and_goes_on_with_more_patience(run_train, tmp_path, capsys):
    stopping = {**RISING, "eval_steps": 1, "save_steps": 1, "logging_steps": 5, "early_stopping_patience": 2}
    whole = run_train(run_name="whole", output_dir=str(tmp_path / "whole"), **stopping)
    end = whole["steps"]
    assert whole["stopped_early"] and 3 <= end < 12
    assert [line["step"] for line in read_metrics(tmp_path / "runs/whole/metrics.jsonl") if "train/loss" in line][
        -1
    ] == end
    stop_after(end - 1, lambda: run_train(**stopping))
    assert run_train(**stopping)["steps"] == end
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    capsys.readouterr()
    assert run_train(**stopping)["steps"] == end
    assert f"is finished (stopped early at step {end} of 12)" in capsys.readouterr().out
    with pytest.raises(UserError, match="stopped early at step"):
        run_train(**{**stopping, "max_steps": 14}, extend=True)
    assert run_train(**{**stopping, "early_stopping_patience": 50})["steps"] == 12


def test_strategies_by_epoch_fall_on_the_ends_of_epochs(run_train, tmp_path):
    """The last epoch is a fraction; a batch that fills no step belongs to the epoch that it ends."""
    by_epoch = {"max_steps": -1, "num_train_epochs": 2.5, "save_total_limit": 9, "gradient_accumulation_steps": 8}
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    summary = run_train(**by_epoch, **strategies)
    folder, windows = tmp_path / "runs/run", (summary["ledger"]["train_tokens"] - 1) // 16
    epoch = math.ceil(windows / 32)
    ends = [epoch, 2 * epoch, math.ceil(2.5 * epoch)]
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == ends
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, *ends]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in ends]


def test_strategy_no_neither_evaluates_nor_saves(run_train, tmp_path, capsys):
    summary = run_train(eval_strategy="no", save_strategy="no")
    assert summary["eval"] == {"before": None, "best": None, "after": None}
    assert not list((tmp_path / "runs/run/checkpoints").glob("step-*")) and (tmp_path / "brain/config.json").is_file()
    shown = capsys.readouterr().out  # no samples are announced
    assert "after:" not in shown and "; a text from it:\n" in shown


def test_save_strategy_best_saves_at_the_best_evaluations_alone(run_train, tmp_path):
    run_train(**RISING, save_strategy="best", save_total_limit=9)
    lowest, expected = INF, []
    for step, loss in losses_of(tmp_path / "runs/run").items():
        if loss < lowest:
            lowest = loss
            expected.append(f"step-{step:08d}")
    assert sorted(path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()) == expected


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"load_best_model_at_end": True, "held_out_fraction": 0.0}, "held_out_fraction 0"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "eval_strategy no"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "save_strategy best"),
        ({"greater_is_better": True}, "the lowest is best"),
        ({"metric_for_best_model": "bleu"}, "perplexity"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_patience"),
        ({"early_stopping_patience": 0}, "above 0"),
    ],
)
def test_contradictions_about_the_best_are_told(run_train, tmp_path, changed, named):
    with pytest.raises(UserError, match=named):
        run_train(**changed)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changed", [{"early_stopping_patience": 2}, {"logging_strategy": "epoch"}])
def test_compare_refuses_what_its_arms_do_not_share(changed):
    [name] = changed
    assert any(mistake.startswith(name) for mistake in CompareConfig(**changed).mistakes())
    assert not CompareConfig().mistakes()


def test_checkpoint_is_a_model_folder(run_train, settings, tmp_path):
    run_train(max_steps=4)
    checkpoint = tmp_path / "runs/run/checkpoints/step-00000004"
    assert_equal_weights(checkpoint, tmp_path / "brain")
    assert {"config.json", "tokenizer.json"} <= json.loads((checkpoint / "manifest.json").read_text())["files"].keys()
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.model_type == "gpt2"
    answers = [
        run_script("generate.py", "--model", folder, "--prompt", "Halo", "--max_new_tokens", "5", "--temperature", "0")
        for folder in (checkpoint, tmp_path / "brain")
    ]
    assert answers[0].returncode == 0 and answers[0].stdout == answers[1].stdout
    again = run_train(model=str(checkpoint), run_name="again", output_dir=str(tmp_path / "again"), max_steps=1)
    assert again["steps"] == 1


def test_early_stop_and_best_weights_equal_those_of_trainer(run_train, settings, tmp_path):
    """Trainer itself, with its callback, on the same windows; both score the held-out text with our evaluation."""
    changed = {**RISING, "eval_steps": 1, "early_stopping_patience": 3, "load_best_model_at_end": True, **arms._EXACT}
    summary = run_train(**changed)
    config = TrainConfig(**{**settings, **changed}).resolve()
    runtime = distributed.start("cpu", "fp32")
    prepared = prepare(config, runtime)
    batches = Batches(len(prepared.train), batch_size=4, accumulation=1, seed=config.seed)

    class Evaluating(arms._trainer_class(batches)):
        def evaluate(self, *_, **__):
            size, text = distributed.BatchSize(8), (prepared.held_out, prepared.held_out_bytes)
            loss = evaluate(CausalLMLoss(self.model), *text, batch_size=size, runtime=runtime).loss
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": loss})
            return {"eval_loss": loss}

    class Seed(TrainerCallback):
        def on_train_begin(self, *_, **__):
            distributed.set_seed(config.seed)

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=12, learning_rate=0.3, lr_scheduler_type="constant", use_cpu=True,
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, remove_unused_columns=False, report_to="none", seed=config.seed,
    )  # fmt: skip
    windows = arms.TrainerWindows(prepared.train)
    trainer = Evaluating(
        model=loading.load_model(config.model, prepared.model_config, False),
        args=arguments,
        train_dataset=windows,
        eval_dataset=windows,
        data_collator=default_data_collator,
        callbacks=[EarlyStoppingCallback(3), Seed()],
    )
    trainer.train()
    assert summary["stopped_early"] and summary["steps"] == trainer.state.global_step < 12
    assert summary["published_step"] == trainer.state.best_global_step < summary["steps"]
    theirs = trainer.model.state_dict()
    for name, tensor in weights(tmp_path / "brain").items():
        assert torch.equal(tensor, theirs[name]), name


def test_ranks_stop_together_and_publish_the_best(settings, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    words = flags({**settings, **RISING, "eval_steps": 1, "early_stopping_patience": 1}) + ["--load_best_model_at_end"]
    done = subprocess.run(torchrun + words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["stopped_early"] and summary["published_step"] == summary["eval"]["best"]["step"]
    assert_equal_weights(
        tmp_path / "runs/run/checkpoints" / f"step-{summary['published_step']:08d}", tmp_path / "brain"
    )
    assert f"the weights are those of step {summary['published_step']}, the best" in done.stdout
