"""The page that compares all runs of a folder."""

import os
from pathlib import Path
from urllib.parse import quote

from mori.cli import clock, plural
from mori.tracking.report.charts import Chart, Series, drawable
from mori.tracking.report.content import shown_setting
from mori.tracking.report.data import RunFiles, changed_settings, number, text
from mori.tracking.report.page import Code, Figure, Headline, Link, Page, Table, change, count, fixed, memory

_COLOURS = 8  # that the style sheet has for runs; the others are grey
_MOST_RUNS = 40  # of a chart
# They differ between any two runs, or only say where and when files are written, and what stands in them.
_NOT_COMPARED = frozenset((
    "run_name", "output_dir", "logging_dir", "resume_from_checkpoint", "extend", "hub_model_id", "push_to_hub", "hub_private_repo",
    "language", "report_to", "logging_steps", "logging_strategy", "save_steps", "save_strategy", "save_total_limit", "profile_steps",
))  # fmt: skip


def folder_page(folder: Path, runs: list[RunFiles]) -> Page:
    """The page of a folder of runs, the best first."""
    damaged = [f"{run.name}: {line}" for run in runs for line in run.damage]
    runs = [run for run in runs if run.config or run.metrics]
    has_bits = all(_best(run, "bits_per_byte") is not None for run in runs if _best(run, "loss") is not None)
    measure = "bits_per_byte" if has_bits else "loss"  # losses of other tokenizers do not compare
    runs.sort(key=lambda run: (_best(run, measure) is None, _best(run, measure) or 0.0, run.name))
    evaluated = [run for run in runs if _best(run, measure) is not None]
    best = evaluated[0] if evaluated else None
    warnings = damaged
    hashed = all(text(run.results, "sha256", "documents_sha256") for run in evaluated)
    if len(texts := {_held_out(run, hashed) for run in evaluated}) > 1:
        warnings = [
            f"The runs have {len(texts)} different held-out texts, so their losses cannot all be compared.",
            *damaged,
        ]
    return Page(
        title=folder.resolve().name,
        kind=plural(len(runs), "run"),
        summary="Each run's lowest held-out loss, what it took, and the settings in which the runs differ.",
        headline=_headline(best, measure) if best else None,
        figures=_figures(runs, best),
        warnings=warnings,
        charts=_charts(runs, measure),
        tables=[table for table in (_runs(runs, best), _settings(runs)) if table.rows],
        end="Written by mori report from the files of the runs.",
    )


def _best(run: RunFiles, name: str) -> float | None:
    value = number(run.best_evaluation, name)
    return value if value is not None and drawable(value) else None


def _held_out(run: RunFiles, hashed: bool) -> tuple:
    """What identifies the text that a run is evaluated on, by its hash or, as far as older runs tell, its size."""
    corpus = text(run.results, "sha256", "documents_sha256") if hashed else number(run.ledger, "bytes")
    validation_file, scored = (str(run.config.get(name)) for name in ("validation_file", "max_eval_windows"))
    return corpus, validation_file, number(run.config, "held_out_fraction"), scored


def _headline(run: RunFiles, measure: str) -> Headline:
    first, last = number(run.first_evaluation, measure), _best(run, measure)
    label, digits = ("bits per byte", 3) if measure == "bits_per_byte" else ("held-out loss", 4)
    shown = "" if first is None else fixed(first, digits)
    step = count(number(run.best_evaluation, "step"))
    note = " · ".join(filter(None, (f"{run.name}, step {step}", change(first, last))))
    return Headline(f"The lowest {label}", shown, fixed(last, digits), note)


def _figures(runs: list[RunFiles], best: RunFiles | None) -> list[Figure]:
    seconds = [time for run in runs if (time := number(run.results, "wall_seconds")) and drawable(time)]
    finished = sum(run.finished for run in runs)
    figures = [Figure("Runs", count(len(runs)), f"{finished} finished" if finished < len(runs) else "all finished")]
    figures += [Figure("Best run", best.name)] if best else []
    return figures + ([Figure("Time together", clock(sum(seconds)))] if seconds else [])


def _charts(runs: list[RunFiles], measure: str) -> list[Chart]:
    """The curves of the runs in one picture each."""
    name = "bits per byte" if measure == "bits_per_byte" else "loss"
    charts = []
    for title, tag, smooth in ((f"Held-out {name}", f"eval/{measure}", False), ("Training loss", "train/loss", True)):
        series = [
            Series(run.name, run.points(tag), _colour(index), dots=not smooth and index < _COLOURS, smooth=smooth)
            for index, run in enumerate(runs[:_MOST_RUNS])
        ]
        charts.append(Chart(title, series, crowded=True))
    return [chart for chart in charts if chart.series]


def _colour(index: int) -> str:
    return f"c{index}" if index < _COLOURS else "rest"


def _runs(runs: list[RunFiles], best: RunFiles | None) -> Table:
    rows = []
    for index, run in enumerate(runs):
        evaluation, last_loss = run.best_evaluation, run.last("eval/loss")
        total, seconds = number(run.results, "total_steps"), number(run.results, "wall_seconds")
        steps = count(run.step) + ("" if run.finished else f" of {count(total)}" if total else " …")
        rows.append(
            [
                Link(run.name, quote(os.fsencode(f"{run.name}/report.html")), _colour(index)),
                steps,
                fixed(number(evaluation, "loss"), 4),
                fixed(number(evaluation, "bits_per_byte"), 4),
                count(number(evaluation, "step")),
                fixed(last_loss, 4),
                fixed(run.last("train/loss"), 4),
                count(number(run.results, "tokens_per_second") or run.last("perf/tokens_per_second")),
                memory(number(run.results, "peak_memory_bytes") or (run.last("perf/peak_memory_gib") or 0) * 2**30),
                "–" if seconds is None or not drawable(seconds) else clock(seconds),
            ]
        )
    columns = [
        "Run", "#Steps", "#Best held-out loss", "#Bits per byte", "#At step", "#Last held-out loss", "#Training loss",
        "#Tokens/s", "#Memory", "#Time",
    ]  # fmt: skip
    return Table("Runs", columns, rows, marked=0 if best else None)


def _settings(runs: list[RunFiles]) -> Table:
    """The settings in which the runs differ, a row each; those of a run's own model count as its default."""
    names = dict.fromkeys(name for run in runs for name in changed_settings(run))
    shown = {
        name: [shown_setting(run, run.config[name]) if name in run.config else "–" for run in runs]
        for name in names
        if name not in _NOT_COMPARED
    }
    differing = {name: values for name, values in shown.items() if len(set(values)) > 1}
    rows = [[Code(run.name), *(values[index] for values in differing.values())] for index, run in enumerate(runs)]
    return Table("Settings that differ", ["Run", *differing], rows if differing else [])
