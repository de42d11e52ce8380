"""Disks that spoil what is on them, and disks without room."""

import contextlib
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mori import optim
from mori.checkpoint import checkpoints as checkpoint
from mori.checkpoint import files

from .common import STEPS, WEIGHTS, Case, Ended, Lab, patched, row, run, seeds, together

FILES = (WEIGHTS, "optimizer.safetensors", "state.json", "manifest.json")


def _flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def _zero(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    at = draw.randrange(len(raw)) // 4096 * 4096
    page = raw[at : at + 4096]
    raw[at : at + 4096] = bytes(len(page)) if any(page) else b"\1" * len(page)
    path.write_bytes(raw)


def _truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def _delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def _swap(path: Path, draw: random.Random) -> None:
    other = checkpoint.published(path.parent.parent)[0] / path.name
    ours, theirs = path.read_bytes(), other.read_bytes()
    if ours != theirs:
        path.write_bytes(theirs)  # the older one keeps its own, so that it can be gone on from
    else:
        _flip(path, draw)


def _edit(path: Path, draw: random.Random) -> None:
    path = path.with_name("manifest.json")
    manifest = json.loads(path.read_text())
    name = draw.choice(FILES[:3])
    described = manifest["files"][name]
    draw.choice(
        [
            lambda: described.update(bytes=described["bytes"] + 1),
            lambda: described.update(sha256=described["sha256"][::-1]),
            lambda: manifest.update(format=2),
            lambda: manifest["files"].pop(name),
            lambda: manifest.pop("seal"),
            lambda: manifest.update(files=[]),
            lambda: manifest["files"].update({"../x": described}),
        ]
    )()
    path.write_text(json.dumps(manifest))


DAMAGES = {"bit flip": _flip, "zeroed page": _zero, "truncation": _truncate, "deletion": _delete, "file of another checkpoint": _swap, "edited manifest": _edit}  # fmt: skip


def _stopped(lab: Lab) -> tuple[dict, Path]:
    """The files of a run that was killed after its second of three saves, and what it leaves when it goes on."""
    whole = lab.whole()
    at_step = patched(optim, "set_learning_rate", 10, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert run(lab.config("stopped"), at_step).code == -signal.SIGKILL
    return whole, lab.folder / "stopped"


def corruptions(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Damage to each file of the newest checkpoint: named, set aside, and the one before gone on from."""
    whole, stopped = _stopped(lab)
    found, others, lost, started = [], [], [], time.perf_counter()
    for number, case_seed in enumerate(seeds(seed, 540 if full else 6)):
        kind, file = list(DAMAGES)[number % len(DAMAGES)], FILES[number // len(DAMAGES) % len(FILES)]
        draw = random.Random(case_seed)
        shutil.copytree(stopped, lab.folder / "damaged")
        newest = lab.checkpoints("damaged") / "step-00000008"
        DAMAGES[kind](newest / file, draw)
        ended = run(lab.config("damaged"))
        problem = ended.problem(0) or lab.differs("damaged", whole)
        named = file if kind != "edited manifest" else "manifest.json"
        if not problem and not re.search(
            rf"set aside as step-00000008.corrupt: .*{re.escape(named)}|format 2", ended.text
        ):
            problem = f"not named: {ended.text[:300]}"
        if not problem and not newest.with_name("step-00000008.corrupt").is_dir():
            problem = "not set aside"
        found.append(Case(f"{kind} in {file}", case_seed, problem))
        lab.drop("damaged")
    for number, case_seed in enumerate(seeds(seed + 1, 60 if full else 3)):
        kind = ("bit flip", "zeroed page", "truncation", "deletion")[number % 4]
        shutil.copytree(stopped, lab.folder / "damaged")
        cache = next((lab.folder / "damaged" / "runs" / ".cache").iterdir())
        run_dir = lab.run_dir("damaged")
        path = [cache, run_dir / "config.json", run_dir / "environment.json", next(run_dir.glob("events*"))][
            number // 4 % 4
        ]
        DAMAGES[kind](path, random.Random(case_seed))
        ended = run(lab.config("damaged"))
        problem = ended.problem(0) or lab.differs("damaged", whole)
        others.append(Case(f"{kind} in {re.sub(r'[0-9a-f.]{16,}', '*', path.name)}", case_seed, problem))
        lab.drop("damaged")
    for case_seed in seeds(seed + 2, 20 if full else 1):
        shutil.copytree(stopped, lab.folder / "damaged")
        draw = random.Random(case_seed)
        for folder in checkpoint.published(lab.checkpoints("damaged")):
            DAMAGES[draw.choice(list(DAMAGES)[:4])](folder / draw.choice(FILES), draw)
        ended = run(lab.config("damaged"))
        problem = ended.problem(2) or ("" if "no whole checkpoint is left" in ended.text else ended.text[:300])
        lost.append(Case("all checkpoints damaged", case_seed, problem))
        lab.drop("damaged")
    return [
        row("damage to a file of the newest checkpoint: named, set aside, the one before used, bit-identical end", seed, found, started),
        row("damage to a file beside the checkpoints: bit-identical end", seed, others, started),
        row("damage to every checkpoint: said so, and not begun anew", seed, lost, started),
    ]  # fmt: skip


def corruptions_of_shared_weights(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Damage to each file of the newest checkpoint of two ranks that share the weights."""
    shared, started = {"fsdp": "full_shard"}, time.perf_counter()
    whole = lab.whole(2, **shared)
    at_step = patched(optim, "set_learning_rate", 10, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert together(lab.config("stopped", **shared), 2, at_step).code == -signal.SIGKILL
    names = sorted(path.name for path in (lab.checkpoints("stopped") / "step-00000008").iterdir())
    pairs = [(kind, name) for kind in ("bit flip", "zeroed page", "truncation", "deletion") for name in names]
    cases = []
    for (kind, name), case_seed in zip(
        pairs if full else pairs[:: len(pairs) // 2], seeds(seed, len(pairs)), strict=False
    ):
        shutil.copytree(lab.folder / "stopped", lab.folder / "damaged")
        newest = lab.checkpoints("damaged") / "step-00000008"
        DAMAGES[kind](newest / name, random.Random(case_seed))
        ended = together(lab.config("damaged", **shared), 2)
        problem = ended.problem(0) or lab.differs("damaged", whole)
        if not problem and not re.search(rf"set aside as step-00000008.corrupt: .*{re.escape(name)}", ended.text):
            problem = f"not named: {ended.text[:300]}"
        cases.append(Case(f"{kind} in {name}", case_seed, problem))
        lab.drop("damaged")
    title = "damage to a file of the newest checkpoint of two ranks that share the weights: the one before used"
    return [row(title, seed, cases, started)]


@contextlib.contextmanager
def _small_disk(folder: Path, kib: int) -> Iterator[Callable[[str], None] | None]:
    """A file system of `kib` KiB at `folder`, and a function that gives it another size; None where mounting is not allowed."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", folder], stderr=subprocess.DEVNULL)
    if mounted.returncode:
        yield None
        return
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", "none", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _without_room(ended: Ended, lab: Lab, name: str) -> str:
    """What is wrong with how a run met a full disk."""
    problem = ended.problem(0, 1, 2)
    if not problem and ended.code and not re.search(r"train.py: (error|failed): .+", ended.text):
        problem = f"no line says what is wrong: {ended.text[-300:]}"
    told = re.search(r"/checkpoints: .+ \(it needs [\d.,]+ MiB, [\d.,]+ MiB are free\)", ended.text)
    if not problem and "no checkpoint at step" in ended.text and not told:
        problem = f"path, need and room are not named: {ended.text[-300:]}"
    stages = [path.name for path in (lab.folder / name).rglob(".*") if path.suffix in (".partial", ".pruned")]
    return problem or (f"{stages} left behind" if stages else "")


def _obey_permissions() -> None:
    """In a child: root, whom no permission stops, is stopped like anybody else (capabilities(7), CAP_DAC_OVERRIDE)."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~(1 << 1)  # of the effective ones
    assert libc.capset(header, sets) == 0


def no_space(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Disks of many sizes, files that may not grow, read-only folders: the run goes on, or goes on once there is room."""
    whole, cases, started = lab.whole(), [], time.perf_counter()
    sizes = [8 + 24 * number for number in range(25)] if full else [150]  # a run takes some 500 KiB
    for kib in sizes:
        name = f"disk-{kib}"
        with _small_disk(lab.folder / name, kib) as remount:
            if remount:
                ended = run(lab.config(name))
                problem = _without_room(ended, lab, name)
                remount("50m")
                problem = problem or run(lab.config(name)).problem(0) or lab.differs(name, whole)
                cases.append(Case(f"a disk of {kib} KiB", kib, problem))
        lab.drop(name)
    for kib in [1 + 3 * number for number in range(50 - len(cases))] if full else [40]:
        name = f"limit-{kib}"

        def limit(kib=kib) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, kib << 10))

        problem = _without_room(run(lab.config(name), limit), lab, name)
        problem = problem or run(lab.config(name)).problem(0) or lab.differs(name, whole)
        cases.append(Case(f"no file above {kib} KiB", kib, problem))
        lab.drop(name)
    turned = []
    for step in range(1, STEPS + 1) if full else [6]:
        name = f"read-only-{step}"

        def lock(name=name) -> None:
            lab.checkpoints(name).mkdir(exist_ok=True)
            lab.checkpoints(name).chmod(0o555)

        def before(step=step, lock=lock) -> None:
            _obey_permissions()
            patched(optim, "set_learning_rate", step, lock)()

        ended = run(lab.config(name), before)
        problem = ended.problem(1) or _without_room(ended, lab, name)
        if not problem and "the last checkpoint could not be saved" not in ended.text:
            problem = "not told"
        lab.checkpoints(name).chmod(0o755)
        problem = problem or run(lab.config(name)).problem(0) or lab.differs(name, whole)
        turned.append(Case(f"read-only from step {step}", step, problem))
        lab.drop(name)
    logs = []
    for step in range(1, STEPS + 1) if full else [3]:
        name = f"log-{step}"

        def lose_the_logs(name=name) -> None:
            for path in [lab.run_dir(name) / "metrics.jsonl", *lab.run_dir(name).glob("events*")]:
                path.unlink(missing_ok=True)
                os.symlink("/dev/full", path)
            for stream in (1, 2):
                os.dup2(os.open("/dev/full", os.O_WRONLY), stream)

        ended = run(lab.config(name), patched(optim, "set_learning_rate", step, lose_the_logs))
        weights = files.hashes(lab.folder / name / "brain")["model.safetensors"] if ended.code == 0 else ""
        logs.append(
            Case(
                f"logs and output full from step {step}",
                step,
                ended.problem(0) or ("" if weights == whole["brain"]["model.safetensors"] else "brain differs"),
            )
        )
        lab.drop(name)
    return [
        row("no space, at many sizes: goes on or says why; with room again, bit-identical end", seed, cases, started),
        row("the folder may not be written any more: trained to the end, saved once it can be", seed, turned, started),
        row("logs, standard output and standard error on a full disk: training goes on", seed, logs, started),
    ]


CAMPAIGNS = [corruptions, corruptions_of_shared_weights, no_space]
