"""What happens before the first step: the text made ready, the folders looked at, the checkpoint to go on from found."""

import itertools
import json
import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers

from . import __version__, checkpoint, corpus, data
from .config import TrainConfig, UserError
from .model import check_fits
from .runtime import Runtime


@dataclass
class Text:
    """The corpus, ready to train on. `held_out_bytes` is the size of the text behind the held-out labels."""

    train: data.ShiftedDataset
    held_out: data.ShiftedDataset
    held_out_bytes: int
    ledger: corpus.Ledger
    tokens: corpus.TokenFile

    @property
    def hashes(self) -> dict[str, str]:
        """What identifies the corpus and its tokenizer."""
        return {name: self.tokens.header[name] for name in ("corpus_sha256", "tokenizer_sha256")}


def prepare_text(
    config: TrainConfig, documents: list[corpus.Document], tokenizer, model_config, where: Runtime
) -> Text:
    """Tokenize the documents (or find them tokenized), and cut the tokens into training and held-out windows.

    Raises UserError where the corpus is too short, or block or token ids do not fit the model.
    """
    check_fits(model_config, block_size=config.block_size, max_id=0)
    cache_dir = Path(config.logging_dir) / ".cache"
    tokens = where.main_first(lambda: corpus.TokenFile.make(documents, tokenizer, cache_dir))
    check_fits(model_config, block_size=config.block_size, max_id=tokens.header["max_id"])
    boundary = data.split(len(tokens), config.block_size, config.held_out_fraction)
    train = data.ShiftedDataset(tokens.ids[:boundary], config.block_size)
    return Text(
        train=train,
        held_out=data.ShiftedDataset(tokens.ids[boundary:], config.block_size, keep_tail=True),
        # The first held-out token is nobody's label: its bytes are not predicted.
        held_out_bytes=corpus.text_bytes_from(boundary + 1, tokens, documents, tokenizer),
        ledger=corpus.Ledger(
            bytes=tokens.header["bytes"],
            documents=len(documents),
            tokens=len(tokens),
            train_tokens=boundary - train.dropped,
            held_out_tokens=len(tokens) - boundary,
            dropped_tokens=train.dropped,
        ),
        tokens=tokens,
    )


def check_writable(run_dir: Path, output_dir: Path) -> None:
    """Raise UserError where the run or the model could not be written, or where something else would be replaced."""
    for name, path in (("logging_dir", run_dir), ("output_dir", output_dir)):
        if path.exists() and not path.is_dir():
            raise UserError(f"{name}: {path} is a file; choose a folder")
        # The model's folder is renamed into place, so it is its parent that is written.
        inside = [path] if path == run_dir else []
        parent = next(folder for folder in [*inside, *path.absolute().parents] if folder.exists())
        if not parent.is_dir():
            raise UserError(f"{name}: cannot make {path}, because {parent} is a file")
        try:
            probe = parent / ".mori-write-probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{name}: cannot write in {parent}: {error.strerror}") from None
    for folder in (output_dir, output_dir.with_name(output_dir.name + ".previous")):
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise UserError(
                f"output_dir: {folder} holds something that is no model and would be replaced; choose another folder"
            )


def set_aside(folder: Path) -> None:
    """Rename `folder`, where there is one, to the first of `<name>.1`, `<name>.2` ... that is free."""
    if folder.exists():
        numbered = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        folder.rename(next(path for path in numbered if not path.exists()))


def find_checkpoint(config: TrainConfig, run_dir: Path, identity: dict) -> Path | None:
    """The checkpoint that the run goes on from, or None for a run that begins.

    Raises UserError where the checkpoint belongs to a run whose weights would differ, with the fields that do.
    """
    root = run_dir / "checkpoints"
    if config.resume_from_checkpoint == "none":
        set_aside(run_dir)
        return None
    if config.resume_from_checkpoint == "auto":
        folder = checkpoint.newest(root, lambda message: print(message, file=sys.stderr))
    else:
        folder = Path(config.resume_from_checkpoint)
        if not folder.is_dir():
            raise UserError(
                f"resume_from_checkpoint: {folder} is not a folder; give auto, none, or a checkpoint's folder"
            )
        try:
            checkpoint.verify(folder)
        except checkpoint.CorruptCheckpoint as error:
            raise UserError(f"resume_from_checkpoint: {error}") from None
    if folder is None:
        return None
    saved = checkpoint.load_state(folder)
    known = {f.name for f in fields(TrainConfig)}
    differing = TrainConfig(**{k: v for k, v in saved["config"].items() if k in known}).differences(config)
    differing += [f"{k} ({saved[k]!r}, {v!r})" for k, v in identity.items() if k != "config" and saved[k] != v]
    if differing:
        raise UserError(
            f"{folder} belongs to a run with other settings (there, now): {'; '.join(differing)}. "
            "Use those settings, another --run_name, or --resume_from_checkpoint none (the old run is set aside)"
        )
    return folder


def finished_summary(run_dir: Path, output_dir: Path, resumed: Path | None, total_steps: int) -> dict | None:
    """The summary of a run that has nothing left to do, its model in place; else None."""
    path = run_dir / "summary.json"
    if resumed and checkpoint.load_state(resumed)["step"] == total_steps and path.exists():
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["output_dir"] == str(output_dir) and (output_dir / "config.json").exists():
            return summary
    return None


def environment(where: Runtime) -> dict:
    """What the run ran on, for `environment.json`."""
    gpu = where.device.type == "cuda"
    return {
        "mori": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(where.device) if gpu else platform.processor() or platform.machine(),
        "precision": where.precision,
        "threads": torch.get_num_threads(),
        "world_size": where.world_size,
        "command": sys.argv,
    }
