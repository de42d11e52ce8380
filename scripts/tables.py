#!/usr/bin/env python
"""Write the tables of runs/README.md, tests/faults/README.md, and of the speed in README.md, from the JSON files in runs/bench."""

import argparse
import json
import re
import sys
from pathlib import Path

from mori.cli import plural

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "runs/bench"
# Column titles by folder; a folder that is not listed has its name as title.
MACHINES = {"bench": "4 cores, AVX2", "zen5": "2 cores, AMD Zen 5"}
BENCHMARKS = {
    "train": "seconds",
    "memory": "peak memory",
    "startup": "seconds to the first step",
    "tokenize": "seconds",
    "decode": "seconds",
}
DIFFERENCES = ("loss", "grad_norm", "learning_rate", "weight")


def benchmarks() -> list[str]:
    """The ratios of every benchmark, one column per machine, and the versions they were measured with."""
    folders = [BENCH, *sorted(path for path in BENCH.iterdir() if path.is_dir())]
    titles = [MACHINES.get(folder.name, folder.name) for folder in folders]
    rows: dict[tuple, dict[str, str]] = {}
    measured = []
    for title, folder in zip(titles, folders, strict=True):
        for path in sorted(folder.glob("*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            if report.get("bench") not in BENCHMARKS:
                continue
            order, what = list(BENCHMARKS).index(report["bench"]), _description(report)
            for pair, ratio in report["ratios"].items():
                rows.setdefault((order, what, pair), {})[title] = _spread(ratio)
            figures = next(iter(report["arms"].values()))
            repeats = len(figures.get("seconds") or figures["training_peak_memory_bytes"])
            versions, commit = report["versions"], (report["commit"] or "–")[:7]
            software = [versions["torch"], versions["transformers"], commit]
            measured.append([title, what, repeats, report["device"], report["threads"], *software])
    table = [["benchmark", "ratio of", *titles]]
    for (order, what, pair), cells in sorted(rows.items(), key=lambda row: _natural(row[0])):
        quantity = list(BENCHMARKS.values())[order]
        arms = " / ".join(f"`{arm}`" for arm in pair.split(" / "))
        table.append([what, f"{quantity}, {arms}", *(cells.get(title, "–") for title in titles)])
    titles = ["machine", "benchmark", "repeats", "device", "threads", "torch", "transformers", "commit"]
    return [*_table(table, left=2), "", *_table([titles, *measured], left=2)]


def _description(report: dict) -> str:
    shape = report["shape"]
    name = f"`{report['bench']}`, {report['model'].removeprefix('random weights, ')}"
    if report["bench"] == "tokenize":
        return f"`tokenize`, {shape['bytes'] / 1e6:.0f} MB in {plural(shape['lines'], 'line')}"
    if report["bench"] == "decode":
        return f"{name}, batch {shape['batch_size']}, {shape['new_tokens']} tokens, {shape['dtype']}"
    return f"{name}, batch {shape['per_device_train_batch_size']} of {shape['block_size']} tokens, {shape['precision']}"


def comparisons() -> list[str]:
    """The differences from Trainer, and the outcome of every arm, of each comparison."""
    differences = [["comparison", "arms", "steps", "loss", "gradient norm", "learning rate", "final weights"]]
    outcomes = [
        [
            "comparison",
            "arm",
            "steps",
            "distinct tokens",
            "held-out loss before",
            "after",
            "perplexity",
            "bits per byte",
        ]
    ]
    for path in sorted(BENCH.glob("compare-*.json")):
        comparison = json.loads(path.read_text(encoding="utf-8"))
        for pair, values in comparison["pairs"].items():
            if pair in ("mori-exact|trainer", "mori|trainer"):
                cells = [f"{values[f'max_abs_{name}_diff']:.3g}" for name in DIFFERENCES]
                differences.append([comparison["name"], f"`{pair.replace('|', '` and `')}`", values["steps"], *cells])
        for name, arm in comparison["arms"].items():
            before, after = arm["held_out"]["before"], arm["held_out"]["after"]
            tokens = f"{arm['tokens_trained']:,} of {comparison['ledger']['train_tokens']:,}"
            scores = [
                f"{before['loss']:.4f}",
                f"{after['loss']:.4f}",
                f"{after['perplexity']:,.0f}",
                "–" if after["bits_per_byte"] is None else f"{after['bits_per_byte']:.4f}",
            ]
            outcomes.append([comparison["name"], f"`{name}`", f"{arm['steps']:,}", tokens, *scores])
    return [*_table(differences, left=2), "", *_table(outcomes, left=2)]


def faults() -> list[str]:
    """The number of cases of each fault campaign, and how many passed."""
    report = json.loads((BENCH / "faults.json").read_text(encoding="utf-8"))
    results = report["results"]
    table = [["fault", "commit", "cases", "passed"]]
    table += [[result["name"], result.get("commit", "–"), result["tried"], result["held"]] for result in results]
    table.append(["all", "", *(f"{sum(result[key] for result in results):,}" for key in ("tried", "held"))])
    versions = f"torch {report['torch']}, transformers {report['transformers']}, Python {report['python']}, {report['device']}, seed {report['seed']}"
    return [
        *_table(table, left=1),
        "",
        f"Measured with {versions}." + (f" Note: {report['note']}." if report.get("note") else ""),
    ]


def speed() -> list[str]:
    """The README's table: how much faster `mori` is, and its share of the processor's peak, without empty rows and columns."""
    table = [[SPEED_TITLE, "compared with", "faster by", "than nanoGPT's loop", "share of the peak"]]
    for what, reference, pairs in SPEED:
        cells = []
        for name, pair in pairs:
            path = BENCH / "zen5" / f"{name}.json"
            if path.is_file():
                report = json.loads(path.read_text(encoding="utf-8"))
                keys = ("ratios", pair), ("ratios", "nanogpt / mori"), ("arms", "mori", "median_share_of_peak")
                cells.append([_figure(path, report, *key) for key in keys])
        if cells:
            table.append([what, reference, *("; ".join(dict.fromkeys(column)) for column in zip(*cells, strict=True))])
    columns = [column for column in zip(*table, strict=True) if set(column[1:]) != {"–"}]
    return _table(list(zip(*columns, strict=True)), left=2)


def _figure(path: Path, report: dict, *keys: str) -> str:
    """An entry of a report as a link to it; a dash if it has none."""
    entry = report
    for key in keys:
        entry = entry.get(key, {})
    if not entry:
        return "–"
    text = _spread(entry).replace(" to ", "–") if isinstance(entry, dict) else f"{entry:.2f}"
    return f'[{text}]({path.relative_to(ROOT)} "{".".join(keys)}")'


def _spread(ratio: dict) -> str:
    median, low, high = (f"{ratio[key]:.2f}" for key in ("median", "min", "max"))
    return median if ratio["min"] == ratio["max"] else f"{median} ({low} to {high})"


def _natural(key: tuple) -> list:
    """Sorts numbers within texts by value: 128 before 1024."""
    return [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(text))] for text in key]


def _table(rows: list[list], left: int) -> list[str]:
    """A Markdown table; the first row has the titles, the first `left` columns are aligned to the left."""
    header, *body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    alignment = ["---"] * left + ["---:"] * (len(rows[0]) - left)
    return [header, f"| {' | '.join(alignment)} |", *body]


SPEED_TITLE = "random weights, 2 cores of an AMD Zen 5"
_TRAINER = "trainer / mori"
SPEED = [
    *(
        (
            f"training {name}, 4 windows of {length} tokens, fp32; bf16", "`Trainer`",
            [(f"train-{shape}-batch4-block{length}-{precision}-cpu", _TRAINER) for precision in ("fp32", "bf16")],
        )
        for shape, name in (("124m", "124M GPT-2"), ("smollm2-135m", "SmolLM2-135M"))
        for length in (128, 512)
    ),
    ("GPT-2 from start to first step, without evaluation before it", "`Trainer`", [("startup-124m-batch4-block128-fp32-cpu", _TRAINER)]),
    (
        "GPT-2 decoding, batch 1, greedy; sampled", "`generate()`",
        [("decode-124m-batch1", f"generate-{way} / mori-{way}") for way in ("greedy", "sampled")],
    ),
    ("tokenizing 100 MB", "`datasets`, a process per core", [("tokenize", "run_clm / mori")]),
]  # fmt: skip
TABLES = {
    ROOT / "runs/README.md": {"benchmarks": benchmarks, "comparisons": comparisons},
    ROOT / "tests/faults/README.md": {"faults": faults},
}


def updated(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between the two markers of the table `name`."""
    start, end = f"<!-- {name}: written by scripts/tables.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return "\n".join([before + start, "", *lines, "", end + rest.split(end)[1]])


def with_speed(text: str, lines: list[str]) -> str:
    """The README with `lines` in place of its table of the speed, which its title shows."""
    start = text.index(f"| {SPEED_TITLE} |")
    return text[:start] + "\n".join(lines) + text[text.index("\n\n", start) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    check, stale = parser.parse_args().check, []
    for path, tables in {ROOT / "README.md": {}, **TABLES}.items():
        text = current = path.read_text(encoding="utf-8")
        for name, lines in tables.items():
            text = updated(text, name, lines())
        if path == ROOT / "README.md":
            text = with_speed(text, speed())
        if text != current:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path} is not up to date: run python scripts/tables.py" if check else f"{path} written")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
