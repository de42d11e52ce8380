import sys
import tracemalloc
from pathlib import Path

import numpy
import pytest
import torch

from mori.cli import UserError
from mori.data import windows as windows_module
from mori.data.windows import Batches, Positions, ShiftedDataset, Spread, load_step, permuted, split


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_batches_share_the_windows_of_a_step_among_any_number_of_ranks(world_size):
    """A run that began on three ranks goes on with its six windows in a step, evenly shared in equally many micro-batches."""
    whole = Batches(22, batch_size=6, accumulation=1, seed=5)
    ranks = [
        Batches(22, batch_size=2, accumulation=1, seed=5, rank=rank, world_size=world_size, windows_per_step=6)
        for rank in range(world_size)
    ]
    assert {batches.steps_per_epoch for batches in ranks} == {whole.steps_per_epoch}
    for step in range(8):
        groups = [batches[step] for batches in ranks]
        assert sorted(sum((sum(group, []) for group in groups), [])) == sorted(sum(whole[step], []))
        assert len({len(group) for group in groups}) == 1
        assert all(len(indices) <= 2 for group in groups for indices in group)
    assert max(sum(map(len, batches[0])) for batches in ranks) == -(-6 // world_size)


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


# ------------------------------------------------------------------------------------------- more windows than fit a list


@pytest.mark.parametrize("n", [*range(1, 35), 1000, 4096, 4097, 65_537])
def test_permuted_visits_each_number_once(n):
    for seed in (0, 1, -5, 1 << 70):
        assert sorted(permuted(numpy.arange(n), n, seed).tolist()) == list(range(n))


def test_permuted_mixes_as_a_random_permutation_does():
    """Few fixed points, no correlation with the place or between seeds, neighbours fall anywhere: as by chance."""
    n = 20_000
    orders = [permuted(numpy.arange(n), n, seed) for seed in range(8)]
    for order, next_order in zip(orders, [*orders[1:], orders[0]], strict=True):
        assert (order == numpy.arange(n)).sum() < 8 and (order == next_order).sum() < 8  # a Poisson number of mean 1
        for pair in ((order, numpy.arange(n)), (order, next_order), (order[1:], order[:-1])):
            assert abs(numpy.corrcoef(*pair)[0, 1]) < 5 / n**0.5
        counts = numpy.histogram(order[: n // 10], bins=20)[0]
        assert ((counts - 100) ** 2 / 100).sum() < 60  # chi-squared of 19 degrees of freedom


def test_permuted_takes_memory_for_its_places_alone():
    n = 10**15 + 7
    tracemalloc.start()
    numbers = permuted(numpy.arange(n - 1000, n), n, 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
    assert len(set(numbers.tolist())) == 1000 and numbers.min() >= 0 and numbers.max() < n
    assert [permuted(numpy.array([place]), n, 3)[0] for place in (n - 1000, n - 1)] == numbers[[0, -1]].tolist()


@pytest.mark.parametrize("windows, batch_size, accumulation, world_size", [(37, 4, 2, 1), (37, 2, 2, 2), (5, 4, 2, 4)])
def test_batches_without_a_list_visit_every_window_once_per_epoch(
    monkeypatch, windows, batch_size, accumulation, world_size
):
    monkeypatch.setattr(windows_module, "_LISTED_WINDOWS", 4)
    monkeypatch.setattr(torch, "randperm", None)
    test_batches_visit_every_window_once_per_epoch(windows, batch_size, accumulation, world_size)
    test_batches_are_a_pure_function_of_the_step()
    test_batches_take_the_same_windows_per_step_in_every_layout()


def test_batches_of_few_windows_are_in_the_order_of_randperm():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)).tolist()
    batches = Batches(10, batch_size=4, accumulation=1, seed=3)
    assert [batches[step][0] for step in (3, 4, 5)] == [order[:4], order[4:8], order[8:]]


@pytest.mark.parametrize("width", [0, 1, 2, 3])
@pytest.mark.parametrize("offset", [0, 4, 11])
def test_positions_are_those_of_a_set(width, offset):
    firsts = numpy.array([0, 3, 9, 12, 20])
    members = {first + n - offset for first in firsts.tolist() for n in range(width)}
    positions = Positions(firsts, width, offset)
    where = numpy.arange(30).reshape(5, 6)
    assert positions.holds(where).tolist() == [[n in members for n in row] for row in where.tolist()]
    for start in range(0, 12, 3):
        assert positions.count(start, 15) == sum(start <= n < 15 for n in members)
    assert not Positions(firsts[:0]).holds(where).any() and Positions(firsts[:0]).count(0, 30) == 0


def test_spread_is_a_sequence_of_windows():
    spread, expected = Spread(range(7), 7, 100), [n * 100 // 7 for n in range(7)]
    assert list(spread) == expected and spread[-1] == expected[-1] and list(spread[1::2][1:]) == expected[1::2][1:]
    with pytest.raises(IndexError):
        spread[7]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dataset_holds_no_pages_of_a_mapped_file(tmp_path, monkeypatch):
    """Reading all of a file leaves no more of it in the memory of the process than the latest windows."""
    monkeypatch.setattr(windows_module, "_WINDOWS_BETWEEN_RELEASES", 16)
    numpy.zeros(1 << 24, numpy.uint16).tofile(tmp_path / "ids")
    dataset = ShiftedDataset(numpy.memmap(tmp_path / "ids", numpy.uint16, "r")[: (1 << 24) - 5], 4096)
    for first in range(0, len(dataset), 8):
        dataset.batch(range(first, min(first + 8, len(dataset))))
    maps = Path("/proc/self/smaps").read_text().partition(str(tmp_path / "ids"))[2]
    resident = next(line for line in maps.splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) < 4096  # KiB, of 32 MiB
