"""How well a model predicts the held-out text, and where a number first stopped being finite."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch

from mori.cli import RunFailed, callable_module, checked, plural
from mori.config import EvaluateConfig, TrainConfig
from mori.data.windows import IGNORE_INDEX, ShiftedDataset, Spread, count_targets
from mori.distributed import BatchSize, Runtime, restored_backends, start
from mori.model import loading, special_tokens
from mori.model.adapters.lora import merge
from mori.model.lm import CausalLMLoss
from mori.model.variants import build_module
from mori.prepare import read, scored_text, settle_precision, tokenized

_EVALUATION_SHARE = 0.1  # of the training time
# In nats; TensorBoard shows 30 bins of equal width as they are. The last bin also holds all losses above it.
TOKEN_LOSS_EDGES = [i / 2 for i in range(31)]


@dataclass
class Evaluation:
    """`loss` is in nats per token, `bits_per_byte` in bits per byte of the text before it was tokenized, or None.

    All are None for a run that holds no text out. `token_losses` counts the tokens by their loss, in the bins between
    `TOKEN_LOSS_EDGES`.
    """

    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    token_losses: ClassVar[list[int]] = []  # no field: `asdict` gives the figures

    def __str__(self) -> str:
        if self.loss is None:
            return "no text is held out"
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"held-out loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits}"

    def scalars(self) -> dict[str, float]:
        """The values that there are, by their tags."""
        return {f"eval/{name}": value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    module: CausalLMLoss,
    dataset: ShiftedDataset | None,
    text_bytes: int | None,
    windows: Sequence[int] | None = None,
    *,
    batch_size: BatchSize,
    runtime: Runtime,
    give_up: Callable[[], object] = lambda: False,
) -> Evaluation | None:
    """Score every target of `dataset` once, or of some `windows` of it; the ranks share the work.

    Losses are summed in float64. Bits per byte, (nats / ln 2) / `text_bytes`, does not depend on the tokenizer, so it compares
    models with different vocabularies. It counts the bytes of the files, although a tokenizer may write text in lower case, say;
    it is None if `text_bytes` is, as where the tokenizer loses text. Some windows count with their share of the labels as bytes.
    The token that ends a document counts towards the loss, and has no bytes; a token that only begins one is given, never
    predicted, and has no label in `dataset`. A batch that does not fit in memory is split in halves. `give_up` is called before
    every batch; the result is None once it returns true.

    Raises RunFailed if a batch does not fit while the ranks share the weights, and so must compute batches of the same size.
    """
    if dataset is None:
        return Evaluation(None, None, None)
    was_training = module.training
    module.eval()
    totals = torch.zeros(2 + len(TOKEN_LOSS_EDGES) - 1, dtype=torch.float64)
    windows = range(len(dataset)) if windows is None else windows
    share, position = windows[runtime.rank :: runtime.world_size], 0
    own = len(share)
    if runtime.sharded and own < len(windows[:: runtime.world_size]):  # all ranks compute the same number of batches
        share = [*share, windows[0]]
    while position < len(share):
        if give_up():
            module.train(was_training)
            return None
        input_ids, labels = dataset.batch(share[position : position + batch_size.size])
        labels[own - position :] = IGNORE_INDEX
        with batch_size, runtime.autocast(), module.token_losses() as losses:
            loss_sum = module(input_ids.to(runtime.device), labels.to(runtime.device)).item()
        if batch_size.halved and runtime.sharded:
            raise RunFailed(
                f"memory ran out in an evaluation on rank {runtime.rank}; the same command with a smaller "
                f"--per_device_eval_batch_size than {len(labels)} resumes"
            )
        if not batch_size.halved:
            counts = _histogram(torch.cat(losses).cpu()[labels.flatten() != IGNORE_INDEX])
            totals += torch.tensor([loss_sum, count_targets(labels), *counts], dtype=torch.float64)
            position += len(labels)
    nats, targets, *counts = runtime.all_sum(totals).tolist()
    module.train(was_training)
    loss = nats / targets if targets else math.nan  # some windows may have no label
    perplexity = math.exp(loss) if loss < 700 else math.inf
    scored_bytes = (text_bytes or 0) * (targets / dataset.targets)
    evaluation = Evaluation(loss, perplexity, nats / math.log(2) / scored_bytes if scored_bytes else None)
    evaluation.token_losses = list(map(int, counts))
    return evaluation


def _histogram(losses: torch.Tensor) -> list[int]:
    """How many token losses `(N,)`, on the CPU, lie between the edges; a loss on an edge belongs to the bin above it."""
    bins = torch.bucketize(losses, torch.tensor(TOKEN_LOSS_EDGES[1:-1]), right=True)
    return torch.bincount(bins, minlength=len(TOKEN_LOSS_EDGES) - 1).tolist()


def windows_to_score(config: TrainConfig, held_out: int, steps_between: int, windows_per_step: int) -> Sequence[int]:
    """The held-out windows, of `held_out`, that each evaluation of a run scores: all, or fewer, spread evenly.

    `config.max_eval_windows` bounds their number; 0 takes all. Unset, evaluations take a tenth of the training time at most: a
    forward pass takes a third of the time of a training step on the same windows.
    """
    count = config.max_eval_windows
    if count is None:
        count = max(1, int(_EVALUATION_SHARE * 3 * steps_between * windows_per_step))
    if count == 0 or count >= held_out:
        return range(held_out)
    return Spread(range(count), count, held_out)


@restored_backends()
def evaluate_text(config: EvaluateConfig) -> dict:
    """The scores of a text by `config.model`: `loss`, `perplexity`, `bits_per_byte`, and how much was scored.

    Raises UserError for a model or a text that cannot be read, and windows that do not fit the model; RunFailed if not even one
    window fits in memory.
    """
    config = checked(config)
    runtime = start(config.device, config.precision)
    corpus = read(config.corpus, config, runtime)
    tokenizer = loading.load_tokenizer(config.model, (), config.trust_remote_code)
    model_config = loading.load_config(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    settle_precision(config.precision, runtime, model_config, config.per_device_eval_batch_size * config.block_size)
    special = special_tokens.decide(tokenizer, document_bos=config.document_bos, parse=config.parse_special_tokens)
    token_file = tokenized(corpus, tokenizer, model_config, special, config, runtime)
    windows, text_bytes = scored_text(token_file, corpus, tokenizer, config.block_size, runtime)
    model = merge(loading.load_model(config.model, model_config, config.trust_remote_code)).to(runtime.device)
    module, _ = build_module(model, TrainConfig(block_size=config.block_size), windows.batch([0]), runtime)
    size = BatchSize(config.per_device_eval_batch_size)
    evaluation = evaluate(module, windows, text_bytes, batch_size=size, runtime=runtime)
    return {"model": config.model, "tokens": windows.targets, "bytes": text_bytes, **asdict(evaluation)}


def print_evaluation(config: EvaluateConfig) -> None:
    """Print what `evaluate_text` returns."""
    result = evaluate_text(config)
    evaluation = Evaluation(**{f.name: result[f.name] for f in fields(Evaluation)})
    text = ", ".join(config.corpus) or "the transcripts that ship with mori"
    line = f"{config.model}: {evaluation} on {plural(result['tokens'], 'token')} of {text}"
    print(json.dumps(result) if config.json else line)


def first_nonfinite_tensor(
    module: CausalLMLoss,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    n_targets: torch.Tensor,
    runtime: Runtime,
) -> str | None:
    """The first tensor that is not finite when `micro_batches`, each `input_ids` and `labels` `(B, T)`, are trained on.

    Weights come first, then the outputs of the modules in the order of their computation, then the loss, then the gradients from
    the loss backwards. None if all are finite: a loss scale may overflow them. The gradients are zeroed afterwards.
    """
    for name, parameter in module.model.named_parameters():
        if _nonfinite(parameter.to_local() if runtime.sharded else parameter):
            return f"the weight {name}"
    if runtime.sharded:
        return None  # a rank that stops at the first would leave the others waiting
    names: list[str] = []  # of the first output that is not finite

    def watch(name: str):
        def hook(_module, _inputs, output) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if not names and any(isinstance(tensor, torch.Tensor) and _nonfinite(tensor) for tensor in tensors):
                names.append(f"the output of {name}")

        return hook

    # A module's hook runs after those of its children, so the first name is the innermost module's.
    hooks = [child.register_forward_hook(watch(name)) for name, child in module.model.named_modules() if name]
    try:
        with module.not_compiled():
            for input_ids, labels in micro_batches:
                with runtime.autocast():
                    loss = module(input_ids.to(runtime.device), labels.to(runtime.device), n_targets.to(runtime.device))
                if names or _nonfinite(loss):
                    return names[0] if names else "the loss"
                loss.backward()
        for name, parameter in reversed(list(module.model.named_parameters())):
            if parameter.grad is not None and _nonfinite(parameter.grad):
                return f"the gradient of {name}"
        return None
    finally:
        for hook in hooks:
            hook.remove()
        module.zero_grad()


def _nonfinite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())


callable_module(__name__, EvaluateConfig, evaluate_text)  # mori.evaluate("mori_brain_final", "text.txt")
