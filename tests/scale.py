"""`python -m tests.scale`: memory and seconds of a corpus of many GB, compressed rows of made-up text, tokenized and trained on.

The rows are sentences of the shipped transcripts in random order. The memory is that of the process and its children, each page
that they share counted once (PSS), five times a second. A second start shows what an unchanged corpus costs.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mori.bench import harness
from mori.data.files import SHIPPED

ROOT = Path(__file__).parent.parent
DISTINCT = 5  # files of 1 GB of text; more are the same again
TRAIN = [
    sys.executable, "scripts/train.py", "--model", "mini", "--max_steps", "100", "--prompt", "Halo", "--max_new_tokens", "5",
    "--save_steps", "100",
]  # fmt: skip


def write_rows(path: Path, n_bytes: int, seed: int) -> None:
    """Write rows with `n_bytes` of text, of 100 to 4,000 characters each."""
    rng = random.Random(seed)
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.txt")))
    sentences = re.split(r"(?<=[.!?])\s+", text)
    written = number = 0
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        while written < n_bytes:
            row = f"{number}. " + " ".join(rng.choices(sentences, k=rng.randrange(1, 60)))
            file.write(json.dumps({"id": number, "text": row}, ensure_ascii=False) + "\n")
            written, number = written + len(row.encode()), number + 1


def memory(pid: int) -> dict[str, int]:
    """Bytes in memory of a process and its children, by kind; 0 for those that have ended."""
    total = {"Pss": 0, "Pss_Anon": 0}
    pids = [pid]
    for parent in pids:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
            for line in Path(f"/proc/{parent}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in total:
                    total[name] += int(value.split()[0]) * 1024
        except OSError:
            continue
    return total


def run(files: list[Path], folder: Path, name: str) -> dict:
    """A training run; the seconds to its first step and to its end, and the peaks of its memory before and after the first."""
    command = [
        *TRAIN,
        "--corpus",
        *map(str, files),
        "--logging_dir",
        folder / "runs",
        "--run_name",
        name,
        "--output_dir",
        folder / name,
    ]
    started, log = time.perf_counter(), folder / "output.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    first_step, peaks = None, {"preparing": {}, "training": {}}
    while process.poll() is None:
        if first_step is None and "\ntrains " in log.read_text():
            first_step = time.perf_counter() - started
        phase = peaks["preparing" if first_step is None else "training"]
        for kind, size in memory(process.pid).items():
            phase[kind] = max(phase.get(kind, 0), size)
        time.sleep(0.2)
    output = log.read_text()
    if process.returncode:
        raise SystemExit(output)
    ledger = next(line for line in output.splitlines() if line.startswith("reads "))
    return {
        "first_step_seconds": first_step,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peaks,
        "ledger": ledger,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--folder", type=Path, required=True, help="for the rows and the token files")
    parser.add_argument("--output_dir", default="runs/bench/zen5")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    arms = {}
    for size in sorted(arguments.gigabytes):
        files = [arguments.folder / f"{number:02}.jsonl.gz" for number in range(size)]
        for number, path in enumerate(files):
            if number >= DISTINCT and not path.exists():
                path.hardlink_to(files[number % DISTINCT])
            elif not path.exists():
                write_rows(path.with_suffix(".tmp"), 10**9, seed=number)
                path.with_suffix(".tmp").rename(path)
        time.sleep(6)  # until the files count as unchanging
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            first = run(files, Path(name), "first")
            token_bytes = sum(path.stat().st_size for path in (Path(name) / "runs/.cache").glob("tokens-*.bin"))
            arms[f"{size} GB"] = {
                "compressed_bytes": sum(path.stat().st_size for path in files),
                "token_file_bytes": token_bytes,
                "first_start": first,
                "second_start": run(files, Path(name), "second"),
            }
        print(json.dumps(arms[f"{size} GB"]), flush=True)
        report = {
            "bench": "scale",
            "model": "mini",
            "shape": {"rows": "jsonl.gz", "distinct_gigabytes": DISTINCT},
            "arms": arms,
            "ratios": {},
        }
        harness.write(arguments.output_dir, "scale", report, ("tokenizers",), threads=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
