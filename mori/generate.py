"""Prompt -> text: one pass over the prompt, then a token at a time over the model's key-value cache."""

import json
import sys
from dataclasses import asdict, dataclass

import torch
from torch import nn

from . import runtime
from .config import PRESETS, GenerateConfig, SamplingConfig, UserError, checked
from .foreign import guarded
from .model import check_fits, context_length, load_config, load_model, load_tokenizer
from .sampling import Sampler


@dataclass
class Completion:
    """A prompt, the text that follows it, and the ids of that text (the end-of-text token not among them)."""

    prompt: str
    text: str
    new_token_ids: list[int]


@torch.no_grad()
def decode(
    model: nn.Module, input_ids: torch.Tensor, sampler: Sampler, max_new_tokens: int, eos_ids: set[int]
) -> list[list[int]]:
    """Draw tokens after `input_ids` `(B, S)` until every row has ended or has `max_new_tokens`; the new ids of each row.

    A row ends at a token of `eos_ids`, which is left out. Models without a key-value cache read the whole text each time.
    """
    ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=input_ids.device)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    prompt_length = input_ids.size(1)
    unread, cache = input_ids, None
    for _ in range(max_new_tokens):
        out = model(input_ids=unread, past_key_values=cache, use_cache=True)
        cache = out.get("past_key_values")
        chosen = sampler(out.logits[:, -1], input_ids)  # (B, 1)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        unread = chosen if cache is not None else input_ids
        finished |= torch.isin(chosen[:, 0], ends)
        if finished.all():
            break
    rows = input_ids[:, prompt_length:].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in eos_ids), None)] for row in rows]


def generate(
    model: nn.Module,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 100,
    num_return_sequences: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[Completion]:
    """Texts that go on from `prompts`, `num_return_sequences` for each, in order.

    Each prompt starts the sampler from `seed` anew, so its texts do not depend on the prompts beside it. A text ends at
    the model's end-of-text token, after `max_new_tokens`, or where the model's context is full. The model is put into
    evaluation mode meanwhile; PyTorch's global random state is neither read nor changed.

    Raises FloatingPointError where the logits are not finite, UserError for a value that cannot be, a prompt longer than the context, and an empty prompt where the
    tokenizer has no beginning-of-text token.
    """
    controls = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    checked(SamplingConfig(**controls, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences))
    encoded = [_prompt_ids(prompt, tokenizer, model.config) for prompt in prompts]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    made = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        sampler = Sampler(**controls, seed=seed, device=device)
        room = (context_length(model.config) or len(ids) + max_new_tokens) - len(ids) + 1
        input_ids = torch.tensor([ids] * num_return_sequences, device=device)
        for row in decode(model, input_ids, sampler, min(max_new_tokens, room), _eos_ids(model, tokenizer)):
            whole = tokenizer.decode(ids + row, skip_special_tokens=True)
            start = len(
                tokenizer.decode(ids, skip_special_tokens=True)
            )  # decoded alone, a text may lose its first space
            made.append(Completion(prompt, whole[start:], row))
    model.train(was_training)
    return made


def check_prompts(prompts: list[str], tokenizer, model_config) -> None:
    """Raise UserError for a prompt that this model could not go on from."""
    for prompt in prompts:
        _prompt_ids(prompt, tokenizer, model_config)


def _prompt_ids(prompt: str, tokenizer, model_config) -> list[int]:
    context = context_length(model_config)
    ids = guarded("cannot tokenize the prompt", lambda: tokenizer(prompt)["input_ids"]) if prompt else []
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError(
                "the prompt is empty and this model has no beginning-of-text token to start from; give a --prompt"
            )
        ids = [tokenizer.bos_token_id]
    if context and len(ids) > context:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {context}; make the prompt shorter")
    check_fits(model_config, block_size=len(ids), max_id=max(ids))
    return ids


def _eos_ids(model: nn.Module, tokenizer) -> set[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return set() if eos is None else set(eos) if isinstance(eos, list) else {eos}


def speak(config: GenerateConfig) -> None:
    """`scripts/generate.py`: load the model, and print what it says after each prompt."""
    if config.model in PRESETS:
        raise UserError(
            f"{config.model} is a model to be trained; give --model the folder where scripts/train.py left its brain"
        )
    place = runtime.start(config.device)
    tokenizer = load_tokenizer(config.model, (), config.trust_remote_code)
    model_config = load_config(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    model = load_model(config.model, model_config, config.trust_remote_code).to(place.device)
    try:
        completions = generate(model, tokenizer, config.prompt, seed=config.seed, **config.sampling())
    except FloatingPointError as error:
        raise UserError(str(error)) from None
    if config.json:
        json.dump([asdict(completion) for completion in completions], sys.stdout, ensure_ascii=False)
        print()
        return
    for number, completion in enumerate(completions):
        if number:
            print("-" * 40)
        print(completion.prompt + completion.text)
