"""Recording functions of tensors and replaying them."""

import pytest
import torch

from mori.speed.replay import Recording, Replay, Unrecordable


def test_replay_adds_to_numbers_that_grow_or_fall():
    """A number and the bounds of slices follow the text; a factor stays."""
    rows, table = torch.randn(1, 4), torch.randn(20, 4)

    def function(row: torch.Tensor, length: int) -> torch.Tensor:
        ends = table[:length].sum() - table[20 - length :].sum() * (2 * length)
        return (row * 3 + length) @ table[length - 1 : length].t() + ends

    recordings, results = [], []
    for length in (5, 6):
        recordings.append(Recording([rows]))
        with recordings[-1]:
            results.append(function(rows, length))
    assert not recordings[1].same_as(recordings[0]) and recordings[1].same_as(recordings[0], growing=True)
    replay = Replay(recordings[1], recordings[0], results[1])
    for row, length in ((torch.randn(1, 4), length) for length in (6, 7, 9, 20)):
        replay.ahead = length - 6
        assert torch.equal(replay(row), function(row, length))


def replay_of(function, first: torch.Tensor, second: torch.Tensor) -> Replay:
    """The replay of `function`, recorded on two inputs."""
    recordings, results = [], []
    for tensor in (first, second):
        recordings.append(Recording([tensor]))
        with recordings[-1]:
            results.append(function(tensor))
    assert recordings[1].same_as(recordings[0])
    return Replay(recordings[1], recordings[0], results[1])


def test_replay_follows_shapes_that_grow():
    """Sums over a text that is longer at each replay, next to tensors that keep their shape."""

    def function(text: torch.Tensor) -> torch.Tensor:
        grown = (text + 1).view(-1)
        return (text[:, :1] * 2).view(-1) + (grown * grown.view(1, -1)).sum()

    texts = [torch.randn(1, length) for length in range(3, 8)]
    replay = replay_of(function, *texts[:2])
    assert all(torch.equal(replay(text), function(text)) for text in texts)


def test_replay_under_autocast_keeps_the_types():
    bias, weight, rows = torch.randn(6), torch.randn(4, 6), [torch.randn(1, 4) for _ in range(4)]

    def function(row: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, row, weight).view(-1) + 1

    with torch.autocast("cpu", dtype=torch.bfloat16):
        replay = replay_of(function, *rows[:2])
        assert all(torch.equal(replay(row), function(row)) for row in rows)


@pytest.mark.parametrize("reads", ["input", "state", "view of the state", "written view", "constant"])
def test_values_may_be_read_that_depend_neither_on_inputs_nor_on_states(reads):
    """A mask of ones may choose the path, the text and what the step before left may not."""
    row, state = torch.ones(1, 4), torch.ones(1, 4)

    def function() -> torch.Tensor:
        rows = torch.ones(2, 4)
        rows[0].copy_(row[0])
        values = {"input": row * 2, "state": state, "view of the state": state[0] + 1, "written view": rows}
        read = {**values, "constant": torch.ones(3)}[reads]
        state.add_(row)
        return row + 1 if read.all() else row

    recording = Recording([row], [state])
    if reads == "constant":
        with recording:
            result = function()
        assert torch.equal(result, row + 1)
    else:
        with recording, pytest.raises(Unrecordable, match="__bool__"):
            function()
