"""Prompts -> new token ids: the decoding loop."""

from collections.abc import Iterator

import torch
from torch import nn

from mori.generation.replaying_reader import open_reader
from mori.generation.sampler import Sampler


def decode(
    model: nn.Module,
    prompts: list[list[int]],
    sampler: Sampler,
    max_new_tokens: int,
    *,
    context: int | None = None,
    steps_at_once: int = 1,
) -> Iterator[list[list[int]]]:
    """Draw `max_new_tokens` tokens after each of `prompts`; yields the new ids of every row, `steps_at_once` at a time.

    The caller decides which rows have ended, and stops iterating when all have. Prompts of unequal length are padded on the
    left. When `context` tokens are full and no prompt is padded, decoding continues from the newer half of the texts.

    Raises FloatingPointError if the logits are not finite or every token is forbidden.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pads = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
    vocabulary = model.get_output_embeddings().weight.size(0)
    # The texts for the sampler, whose padding is outside the vocabulary, and for the model, whose padding is token 0.
    texts = torch.full((len(prompts), longest + max_new_tokens), vocabulary, device=device)
    for row, prompt in zip(texts, prompts, strict=True):
        row[longest - len(prompt) : longest] = torch.tensor(prompt, device=device)
    input_ids = texts.masked_fill(texts == vocabulary, 0)
    length = min(longest + max_new_tokens, context or 2**62)
    reader, first = open_reader(model, pads, context, length), 0  # the reader knows the texts from column `first` on
    for start in range(longest, longest + max_new_tokens, steps_at_once):
        drawn = []
        for end in range(start, min(start + steps_at_once, longest + max_new_tokens)):
            if context and not reader.padded and end - first > context:
                reader, first = open_reader(model, pads, context, length), end - max(1, context // 2)
            logits = reader.read(input_ids[:, first:end])
            with torch.inference_mode():
                drawn.append(sampler(logits, texts[:, :end], end - longest))
                # A failed draw (-1) is noticed below; until then the steps continue with token 0.
                texts[:, end : end + 1] = input_ids[:, end : end + 1] = drawn[-1].clamp(min=0)
        new_ids = torch.cat(drawn, 1).tolist()
        if any(token < 0 for row in new_ids for token in row):
            raise FloatingPointError(
                "no token can be drawn: the model has diverged (its logits are not finite), a control's value is too extreme, "
                "or every token is forbidden"
            )
        yield new_ids
