"""Token ids -> training and held-out part -> shifted windows -> micro-batches in a seeded order."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch.utils.data import Dataset

from mori.cli import UserError, plural

IGNORE_INDEX = -100  # the label of a position that does not count towards the loss, as in PyTorch
_LISTED_WINDOWS = 1 << 24  # more are not listed in memory to be shuffled
_ROUNDS = 6  # of the Feistel network; three make a pseudorandom permutation, four a strong one
_WINDOWS_BETWEEN_RELEASES = 1 << 12


def split(count: int, block_size: int, held_out_fraction: float) -> int:
    """The boundary in a stream of `count` tokens: `[0, boundary)` is for training, `[boundary, count)` is held out.

    At least one window with its last label is held out, and nothing for a fraction of 0. Raises UserError if the training part would be shorter than that.
    """
    shortest = block_size + 1
    held_out = max(round(count * held_out_fraction), shortest) if held_out_fraction else 0
    if count - held_out < shortest:
        raise UserError(
            f"the corpus has {plural(count, 'token')}, and block_size {block_size} with held_out_fraction {held_out_fraction} "
            f"needs at least {shortest} to train on and {held_out} to hold out; "
            "bring more text, or make block_size or held_out_fraction smaller"
        )
    return count - held_out


def count_targets(labels: torch.Tensor) -> int:
    """The number of labels, in CPU memory, that count towards the loss."""
    return int((labels.numpy() != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Positions:
    """A set of positions in a sequence of ids: the `width` positions from each of `firsts - offset` on.

    `firsts`, `(N,)` int64 and sorted, may be memory-mapped: a question costs a binary search.
    """

    firsts: numpy.ndarray
    width: int = 1
    offset: int = 0

    def holds(self, positions: numpy.ndarray) -> numpy.ndarray:
        """Whether each of the positions, of any shape, int64, is in the set; bool of the same shape."""
        if not len(self.firsts):
            return numpy.zeros(positions.shape, bool)
        positions = positions + self.offset
        before = numpy.searchsorted(self.firsts, positions, side="right") - 1
        return (before >= 0) & (positions < self.firsts[numpy.maximum(before, 0)] + self.width)

    def count(self, start: int, stop: int) -> int:
        """The number of positions of the set in `[start, stop)`; no two of `firsts` are closer than `width`."""
        bounds = [numpy.int64(bound + self.offset - n) for n in range(self.width) for bound in (start, stop)]
        indices = numpy.searchsorted(self.firsts, bounds)
        return int((indices[1::2] - indices[::2]).sum())


@dataclass(frozen=True)
class Spread(Sequence):
    """`n_chosen` of `total` windows, spread evenly, without a list of them; `numbers` are those of this slice, below `n_chosen`."""

    numbers: range
    n_chosen: int
    total: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        if isinstance(number, range):
            return Spread(number, self.n_chosen, self.total)
        return number * self.total // self.n_chosen


class ShiftedDataset(Dataset):
    """Windows over a sequence of token ids, with labels already shifted: x = ids[i:i+T], y = ids[i+1:i+T+1].

    The windows are adjacent and share no input. The last `dropped` tokens, fewer than T, fill no window; with `keep_tail`
    they become one more window, padded with label -100, and nothing is dropped.
    """

    def __init__(
        self,
        ids: numpy.ndarray,
        block_size: int,
        keep_tail: bool = False,
        without_label: Positions | None = None,
    ):
        """`ids`: `(N,)` of any integer type, memory-mapped or not; those at the positions `without_label` get label -100."""
        self.ids, self.block_size, self.without_label = ids, block_size, without_label
        full_windows, tail = divmod(len(ids) - 1, block_size)
        self.dropped = 0 if keep_tail else tail
        self._windows = full_windows + (1 if keep_tail and tail else 0)
        self._unreleased = 0

    def __len__(self) -> int:
        return self._windows

    @property
    def targets(self) -> int:
        """The number of labels in all windows."""
        positions = len(self.ids) - self.dropped
        return positions - 1 - (self.without_label.count(1, positions) if self.without_label else 0)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window: `input_ids` `(T,)` and `labels` `(T,)`, int64."""
        input_ids, labels = self.batch([index])
        return {"input_ids": input_ids[0], "labels": labels[0]}

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Several windows: `input_ids` `(B, T)` and `labels` `(B, T)`, int64."""
        offsets = numpy.asarray(indices)[:, None] * self.block_size + numpy.arange(self.block_size + 1)
        is_padding = offsets >= len(self.ids)
        window = torch.from_numpy(self.ids[numpy.where(is_padding, 0, offsets)].astype(numpy.int64))  # (B, T + 1)
        labels = window[:, 1:].clone()
        has_no_label = is_padding[:, 1:]
        if self.without_label is not None:
            has_no_label = has_no_label | self.without_label.holds(offsets[:, 1:])
        labels[torch.from_numpy(has_no_label)] = IGNORE_INDEX
        self._release(len(offsets))
        return window[:, :-1].contiguous(), labels

    def _release(self, windows: int) -> None:
        """Unmap the pages of a memory-mapped file now and then; else the process appears to hold all that it has read."""
        self._unreleased += windows
        if self._unreleased >= _WINDOWS_BETWEEN_RELEASES and isinstance(self.ids, numpy.memmap):
            self._unreleased = 0
            if hasattr(mmap, "MADV_DONTNEED"):
                self.ids._mmap.madvise(mmap.MADV_DONTNEED)


class Batches:
    """The micro-batches of every optimizer step, as a pure function of the step's number.

    Each epoch visits every window once, in a permutation drawn from `seed` and the epoch's number: of a list of the windows,
    or for very many windows computed at the places that a step takes (`permuted`). A step takes the next `windows_per_step`
    windows, by default `batch_size * accumulation * world_size`, and shares them evenly among the ranks; the last step of an
    epoch takes those that are left. The step's number is therefore the position in the data, and resuming needs no other state.
    `batch_size` may be changed at any time: the windows of a step stay the same and are cut into more or fewer micro-batches.
    """

    def __init__(
        self,
        windows: int,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        windows_per_step: int | None = None,
    ):
        self.windows, self.batch_size, self.accumulation, self.seed = windows, batch_size, accumulation, seed
        self.rank, self.world_size = rank, world_size
        self.windows_per_step = windows_per_step or batch_size * accumulation * world_size
        self.steps_per_epoch = -(-windows // self.windows_per_step)
        self._epoch, self._order = -1, None

    def order(self, epoch: int, first: int, stop: int) -> list[int]:
        """The windows that `epoch` visits at the places `[first, stop)`, which end at the last window."""
        seed, stop = self.seed * 1_000_003 + epoch, min(stop, self.windows)
        if self.windows > _LISTED_WINDOWS:
            return permuted(numpy.arange(first, stop), self.windows, seed).tolist()
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.windows, generator=torch.Generator().manual_seed(seed))
        return self._order[first:stop].tolist()

    def __getitem__(self, step: int) -> list[list[int]]:
        """The window indices of this rank's micro-batches in optimizer step number `step` (from 0).

        Every rank gets the same number of micro-batches; in the last step of an epoch one may be short or empty.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.windows_per_step
        windows = self.order(epoch, first, first + self.windows_per_step)
        groups, left = [], self.windows_per_step
        count, start = -(-left // (self.batch_size * self.world_size)), 0
        while start < len(windows):
            size = -(-left // (self.world_size * (count - len(groups))))  # of a rank
            own = start + self.rank * size
            groups.append(windows[own : min(own + size, start + left)])
            start, left = start + size * self.world_size, left - size * self.world_size
        return groups

    def windows_in(self, step: int) -> int:
        """The number of windows that all ranks together visit in optimizer step number `step`."""
        return min(self.windows_per_step, self.windows - step % self.steps_per_epoch * self.windows_per_step)

    def epoch(self, step: int) -> float:
        """The number of epochs completed after `step` steps."""
        completed, step_in_epoch = divmod(step, self.steps_per_epoch)
        return completed + min(step_in_epoch * self.windows_per_step, self.windows) / self.windows


def permuted(places: numpy.ndarray, n: int, seed: int) -> numpy.ndarray:
    """The numbers at some places of a permutation of `range(n)`, `(N,)` int64, in time and memory for these places alone.

    A Feistel network permutes the numbers of an even number of bits (Luby and Rackoff, 1988). A result of `n` or more is
    permuted again until it is below `n` ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002),
    which takes fewer than four times on average.
    """
    half = numpy.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    mask = (numpy.uint64(1) << half) - numpy.uint64(1)
    keys = _mixed(numpy.arange(1, _ROUNDS + 1, dtype=numpy.uint64) + _mixed(numpy.array([seed % 2**64], numpy.uint64)))
    numbers, outside = places.astype(numpy.uint64), numpy.ones(len(places), bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        numbers[outside] = left << half | right
        outside = numbers >= n
    return numbers.astype(numpy.int64)


def _mixed(numbers: numpy.ndarray) -> numpy.ndarray:
    """Each of the uint64 numbers hashed to 64 bits, by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    numbers = (numbers ^ (numbers >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> numpy.uint64(31))


def load_step(
    dataset: ShiftedDataset, groups: list[list[int]], pin: bool
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """The micro-batches of one step, each `input_ids` and `labels` `(B, T)`, and the number of their valid labels.

    `pin`: put them into pinned memory. A rank without windows gets one without labels, because every rank must take part in
    the exchange of gradients.
    """
    micro_batches = []
    for indices in groups:
        input_ids, labels = dataset.batch(indices or [0])
        if not indices:
            labels.fill_(IGNORE_INDEX)
        micro_batches.append((input_ids, labels))
    n_targets = torch.tensor(sum(count_targets(labels) for _, labels in micro_batches))
    if pin:
        micro_batches = [(input_ids.pin_memory(), labels.pin_memory()) for input_ids, labels in micro_batches]
        n_targets = n_targets.pin_memory()
    return micro_batches, n_targets
