"""What the campaigns share: a small run, forked children that train, and what is compared when they have ended.

A child is forked from a process that has imported everything and has no threads, so a case takes a fraction of a second, and
can be killed like any other process.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GPT2Config

from mori.checkpoint import checkpoints as checkpoint
from mori.checkpoint import files
from mori.cli import run_script
from mori.config import TrainConfig
from mori.data.files import SHIPPED
from mori.model.loading import train_tokenizer
from mori.tracking.loggers import read_metrics
from mori.train import train

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_STEPS = 12, 4
ADAPTERS = bool(os.environ.get("MORI_FAULTS_ADAPTERS"))  # set by --adapters: the runs train LoRA adapters
WEIGHTS = "adapter_model.safetensors" if ADAPTERS else "model.safetensors"  # of a checkpoint
HUNG = 1000
APART = (
    "tokens",
    "samples_before",
    "samples_after",
    "peak_memory_bytes",
)  # what a checkpoint in the middle may hold otherwise; see the summary


@dataclass
class Case:
    """One thing that was tried: what it was, the seed that replays it, and what did not hold ("" where all did)."""

    name: str
    seed: int
    problem: str


def row(name: str, seed: int, done: list[Case], started: float) -> dict:
    """A campaign's line in the results; `started` is when it began, by `time.perf_counter`."""
    failures = [{"case": case.name, "seed": case.seed, "problem": case.problem} for case in done if case.problem]
    return {
        "name": name, "tried": len(done), "held": len(done) - len(failures), "seconds": round(time.perf_counter() - started, 1),
        "seed": seed, "cases": [{"case": case.name, "seed": case.seed} for case in done], "failures": failures,
    }  # fmt: skip


@dataclass
class Ended:
    """How a child ended: `code` is negative for the signal that killed it."""

    code: int
    text: str
    seconds: float

    def problem(self, *codes: int) -> str:
        """What is wrong with the way it ended, where one of `codes` was expected."""
        if "Traceback" in self.text:
            return f"a traceback: {self.text.strip()[-300:]}"
        return "" if self.code in codes else f"code {self.code}: {self.text.strip()[-300:]}"


@dataclass
class Lab:
    """A folder for one campaign, the model and the text in it, and the runs that nothing happened to."""

    folder: Path
    wholes: dict = field(default_factory=dict)

    def __post_init__(self):
        text = sorted(SHIPPED.glob("*.txt"))[1].read_text(encoding="utf-8")[:3000]
        tokenizer = train_tokenizer([text], 300)
        torch.manual_seed(0)
        shape = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        transformers.logging.disable_progress_bar()
        AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.text.write_text(text, encoding="utf-8")

    @property
    def model(self) -> Path:
        """A GPT-2 with dropout."""
        return self.folder / "model"

    @property
    def text(self) -> Path:
        """The corpus."""
        return self.folder / "text.txt"

    def config(self, name: str, **changed) -> dict:
        """The fields of a run named `name`, whose files are all in the folder `name`."""
        return {
            "model": str(self.model), "corpus": [str(self.text)], "block_size": 16, "held_out_fraction": 0.1, "max_steps": STEPS,
            "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
            "eval_steps": 6, "save_steps": SAVE_STEPS, "save_total_limit": 2, "max_new_tokens": 2, "prompt": ["Halo"], "device": "cpu",
            "logging_dir": str(self.folder / name / "runs"), "output_dir": str(self.folder / name / "brain"), "run_name": "run", **({"use_peft": True, "lora_r": 2} if ADAPTERS else {}),
        } | changed  # fmt: skip

    def whole(self, ranks: int = 1, **changed) -> dict:
        """What a run with these fields leaves that nothing happens to; it is done once."""
        key = json.dumps([changed, ranks], sort_keys=True)
        if key not in self.wholes:
            name = f"whole-{len(self.wholes)}"
            ended = together(self.config(name, **changed), ranks)
            assert ended.code == 0, ended.text
            self.wholes[key] = self.left_by(name) | {"seconds": ended.seconds}
        return self.wholes[key]

    def run_dir(self, name: str) -> Path:
        """The run's own folder."""
        return self.folder / name / "runs" / "run"

    def checkpoints(self, name: str) -> Path:
        """The folder of its checkpoints."""
        return self.run_dir(name) / "checkpoints"

    def left_by(self, name: str) -> dict:
        """All that two equal runs leave equally: weights, the last checkpoint's state, and every number that was logged."""
        last = checkpoint.published(self.checkpoints(name))[-1]
        checkpoint.verify(last)
        described = json.loads((last / "manifest.json").read_text())["files"]
        state = json.loads((last / "state.json").read_text())
        summary = json.loads((self.run_dir(name) / "summary.json").read_text())
        names = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
        lines = [[line.get(n) for n in names] for line in read_metrics(self.run_dir(name) / "metrics.jsonl")]
        lines = [line for line in lines if any(line[1:])]
        return {
            "brain": _tensors(files.hashes(self.folder / name / "brain"), ""),
            "model": _tensors(described, WEIGHTS),
            "optimizer": _tensors(described, "optimizer"),
            "state": {k: v for k, v in state["progress"].items() if isinstance(v, (int, list)) and k not in APART},
            "random": [state["ranks"], state["scaler"]],
            "found": [summary["eval"], summary["samples"], summary["skipped_steps"]],
            "log": json.dumps(lines),
        }  # fmt: skip

    def differs(self, name: str, whole: dict) -> str:
        """What the run `name`, which has ended, left otherwise than `whole`, or left behind."""
        left = self.left_by(name)
        differing = [key for key in left if left[key] != whole[key]]
        stages = [path.name for path in (self.folder / name).rglob(".*") if path.suffix in (".partial", ".pruned")]
        return "; ".join([*(f"{key} differs" for key in differing), *(f"{stage} is left behind" for stage in stages)])

    def drop(self, name: str) -> None:
        """Remove a case's folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def _tensors(files: dict, name: str) -> dict:
    """The files of tensors whose names begin as `name` does: one, or those of several ranks."""
    return {
        file: content
        for file, content in files.items()
        if file.startswith(name.removesuffix(".safetensors")) and file.endswith(".safetensors")
    }


def on_the_board(run_dir: Path) -> list[int]:
    """The steps at which TensorBoard shows a loss."""
    board = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars("train/loss")]


def fork(config: dict, before: Callable[[], object] = lambda: None, output: Path | None = None, **environment) -> int:
    """Train in a forked child, in which `before` is called first; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    handle = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    os.environ.update(environment)
    code = 1
    try:
        before()
        run_script("train.py", lambda: train(TrainConfig(**config)) and None)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout: float = 120) -> int:
    """The exit code of a child; negative for the signal that ended it, HUNG where it had to be killed after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG
        time.sleep(0.002)


def run(
    config: dict, before: Callable[[], object] = lambda: None, *, kill_after: float | None = None, timeout: float = 120
) -> Ended:
    """Train in a child until it ends, or is killed after `kill_after` seconds."""
    folder = Path(config["logging_dir"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(folder.name + ".out")
    started = time.perf_counter()
    pid = fork(config, before, output)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    code = wait(pid, timeout)
    text = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    return Ended(code, text, time.perf_counter() - started)


def together(config: dict, ranks: int, before: Callable[[], object] = lambda: None, timeout: float = 120) -> Ended:
    """Train in `ranks` children that work together."""
    if ranks == 1:
        return run(config, before, timeout=timeout)
    folder = Path(config["logging_dir"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(folder.name + ".out")
    started = time.perf_counter()
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    outputs = [output.with_suffix(f".{rank}.out") for rank in range(ranks)]
    pids = [fork(config, before, outputs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **port) for rank in range(ranks)]
    codes = [wait(pid, timeout) for pid in pids]
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    for path in outputs:
        path.unlink()
    return Ended(max(codes, key=abs), text, time.perf_counter() - started)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(config: dict, ranks: int, *options: str, script: str = "scripts/train.py", **streams) -> subprocess.Popen:
    """Start `scripts/train.py` under torchrun."""
    words = []
    for name, value in config.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return subprocess.Popen([*command, script, *words], cwd=ROOT, start_new_session=True, **streams)


def workers(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's ranks, rank 0 first (they are started in this order)."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    return []


def end(process: subprocess.Popen) -> None:
    """Kill torchrun and all of its ranks (they are in sessions of their own)."""
    for pid in [*workers(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def patched(module, name: str, at_call: int, action: Callable[[], object]) -> Callable[[], None]:
    """What a child calls first, so that `action` happens at the `at_call`th call of `module.name`, before it is done."""

    def patch() -> None:
        real, calls = getattr(module, name), []

        def watched(*arguments, **keywords):
            calls.append(1)
            if len(calls) == at_call:
                action()
            return real(*arguments, **keywords)

        setattr(module, name, watched)

    return patch


def seeds(seed: int, count: int) -> list[int]:
    """A seed for each of `count` cases."""
    draw = random.Random(seed)
    return [draw.randrange(2**31) for _ in range(count)]
