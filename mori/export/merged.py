"""Merge an adapter into its base model and write the model's folder; load it again and compare."""

import contextlib
from pathlib import Path

import torch
from torch import nn

from mori.checkpoint.files import advice, publish
from mori.cli import RunFailed, UserError, guarded
from mori.config import ExportConfig
from mori.model import loading, saving
from mori.model.adapters import files, lora
from mori.tracking.report.card import CARD, merged_card

_TOLERANCE = 1e-5  # of the logits, in proportion to the largest


def export_merged(config: ExportConfig) -> Path:
    """Write the base model with the adapter `config.model` in its weights, in fp32; returns the folder.

    Raises UserError for a folder that holds no adapter and for an output that exists, and RunFailed if the model cannot be
    written, or does not compute what base and adapter do.
    """
    name = config.model
    base = files.base_of(name)
    if base == name:
        raise UserError(f"merge: {name} holds no adapter ({files.CONFIG}), so there is nothing to merge")
    path = Path(config.output or f"{Path(name).resolve().name}-merged")
    if path.exists():
        raise UserError(f"output: {path} exists; give another name")
    tokenizer = loading.load_tokenizer(name, (), config.trust_remote_code)
    model_config = loading.load_config(name, tokenizer, trust_remote_code=config.trust_remote_code)
    model = loading.load_model(name, model_config, config.trust_remote_code)
    beside = _logits(model)
    try:
        publish(
            path.absolute(), lambda folder: _write(model, tokenizer, folder, Path(name) / CARD, path.resolve().name)
        )
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {advice(error)}") from None
    difference = (_logits(loading.load_model(str(path), model_config, config.trust_remote_code)) - beside).abs().max()
    if not difference <= _TOLERANCE * beside.abs().max():
        raise RunFailed(f"{path} differs from {base} with the adapter by {difference:.1e} in a logit; do not use it")
    print(f"{path}: {base} with the adapter {name} merged; read back, its logits differ by {difference:.1e} at most")
    return path


def _write(model: nn.Module, tokenizer, folder: Path, adapter_card: Path, name: str) -> None:
    """Write the merged model, and a card made of the adapter's if that is there."""
    saving.save(lora.merge(model), tokenizer, folder)
    if adapter_card.is_file():
        with contextlib.suppress(UserError):
            card = guarded("", lambda: merged_card(adapter_card.read_text(encoding="utf-8"), name))
            if card:
                (folder / CARD).write_text(card, encoding="utf-8")


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(16)[None] % model.config.get_text_config().vocab_size
    return model.eval()(input_ids=ids, use_cache=False).logits.float()
