#!/usr/bin/env python
"""Train with several settings and seeds, and compare what is held out: a table and a JSON file.

python scripts/sweep.py --corpus my_text/ --equal_time --variations "learning_rate=2e-3" "optim=muon dropout=0.2"

The same command again goes on where it stopped: finished runs are read, not repeated. Each leaves its model and one checkpoint.
"""

import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mori.cli import RunFailed, UserError, checked, flag, one_line, parse, run_script, same_flag
from mori.config import TrainConfig

_ROUNDS, _TIMED_STEPS, _WARM_UP_STEPS = 3, 8, 3


@dataclass
class SweepConfig(TrainConfig):
    """A call of `scripts/sweep.py`: the flags of a training, and how they vary."""

    group = "sweep"

    variations: list[str] = flag(
        [], 'settings that differ from those of the call, such as "optim=muon dropout=0.2"; the call itself comes first'
    )
    seeds: list[int] = flag([42, 43, 44], "seeds of each variation; they replace --seed", kind=int)
    equal_time: bool = flag(
        False, "give each variation the steps that take as long as those of the call, by a short timing in turn"
    )
    save_steps: float = same_flag(TrainConfig, "save_steps", 1e9)


def settings_of(config: SweepConfig, variation: str) -> TrainConfig:
    """The config of a variation. Raises UserError for a setting that is none, or a value out of range."""
    try:
        varied = parse(TrainConfig, "", [f"--{word}" for word in shlex.split(variation)])
        common = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
        settings = TrainConfig(**common | {name: getattr(varied, name) for name in varied.given})
        return [checked(replace(settings, seed=seed)).resolve() for seed in config.seeds][0]
    except (UserError, ValueError) as mistake:
        raise UserError(f"variation {variation!r}: {mistake}") from None


def step_seconds(configs: list[TrainConfig]) -> list[float]:
    """The median seconds of an optimizer step of each config, in short runs that take turns."""
    from mori.train import train

    seconds: list[list[float]] = [[] for _ in configs]
    for _ in range(_ROUNDS):
        for config, of_config in zip(configs, seconds, strict=True):
            times: list[float] = []
            with tempfile.TemporaryDirectory() as folder, _quiet():
                short = {"max_steps": _TIMED_STEPS, "eval_strategy": "no", "save_strategy": "no", "run_name": "timing"}
                where = {"output_dir": f"{folder}/model", "logging_dir": folder, "warmup_steps": 0.0}
                train(replace(config, **short, **where), lambda step, total, times=times: times.append(total))
            of_config += [after - before for before, after in zip(times, times[1:], strict=False)][_WARM_UP_STEPS:]
    return [statistics.median(of_config) for of_config in seconds]


def run(config: TrainConfig) -> dict:
    """Train once; the figures of the held-out text at the end and at the best evaluation, or the error."""
    from mori.train import train

    try:
        with _quiet():
            summary = train(config)
    except RunFailed as error:
        return {"seed": config.seed, "error": one_line(error)}
    kept = ("steps", "wall_seconds", "tokens_per_second")
    return {"seed": config.seed, **{key: summary[key] for key in kept}, **summary["eval"]}


def sweep(config: SweepConfig) -> dict:
    """Train every variation with every seed; write and return `sweep.json`, and `sweep.md` beside it."""
    variations = ["", *config.variations]
    configs = [settings_of(config, variation) for variation in variations]
    folder = Path(configs[0].logging_dir) / f"sweep-{configs[0].run_name}"
    path = folder / "sweep.json"
    rows = [{"variation": variation, "runs": []} for variation in variations]
    earlier = {row["variation"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    if config.equal_time:
        known = [earlier.get(variation, {}).get("step_seconds") for variation in variations]
        seconds = known if all(known) else step_seconds(configs)
        for row, value in zip(rows, seconds, strict=True):
            row["step_seconds"] = value
    for row, varied in zip(rows, configs, strict=True):
        if config.equal_time and row is not rows[0]:
            steps = round(rows[0]["runs"][0]["steps"] * seconds[0] / row["step_seconds"])
            varied = replace(varied, max_steps=max(1, steps))
        for seed in config.seeds:
            name = f"{rows.index(row):02d}-seed{seed}"
            where = {"logging_dir": str(folder), "output_dir": str(folder / name / "model"), "run_name": name}
            row["runs"].append(run(replace(varied, seed=seed, **where)))
            result = {"command": sys.argv, "rows": rows}
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            (folder / "sweep.md").write_text("\n".join(table(rows)) + "\n", encoding="utf-8")
        print(table(rows)[rows.index(row) + 2], flush=True)
    print(*["", *table(rows), "", f"written: {path}, {folder / 'sweep.md'}"], sep="\n")
    return result


def table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table: the mean over the seeds, and in brackets the smallest and the largest value."""
    lines = [
        "| settings | steps | bits per byte at the end | of the best evaluation | difference |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    first = None
    for row in rows:
        done = [run for run in row["runs"] if "error" not in run]
        if not done:
            reason = row["runs"][0]["error"] if row["runs"] else "not run yet"
            lines.append(f"| {row['variation'] or 'the call'} | | {reason} | | |")
            continue
        key = "bits_per_byte" if done[0]["after"]["bits_per_byte"] is not None else "loss"
        end, best = ([run[which][key] for run in done] for which in ("after", "best"))
        first = first or statistics.mean(best)
        cells = [row["variation"] or "the call", f"{done[0]['steps']:,}", _spread(end), _spread(best)]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(best) / first - 1:+.1%} |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


@contextlib.contextmanager
def _quiet():
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def main() -> None:
    """Sweep as the command line says."""
    sweep(parse(SweepConfig, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run_script("sweep.py", main)
