"""What happens before the first step: the text made ready, the folders looked at, the checkpoint to go on from found."""

import contextlib
import fcntl
import json
import tempfile
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO

from mori import distributed as runtime
from mori.checkpoint import checkpoints as checkpoint
from mori.checkpoint import files
from mori.config import HORIZON, TrainConfig, UserError, tell
from mori.data import corpus
from mori.data import windows as data
from mori.model.loading import check_fits


@dataclass
class Progress:
    """Where a run stands: all of its state but the tensors and the random generators. Every checkpoint holds it."""

    step: int = 0
    before: dict | None = None  # the evaluation at step 0
    best: dict | None = None  # the evaluation with the lowest loss
    after: dict | None = None  # the newest evaluation
    samples_before: list[str] = field(default_factory=list)
    samples_after: list[str] = field(default_factory=list)
    unlogged_losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    train_batch_size: int = 0  # windows in one micro-batch, and in one batch of the evaluation,
    eval_batch_size: int = 0  # where memory ran out and they are fewer than the config says

    @classmethod
    def from_json(cls, values: dict) -> "Progress":
        """What a checkpoint holds. Raises ValueError where it is something else."""
        made = cls(**values)
        for f, plain in zip(fields(cls), vars(cls()).values(), strict=True):
            value = getattr(made, f.name)
            kinds = (dict, type(None)) if plain is None else (int, float) if f.type is float else type(plain)
            if not isinstance(value, kinds) or (isinstance(value, dict) and not {"step", "loss"} <= value.keys()):
                raise ValueError(f"{f.name} is {value!r}")
        if not all(isinstance(loss, float) for loss in made.unlogged_losses):
            raise ValueError("unlogged_losses are not numbers")
        return made


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
    config: TrainConfig, documents: list[corpus.Document], tokenizer, model_config, where: runtime.Runtime
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
            bytes=sum(document.bytes for document in documents),
            documents=len(documents),
            tokens=len(tokens),
            train_tokens=boundary - train.dropped,
            held_out_tokens=len(tokens) - boundary,
            dropped_tokens=train.dropped,
        ),
        tokens=tokens,
    )


def check_writable(run_dir: Path, output_dir: Path) -> None:
    """Raise UserError where the run or the model could not be written, or where something else would be replaced.

    Both paths are absolute, without links.
    """
    if output_dir in (run_dir, *run_dir.parents, *Path.cwd().parents, Path.cwd()):
        raise UserError(f"output_dir: {output_dir} holds other things than a model; choose a folder of its own")
    if (run_dir / "checkpoints") in (output_dir, *output_dir.parents):
        raise UserError(f"output_dir: {output_dir} is where the checkpoints go; choose another folder")
    for name, path in (("logging_dir", run_dir), ("output_dir", output_dir)):
        if path.exists() and not path.is_dir():
            raise UserError(f"{name}: {path} is a file; choose a folder")
        # The model's folder is renamed into place, so it is its parent that is written.
        inside = [path] if path == run_dir else []
        parent = next(folder for folder in [*inside, *path.parents] if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise UserError(f"{name}: cannot write in {parent}: {error.strerror}") from None
    if output_dir.is_dir() and any(output_dir.iterdir()) and not _is_model(output_dir):
        raise UserError(
            f"output_dir: {output_dir} holds something that is no model and would be replaced; choose another folder"
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def lock(run_dir: Path) -> IO:
    """Keep other processes out of the run's folder for as long as the returned file is open (a killed process closes it).

    Raises UserError where another process is in it, and still after a few seconds: it may be one that is dying.
    """
    file, deadline = (run_dir / ".lock").open("w"), time.monotonic() + 3
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process is writing {run_dir}; wait for it, or use another --run_name"
                ) from None
            time.sleep(0.1)


def remember_batch_size(run_dir: Path, rank: int, size: int) -> None:
    """Leave word for the next start that micro-batches of more than `size` windows do not fit in this rank's memory."""
    with contextlib.suppress(OSError):
        files.write_json(run_dir / f"batch_size-{rank}.json", size)


def remembered_batch_size(run_dir: Path) -> int | None:
    """The smallest size that any rank has left word of."""
    found = []
    for path in run_dir.glob("batch_size-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


def find_checkpoint(config: TrainConfig, run_dir: Path, identity: dict, total_steps: int) -> Path | None:
    """The checkpoint that the run goes on from, or None for a run that begins. Call it with the run's `lock` held.

    Raises UserError where the checkpoint belongs to a run whose weights would differ, with the fields that do; with
    `extend` the run's length may.
    """
    root = run_dir / "checkpoints"
    if config.resume_from_checkpoint == "none":
        return None
    if config.resume_from_checkpoint == "auto":
        checkpoint.clean(root)
        folder = checkpoint.newest(root, tell)
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
        newer = [path.name for path in checkpoint.published(root) if path.name > folder.name]
        if newer:
            raise UserError(
                f"resume_from_checkpoint: the run {run_dir} has gone on to {newer[-1]}; leave the flag out to go on with it, or give another --run_name to branch off {folder}"
            )
    if folder is None:
        if config.extend:
            raise UserError(f"extend: {run_dir} holds no checkpoint to go on from; leave --extend out to begin a run")
        return None
    saved = checkpoint.load_state(folder)
    differing = _differences(saved, config, identity, folder)
    if config.extend:
        differing = {name: values for name, values in differing.items() if name not in HORIZON}
    if differing:
        longer = "--extend (to go on to the new length), " if differing.keys() <= HORIZON else ""
        raise UserError(
            f"{folder} belongs to a run with other settings (there, now): "
            f"{'; '.join(f'{name} {values}' for name, values in differing.items())}. "
            f"Use those settings, {longer}another --run_name, or --resume_from_checkpoint none (the old run is set aside)"
        )
    if saved["step"] > total_steps:
        raise UserError(f"{folder} has done {saved['step']} steps already, more than the {total_steps} of this run")
    return folder


def _differences(saved: dict, config: TrainConfig, identity: dict, folder: Path) -> dict[str, str]:
    known = {f.name for f in fields(TrainConfig)}
    try:
        there = TrainConfig(**{name: value for name, value in saved["config"].items() if name in known})
        others = {name: saved[name] for name in identity if name != "config"}
    except (KeyError, AttributeError):
        raise UserError(f"{folder / 'state.json'} is not what mori writes; take another checkpoint") from None
    changed = {name: f"({value!r}, {identity[name]!r})" for name, value in others.items() if value != identity[name]}
    return there.differences(config) | changed


def finished_summary(run_dir: Path, output_dir: Path, resumed: Path | None, total_steps: int) -> dict | None:
    """The summary of a run that has nothing left to do and whose model is in its place, file by file; else None."""
    if not resumed or checkpoint.load_state(resumed)["step"] != total_steps or not output_dir.is_dir():
        return None
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        mine = summary["steps"] == total_steps and summary["output_sha256"] == files.hashes(output_dir)
        return summary if mine else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: it is written again


def restore(folder: Path, model, optimizer, scaler, where: runtime.Runtime) -> Progress:
    """Put a checkpoint's tensors, scaler and random state in place; returns where the run stood.

    Raises UserError where they are not those of this run: nothing of the state is optional.
    """
    state = checkpoint.load_state(folder)
    try:
        checkpoint.load_tensors(folder, model, optimizer)
        scaler.load_state_dict(state["scaler"])
        mine = state["ranks"][where.rank]
        runtime.set_rng_state(mine["rng"])
        return Progress.from_json({**state["progress"], "unlogged_losses": mine["unlogged_losses"]})
    except UserError:
        raise
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{folder / 'state.json'} is not what mori writes ({error}); take another checkpoint") from None
