"""What a model does, asked of the model itself on a few tokens, before any work."""

import torch
from torch import nn

from mori.cli import UserError
from mori.model.context import usable_context

_TOKENS = 16


@torch.no_grad()
def check_causal(model: nn.Module, name: str, input_ids: torch.Tensor) -> str:
    """Raise UserError if the model `name` cannot read text alone, or if a token's logits depend on later tokens.

    Args:
        input_ids: `(B, T)`, of which 16 are read.

    Returns:
        A sentence that says how the model's own loss differs from the cross-entropy of the next token; "" if it does not.
    """
    ids = input_ids[:1, :_TOKENS]
    half, vocabulary = ids.size(1) // 2, len(model.get_input_embeddings().weight)
    changed = torch.cat([ids[:, :half], (ids[:, half:] + 1) % vocabulary], dim=1)
    pair, was_training = torch.cat([ids, changed]), model.training
    model.eval()
    try:
        output = read_text(model, name, pair)
    finally:
        model.train(was_training)
    before = output.logits[:, :half].float()
    tolerance = 1e-4 if output.logits.dtype == torch.float32 else 1e-2
    if half and (before[0] - before[1]).abs().max() > tolerance * before.abs().max():
        raise UserError(
            f"model {name} is a {type(model).__name__} that reads text in both directions: a later token changes what it expects "
            "before it; take a causal model (in some config.json: is_decoder or causal true)"
        )
    return _difference(model, output, pair)


def check_positions(model: nn.Module, block_size: int) -> None:
    """Raise UserError if the model has fewer positions than `block_size`."""
    context = usable_context(model, explicit_positions=False)
    if context and block_size > context:
        raise UserError(
            f"block_size {block_size} is longer than the {context} positions of the model; use --block_size {context}"
        )


def read_text(model: nn.Module, name: str, input_ids: torch.Tensor):
    """The output of the model `name` for `input_ids` `(B, T)` as labels too, or without labels if it cannot have these.

    Raises UserError if it cannot read text alone.
    """
    reasons = (LookupError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError)
    try:
        output = model(input_ids=input_ids, labels=input_ids, use_cache=False)
        if output.logits is not None:
            return output
    except (*reasons, RuntimeError):
        pass
    try:
        return model(input_ids=input_ids, use_cache=False)
    except reasons as error:
        raise UserError(
            f"model {name} is a {type(model).__name__} that cannot be trained on text alone: {error!r}"
        ) from None


def _difference(model: nn.Module, output, input_ids: torch.Tensor) -> str:
    loss = getattr(output, "loss", None)
    if loss is None or input_ids.size(1) < 2:
        return ""
    logits = output.logits.float()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    unshifted = nn.functional.cross_entropy(
        logits.flatten(0, 1), input_ids.flatten()
    )  # BART's kind wants shifted labels
    router_loss = getattr(output, "aux_loss", None)
    if router_loss is not None:
        loss = loss - getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", 0.0)) * router_loss
    tolerance = 1e-3 if output.logits.dtype == torch.float32 else 1e-2
    if not min(abs(loss - expected), abs(loss - unshifted)) > tolerance * expected:  # or NaN
        return ""
    return (
        f"{type(model).__name__} has another training loss ({loss:.3f} on a few tokens, where the cross-entropy of the next token is "
        f"{expected:.3f}): it is not used, mori trains with the cross-entropy"
    )
