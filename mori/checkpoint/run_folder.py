"""The folder of a run: whether it may be written, who holds it, and the checkpoint it resumes from."""

import contextlib
import json
import math
import os
import re
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import IO

from mori.checkpoint import checkpoints
from mori.checkpoint.files import PREVIOUS, hashes, stays_in_place, visible, write_json
from mori.cli import UserError, locks, plural, print_error
from mori.config import PRESETS, TrainConfig

# What checkpoints of versions that did not record it stand for.
_UNKNOWN = "unknown"
_IN_EARLIER_VERSIONS = {
    "document_bos": False, "parse_special_tokens": True, "device": _UNKNOWN, "model_sha256": _UNKNOWN, "documents_sha256": _UNKNOWN,
    "base_sha256": "",
}  # fmt: skip
_IN_WORDS = {
    "documents_sha256": "(the corpus has another text now)",
    "tokenizer_sha256": "(the tokenizer is another one now)",
}
_DRY_RUN = re.compile(r"preflight\.json|batch_size-\d+\.json")
_INEXACT = ("precision", "world_size", "device")  # a run goes on with others, but rounds otherwise


def check_apart(model: str, run_dir: Path, output_dir: Path) -> None:
    """Raise UserError if the run or its model would be written into the folder of the model it starts from, or around it.

    Links are followed. A checkpoint of another run is such a folder too.
    """
    source = Path(model)
    if model in PRESETS or not source.is_dir():
        return
    source = source.resolve()
    for name, path in (("output_dir", output_dir), ("logging_dir", run_dir)):
        place = (
            "is"
            if path == source
            else "is in"
            if _lies_in(path, source)
            else "contains"
            if _lies_in(source, path)
            else ""
        )
        if place:
            name = "run_name" if path == run_dir and place == "contains" else name
            raise UserError(
                f"{name}: {path} {place} the folder of --model, {source}, which it must not change; choose another"
            )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder`, or inside it; on a file system without upper case, too."""
    return folder.exists() and any(part.exists() and part.samefile(folder) for part in (path, *path.parents))


def check_writable(run_dir: Path, output_dir: Path) -> None:
    """Raise UserError if the run or the model could not be written, or would replace something else.

    Both paths are absolute, without links.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in str(output_dir)):
        raise UserError(
            f"the path {str(output_dir)!a} is not UTF-8, so no tokenizer can be saved there; use another --output_dir"
        )
    if output_dir in (run_dir, *run_dir.parents, *Path.cwd().parents, Path.cwd()):
        raise UserError(f"output_dir: {output_dir} contains other things than a model; choose another folder")
    if (run_dir / "checkpoints") in (output_dir, *output_dir.parents):
        raise UserError(f"output_dir: {output_dir} is where the checkpoints go; choose another folder")
    for name, path in (("logging_dir", run_dir), ("output_dir", output_dir)):
        if path.exists() and not path.is_dir():
            raise UserError(f"{name}: {path} is a file; choose a folder")
        # The model's folder is renamed into place: its parent must be writable, unless it is filled in place.
        candidates = [path, *path.parents] if path == run_dir or stays_in_place(path) else path.parents
        parent = next(folder for folder in candidates if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise UserError(f"{name}: cannot write in {parent}: {error.strerror}") from None
    in_place = stays_in_place(output_dir)
    contents = list((visible if in_place else Path.iterdir)(output_dir)) if output_dir.is_dir() else []
    if contents and not _is_model(output_dir) and not (in_place and (output_dir / PREVIOUS).is_dir()):
        raise UserError(
            f"output_dir: {output_dir} contains something that is not a model and would be replaced; choose another folder"
        )


def _is_model(folder: Path) -> bool:
    configs = ("config.json", "adapter_config.json")
    return any((folder / name).is_file() for name in configs) and any(folder.glob("*.safetensors"))


def lock(run_dir: Path) -> IO:
    """Keep other processes out of the run's folder while the returned file is open; a killed process closes it.

    Raises UserError if another process holds the folder for more than three seconds: it may be dying.
    """
    file, deadline = (run_dir / ".lock").open("w"), time.monotonic() + 3
    while True:
        try:
            locks.lock(file, "two processes that train this run at once would not notice each other")
            file.write(_torchrun())
            file.flush()
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process is writing {run_dir}; wait for it, or use another --run_name"
                ) from None
            time.sleep(0.1)


def is_of_this_torchrun(run_dir: Path) -> bool:
    """Whether the torchrun that started this process has opened the folder before: it starts its ranks again when nodes join."""
    with contextlib.suppress(OSError, ValueError):
        return bool(_torchrun()) and (run_dir / ".lock").read_text(encoding="utf-8") == _torchrun()
    return False


def _torchrun() -> str:
    """The torchrun that started this process; "" if none did."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return run and f"{run} {os.getppid()}"


def remember_batch_size(run_dir: Path, rank: int, size: int) -> None:
    """Record for the next start that only micro-batches of `size` windows fit in this rank's memory."""
    with contextlib.suppress(OSError):
        write_json(run_dir / f"batch_size-{rank}.json", size)


def remembered_batch_size(config: TrainConfig, run_dir: Path) -> int | None:
    """The smallest size that any rank has recorded, for a run that resumes; else None."""
    if config.resume_from_checkpoint == "none":
        return None
    sizes = []
    for path in run_dir.glob("batch_size-*.json"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(json.loads(path.read_text(encoding="utf-8")))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def choose(config: TrainConfig, first: Path, identity: dict) -> Path:
    """The folder of a run that the user did not name: `first`, or `first` with a number from 2 on.

    The newest run with the same settings is resumed. If there is none, a new run begins beside the others, and a note says what
    differs. Reads only: another process may be writing these folders. Raises UserError if `extend` could mean several runs.
    """
    numbered = _numbered(first)
    runs = [path for path in numbered.values() if path.is_dir()]
    named = Path(config.resume_from_checkpoint).resolve().parent.parent
    if named in runs:
        return named
    exact = {run: _differing(run, replace(config, extend=False), identity) for run in runs}
    matches = [run for run, differing in exact.items() if differing == {}]
    if not matches and config.extend:
        matches = [run for run in runs if _differing(run, config, identity) == {}]
        if len(matches) > 1:
            names = ", ".join(run.name for run in matches)
            raise UserError(
                f"extend: several runs differ from this one in nothing but their length ({names}); say which with --run_name"
            )
        matches = matches or runs[-1:]  # whose differences the refusal names
    if matches:
        return matches[-1]
    if not runs:
        return first
    new = first.with_name(f"{first.name}-{max(numbered) + 1}")
    nearest = min(reversed(exact), key=lambda run: math.inf if exact[run] is None else len(exact[run]))
    reason = "is a run that cannot be read"
    if exact[nearest]:
        reason = f"belongs to a run with other settings (there, now): {_listed(exact[nearest])}"
        if not _differing(nearest, replace(config, extend=True), identity):
            reason += " (--extend resumes it up to the new length)"
    output = Path(config.output_dir)
    kept = f"; its model will replace {output}, which is kept as {output.name}{PREVIOUS}" if output.is_dir() else ""
    print_error(f"note: {nearest} {reason}. A new run begins beside it, {new.name}{kept}")
    return new


def _numbered(first: Path) -> dict[int, Path]:
    """All that is named `first`, `first-2`, `first-3` and so on, by number, in order."""
    number = re.compile(re.escape(first.name) + r"(?:-([2-9]|[1-9]\d+))?")
    with contextlib.suppress(FileNotFoundError):
        matches = [(number.fullmatch(path.name), path) for path in first.parent.iterdir()]
        return dict(sorted((int(match[1] or 1), path) for match, path in matches if match))
    return {}


def _differing(run_dir: Path, config: TrainConfig, identity: dict) -> dict | None:
    """What the run in a folder and this run do not share, see `_differences`; None if it cannot be told. Reads only.

    A run without a whole checkpoint starts again, so only its settings count.
    """
    for folder in reversed(checkpoints.published(run_dir / "checkpoints")):
        with contextlib.suppress(checkpoints.CorruptCheckpoint, UserError):
            checkpoints.verify(folder, only="state.json")
            return _strict_differences(checkpoints.load_state(folder), config, identity, folder)
    try:
        settings = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        return _strict_differences({**identity, "config": settings}, config, identity, run_dir)
    except FileNotFoundError:
        # A folder that is empty, or left by a dry run, belongs to any run.
        return {} if all(_DRY_RUN.fullmatch(path.name) for path in run_dir.glob("[!.]*")) else None
    except (OSError, ValueError, UserError):
        return None


def _strict_differences(saved: dict, config: TrainConfig, identity: dict, folder: Path) -> dict:
    """The first of `_differences`. A model of another name, though of the same shape, counts unless the old one was moved."""
    differing = _differences(saved, config, identity, folder)[0]
    old, new = Path(saved["config"]["model"]), Path(config.model)
    if old != new and (not new.is_dir() or old.is_dir() and not old.samefile(new)):
        differing["model"] = f"({str(old)!r}, {config.model!r})"
    return differing


def check_resumed(config: TrainConfig, checkpoint: Path, identity: dict, total_steps: int) -> int:
    """The windows of a step of the run that resumes from a checkpoint: those that it had, also on another number of ranks.

    Raises UserError if the checkpoint belongs to a run whose weights would differ, and names the fields that do; with `extend`
    the length of the run may differ. Notes say what only rounds otherwise.
    """
    saved = checkpoints.load_state(checkpoint)
    differing, inexact = _differences(saved, config, identity, checkpoint)
    if differing:
        only_length = not _differences(saved, replace(config, extend=True), identity, checkpoint)[0]
        longer = "--extend (to resume up to the new length), " if only_length and total_steps > saved["step"] else ""
        raise UserError(
            f"{checkpoint} belongs to a run with other settings (there, now): "
            f"{_listed(differing)}. Use those settings, {longer}another --run_name, or --resume_from_checkpoint none (the old run is set aside)"
        )
    if saved["config"].get("model") != config.model:
        print_error(
            f"note: the model was {saved['config'].get('model')} and is {config.model} now; its configuration is the same"
        )
    windows = _windows_per_step(saved, config, identity)[0]
    if inexact:
        kept = f". A step keeps its {plural(windows, 'window')}" if "world_size" in inexact else ""
        print_error(
            f"note: resumes with other settings (there, now): {_listed(inexact)}{kept}. The run continues, but its weights will "
            "not be equal to the bit to those of a run that never stopped"
        )
    return windows


def check_length(checkpoint: Path, total_steps: int) -> None:
    """Raise UserError if a checkpoint has done more steps than the run has."""
    step = checkpoints.load_state(checkpoint)["step"]
    if step > total_steps:
        raise UserError(
            f"{checkpoint} has done {plural(step, 'step')} already, more than the {total_steps} of this run"
        )


def check_named(folder: Path, run_dir: Path) -> None:
    """Raise UserError if the checkpoint whose folder the user gave is damaged, or the run has gone on beyond it."""
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint: {folder} is not a folder; give auto, none, or a checkpoint's folder")
    try:
        checkpoints.verify(folder)
    except checkpoints.CorruptCheckpoint as error:
        raise UserError(f"resume_from_checkpoint: {error}") from None
    newer = [path.name for path in checkpoints.published(run_dir / "checkpoints") if path.name > folder.name]
    if newer:
        raise UserError(
            f"resume_from_checkpoint: the run {run_dir} has gone on to {newer[-1]}; leave the flag out to resume there, or give "
            f"another --run_name to branch off {folder}"
        )


def _differences(saved: dict, config: TrainConfig, identity: dict, folder: Path) -> tuple[dict, dict]:
    """What the checkpoint and this run do not share, each with `(there, now)`: what makes another run, and what only rounds otherwise."""
    known = {f.name for f in fields(TrainConfig)}
    try:
        there = TrainConfig(**{name: value for name, value in saved["config"].items() if name in known})
        saved = {**_IN_EARLIER_VERSIONS, **saved}
        values = {
            name: (saved[name], identity[name]) for name in identity if name not in ("config", "windows_per_step")
        }
        windows = _windows_per_step(saved, config, identity)
    except (KeyError, AttributeError, TypeError):
        raise UserError(f"{folder / 'state.json'} is not a state of mori; take another checkpoint") from None
    same_model = values.pop("model_sha256")
    changed = {
        name: _IN_WORDS.get(name, f"({old!r}, {new!r})")
        for name, (old, new) in values.items()
        if old not in (new, _UNKNOWN)
    }
    if kept_precision(saved, config, identity) == saved["precision"]:
        changed.pop("precision", None)
    inexact = {name: changed.pop(name) for name in _INEXACT if name in changed} | there.inexact_differences(config)
    differing = there.differences(config, extending=config.extend) | changed
    if same_model[0] == same_model[1]:
        differing.pop("model", None)
    if windows[0] != windows[1]:
        layout = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        differing |= {name: inexact[name] for name in layout if name in inexact}
        differing["windows in a step"] = f"({windows[0]}, {windows[1]})"
    return differing, inexact


def kept_precision(saved: dict, config: TrainConfig, identity: dict) -> str:
    """The precision in which a run resumes: with `auto` that of its checkpoint, on the same kind of device."""
    kept = config.precision == "auto" and saved.get("device") == identity["device"]
    return saved["precision"] if kept else identity["precision"]


def _listed(differing: dict) -> str:
    return "; ".join(f"{name} {values}" for name, values in differing.items())


def _windows_per_step(saved: dict, config: TrainConfig, identity: dict) -> tuple[int, int]:
    """The windows in a step of a checkpoint, and of the run that resumes from it.

    They are the same if the user's settings are: another number of ranks, such as after a node was lost, shares them otherwise.
    """
    layout = ("per_device_train_batch_size", "gradient_accumulation_steps")
    there, now = [saved["config"][name] for name in layout], [getattr(config, name) for name in layout]
    before = saved.get("windows_per_step") or math.prod(there) * saved["world_size"]
    return before, before if there == now else math.prod(now) * identity["world_size"]


def finished_summary(
    config: TrainConfig, run_dir: Path, output_dir: Path, resumed: Path | None, total_steps: int
) -> dict | None:
    """The summary of a finished run whose model is in its place, file by file; else None.

    A run that stopped early is finished unless it has more patience now. Raises UserError if it is to be extended without.
    """
    if not resumed or not output_dir.is_dir():
        return None
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        progress, steps = checkpoints.load_state(resumed)["progress"], summary["steps"]
        stopped_early = summary.get("stopped_early") and _out_of_patience(config, summary)
        if progress["step"] != steps and config.save_strategy not in ("best", "no"):
            return None
        if steps != total_steps and not stopped_early:
            return None
        if stopped_early and config.extend and summary["total_steps"] != total_steps:
            raise UserError(
                f"extend: {run_dir} stopped early at step {steps}; give a larger --early_stopping_patience, or none, to go on"
            )
        best = progress.get("best_saved") or {"step": steps}
        publishes_best = config.load_best_model_at_end and checkpoints.folder_of(resumed.parent, best["step"]).is_dir()
        complete = summary.get("published_step", steps) == (best["step"] if publishes_best else steps)
        written, present = ({**files, "README.md": ""} for files in (summary["output_sha256"], hashes(output_dir)))
        return summary if complete and written == present else None  # a person may edit the card
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: it is written again


def _out_of_patience(config: TrainConfig, summary: dict) -> bool:
    patience = config.early_stopping_patience
    return patience is not None and summary["evaluations_without_improvement"] >= patience
