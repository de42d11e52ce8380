"""The data of Trainer's arms: the windows of `mori` in its order, and the blocks of the course's recipe."""

import itertools
import math

import torch
from torch.utils.data import Dataset, Sampler

from mori.cli import RunFailed, UserError
from mori.data.windows import Batches, ShiftedDataset
from mori.model.lm import CausalLMLoss


class TrainerWindows(Dataset):
    """The windows of `mori` with the keys that make the model use the labels as they are, without a second shift."""

    def __init__(self, windows: ShiftedDataset):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index]
        return {"input_ids": window["input_ids"], "labels": window["labels"], "shift_labels": window["labels"]}


class CourseBlocks(Dataset):
    """The course's recipe: one row per line, truncated to `max_length` tokens; the rows are joined and cut into blocks."""

    def __init__(self, text: str, tokenizer, block_size: int, max_length: int = 1024):
        rows = (tokenizer(line, truncation=True, max_length=max_length)["input_ids"] for line in text.splitlines())
        ids = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.long)
        self.blocks = ids[: len(ids) // block_size * block_size].view(-1, block_size)
        if not len(self.blocks):
            raise UserError(
                f"truncation by the course's recipe leaves {len(ids)} tokens of this corpus, fewer than one block of "
                f"{block_size}; use a smaller --block_size, or leave course out of --arms"
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Order(Sampler):
    """The order in which `mori` visits the windows of each epoch."""

    def __init__(self, batches: Batches):
        self.batches, self.epoch = batches, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches.windows

    def __iter__(self):
        yield from self.batches.order(self.epoch, 0, self.batches.windows)


def check_shift_labels(model: torch.nn.Module, window: dict[str, torch.Tensor]) -> None:
    """Raise RunFailed if the model ignores `shift_labels`: it would shift the labels a second time without a warning."""
    batch = {name: value[None].to(model.device) for name, value in window.items()}
    with torch.no_grad():
        model.eval()
        loss = model(**batch).loss.item()
        targets = torch.tensor(batch["labels"].numel(), device=model.device)
        expected = CausalLMLoss(model)(batch["input_ids"], batch["labels"], targets).item()
        model.train()
    if not math.isclose(loss, expected, rel_tol=1e-4):
        raise RunFailed(
            f"{type(model).__name__} ignores shift_labels (its loss is {loss}, that of the labels as given is "
            f"{expected}): Trainer would train it on other targets"
        )
