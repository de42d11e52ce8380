"""Which held-out windows an evaluation scores, and what it makes of them."""

import json
import math

import numpy
import pytest
import torch
from conftest import CPU, assert_equal_weights, run_script, stop_after
from families import small_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from mori.cli import UserError
from mori.config import TrainConfig
from mori.data.windows import Positions, ShiftedDataset, count_targets
from mori.distributed import BatchSize, Runtime
from mori.evaluate import TOKEN_LOSS_EDGES, _histogram, evaluate, windows_to_score
from mori.model.lm import CausalLMLoss


@pytest.mark.parametrize("limit, expected", [(0, 100), (None, 12), (7, 7), (100, 100), (1000, 100)])
def test_windows_to_score_are_spread_over_the_held_out_text(limit, expected):
    """Unset: 5 steps of 8 windows between evaluations, of whose time a tenth is 0.1 * 3 * 40 = 12 forward passes."""
    windows = windows_to_score(TrainConfig(max_eval_windows=limit), 100, steps_between=5, windows_per_step=8)
    assert len(windows) == len(set(windows)) == expected
    gaps = {after - before for before, after in zip(windows[:-1], windows[1:], strict=True)}
    assert windows[0] == 0 and max(gaps) - min(gaps) <= 1 and windows[-1] + max(gaps) >= 100


def test_windows_to_score_are_never_none():
    assert len(windows_to_score(TrainConfig(), 9, steps_between=1, windows_per_step=1)) == 1


@pytest.mark.parametrize("windows", [None, [0, 3], [6]])
def test_evaluate_scores_the_windows_as_pytorch_does(windows):
    """Bits per byte count the bytes of the whole text by the share of the labels that are scored."""
    torch.manual_seed(0)
    ids, without = torch.randint(0, 97, (50,)).numpy(), Positions(torch.tensor([0, 9, 30]).numpy())
    dataset = ShiftedDataset(ids, 8, keep_tail=True, without_label=without)
    model = small_model("gpt2", 97).eval()
    evaluation = evaluate(CausalLMLoss(model), dataset, 120, windows, batch_size=BatchSize(2), runtime=CPU)
    input_ids, labels = dataset.batch(range(7) if windows is None else windows)
    with torch.no_grad():
        logits = model.eval()(input_ids).logits.double()
    nats, targets = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item(), (labels >= 0).sum()
    assert evaluation.loss == pytest.approx(nats / targets.item(), rel=1e-6)
    assert dataset.targets == 50 - 1 - 2 == sum(count_targets(dataset.batch([i])[1]) for i in range(7))
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / (120 * targets.item() / 47), rel=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_evaluate_counts_the_token_losses_as_numpy_does(chunked):
    """A head with large weights spreads the losses from 0 to beyond the last edge; the ignored labels count nowhere."""
    torch.manual_seed(0)
    ids, without = torch.randint(0, 97, (500,)).numpy(), Positions(torch.tensor([0, 9, 30]).numpy())
    dataset = ShiftedDataset(ids, 8, keep_tail=True, without_label=without)
    model = small_model("gpt2", 97).eval()
    with torch.no_grad():
        model.lm_head.weight *= 4
    module = CausalLMLoss(model, chunked_loss=chunked)
    evaluation = evaluate(module, dataset, None, batch_size=BatchSize(2), runtime=CPU)
    input_ids, labels = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        losses = cross_entropy(model.eval()(input_ids).logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses[labels.flatten() >= 0].numpy()
    expected, _ = numpy.histogram(losses.clip(0, 14.99), TOKEN_LOSS_EDGES)
    assert evaluation.token_losses == expected.tolist() and sum(expected) == dataset.targets
    assert losses.max() > 15 and (expected > 0).sum() > 20
    assert evaluation.loss == pytest.approx(losses.mean(dtype="float64"), rel=1e-6)


def test_histogram_puts_a_loss_on_an_edge_into_the_bin_above_it_as_numpy_does():
    losses = torch.tensor([0.0, 0.25, 0.5, 7.5, 7.5, 14.5, 15.0, torch.inf])
    expected, _ = numpy.histogram(losses.numpy().clip(0, 14.9), TOKEN_LOSS_EDGES)
    assert _histogram(losses) == expected.tolist() and sum(expected) == len(losses)


def test_evaluate_shares_the_windows_between_ranks():
    """Each window is scored by one rank; `all_sum` of this test keeps the part of one rank."""

    class OneRank(Runtime):
        def all_sum(self, tensor):
            return tensor

    dataset = ShiftedDataset(torch.arange(50).numpy(), 8, keep_tail=True)
    module, rows = CausalLMLoss(small_model("gpt2", 97)), []
    module.register_forward_pre_hook(lambda module, inputs: rows.extend(inputs[0][:, 0].tolist()))
    for rank in range(2):
        runtime = OneRank(torch.device("cpu"), rank, 2, "fp32")
        evaluate(module, dataset, 120, batch_size=BatchSize(2), runtime=runtime)
    assert sorted(rows) == [0, 8, 16, 24, 32, 40, 48] and rows[:4] == [0, 16, 32, 48]


def test_train_evaluates_as_many_windows_as_it_says(run_train, tmp_path, capsys):
    summary = run_train(max_steps=4, eval_steps=1, per_device_train_batch_size=2, max_eval_windows=None)
    assert "checks  1 of " in capsys.readouterr().out and summary["eval"]["best"]
    run_train(max_steps=4, eval_steps=1, run_name="all")
    assert "--max_eval_windows" not in capsys.readouterr().out


def test_train_on_everything_evaluates_nothing(run_train, tmp_path, capsys):
    summary = run_train(held_out_fraction=0, save_steps=4)
    ledger = summary["ledger"]
    assert ledger["tokens"] == ledger["train_tokens"] + ledger["dropped_tokens"] and ledger["held_out_tokens"] == 0
    assert summary["eval"]["best"] is None and summary["eval"]["after"]["loss"] is None and summary["samples"]["after"]
    assert "held-out loss" not in capsys.readouterr().out
    stop_after(
        7, lambda: run_train(held_out_fraction=0, save_steps=4, run_name="killed", output_dir=str(tmp_path / "b"))
    )
    run_train(held_out_fraction=0, save_steps=4, run_name="killed", output_dir=str(tmp_path / "b"))
    assert_equal_weights(tmp_path / "brain", tmp_path / "b")
    with pytest.raises(UserError, match="follows the held-out loss"):
        run_train(held_out_fraction=0, lr_scheduler_type="greedy", run_name="greedy")


def test_validation_file_is_evaluated_as_transformers_does(run_train, settings, small_model, tmp_path):
    """The whole corpus is trained on, and the loss is that of the other file."""
    path = tmp_path / "other.txt"
    path.write_text("Selamat pagi, semuanya. " * 30, encoding="utf-8")
    summary = run_train(validation_file=[str(path)])
    assert summary["ledger"]["held_out_tokens"] == 0
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"] + [tokenizer.eos_token_id])
    model, nats = AutoModelForCausalLM.from_pretrained(small_model).eval(), 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            logits = model(ids[None, start : start + 16]).logits[0]
            labels = ids[start + 1 : start + 17]
            nats += cross_entropy(logits[: len(labels)].double(), labels, reduction="sum").item()
    before = summary["eval"]["before"]
    assert before["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


def test_evaluate_script_gives_the_loss_of_the_training(run_train, settings, tmp_path):
    """The brain's loss on the validation file, after its training and by itself."""
    path = tmp_path / "other.txt"
    path.write_text("Selamat pagi, semuanya. " * 30, encoding="utf-8")
    after = run_train(validation_file=[str(path)])["eval"]["after"]
    flags = ["--corpus", str(path), "--block_size", "16", "--logging_dir", str(tmp_path / "runs")]
    done = run_script("evaluate.py", "--model", str(tmp_path / "brain"), *flags, "--json")
    result = json.loads(done.stdout)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert result[name] == pytest.approx(after[name], rel=1e-5)
    missing = run_script("evaluate.py", "--model", str(tmp_path / "nothing"), *flags)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 2 and "nothing" in missing.stderr
