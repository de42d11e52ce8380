import numpy
import pytest
import torch

from mori.cli import UserError
from mori.data.windows import Batches, ShiftedDataset, load_step, split


def test_dataset_labels_are_the_next_token():
    ids = numpy.arange(100, 100 + 23, dtype=numpy.uint16)
    dataset = ShiftedDataset(ids, 5)
    assert len(dataset) == 4 and dataset.dropped == 2  # 4 windows and the last label take 21 tokens
    for i in range(4):
        window = dataset[i]
        assert window["input_ids"].tolist() == ids[5 * i : 5 * i + 5].tolist()
        assert window["labels"].tolist() == ids[5 * i + 1 : 5 * i + 6].tolist()
        assert window["labels"].dtype == torch.int64


@pytest.mark.parametrize("count", range(11, 40))
def test_dataset_drops_less_than_a_window(count):
    dataset = ShiftedDataset(numpy.arange(count), 5)
    seen = {int(t) for i in range(len(dataset)) for t in (*dataset[i]["input_ids"], *dataset[i]["labels"])}
    assert len(seen) + dataset.dropped == count and dataset.dropped < 5


@pytest.mark.parametrize("count", range(6, 30))
def test_dataset_with_keep_tail_has_every_token_but_the_first_as_a_label_once(count):
    dataset = ShiftedDataset(numpy.arange(count), 5, keep_tail=True)
    _, labels = dataset.batch(range(len(dataset)))
    assert labels[labels != -100].tolist() == list(range(1, count)) and dataset.dropped == 0


def test_split_holds_out_at_least_a_window():
    assert split(1000, 10, 0.05) == 950
    assert split(100, 10, 0.05) == 89
    assert split(22, 10, 0.05) == 11
    with pytest.raises(UserError, match="21 tokens"):
        split(21, 10, 0.05)


@pytest.mark.parametrize(
    "windows, batch_size, accumulation, world_size", [(37, 4, 2, 1), (37, 2, 2, 2), (16, 4, 2, 2), (5, 4, 2, 4)]
)
def test_batches_visit_every_window_once_per_epoch(windows, batch_size, accumulation, world_size):
    ranks = [
        Batches(windows, batch_size=batch_size, accumulation=accumulation, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    orders = []
    for epoch in range(2):
        visited = []
        for step in range(epoch * ranks[0].steps_per_epoch, (epoch + 1) * ranks[0].steps_per_epoch):
            groups = [batches[step] for batches in ranks]
            assert len({len(group) for group in groups}) == 1  # all ranks exchange gradients equally often
            in_step = [w for group in groups for micro_batch in group for w in micro_batch]
            assert len(in_step) == ranks[0].windows_in(step)
            visited += in_step
        assert sorted(visited) == list(range(windows))
        orders.append(visited)
    assert orders[0] != orders[1]


def test_batches_take_the_same_windows_per_step_in_every_layout():
    layouts = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]
    steps = []
    for batch_size, accumulation, world_size in layouts:
        ranks = [
            Batches(21, batch_size=batch_size, accumulation=accumulation, seed=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        steps.append([sorted(w for b in ranks for group in b[step] for w in group) for step in range(6)])
    assert all(windows == steps[0] for windows in steps)


def test_batches_are_a_pure_function_of_the_step():
    batches = Batches(37, batch_size=4, accumulation=2, seed=3)
    forward = [batches[step] for step in range(12)]
    fresh = Batches(37, batch_size=4, accumulation=2, seed=3)
    assert [fresh[step] for step in reversed(range(12))] == forward[::-1]
    assert Batches(37, batch_size=4, accumulation=2, seed=4)[0] != forward[0]


def test_batches_count_epochs():
    batches = Batches(10, batch_size=4, accumulation=1, seed=0)
    assert [batches.epoch(step) for step in (0, 1, 2, 3, 4)] == [0, 0.4, 0.8, 1.0, 1.4]


def test_load_step_counts_no_targets_for_a_rank_without_windows():
    dataset = ShiftedDataset(numpy.arange(50), 5)
    micro_batches, n_targets = load_step(dataset, [[0, 1], []], pin=False)
    assert n_targets.item() == 10
    assert micro_batches[1][0].shape == (1, 5) and (micro_batches[1][1] == -100).all()
