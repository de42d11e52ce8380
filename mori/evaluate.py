"""How well a model predicts the held-out text: loss, perplexity, and bits per byte of the original text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mori.data.windows import ShiftedDataset, count_targets
from mori.distributed import BatchSize, Runtime
from mori.model.loading import CausalLMLoss


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
    batch_size: BatchSize,
    runtime: Runtime,
    give_up: Callable[[], object] = lambda: False,
) -> Evaluation | None:
    """Score every target of `dataset` once; ranks share the work.

    Only the summed loss and the count are kept, in float64. Bits per byte does not depend on the tokenizer, so models
    with different vocabularies can be compared by it: (nats / ln 2) / `text_bytes`. A batch that does not fit in memory
    is done again in halves. `give_up` is asked before every batch; once it is true, the result is None.
    """
    was_training = module.training
    module.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    share = range(runtime.rank, len(dataset), runtime.world_size)
    at = 0
    while at < len(share):
        if give_up():
            module.train(was_training)
            return None
        input_ids, labels = dataset.batch(share[at : at + batch_size.size])
        with batch_size, runtime.autocast():
            loss_sum = module(input_ids.to(runtime.device), labels.to(runtime.device)).item()
        if not batch_size.halved:
            totals += torch.tensor([loss_sum, count_targets(labels)], dtype=torch.float64)
            at += len(labels)
    nats, targets = runtime.all_sum(totals).tolist()
    module.train(was_training)
    loss = nats / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, nats / math.log(2) / max(1, text_bytes))
