"""How arms are measured: each repeat in a process of its own, the arms in turn; medians, spread, ratios of pairs, JSON."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mori.config import RunFailed, UserError

ROOT = Path(__file__).parent.parent.parent
_GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = {
    "tiny": {**_GPT2, "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 8192},
    "mini": {**_GPT2, "n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 8192},
    "small": {**_GPT2, "n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 8192},
    "124m": {**_GPT2, "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257},
    "llama-160m": {
        "model_type": "llama", "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
        "intermediate_size": 2048, "vocab_size": 32_000, "tie_word_embeddings": False,
    },
    "llama-1b": {
        "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
}  # fmt: skip


def in_turn(arms: list[str], repeats: int, run: Callable[[str], dict]) -> dict[str, list[dict]]:
    """`run` every arm `repeats` times, and return for each arm what it found.

    The arms take turns, in reverse in every second repeat: what grows warm or busy meanwhile touches all alike. What is
    found has `seconds`, which are told on standard error.
    """
    found: dict[str, list[dict]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            found[arm].append(run(arm))
            print(f"{repeat + 1}/{repeats} {arm:18} {found[arm][-1]['seconds']:8.3f} s", file=sys.stderr, flush=True)
    return found


def in_a_process(arm: str, command: list[str], threads: int = 0) -> str:
    """Run `command` with this Python in a fresh process that finds `mori`; returns what it printed.

    `threads` of 0 is what PyTorch takes by itself. Raises RunFailed, with the last line of its complaint, where it fails.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        raise RunFailed(f"{arm} was killed by signal {-done.returncode} (out of memory?)")
    if done.returncode:
        raise RunFailed(f"{arm} failed: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1][:500]}")
    return done.stdout


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest of the repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """The spread of `one / other`, repeat by repeat: both were measured one after the other."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def require(package: str, arm: str) -> None:
    """Raise UserError where `package`, which `arm` needs and `mori` does not, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the arm {arm} needs {package}: pip install {package}, or leave it out with --arms")


def check_writable(output_dir: str) -> None:
    """Raise UserError where the figures could not be written into the folder `output_dir`."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {output_dir}: {error.strerror}") from None


def write(
    output_dir: str,
    name: str,
    report: dict,
    packages: tuple[str, ...] = (),
    device: torch.device | None = None,
    threads: int = 0,
) -> None:
    """Print the ratios, and leave the figures in `<output_dir>/<name>.json`, with what they were taken on.

    `report` has `bench`, `model`, `shape`, `arms` and `ratios`; `packages` are those whose versions matter besides
    PyTorch's and transformers'.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    whole = {
        **report,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: importlib.metadata.version(package) for package in ("transformers", *packages)},
        },
        "device": torch.cuda.get_device_name(device) if device and device.type == "cuda" else str(device or "cpu"),
        "threads": threads or torch.get_num_threads(),
        "commit": commit or None,
    }
    path = Path(output_dir) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for pair, found in report["ratios"].items():
        print(f"{pair:34} {found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})")
    print(f"written to {path}")
