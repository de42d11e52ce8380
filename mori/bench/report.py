"""What a comparison leaves for people: `report.md` and a picture of the curves."""

from pathlib import Path

_COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e")


def write(folder: Path, found: dict, curves: dict[str, list[dict]]) -> None:
    """Write `report.md`, and `curves.png` where matplotlib is installed.

    Args:
        folder: where both go.
        found: the content of `compare.json`.
        curves: the lines of each arm's `metrics.jsonl`.
    """
    drawn = _draw(folder / "curves.png", found, curves)
    (folder / "report.md").write_text("\n".join(_lines(found, drawn)) + "\n", encoding="utf-8")


def _lines(found: dict, drawn: bool) -> list[str]:
    arms = {name: arm for name, arm in found["arms"].items() if not arm["error"]}
    env, config, ledger = found["environment"], found["config"], found["ledger"]
    size = found["model"]["parameters"]
    # Against Trainer where it took part; compare.json has every pair.
    shown = {name: pair for name, pair in found["pairs"].items() if "trainer" in name.split("|")} or found["pairs"]
    lines = [
        f"# {found['name']}: the same run, side by side",
        "",
        f"`{found['model']['name']}` ({size / 1e6:.1f} M parameters) on {ledger['documents']} document(s), {ledger['bytes']:,} bytes. "
        f"Every arm started from the same weights, in a process of its own; {config['repeats']} run(s) of each, in turn. "
        f"{env['device'] or 'CPU'}, {env['precision']}, {env['threads']} threads, torch {env['torch']}, transformers {env['transformers']}, "
        f"Python {env['python']}.",
        "",
        *_verdict(found),
        "* `mori` is the loop of this project; `mori-exact` is the same with every option off that changes the order of floating-point "
        "operations.",
        "* `trainer` is `transformers.Trainer` on the same windows in the same order; `trainer-tuned` the same with `torch.compile`, "
        "loader workers, and without reporting and NaN filter.",
        "* `course` is the usual recipe, as tutorials give it: one row per line, `truncation=True, max_length=1024`, Trainer's own "
        "shuffling and label shift.",
        "",
        "`mori` and `trainer` share what is before and after the training: the windows and their order, the seed, the scoring. Forward, "
        "loss, backward, clipping, optimizer and schedule are each one's own. Trainer is given its sampler, its loader (with a "
        "random generator of its own), and the shifted labels under both `labels` and `shift_labels`.",
        "",
        "Compiled dropout draws other random numbers: with `--dropout 0` the compiled arm does the same work as the others.",
        "",
    ]
    if drawn:
        lines += ["![Training loss, held-out loss, and the difference of the training losses](curves.png)", ""]

    lines += ["## Where they end", "", "Every arm is scored by the same code on the same held-out text.", ""]
    lines += [
        "| arm | steps | different tokens | targets in all | held-out loss before | after | perplexity | bits per byte |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in arms.items():
        before, after = arm["held_out"]["before"], arm["held_out"]["after"]
        lines.append(
            f"| `{name}` | {arm['steps']} | {arm['tokens_trained']:,} | {arm['targets']:,} | {before['loss']:.6f} | {after['loss']:.6f} "
            f"| {after['perplexity']:.2f} | {after['bits_per_byte']:.4f} |"
        )
    lines += [f"| `{name}` | failed: {arm['error']} |" for name, arm in found["arms"].items() if arm["error"]]
    lines += [
        "",
        f"The corpus has {ledger['tokens']:,} tokens: {ledger['train_tokens']:,} to train on, {ledger['held_out_tokens']:,} held out, "
        f"{ledger['dropped_tokens']:,} dropped because they fill no window. *Different tokens* counts those among them that stood in a "
        "batch, *targets in all* every prediction that was trained, repetitions included.",
        "",
        "## How much they differ",
        "",
        "The largest absolute difference over all logged steps, and over all final weights. Zero means equal to the last bit.",
        "",
        "| arms | steps | loss | gradient norm | learning rate | final weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, pair in shown.items():
        values = [pair[f"max_abs_{of}_diff"] for of in ("loss", "grad_norm", "learning_rate", "weight")]
        steps = "not the same" if pair["steps"] is None else pair["steps"]
        lines.append(f"| `{name.replace('|', '` and `')}` | {steps} | " + " | ".join(map(_difference, values)) + " |")

    lines += ["", "## What they cost", ""]
    lines += ["| arm | tokens per second | seconds to the first step | peak memory |", "| --- | ---: | ---: | ---: |"]
    for name, arm in arms.items():
        lines.append(
            f"| `{name}` | {_median(arm['tokens_per_second'], '{:,.0f}')} | {_median(arm['first_step_seconds'], '{:.1f}')} "
            f"| {arm['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    lines += [
        "",
        "Ratios, run by run in the same turn: median of the ratios (smallest to largest). A speed above 1: the first arm is faster; "
        "seconds or memory above 1: it needs more. A spread that holds 1 shows no difference.",
        "",
    ]
    lines += ["| arms | speed | seconds to the first step | memory |", "| --- | ---: | ---: | ---: |"]
    for name, pair in shown.items():
        title = f"`{name.replace('|', '` / `')}`"
        if pair["timing_valid"]:
            ratios = [_median(pair[key], "{:.2f}") for key in ("speed_ratio", "first_step_ratio", "memory_ratio")]
            lines.append(f"| {title} | " + " | ".join(ratios) + " |")
        else:
            lines.append(f"| {title} | void: the losses disagree, so this was not the same work | | |")
    lines += [
        "",
        "Speed is that of training alone, logging included, evaluation and saving not; the first 3 steps are left out as warm-up. "
        "*To the first step* counts from the start of the process, an evaluation of the untrained model included. Memory is the peak "
        "of the GPU where there is one, else of the whole process.",
        "",
        "## Settings of each arm",
        "",
    ]
    for name, arm in arms.items():
        lines += [f"<details><summary><code>{name}</code></summary>", "", "```"]
        lines += [f"{key}: {value}" for key, value in sorted(arm["settings"].items()) if value not in (None, "", [])]
        lines += ["```", "", "</details>", ""]
    return lines


def _verdict(found: dict) -> list[str]:
    ours = next((arm for arm in ("mori-exact", "mori") if f"{arm}|trainer" in found["pairs"]), None)
    if not ours:
        return []
    pair = found["pairs"][f"{ours}|trainer"]
    differences = [pair[f"max_abs_{of}_diff"] for of in ("loss", "grad_norm", "learning_rate", "weight")]
    equal = all(value == 0 for value in differences)
    said = f"equal to the last bit in every loss, gradient norm and learning rate of {pair['steps']} logged steps and in every final weight"
    return [f"**`{ours}` and `trainer` are {said if equal else 'not equal: see how much they differ below'}.**", ""]


def _difference(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.2e}"


def _median(spread: dict, form: str) -> str:
    shown = form.format(spread["median"])
    if spread["min"] == spread["max"]:
        return shown
    return f"{shown} ({form.format(spread['min'])} to {form.format(spread['max'])})"


def _draw(path: Path, found: dict, curves: dict[str, list[dict]]) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    arms = [name for name, arm in found["arms"].items() if not arm["error"]]
    figure = Figure(figsize=(11, 9), layout="constrained")
    training, held_out, difference = figure.subplots(3, 1)
    for number, name in enumerate(arms):
        # Curves that are equal lie on each other: each is drawn thinner than the one below it.
        style = {"color": _COLOURS[number % 5], "linewidth": 1.2 + 1.6 * (len(arms) - 1 - number), "label": name}
        for axes, tag in ((training, "train/loss"), (held_out, "eval/loss")):
            points = [(line["step"], line[tag]) for line in curves[name] if tag in line]
            axes.plot(*zip(*points, strict=True), **style)
    reference = "trainer" if "trainer" in arms else arms[0] if arms else None
    losses = {
        name: {line["step"]: line["train/loss"] for line in curves[name] if "train/loss" in line} for name in arms
    }
    zero = []
    for number, name in enumerate(arms):
        if name == reference or losses[name].keys() != losses[reference].keys():
            continue
        points = [(step, losses[name][step] - losses[reference][step]) for step in losses[name]]
        difference.plot(*zip(*points, strict=True), color=_COLOURS[number % 5], label=name, linewidth=1.2)
        if all(value == 0 for _, value in points):
            zero.append(f"{name}: 0 at all {len(points)} steps")
    training.set(title="Training loss", ylabel="nats per token")
    held_out.set(title="Held-out loss", ylabel="nats per token")
    title = "; ".join([f"Training loss, minus that of {reference}", *zero])
    difference.set(title=title, xlabel="step", ylabel="difference")
    for axes in (training, held_out, difference):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    return True
