"""`python -m tests.preflight_accuracy`: what the preflight says of a run, beside what then happens."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
STORIES = f"--model {SHARED}/models/stories260K --corpus {SHARED}/data/mori_corpus.txt --learning_rate 1e-3"
PRETRAINED = "--model {folder}/model --corpus {folder}/corpus.txt --eval_steps 0.5 --save_steps 0.5 --max_new_tokens 20"
# name -> flags; {folder} holds a GPT-2 of 124 million random weights and a text
CASES = {
    "mini": "",
    "stories260K": f"{STORIES} --block_size 256 --max_steps 400",
    "124m": f"{PRETRAINED} --max_steps 20",
    "124m, windows of 512": f"{PRETRAINED} --max_steps 20 --block_size 512",
    "mini, one epoch": "--num_train_epochs 1",
    "mini, muon": "--num_train_epochs 1 --optim muon",
    "stories260K, LoRA": f"{STORIES} --block_size 256 --max_steps 40 --use_peft",
}
PROGRAM = """import sys
from mori import preflight
preflight.FEWEST_STEPS = int(sys.argv.pop(1))
from mori.__main__ import run_command
run_command("train", "train.py")
"""


def trained(flags: str, folder: Path, fewest: int) -> dict:
    """One run in a process; what it said before, and its seconds from there and its peak memory."""
    runs, brain = folder / f"runs-{fewest}", folder / f"brain-{fewest}"
    words = [
        *flags.replace("{folder}", str(folder)).split(),
        "--logging_dir",
        runs,
        "--run_name",
        "run",
        "--output_dir",
        brain,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", PROGRAM, str(fewest), *map(str, words)],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)],
    )
    _, status, usage = os.wait4(process, 0)
    ended = time.time()
    if status:
        raise SystemExit((folder / "output.txt").read_text()[-3000:])
    path = runs / "run" / "preflight.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return {"said": said, "seconds": ended - path.stat().st_mtime if said else 0.0, "peak": usage.ru_maxrss * 1024}


def make_model(folder: Path) -> None:
    """Write a 124M model and its text, in a new process: a child's peak memory starts at its parent's."""
    from mori.bench.train import make_inputs

    make_inputs(SimpleNamespace(shape="124m"), folder, tokens=200_000)


def main() -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m tests.preflight_accuracy", description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(CASES), help="names of cases")
    parser.add_argument(
        "--without", action="store_true", help="run each case without a preflight, too, for its peak memory"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    print("| run | said | took | | peak said | peak | | peak without | load |\n| --- |" + " ---: |" * 8)
    for name in options.only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if "124m" in name:
                maker = multiprocessing.get_context("spawn").Process(target=make_model, args=[folder])
                maker.start()
                maker.join()
            run = trained(CASES[name], folder, 20)
            without = f"{trained(CASES[name], folder, 1_000_000)['peak'] / 2**20:,.0f} MiB" if options.without else ""
        said, peak = run["said"]["seconds"]["total"], run["said"]["peak_memory_bytes"]["host"]
        cells = [f"{said:.0f} s", f"{run['seconds']:.0f} s", f"{said / run['seconds'] - 1:+.1%}"]
        cells += [f"{peak / 2**20:,.0f} MiB", f"{run['peak'] / 2**20:,.0f} MiB", f"{peak / run['peak'] - 1:+.1%}"]
        print(
            f"| {name} | {' | '.join(cells)} | {without} | {os.getloadavg()[0]:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
