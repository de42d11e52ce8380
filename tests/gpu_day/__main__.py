"""`python -m tests.gpu_day --out DIR`: everything that only a GPU can show; README.md has the commands."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tests.gpu_day import runner, table
from tests.gpu_day.parts import PARTS

STARTED = time.monotonic()


def main() -> int:
    """Do the parts and print the table; 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_day", description=__doc__)
    parser.add_argument("--out", default="gpu_day", help="folder of the results")
    parser.add_argument("--stories", default="", help="folder of the model stories260K")
    parser.add_argument("--corpus", default="", help="text to train it on; the shipped transcripts by default")
    parser.add_argument("--deadline", type=float, default=545, help="seconds for everything")
    parser.add_argument("--only", default="", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--jobs", type=int, default=0, help="parts side by side; by default 6 on a GPU, 2 in a dry run")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the time limit of every part")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in tiny sizes")
    parser.add_argument("--commit", default="", help="the commit of this checkout, for the record")
    parser.add_argument(
        "--table", nargs="+", type=Path, default=[], help="print the table of earlier results, run nothing"
    )
    parser.add_argument("--publish", type=Path, help="with --table: write its figures as JSON files into this folder")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        runner.run_part(options.part, json.loads(options.task))
        return 0
    if options.table:
        report = table.report(table.read_results(options.table), options.commit)
        print(table.text(report))
        if options.publish:
            publish(report, options.table, options.publish)
        return 0
    names = [name for name in PARTS if not options.only or name in options.only.split(",")]
    names = [name for name in names if name not in options.skip.split(",")]
    unknown = {*options.only.split(","), *options.skip.split(",")} - {"", *PARTS}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in ("stories", "corpus"):  # a path that is not there must not end the day
        path = getattr(options, name)
        setattr(options, name, str(Path(path).resolve()) if path and Path(path).exists() else "")
    options.jobs = options.jobs or (2 if options.dry else 6)
    options.device = "cpu" if options.dry else "cuda"
    day = runner.Runner(options, STARTED)
    day.run(names)
    return int(not runner.finish(day))


def publish(report: dict, folders: list[Path], target: Path) -> None:
    """Write the table and every benchmark's report as JSON files, as in `runs/bench`."""
    target.mkdir(parents=True, exist_ok=True)
    reports = {"gpu-day": report}
    for folder in folders:
        path = folder / "bench.json"
        reports |= json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, content in reports.items():
        content["commit"] = content["commit"] or report["commit"]
        (target / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{len(reports)} files in {target}{os.sep}")


if __name__ == "__main__":
    sys.exit(main())
