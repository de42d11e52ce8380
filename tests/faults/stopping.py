"""Runs that are stopped: killed at random, killed between any two changes on disk, unplugged, told by a signal; and cut."""

import mmap
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mori.train
from mori import optim, output
from mori.checkpoint import checkpoints as checkpoint
from mori.distributed import Runtime
from mori.model.lm import CausalLMLoss
from mori.tracking.loggers import read_metrics

from .common import (
    SAVE_STEPS,
    STEPS,
    WEIGHTS,
    Case,
    Lab,
    end,
    fork,
    free_port,
    on_the_board,
    patched,
    row,
    run,
    seeds,
    together,
    torchrun,
    wait,
)

CHANGES = ("write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
LONG = {"max_steps": 60, "eval_steps": 30}


def newest(lab: Lab, name: str) -> int:
    """The step of the newest whole checkpoint, 0 where there is none."""
    for folder in checkpoint.published(lab.checkpoints(name))[::-1]:
        try:
            checkpoint.verify(folder)
            return int(folder.name[5:])
        except checkpoint.CorruptCheckpoint:
            continue
    return 0


def done(lab: Lab, name: str) -> int:
    """The last step that was logged."""
    return max((line["step"] for line in read_metrics(lab.run_dir(name) / "metrics.jsonl")), default=0)


def spoiled(lab: Lab, name: str, before: int) -> str:
    """What a kill has spoiled, a whole checkpoint of step `before` having been there."""
    now = newest(lab, name)
    if now < before:
        return f"the whole checkpoint of step {before} is gone, the newest is of {now}"
    lost = done(lab, name) - now
    return f"{lost} steps are lost" if lost > SAVE_STEPS else ""


_SHARED = {"fsdp": "full_shard"}
# The fields and the ranks of each chain of kills.
CHAINS: list[tuple[dict, int]] = [
    *[({}, 1), ({"precision": "fp16"}, 1), ({}, 2), ({"precision": "bf16"}, 1)] * 5,
    *[(_SHARED, 2), (_SHARED | {"async_save": True}, 2)] * 3,
]


def kills(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Chains of ten kills at random instants, and how each chain ends that is let go on."""
    chains = CHAINS if full else CHAINS[1:2]
    kinds = ["torchrun" if number in (2, 6) else "" for number in range(len(chains))]
    single, ends, started = [], [], time.perf_counter()
    for number, (case_seed, (options, ranks), kind) in enumerate(
        zip(seeds(seed, len(chains)), chains, kinds, strict=True)
    ):
        name, draw = f"chain-{number}", random.Random(case_seed)
        config, whole = lab.config(name, **LONG, **options), lab.whole(ranks, **LONG, **options)
        label = f"{kind or f'{ranks} process(es)'} {' '.join(map(str, options.values()))}"
        mine = []
        while len(mine) < (10 if full else 4):
            before = newest(lab, name)
            if _killed(config, ranks, kind, draw, whole["seconds"]):
                mine.append(Case(label, case_seed, spoiled(lab, name, before)))
            elif problem := lab.differs(name, whole):
                ends.append(Case(label, case_seed, problem))
            else:
                lab.drop(name)  # it has ended too early to be killed, and well: once more
        ended = together(config, ranks)
        problem = ended.problem(0) or lab.differs(name, whole)
        shown = on_the_board(lab.run_dir(name)) if not problem else []
        if not problem and shown != list(range(1, LONG["max_steps"] + 1)):
            problem = f"TensorBoard shows the steps {shown}"
        single, ends = single + mine, [*ends, Case(label, case_seed, problem)]
        lab.drop(name)
    return [
        row("SIGKILL at a random instant: nothing published is lost, at most one save interval", seed, single, started),
        row("chains of these kills: the end is bit-identical", seed, ends, started),
    ]


def _killed(config: dict, ranks: int, kind: str, draw: random.Random, seconds: float) -> bool:
    """Start a run and kill all of it at a random instant; False where it had ended before."""
    if kind == "torchrun":
        process = torchrun(config, ranks, stdout=-3, stderr=-3)
        log = Path(config["logging_dir"]) / "run" / "metrics.jsonl"
        before = read_metrics(log)
        while read_metrics(log) == before and process.poll() is None:  # it imports, for seconds
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2 * seconds))
        running = process.poll() is None
        end(process)
        return running
    if ranks == 1:
        return run(config, kill_after=draw.uniform(0.05, 0.3 * seconds)).code == -signal.SIGKILL
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    pids = [fork(config, RANK=str(rank), LOCAL_RANK=str(rank), **port) for rank in range(ranks)]
    time.sleep(draw.uniform(0.05, 0.3 * seconds))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return -signal.SIGKILL in [wait(pid) for pid in pids]


class Disk:
    """Stands between a child and the os: counts the changes on disk, and ends the child before one of them.

    Args:
        at: the number of the change that is not done any more; half of it is, where it is a write and `torn`.
        unplugged: also lose what was not yet synced. Files keep a part of what came after their last fsync, and renames
            that came after the last fsync of their folder are taken back, the last ones first.
    """

    def __init__(self, at: int, *, torn: bool = False, unplugged: random.Random | None = None):
        self.at, self.torn, self.unplugged = at, torn, unplugged
        self.count = mmap.mmap(-1, 8)  # shared with the parent
        self.synced: dict[str, int] = {}  # path -> bytes of it that are safe, for files with others
        self.renamed: list[tuple[str, str, bytes | None]] = []  # from, to, and what was there before
        self.lock = threading.Lock()

    @property
    def changes(self) -> int:
        """How many changes there were."""
        return int.from_bytes(self.count[:8], "little")

    def attach(self) -> None:
        """Begin to count, in the child."""
        self.real = {name: getattr(os, name) for name in CHANGES}
        for name, real in self.real.items():
            setattr(os, name, self._watched(name, real))

    def _watched(self, name: str, real: Callable) -> Callable:
        def call(*arguments, **keywords):
            with self.lock:
                number = self.changes + 1
                self.count[:8] = number.to_bytes(8, "little")
            if number == self.at:
                if self.torn and name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    self._note(name, arguments, None)
                if self.unplugged:
                    self._lose()
                os.kill(os.getpid(), signal.SIGKILL)
            replaced = None
            if name in ("rename", "replace") and os.path.isfile(arguments[1]):
                replaced = Path(arguments[1]).read_bytes()
            result = real(*arguments, **keywords)
            with self.lock:
                self._note(name, arguments, replaced)
            return result

        return call

    def _note(self, name: str, arguments: tuple, replaced: bytes | None) -> None:
        if name in ("write", "fsync"):
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
            if name == "write":
                self.synced.setdefault(path, 0)
            else:
                self.synced.pop(path, None)
                self.renamed = [change for change in self.renamed if os.path.dirname(change[1]) != path]
        elif name in ("rename", "replace"):
            old, new = map(str, arguments[:2])
            self.renamed.append((old, new, replaced))
            self.synced = {
                new + path[len(old) :] if path.startswith(old) else path: size for path, size in self.synced.items()
            }

    def _lose(self) -> None:
        for name in CHANGES:
            setattr(os, name, self.real[name])
        for path, safe in self.synced.items():
            if os.path.isfile(path):
                os.truncate(path, self.unplugged.randint(safe, os.path.getsize(path)))
        for old, new, replaced in self.renamed[self.unplugged.randint(0, len(self.renamed)) :][::-1]:
            if os.path.lexists(new) and not os.path.lexists(old):
                shutil.move(new, old)
                if replaced is not None:
                    with open(new, "wb") as file:
                        file.write(replaced)


def changes(lab: Lab, full: bool, seed: int) -> list[dict]:
    """A kill before every single change on disk of a run with three saves, a prune and a publication."""
    watched = Disk(at=0)
    ended = run(lab.config("counted", save_total_limit=1), watched.attach)
    assert ended.code == 0 and watched.changes > 60, (ended.text, watched.changes)
    lab.drop("counted")
    rows = []
    for kind in ("kill", "unplugged"):
        every = range(1, watched.changes + 1) if full else range(7, watched.changes, watched.changes // 6)
        started = time.perf_counter()
        cases = [
            _stopped_at(lab, number, case_seed, kind == "unplugged")
            for number, case_seed in zip(every, seeds(seed, len(every)), strict=True)
        ]
        what = (
            "kill before each change on disk"
            if kind == "kill"
            else "power lost before each change on disk (writes and renames that were not synced are lost)"
        )
        rows.append(row(f"{what}: write, fsync, rename, unlink of save, prune and publication", seed, cases, started))
    return rows


def changes_in_background(lab: Lab, full: bool, seed: int) -> list[dict]:
    """The same of a run that saves in the background."""
    return [_every_change(lab, full, seed, "a save in the background", async_save=True)]


def changes_of_shared_weights(lab: Lab, full: bool, seed: int) -> list[dict]:
    """The same of two ranks that share the weights, of which one is killed."""
    shared = {"ranks": 2, "fsdp": "full_shard"}
    return [
        _every_change(lab, full, seed, "a save of two ranks that share the weights", **shared),
        _every_change(lab, full, seed, "a save of two such ranks in the background", **shared, async_save=True),
    ]


def _every_change(lab: Lab, full: bool, seed: int, what: str, **options) -> dict:
    ranks, watched, started = options.get("ranks", 1), Disk(at=0), time.perf_counter()
    settings = {name: value for name, value in options.items() if name != "ranks"}
    ended = together(lab.config("counted", save_total_limit=1, **settings), ranks, watched.attach)
    assert ended.code == 0 and watched.changes > 60, (ended.text, watched.changes)
    lab.drop("counted")
    every = range(1, watched.changes + 1) if full else range(9, watched.changes, watched.changes // 2)
    cases = [
        _stopped_at(lab, number, case_seed, False, **options)
        for number, case_seed in zip(every, seeds(seed, len(every)), strict=True)
    ]
    return row(f"kill before each change on disk of {what}", seed, cases, started)


def _stopped_at(lab: Lab, number: int, seed: int, unplugged: bool, ranks: int = 1, **options) -> Case:
    draw = random.Random(seed)
    name = f"change-{number}"
    settings = {"save_total_limit": 1, **options}
    config, whole = lab.config(name, **settings), lab.whole(ranks, **settings)
    disk = Disk(number, torn=draw.random() < 0.5, unplugged=draw if unplugged else None)
    ended = together(config, ranks, disk.attach)
    # Threads and ranks take turns as they like: the last change may come a little earlier.
    problem = ended.problem(-signal.SIGKILL, *[0] * bool(options))
    # Saves are at 4, 8 and 12: with the step after logged, the first is published; in the background, with the step after 8.
    first = SAVE_STEPS * (2 if options.get("async_save") else 1)
    problem = problem or ("no whole checkpoint is left" if done(lab, name) > first and not newest(lab, name) else "")
    if not problem:
        ended = together(config, ranks)
        problem = ended.problem(0) or lab.differs(name, whole)
        problem = problem or ("a checkpoint was taken for damaged" if "checkpoint set aside" in ended.text else "")
    lab.drop(name)
    return Case(f"change {number}", seed, problem)


def kills_in_saves(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Kills at random instants inside a save or the prune after it."""
    cases, inside, started = [], 0, time.perf_counter()
    for case_seed in seeds(seed, 200 if full else 4):
        draw, name = random.Random(case_seed), "in-a-save"
        delay, at = draw.uniform(0, 0.02), draw.choice([1, 2, 3])

        def kill_soon(delay=delay) -> None:
            if not os.fork():
                os.closerange(3, 256)  # the lock on the run's folder among them
                time.sleep(delay)
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(0)

        config, whole = lab.config(name, save_total_limit=1), lab.whole(save_total_limit=1)
        ended = run(config, patched(output, "save", at, kill_soon))
        inside += any(lab.checkpoints(name).glob(".step-*"))
        # After the last save the run may end before its kill comes: it must then be complete.
        problem = ended.problem(-signal.SIGKILL, 0) or spoiled(lab, name, SAVE_STEPS * (at - 1))
        if not problem and ended.code == 0:
            problem = lab.differs(name, whole)
        if not problem:
            ended = run(config)
            problem = ended.problem(0) or lab.differs(name, whole)
        cases.append(Case(f"save {at}, {delay * 1000:.1f} ms", case_seed, problem))
        lab.drop(name)
    return [
        row(f"SIGKILL within 20 ms of the beginning of a save ({inside} with files half-written)", seed, cases, started)
    ]


def signals(lab: Lab, full: bool, seed: int) -> list[dict]:
    """SIGINT, SIGTERM and SIGUSR1 everywhere in a run: saved within a step, and bit-identical in the end."""
    options = {"warmup_steps": 4}
    whole = lab.whole(**options)
    places = {
        "the first batch": (mori.train, "load_step", [1]),
        "a step in the warm-up": (optim, "set_learning_rate", [1, 2, 3]),
        "a step": (optim, "set_learning_rate", [5, 8, 9, 11, 12]),
        "an accumulation": (Runtime, "no_sync", [6, 11, 16]),
        "an evaluation": (CausalLMLoss, "forward", [1, 2, 3]),
        "the samples": (mori.train, "generate", [1, 2, 3]),
        "a save": (output, "save", [1, 2, 3]),
    }
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    pairs = [(place, number) for place in places for number in numbers]
    cases, started = [], time.perf_counter()
    for index, case_seed in enumerate(seeds(seed, 51 if full else 3)):
        draw, name = random.Random(case_seed), "signal"
        place, number = pairs[index % len(pairs)] if full else pairs[index * 8]
        module, function, calls = places[place]
        config, at = lab.config(name, **options), mmap.mmap(-1, 8)  # the step in which the signal comes

        def tell(number=number, at=at, name=name) -> None:
            at[:8] = (done(lab, name) + 1).to_bytes(8, "little")
            os.kill(os.getpid(), number)

        problem = run(config, patched(module, function, draw.choice(calls), tell)).problem(130)
        step = int.from_bytes(at[:8], "little")
        if not problem and newest(lab, name) not in (step - 1, step):
            problem = f"told in step {step}, saved at {newest(lab, name)}"
        if not problem:
            problem = run(config).problem(0) or lab.differs(name, whole)
        cases.append(Case(f"{number.name} in {place}", case_seed, problem))
        lab.drop(name)
    for case_seed in seeds(seed + 1, 9 if full else 1):
        draw, name = random.Random(case_seed), "signal"
        place = draw.choice(list(places))
        module, function, calls = places[place]

        def twice() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)

        config = lab.config(name, **options)
        ended = run(config, patched(module, function, draw.choice(calls), twice))
        problem = ended.problem(130) or spoiled(lab, name, 0)
        if not problem and ("train.py: interrupted" not in ended.text or "saved at step" in ended.text):
            problem = "the second did not leave at once"
        problem = problem or run(config).problem(0) or lab.differs(name, whole)
        cases.append(Case(f"Ctrl-C twice in {place}", case_seed, problem))
        lab.drop(name)
    return [row("signals: saved within one step, code 130, bit-identical end", seed, cases, started)]


def cuts(lab: Lab, full: bool, seed: int) -> list[dict]:
    """A run that is taken up after each of its steps goes on through the same checkpoints, tensor by tensor."""
    rows = []
    kinds = {
        "epoch edge": ({"per_device_train_batch_size": 8}, 1),
        "accumulation": ({"gradient_accumulation_steps": 3}, 1),
        "scaler": ({"precision": "fp16"}, 1),
        "two ranks": ({}, 2),
        "three ranks": ({}, 3),  # whose sums have an order
    }
    for kind, (options, ranks) in kinds.items():
        steps, started = 21 if full else 4, time.perf_counter()
        settings = options | {"max_steps": steps, "save_steps": 1, "save_total_limit": 100, "eval_steps": 7}
        name = f"all-{kind.replace(' ', '-')}"
        assert (ended := together(lab.config(name, **settings), ranks)).code == 0, ended.text
        cases = [_cut_at(lab, step, name, settings, ranks) for step in range(1, steps)]
        rows.append(row(f"resume after each step, {kind}: all later checkpoints are equal", seed, cases, started))
        lab.drop(name)
    return rows


def _cut_at(lab: Lab, step: int, name: str, settings: dict, ranks: int) -> Case:
    cut = f"cut-{step}"
    for part in ("runs/run", "runs/.cache"):
        shutil.copytree(lab.folder / name / part, lab.folder / cut / part)
    for folder in checkpoint.published(lab.checkpoints(cut)):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    ended = together(lab.config(cut, **settings), ranks)
    problem = ended.problem(0)
    for theirs in checkpoint.published(lab.checkpoints(name)) if not problem else []:
        ours = lab.checkpoints(cut) / theirs.name
        for file in (WEIGHTS, "optimizer.safetensors"):
            if _bytes(ours / file) != _bytes(theirs / file):
                problem = problem or f"{theirs.name}/{file} differs"
    problem = problem or lab.differs(cut, lab.left_by(name))
    lab.drop(cut)
    return Case(f"after step {step}", step, problem)


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


CAMPAIGNS = [kills, changes, changes_in_background, changes_of_shared_weights, kills_in_saves, signals, cuts]
assert STEPS == 3 * SAVE_STEPS
