"""Which held-out windows an evaluation scores, and what it makes of them."""

import math

import pytest
import torch
from conftest import CPU
from families import small_model
from torch.nn.functional import cross_entropy

from mori.config import TrainConfig
from mori.data.windows import ShiftedDataset, count_targets
from mori.distributed import BatchSize
from mori.evaluate import evaluate, windows_to_score
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
    ids, without = torch.randint(0, 97, (50,)).numpy(), torch.tensor([0, 9, 30]).numpy()
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


def test_train_evaluates_as_many_windows_as_it_says(run_train, tmp_path, capsys):
    summary = run_train(max_steps=4, eval_steps=1, per_device_train_batch_size=2, max_eval_windows=None)
    assert "checks  1 of " in capsys.readouterr().out and summary["eval"]["best"]
    run_train(max_steps=4, eval_steps=1, run_name="all")
    assert "--max_eval_windows" not in capsys.readouterr().out
