"""Recording functions of tensors and replaying them."""

import torch

from mori.speed.replay import Recording, Replay


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
