"""`python -m tests.faults --full`: everything that can go wrong with a run, on purpose, and what was left of it."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Run the campaigns, print and write what held; 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole campaign; without it a few cases of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", action="store_true", help="runs that train LoRA adapters")
    parser.add_argument("--only", nargs="+", default=[], help="names of campaigns")
    parser.add_argument(
        "--output", type=Path, help="JSON of the results; with --full runs/bench/faults.json by default"
    )
    parser.add_argument("--jobs", type=int, default=1, help="campaigns that run side by side")
    options = parser.parse_args()
    if options.adapters:
        os.environ["MORI_FAULTS_ADAPTERS"] = "1"
    output = options.output or (
        Path("runs/bench/faults.json") if options.full and not (options.only or options.adapters) else None
    )

    import torch
    import transformers

    from . import damage, going_bad, inputs, nodes, ranks, stopping
    from .common import Lab

    torch.set_num_threads(1)
    campaigns = {
        c.__name__: c for room in (nodes, ranks, stopping, damage, going_bad) for c in room.CAMPAIGNS
    }  # the long ones first
    campaigns["inputs"] = lambda lab, full, seed: inputs.run(full, seed)
    unknown = set(options.only) - set(campaigns)
    if unknown:
        parser.error(f"no campaign {', '.join(sorted(unknown))}; there are {', '.join(campaigns)}")
    started = time.perf_counter()
    if options.jobs > 1:
        found = _side_by_side(options, options.only or list(campaigns))
    else:
        found = []
        for name in options.only or campaigns:
            with tempfile.TemporaryDirectory() as folder:
                rows = campaigns[name](Lab(Path(folder).resolve()), options.full, options.seed)
            found += [{"campaign": name, **result} for result in rows]
            _show(found[-len(rows) :])
    if output:
        made = {
            "bench": "faults", "full": options.full, "seed": options.seed, "seconds": round(time.perf_counter() - started),
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "device": "cpu", "results": found,
        }  # fmt: skip
        output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return int(any(result["failures"] for result in found))


def _side_by_side(options: argparse.Namespace, names: list[str]) -> list[dict]:
    """Run each campaign in a process of its own, some at a time; their results in the order of `names`."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:

        def one(name: str) -> list[dict]:
            output = Path(folder) / f"{name}.json"
            command = [
                sys.executable,
                "-m",
                "tests.faults",
                "--only",
                name,
                "--seed",
                str(options.seed),
                "--output",
                output,
            ]
            done = subprocess.run([*command, *["--full"] * options.full], capture_output=True, text=True)
            if not output.exists():
                raise SystemExit(f"campaign {name} broke: {done.stderr}")
            rows = json.loads(output.read_text(encoding="utf-8"))["results"]
            _show(rows)
            return rows

        return [result for rows in pool.map(one, names) for result in rows]


def _show(rows: list[dict]) -> None:
    for result in rows:
        print(
            f"{result['held']:4} of {result['tried']:4} held, {result['seconds']:6.1f} s: {result['name']}", flush=True
        )
        for failure in result["failures"][:5]:
            print(f"     {failure}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
