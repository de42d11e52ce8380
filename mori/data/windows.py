"""Token file -> train and held-out parts -> shifted windows -> micro-batches in a seeded order."""

import numpy
import torch
from torch.utils.data import Dataset

from mori.config import UserError
from mori.model.loss import IGNORE_INDEX, count_targets


def split(count: int, block_size: int, held_out_fraction: float) -> int:
    """Where to cut a stream of `count` tokens: training is `[0, boundary)`, held out is `[boundary, count)`.

    Held out is `held_out_fraction` of it, and at least one window with its last label. Raises UserError where the
    training part would be shorter than that.
    """
    shortest = block_size + 1
    held_out = max(round(count * held_out_fraction), shortest)
    if count - held_out < shortest:
        raise UserError(
            f"the corpus has {count:,} tokens, and block_size {block_size} with held_out_fraction {held_out_fraction} "
            f"needs at least {shortest} to train on and {held_out} to hold out; "
            "bring more text, or make block_size or held_out_fraction smaller"
        )
    return count - held_out


class ShiftedDataset(Dataset):
    """Windows over a run of token ids, with labels that are already shifted: x = ids[i:i+T], y = ids[i+1:i+T+1].

    The windows stand side by side and share no input; the last `dropped` tokens, fewer than T, do not fill one.
    With `keep_tail` they become one more, shorter window, filled up with label -100, and nothing is dropped.
    """

    def __init__(self, ids: numpy.ndarray, block_size: int, keep_tail: bool = False):
        """`ids`: `(N,)` of any integer type, memory-mapped or not."""
        self.ids, self.block_size = ids, block_size
        whole, tail = divmod(len(ids) - 1, block_size)
        self.dropped = 0 if keep_tail else tail
        self._windows = whole + (1 if keep_tail and tail else 0)

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One window: `input_ids` `(T,)` and `labels` `(T,)`, int64."""
        input_ids, labels = self.batch([index])
        return {"input_ids": input_ids[0], "labels": labels[0]}

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Several windows at once: `input_ids` `(B, T)` and `labels` `(B, T)`, int64."""
        offsets = numpy.asarray(indices)[:, None] * self.block_size + numpy.arange(self.block_size + 1)
        beyond = offsets >= len(self.ids)
        window = torch.from_numpy(self.ids[numpy.where(beyond, 0, offsets)].astype(numpy.int64))  # (B, T + 1)
        labels = window[:, 1:].clone()
        labels[torch.from_numpy(beyond[:, 1:])] = IGNORE_INDEX
        return window[:, :-1].contiguous(), labels


class Batches:
    """The micro-batches of every optimizer step, as a pure function of the step's number.

    Each epoch visits all windows once, in a permutation drawn from `seed` and the epoch's number. A step takes the next
    `batch_size * accumulation * world_size` windows; the last step of an epoch takes what is left. So the place in the
    data is the step's number: resuming neither replays nor stores anything. `batch_size` may be set to another number at
    any time: the windows of a step stay the same, and are cut into more or fewer micro-batches.
    """

    def __init__(
        self, windows: int, *, batch_size: int, accumulation: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.windows, self.batch_size, self.accumulation, self.seed = windows, batch_size, accumulation, seed
        self.rank, self.world_size = rank, world_size
        self.windows_per_step = batch_size * accumulation * world_size
        self.steps_per_epoch = -(-windows // self.windows_per_step)
        self._epoch, self._order = -1, None

    def order(self, epoch: int) -> torch.Tensor:
        """The permutation of the windows, `(windows,)`, in which `epoch` visits them."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.windows, generator=generator)
        return self._order

    def __getitem__(self, step: int) -> list[list[int]]:
        """The window indices of this rank's micro-batches in optimizer step number `step` (from 0).

        Every rank gets the same number of micro-batches; in the last step of an epoch one may be short, or empty.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.windows_per_step
        group = self.order(epoch)[first : first + self.windows_per_step].tolist()
        across = self.batch_size * self.world_size
        mine = self.rank * self.batch_size
        return [group[at : at + across][mine : mine + self.batch_size] for at in range(0, len(group), across)]

    def windows_in(self, step: int) -> int:
        """How many windows all ranks together visit in optimizer step number `step`."""
        return min(self.windows_per_step, self.windows - step % self.steps_per_epoch * self.windows_per_step)

    def epoch(self, step: int) -> float:
        """How many epochs are done after `step` steps."""
        done, place = divmod(step, self.steps_per_epoch)
        return done + min(place * self.windows_per_step, self.windows) / self.windows


def load_step(
    dataset: ShiftedDataset, groups: list[list[int]], pin: bool
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """The micro-batches of one step, each `input_ids` and `labels` `(B, T)`, and the count of their valid labels.

    In pinned memory where `pin`. A rank with nothing left to do gets one window without labels, so that it still meets
    the others.
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
