"""`python -m tests.faults --full`: everything that can go wrong with a run, on purpose, and what was left of it."""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Run the campaigns, print and write what held; 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole campaign; without it a few cases of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of campaigns")
    parser.add_argument(
        "--output", type=Path, help="JSON of the results; with --full runs/bench/faults.json by default"
    )
    options = parser.parse_args()
    output = options.output or (Path("runs/bench/faults.json") if options.full and not options.only else None)

    import torch
    import transformers

    from . import damage, going_bad, inputs, ranks, stopping
    from .common import Lab

    torch.set_num_threads(1)
    campaigns = {c.__name__: c for room in (stopping, damage, going_bad, ranks) for c in room.CAMPAIGNS}
    campaigns["inputs"] = lambda lab, full, seed: inputs.run(full, seed)
    unknown = set(options.only) - set(campaigns)
    if unknown:
        parser.error(f"no campaign {', '.join(sorted(unknown))}; there are {', '.join(campaigns)}")
    found, started = [], time.perf_counter()
    for name in options.only or campaigns:
        with tempfile.TemporaryDirectory() as folder:
            rows = campaigns[name](Lab(Path(folder).resolve()), options.full, options.seed)
        for result in rows:
            result["campaign"] = name
            print(
                f"{result['held']:4} of {result['tried']:4} held, {result['seconds']:6.1f} s: {result['name']}",
                flush=True,
            )
            for failure in result["failures"][:5]:
                print(f"     {failure}", flush=True)
        found += rows
    if output:
        made = {
            "bench": "faults", "full": options.full, "seed": options.seed, "seconds": round(time.perf_counter() - started),
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "device": "cpu", "results": found,
        }  # fmt: skip
        output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return int(any(result["failures"] for result in found))


if __name__ == "__main__":
    sys.exit(main())
