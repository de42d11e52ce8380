"""Nodes without a shared disk: who writes where, whether all train the same, and which checkpoint they resume from.

The first rank of each file system is its writer. Each writer keeps a whole copy of the run, so no node's loss loses anything.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import mori
from mori.checkpoint import checkpoints, run_folder, writing
from mori.checkpoint.checkpoints import CorruptCheckpoint
from mori.checkpoint.files import advice, stays_in_place, sync, write
from mori.cli import RunFailed, UserError, plural, print_error
from mori.config import TrainConfig
from mori.distributed.ranks import Runtime, restarted

_BLOCK = 1 << 22  # bytes that are sent at once; no rank waits longer for another
# Settings that may differ between nodes.
_PLACES = ("model", "corpus", "output_dir", "logging_dir", "resume_from_checkpoint", "device")
_DATA = {
    "documents_sha256": "the corpus's SHA-256", "tokenizer_sha256": "the tokenizer's SHA-256",
    "model_sha256": "the SHA-256 of the model's configuration", "base_sha256": "the identity of the frozen weights",
    "document_bos": "document_bos", "parse_special_tokens": "parse_special_tokens", "precision": "precision",
}  # fmt: skip


def first_that_sees(runtime: Runtime, folder: Path) -> int:
    """The first rank that sees the same `folder` as this one: each looks for the files that the others put there. Collective."""
    if runtime.world_size == 1:
        return 0
    name = runtime.from_main(secrets.token_hex(8))
    marks = [folder / f".{name}-{rank}" for rank in range(runtime.rank + 1)]
    runtime.agreed(marks[-1].touch)
    try:
        first = next(rank for rank, path in enumerate(marks) if path.exists())
        runtime.barrier()
    finally:
        marks[-1].unlink(missing_ok=True)
    return first


def check_same(runtime: Runtime, values: dict, remedy: str) -> None:
    """Raise UserError if a rank has another value than the main rank; the message names both, and says `remedy`. Collective."""
    places = runtime.gather((socket.gethostname(), values))
    for rank, (host, there) in enumerate(places):
        names = [name for name in values if there.get(name) != places[0][1][name]]
        if names:
            differing = "; ".join(f"{name} {there.get(name)!r}, not {places[0][1][name]!r}" for name in names)
            place = f"rank {rank} on {host} differs from rank 0 on {places[0][0]}"
            runtime.on_main(partial(_refuse, f"{place} ({differing}); {remedy}"))


def _refuse(reason: str) -> None:
    raise UserError(reason)


def introduce(runtime: Runtime, config: TrainConfig, run_dir: Path, output_dir: Path) -> None:
    """Check the folders on every rank, and that all ranks have the same settings and code; set their writers. Collective.

    Raises UserError, the same one on every rank.
    """

    def check_folders() -> None:
        run_folder.check_apart(config.model, run_dir, output_dir)
        run_folder.check_writable(run_dir, output_dir)

    if runtime.world_size == 1:
        check_folders()
        return
    check_same(runtime, _settings(config), "give every node the same command and the same versions")
    runtime.agreed(check_folders)
    runtime.agreed(lambda: os.makedirs(run_dir.parent, exist_ok=True))
    runtime.writer = first_that_sees(runtime, run_dir.parent)
    if runtime.sharded:  # the ranks of the first node write the model
        return
    in_place = stays_in_place(output_dir)
    place = output_dir if in_place else next(folder for folder in output_dir.parents if folder.exists())
    runtime.publisher = first_that_sees(runtime, place)


def started_before(run_dir: Path) -> bool:
    """Whether torchrun starts this process again, after a failure (`--max-restarts`) or because a node has joined or left."""
    return restarted() or run_folder.is_of_this_torchrun(run_dir)


def _settings(config: TrainConfig) -> dict:
    """What every rank must have in common before anything is read: the settings that are no places, and the code's version."""
    values = {name: value for name, value in asdict(config).items() if name not in _PLACES}
    digest = hashlib.sha256()
    for path in sorted(Path(mori.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    has_validation = bool(config.validation_file)
    return {**values, "validation_file": has_validation, "mori": digest.hexdigest()[:12], "torch": torch.__version__}


def check_same_data(runtime: Runtime, identity: dict) -> None:
    """Raise UserError if a rank has read another text, tokenizer or model than the main rank. Collective."""
    values = {words: identity[name] for name, words in _DATA.items()}
    check_same(runtime, values, "give every node the same text and model")


@dataclass
class _Copy:
    """What one file system has of a checkpoint: its manifest, the names of whole files, the first damage ("" if there is none)."""

    host: str
    manifest: dict | None = None
    whole: list[str] = field(default_factory=list)
    damage: str = ""

    @property
    def seal(self) -> str | None:
        """What identifies the content of the checkpoint."""
        return self.manifest and self.manifest["seal"]


def find_run(
    runtime: Runtime,
    config: TrainConfig,
    run_dir: Path,
    is_named: bool,
    identity: dict,
    locks: contextlib.ExitStack,
) -> tuple[Path, Path | None]:
    """Choose and lock the run's folder on every file system; returns it, and the checkpoint to resume from. Collective.

    The ranks agree on the folder's name: that of the run that has gone furthest, or a name that is new everywhere.
    """
    folder = run_dir
    if not is_named:
        choices = runtime.agreed(lambda: _standing(run_folder.choose(config, run_dir, identity)), runtime.is_writer)
        folder = run_dir.with_name(max(choice for choice in choices if choice)[-1])
    runtime.agreed(lambda: folder.is_dir() and locks.enter_context(run_folder.lock(folder)) and None, runtime.is_writer)
    root, checkpoint = folder / "checkpoints", None
    if config.resume_from_checkpoint == "auto":
        runtime.agreed(lambda: checkpoints.clean(root), runtime.is_writer)
        checkpoint = newest_checkpoint(runtime, root, print_error)
    elif config.resume_from_checkpoint != "none":
        checkpoint = Path(config.resume_from_checkpoint)
        runtime.agreed(lambda: run_folder.check_named(checkpoint, folder), runtime.is_writer)
        seal = checkpoints.read_manifest(checkpoint)["seal"]
        check_same(runtime, {"resume_from_checkpoint": seal}, "give the same checkpoint on every node")
    if config.extend and not checkpoint:
        raise UserError(f"extend: {folder} has no checkpoint to resume from; leave --extend out to start a run")
    return folder, checkpoint


def _standing(folder: Path) -> tuple:
    """What orders the folders that the file systems would choose: runs that exist, by their newest step; then new names."""
    steps = [path.name for path in checkpoints.published(folder / "checkpoints")]
    number = re.search(r"-(\d+)$", folder.name)
    return folder.is_dir(), steps[-1] if steps else "", int(number[1]) if number else 1, folder.name


def newest_checkpoint(runtime: Runtime, root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of which the file systems together have every file, verified; every file system has it then. Collective.

    None if there is no checkpoint anywhere. Damaged and incomplete checkpoints that are newer are set aside and told to `say`.
    Raises UserError if no checkpoint is complete, because only the user can start another node, or start over.
    """
    if len(set(runtime.gather(runtime.writer))) == 1:
        put_aside = None if runtime.is_main else lambda *_: None
        try:
            return checkpoints.newest(root, say, partial(verify_together, runtime), put_aside)
        except UserError as error:
            error.reported_by_main_rank = not runtime.is_main
            raise
    any_damaged = runtime.any(any(root.glob("*.corrupt*")))
    steps = runtime.gather([path.name for path in checkpoints.published(root)] if runtime.is_writer else [])
    incomplete = {}
    for name in sorted({name for names in steps for name in names}, reverse=True):
        incomplete[root / name] = bring_everywhere(runtime, root / name, say)
        if not incomplete[root / name]:
            for folder, reason in incomplete.items():
                if reason and runtime.is_writer:
                    error = CorruptCheckpoint(f"no node has all of it, so an older one is taken: {reason}")
                    checkpoints.set_damaged_aside(folder, error, say)
            return root / name
    if incomplete or any_damaged:
        reasons = "; ".join(["", *incomplete.values()])
        remedy = "--resume_from_checkpoint none starts the run from the beginning"
        if "on no node" in reasons:
            remedy = f"start the nodes that have them too; {remedy}"
        runtime.on_main(partial(_refuse, f"no whole checkpoint is left under {root}{reasons}; {remedy}"))
    return None


def verify_together(runtime: Runtime, folder: Path) -> None:
    """`checkpoints.verify`, of which each rank does a share; every rank raises the first error. For a shared disk. Collective."""
    error = None
    try:
        files = checkpoints.read_manifest(folder)["files"]
        by_size = sorted(files, key=lambda name: -files[name]["bytes"])
        checkpoints.verify_files(folder, {name: files[name] for name in by_size[runtime.rank :: runtime.world_size]})
    except (CorruptCheckpoint, UserError) as raised:
        error = raised
    if first := next(filter(None, runtime.gather(error)), None):
        raise first


def bring_everywhere(runtime: Runtime, folder: Path, say: Callable[[str], None]) -> str:
    """Bring a checkpoint to every file system that lacks a part of it; returns what no file system has, "" if that worked. Collective."""
    copies = runtime.agreed(lambda: _copy_in(folder), runtime.is_writer)
    manifest, missing = _most_complete(copies)
    if not missing and sum(copy is not None for copy in copies) > 1:
        _complete(runtime, folder, manifest, copies, say)
    return missing


def _copy_in(folder: Path) -> _Copy:
    copy = _Copy(socket.gethostname())
    if not folder.is_dir():
        return copy
    try:
        copy.manifest = checkpoints.read_manifest(folder)
    except CorruptCheckpoint as error:
        copy.damage = str(error)
        return copy
    for name, description in copy.manifest["files"].items():
        if os.path.lexists(folder / name):
            try:
                checkpoints.verify_files(folder, {name: description})
                copy.whole.append(name)
            except CorruptCheckpoint as error:
                copy.damage = copy.damage or str(error)
    return copy


def _most_complete(copies: list[_Copy | None]) -> tuple[dict | None, str]:
    """The manifest of which the copies have most files, and in words what is missing ("" if nothing is)."""
    best, missing = None, None
    for manifest in [copy.manifest for copy in copies if copy and copy.manifest]:
        there = {name for copy in copies if copy and copy.seal == manifest["seal"] for name in copy.whole}
        absent = sorted(set(manifest["files"]) - there)
        if missing is None or len(absent) < len(missing):
            best, missing = manifest, absent
    damages = [f"rank {rank} on {copy.host}: {copy.damage}" for rank, copy in enumerate(copies) if copy and copy.damage]
    if missing:
        damages.insert(0, f"step {best['step']} has {', '.join(missing[:3])}{' …' * (len(missing) > 3)} on no node")
    return best, "" if missing == [] else "; ".join(damages) or "no manifest"


def _complete(runtime: Runtime, folder: Path, manifest: dict, copies: list, say: Callable[[str], None]) -> None:
    """Bring every file of a checkpoint to each file system that lacks it, from the first rank that has it whole."""
    whole = {r: set(copy.whole) if copy.seal == manifest["seal"] else set() for r, copy in enumerate(copies) if copy}
    lacking = {rank: sorted(set(manifest["files"]) - names) for rank, names in whole.items()}
    for rank, names in lacking.items():
        if names and runtime.is_main:
            size, damage = sum(manifest["files"][name]["bytes"] for name in names), copies[rank].damage
            say(
                f"rank {rank} on {copies[rank].host} fetches {plural(len(names), 'file')} of {folder.name} from other nodes "
                f"({size / 2**20:,.1f} MiB){damage and f': {damage}'}"
            )
    own, staged = lacking.get(runtime.rank, []), checkpoints.staged_folder_of(folder.parent, manifest["step"])
    with _writing(folder):
        for name in sorted({name for names in lacking.values() for name in names}):
            source = next(rank for rank, names in whole.items() if name in names)
            targets = [rank for rank, names in lacking.items() if name in names]
            _transfer(runtime, folder, staged, name, manifest["files"][name], source, targets)
        # A folder of the same checkpoint is filled in place: its other files may be the only ones.
        if own and copies[runtime.rank].seal == manifest["seal"]:
            for name in own:
                os.replace(staged / name, folder / name)
            sync(folder)
            shutil.rmtree(staged)
        elif own:
            if damage := copies[runtime.rank].damage:
                checkpoints.set_damaged_aside(folder, CorruptCheckpoint(damage), say)
            layout = manifest.get("files_of_ranks") or [list(manifest["files"])]
            parts = [{name: manifest["files"][name] for name in names} for names in layout]
            writing.publish(folder.parent, manifest["step"], *parts)
    runtime.barrier()


def _transfer(
    runtime: Runtime, folder: Path, staged: Path, name: str, description: dict, source: int, targets: list[int]
) -> None:
    """Copy a file from the rank `source` to the ranks `targets`, in blocks, after each of which all ranks meet."""
    sizes = [min(_BLOCK, description["bytes"] - start) for start in range(0, description["bytes"], _BLOCK)]

    def received() -> Iterator[memoryview]:
        for size in sizes:
            block = torch.empty(size, dtype=torch.uint8)
            dist.recv(block, source, group=runtime.control)
            runtime.barrier()
            yield memoryview(block.numpy())

    if runtime.rank in targets:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if write(staged / name, received()) != description:
            raise RunFailed(f"{name} of {folder} changed on its way from rank {source}; the same command tries again")
        return
    with (folder / name).open("rb") if runtime.rank == source else contextlib.nullcontext() as file:
        for size in sizes:
            if file:
                block = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
                for rank in targets:
                    dist.send(block, rank, group=runtime.control)
            runtime.barrier()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Convert OSError to a UserError of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {folder}: {advice(error)}") from None
