"""The page of one run."""

import os
import shlex
from pathlib import Path

from mori.cli import clock, plural
from mori.config import PRESETS
from mori.tracking.report.charts import Chart, Series, drawable
from mori.tracking.report.data import (
    METRICS,
    RunFiles,
    changed_settings,
    mapping,
    number,
    text,
    texts,
    typed_command,
    whole,
)
from mori.tracking.report.page import (
    Code,
    Figure,
    Headline,
    Page,
    Sample,
    Table,
    change,
    compact,
    copied_ranges,
    count,
    fixed,
    memory,
)

_MOST_ROWS, _MOST_SAMPLES = 24, 24
_RISEN = 1.01  # times the lowest held-out loss


def run_page(run: RunFiles) -> Page:
    """The page of a run."""
    before, after = run.first_evaluation, run.last_evaluation
    pairs, copies = _samples(run)
    note = "Marked: word for word in the training text." if copies else ""
    if len(pairs) > _MOST_SAMPLES:
        note += f" summary.json has all {len(pairs)} samples."
    ledger = run.ledger
    return Page(
        title=run.name,
        kind="Training report" if run.finished else "Training report · not finished",
        summary=_summary(run),
        headline=_headline(run, before, after),
        figures=_figures(run, before, after),
        warnings=_warnings(run),
        charts=_charts(run),
        sample_titles=(_at_step("Before", before), _at_step("After", mapping(run.results, "eval", "after") or after)),
        sample_note=note,
        pairs=pairs[:_MOST_SAMPLES],
        shares=[
            (name, tokens)
            for name, key in (
                ("to train on", "train_tokens"),
                ("held out", "held_out_tokens"),
                ("dropped", "dropped_tokens"),
            )
            if (tokens := whole(ledger, key)) and tokens > 0
        ],
        tables=[
            table
            for table in (
                _evaluations(run),
                _text(run),
                _model(run),
                _planned(run),
                _heaviest(run),
                _machine(run),
                _hashes(run),
                _settings(run),
            )
            if table.rows
        ],
        commands=_commands(run),
        end=f"Written by mori {text(run.environment, 'mori')} from the files of this run.".replace("  ", " "),
    )


def _at_step(name: str, evaluation: dict) -> str:
    step = number(evaluation, "step")
    return name if step is None else f"{name} · step {count(step)}"


def _summary(run: RunFiles) -> str:
    model, parameters = text(run.config, "model"), number(run.results, "parameters")
    trained = number(run.results, "trained_parameters")
    size = ", ".join(
        [f"{compact(parameters)} parameters"] * bool(parameters)
        + ["from random weights"] * (model in PRESETS)
        + [f"{compact(trained)} of them trainable"] * bool(parameters and trained and trained != parameters)
    )
    model = (os.path.basename(model.rstrip("/")) if os.path.isabs(model) else model) or "A model"
    corpus = texts(run.config, "corpus")
    names = ", ".join(os.path.basename(name.rstrip("/")) or name for name in corpus[:3]) + ", …" * (len(corpus) > 3)
    source = names or "the transcripts that ship with mori" * (text(run.config, "model") != "")
    documents, size_in_bytes = whole(run.ledger, "documents"), number(run.ledger, "bytes")
    amount = f" ({plural(documents, 'document')}, {count(size_in_bytes)} bytes)" if documents else ""
    hardware = ", ".join(filter(None, (text(run.environment, "device"), text(run.environment, "precision"))))
    return (
        model
        + (f" ({size})" if size else "")
        + (f", trained on {source}{amount}" if source else "")
        + (f", on {hardware}" if hardware else "")
        + "."
    )


def _headline(run: RunFiles, before: dict, after: dict) -> Headline | None:
    for name in ("bits_per_byte", "loss"):
        first, last = number(before, name), number(after, name)
        if last is not None:
            digits = 3 if name == "bits_per_byte" else 4
            same = number(before, "step") == number(after, "step")
            shown = "" if first is None or same else fixed(first, digits)
            notes = [change(first, last) if shown else "", "lower is better"]
            where = "Bits per byte" if name == "bits_per_byte" else "Loss"
            return Headline(f"{where} of held-out text", shown, fixed(last, digits), " · ".join(filter(None, notes)))
    points = run.points("train/loss")
    if not points:
        return None
    shown = fixed(points[0][1], 4) if len(points) > 1 else ""
    return Headline("Training loss", shown, fixed(points[-1][1], 4), "no text is held out")


def _figures(run: RunFiles, before: dict, after: dict) -> list[Figure]:
    results, step, total = run.results, run.step, number(run.results, "total_steps")
    figures = []
    for name in ("loss", "perplexity"):
        value, first = number(after, name), number(before, name)
        if value is not None:
            digits = 4 if name == "loss" else 1
            changed = first is not None and number(before, "step") != number(after, "step")
            figures.append(
                Figure(
                    "Held-out loss" if name == "loss" else "Perplexity",
                    fixed(value, digits),
                    f"from {fixed(first, digits)}" if changed else "",
                )
            )
    if step is not None:
        epochs = run.last("train/epoch")
        notes = [
            f"of {count(total)}{', stopped early' * run.finished}" if total and total != step else "",
            f"{epochs:,.1f} epochs" if (epochs or 0) >= 1 else f"{epochs:.2g} epochs" if epochs else "",
        ]
        figures.append(Figure("Steps", count(step), ", ".join(filter(None, notes))))
    seconds = number(results, "wall_seconds")
    if seconds is not None and drawable(seconds):
        figures.append(Figure("Time", clock(seconds), "with evaluations and saves"))
    speed = number(results, "tokens_per_second") or run.last("perf/tokens_per_second")
    if speed:
        mfu = [value for _, value in run.points("perf/mfu") if drawable(value)]
        note = f"MFU {fixed(sum(mfu) / len(mfu) * 100, 0)}%" if mfu else ""
        figures.append(Figure("Tokens/s", count(speed), note))
    peak = number(results, "peak_memory_bytes") or (run.last("perf/peak_memory_gib") or 0) * 2**30
    if peak:
        figures.append(Figure("Peak memory", memory(peak)))
    share, longest = run.last("copying/share_of_8_tokens"), whole(run.last("copying/longest_run"))
    if share is not None:
        beside = run.last("copying/baseline_share_of_8_tokens")
        notes = [
            f"at most {plural(longest, 'token')} in a row" if longest else "",
            "" if beside is None else f"held-out text {_percent(beside)}",
        ]
        figures.append(Figure("Copied", _percent(share), "; ".join(filter(None, notes))))
    return figures


def _percent(share: float) -> str:
    return f"{fixed(share * 100, 1)}%"


def _warnings(run: RunFiles) -> list[str]:
    lines, skipped = list(run.damage), whole(run.results, "skipped_steps") or whole(run.last("train/skipped_steps"))
    if not run.finished:
        total = number(run.results, "total_steps")
        end = f" of {count(total)}" if total else ""
        lines.append(
            f"This run is not finished: this page covers it up to step {count(run.step)}{end}. The same command continues the run."
        )
    if skipped:
        lines.append(f"{plural(skipped, 'step')} skipped, because the gradient was not finite.")
    best, last = run.best_evaluation, run.last_evaluation
    lowest, loss = number(best, "loss"), number(last, "loss")
    if lowest is not None and loss is not None and loss > lowest * _RISEN:
        lines.append(
            f"The held-out loss was lowest at step {count(number(best, 'step'))} ({fixed(lowest, 4)}) and has risen to {fixed(loss, 4)} since: "
            "the last steps learned the training text by heart. --load_best_model_at_end publishes the best weights."
        )
    unknown, lost = number(run.ledger, "unknown_tokens"), number(run.ledger, "lost_bytes")
    if unknown or lost:
        lines.append(
            f"The tokenizer cannot express all of the text: {count(unknown)} unknown tokens, {count(lost)} bytes lost."
        )
    return lines


def _charts(run: RunFiles) -> list[Chart]:
    held_out = Series("held-out loss", run.points("eval/loss"), "held", dots=True)
    charts = [
        Chart("Loss", [Series("training loss", run.points("train/loss"), "train", smooth=True), held_out]),
        Chart("Bits per byte", [Series("held-out text", run.points("eval/bits_per_byte"), "held", dots=True)]),
        Chart("Learning rate", [Series("learning rate", run.points("train/learning_rate"), "plain")], ".3g"),
        Chart(
            "Gradient norm",
            [Series("before clipping", run.points("train/grad_norm"), "plain", smooth=True)],
            ".3g",
            True,
        ),
        Chart(
            "Speed", [Series("tokens per second", run.points("perf/tokens_per_second"), "plain", smooth=True)], ",.0f"
        ),
    ]
    shares = {"samples": "copying/share_of_8_tokens", "held-out text": "copying/baseline_share_of_8_tokens"}
    copied = [
        Series(name, run.points(tag), colour, dots=True)
        for (name, tag), colour in zip(shares.items(), ("held", "rest"), strict=True)
    ]
    charts.append(Chart("Share of 8-token windows copied from the training text", copied, ".1%"))
    return [chart for chart in charts if chart.series]


def _samples(run: RunFiles) -> tuple[list[tuple[Sample | None, Sample | None]], bool]:
    """The samples before and after, in pairs, and whether any part of them is marked as copied."""
    samples, prompts = mapping(run.results, "samples"), texts(run.config, "prompt")
    before, after = texts(samples, "before"), texts(samples, "after")
    copied = {"before": samples.get("copied_before"), "after": samples.get("copied")}
    marked = {
        name: [
            Sample.cut(sample, prompts, copied_ranges(copied.get(name), index)) for index, sample in enumerate(listed)
        ]
        for name, listed in (("before", before), ("after", after))
    }
    evaluated = [number(run.results, "eval", name, "step") for name in marked]
    if (
        marked["before"] and None not in evaluated and evaluated[0] == evaluated[1]
    ):  # there is no evaluation after the first
        marked["after"] = []
    length = max(map(len, marked.values()))
    pairs = [tuple(marked[name][i] if i < len(marked[name]) else None for name in marked) for i in range(length)]
    return pairs, any(part[1] for listed in marked.values() for sample in listed for part in sample.parts)


def _evaluations(run: RunFiles) -> Table:
    losses, by_name = run.points("train/loss"), {name: dict(run.points(f"eval/{name}")) for name in METRICS}
    steps = sorted({step for values in by_name.values() for step in values})
    best = number(run.best_evaluation, "step")
    every = -(-len(steps) // _MOST_ROWS)
    shown = [step for i, step in enumerate(steps) if i % every == 0 or step in (best, steps[-1])] if steps else []
    rows, position = [], 0
    for step in shown:
        while position < len(losses) and losses[position][0] <= step:
            position += 1
        trained = losses[position - 1][1] if position else None
        values = [
            fixed(by_name[name].get(step), digits)
            for name, digits in (("loss", 4), ("perplexity", 2), ("bits_per_byte", 4))
        ]
        rows.append([count(step), fixed(trained, 4), *values])
    note = "The marked row has the lowest held-out loss." if best in shown else ""
    if every > 1:
        note += f" {len(shown)} of {len(steps)} evaluations; metrics.jsonl has all."
    scored, held_out = whole(run.results, "scored_windows"), whole(run.results, "held_out_windows")
    if scored and held_out and scored < held_out:
        note += f" {count(scored)} of {plural(held_out, 'held-out window')} scored."
    columns = ["#Step", "#Training loss", "#Held-out loss", "#Perplexity", "#Bits per byte"]
    return Table("Evaluations", columns, rows, note.strip(), shown.index(best) if best in shown else None)


def _text(run: RunFiles) -> Table:
    names = {
        "Documents": "documents", "Bytes": "bytes", "Tokens": "tokens", "Tokens to train on": "train_tokens",
        "Tokens held out": "held_out_tokens", "Tokens dropped": "dropped_tokens", "Beginning-of-text tokens": "bos_tokens",
        "End-of-text tokens": "eos_tokens", "Empty documents, left out": "empty_documents",
        "Blank documents, left out": "blank_documents", "Documents that repeat an earlier one": "duplicate_documents",
        "Unknown tokens": "unknown_tokens", "Bytes lost": "lost_bytes",
    }  # fmt: skip
    values = {name: number(run.ledger, key) for name, key in names.items()}
    always = list(names)[:6]
    rows = [[name, count(value)] for name, value in values.items() if value or (value is not None and name in always)]
    special = mapping(run.ledger, "special_tokens")
    rows += [[f"Special token {name}", count(number(special, name))] for name in special]
    corpus = [os.path.basename(name.rstrip("/")) or name for name in texts(run.config, "corpus")]
    note = f"Files: {', '.join(corpus[:10])}{', …' if len(corpus) > 10 else ''}. " if corpus else ""
    return Table(
        "The text", ["", "#"], rows, note + "Every token is counted; dropped ones do not fill a window." if rows else ""
    )


def _model(run: RunFiles) -> Table:
    results, best = run.results, run.best_evaluation
    parameters, trained = number(results, "parameters"), number(results, "trained_parameters")
    published = number(results, "published_step") if run.finished else None
    checkpoint = text(results, "best_checkpoint")
    if os.path.isabs(checkpoint):
        checkpoint = checkpoint.partition(f"{os.sep}{run.name}{os.sep}")[2] or os.path.basename(checkpoint)
    best_step = (
        ""
        if number(best, "step") is None
        else f"step {count(number(best, 'step'))}, held-out loss {fixed(number(best, 'loss'), 4)}"
    )
    rows = [
        ["Trained from", Code(run.relative(text(run.config, "model")))],
        ["Parameters", count(parameters) if parameters else ""],
        ["Parameters that train", count(trained) if trained and trained != parameters else ""],
        ["Best evaluation", best_step],
        ["Best checkpoint", Code(checkpoint)],
        ["Trained model", Code(run.relative(text(results, "output_dir"))) if run.finished else ""],
        ["Its weights", f"those of step {count(published)}" if published is not None else ""],
    ]
    return Table("The model", ["", ""], [row for row in rows if row[1]])


def _hashes(run: RunFiles) -> Table:
    names = {"documents_sha256": "Text", "tokenizer_sha256": "Tokenizer", "model_sha256": "Model configuration"}
    rows = [[label, Code(value)] for name, label in names.items() if (value := text(run.results, "sha256", name))]
    output = mapping(run.results, "output_sha256")
    rows += [[name, Code(value)] for name in output if (value := text(output, name))] if run.finished else []
    return Table("SHA-256", ["", ""], rows, folded=True)


def _machine(run: RunFiles) -> Table:
    names = {
        "Device": "device", "Precision": "precision", "Threads": "threads", "Processes": "world_size", "mori": "mori",
        "PyTorch": "torch", "Transformers": "transformers", "Python": "python", "System": "platform",
    }  # fmt: skip
    values = {name: run.environment.get(key) for name, key in names.items()}
    rows = [[name, str(value)] for name, value in values.items() if isinstance(value, (str, int)) and value != ""]
    return Table("Machine and versions", ["", ""], rows)


def _planned(run: RunFiles) -> Table:
    """What was expected before the first step, beside what happened."""
    plan, rows = run.preflight, []
    seconds, took = number(plan, "seconds", "total"), number(run.results, "wall_seconds")
    took = None if took is None else took - (number(plan, "seconds_before") or 0.0)
    if seconds is not None and drawable(seconds):
        happened = took if run.finished and whole(plan, "step") == 0 and took is not None and drawable(took) else None
        rows.append(["Time", clock(seconds), "–" if happened is None else clock(happened), change(seconds, happened)])
    peaks = mapping(plan, "peak_memory_bytes")
    bytes_planned, bytes_used = (
        number(peaks, "device") or number(peaks, "host"),
        number(run.results, "peak_memory_bytes"),
    )
    if bytes_planned:
        rows.append(["Peak memory", memory(bytes_planned), memory(bytes_used), change(bytes_planned, bytes_used)])
    note = "The plan is measured before the first step, and the time counts from there."
    return Table("Planned and happened", ["", "#Planned", "#Happened", "#Difference"], rows, note)


def _heaviest(run: RunFiles) -> Table:
    """The operations that took longest in the steps that were profiled."""
    operations, steps, rows = run.profile.get("operations"), run.profile.get("steps"), []
    for operation in operations if isinstance(operations, list) else []:
        if name := text(operation, "name"):
            share = number(operation, "share")
            time = fixed(number(operation, "ms"), 1)
            rows.append(
                [Code(name[:120]), count(number(operation, "calls")), time, "–" if share is None else _percent(share)]
            )
    of = f"Steps {steps[0]} to {steps[-1]}. " if isinstance(steps, list) and steps else ""
    note = f"{of}The time of the operations that an operation calls is theirs, not its own."
    return Table("The heaviest operations", ["Operation", "#Calls", "#Milliseconds", "#Share"], rows, note)


def shown_setting(run: RunFiles, value) -> str:
    """A setting as a table shows it."""
    if isinstance(value, list):
        return ", ".join(shown_setting(run, item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "unset"}[value]
    return run.relative(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _settings(run: RunFiles) -> Table:
    rows = [
        [Code(name), shown_setting(run, value)] for name, value in changed_settings(run).items() if name != "run_name"
    ]
    return Table("Settings that are not the defaults", ["", ""], rows, folded=True)


def _commands(run: RunFiles) -> list[tuple[str, str]]:
    commands = [("This run", typed)] if (typed := typed_command(run)) else []
    folder = Path(os.path.relpath(run.folder.resolve(), run.base)).as_posix()
    if run.config:
        commands.append(("The same settings", shlex.join(["mori", "train", "--config", f"{folder}/config.json"])))
    if run.finished and (output := text(run.results, "output_dir")):
        commands.append(("Talk to the model", shlex.join(["mori", "chat", "--model", run.relative(output)])))
    return commands
