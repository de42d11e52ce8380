"""How well a model predicts the held-out text: loss, perplexity, and bits per byte of the original text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .data import ShiftedDataset
from .loss import count_targets
from .model import CausalLMLoss
from .runtime import Runtime


@dataclass
class Evaluation:
    """`loss` is in nats per token, `bits_per_byte` in bits per byte of the text before it was tokenized."""

    loss: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    module: CausalLMLoss,
    dataset: ShiftedDataset,
    text_bytes: int,
    *,
    batch_size: int,
    runtime: Runtime,
    give_up: Callable[[], object] = lambda: False,
) -> Evaluation | None:
    """Score every target of `dataset` once; ranks share the work.

    Only the summed loss and the count are kept, in float64. Bits per byte does not depend on the tokenizer, so models
    with different vocabularies can be compared by it: (nats / ln 2) / `text_bytes`. `give_up` is asked before every
    batch; once it is true, the result is None.
    """
    was_training = module.training
    module.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for first in range(runtime.rank * batch_size, len(dataset), batch_size * runtime.world_size):
        input_ids, labels = dataset.batch(range(first, min(first + batch_size, len(dataset))))
        with runtime.autocast():
            loss_sum = module(input_ids.to(runtime.device), labels.to(runtime.device))
        totals += torch.tensor([loss_sum.item(), count_targets(labels)], dtype=torch.float64)
    nats, targets = runtime.all_sum(totals).tolist()
    module.train(was_training)
    loss = nats / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, nats / math.log(2) / max(1, text_bytes))
