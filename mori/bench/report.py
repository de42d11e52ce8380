"""The report of a comparison: `report.md`, and `curves.png` if matplotlib is installed."""

from pathlib import Path

from mori.cli import plural

_COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a994e")
_DIFFERENCES = ("loss", "grad_norm", "learning_rate", "weight")


def write(folder: Path, comparison: dict, curves: dict[str, list[dict]]) -> None:
    """Write `report.md` and, if matplotlib is installed, `curves.png` into `folder`.

    Args:
        folder: the folder of the comparison.
        comparison: the content of `compare.json`.
        curves: the lines of each arm's `metrics.jsonl`.
    """
    arms = {name: arm for name, arm in comparison["arms"].items() if not arm["error"]}
    picture = _draw(folder / "curves.png", list(arms), curves)
    # Pairs with Trainer if it took part; compare.json has every pair.
    pairs = comparison["pairs"]
    pairs = {name: pair for name, pair in pairs.items() if "trainer" in name.split("|")} or pairs
    lines = [
        *_introduction(comparison),
        *(["![Training loss, held-out loss, difference of the training losses](curves.png)", ""] if picture else []),
        *_outcome(comparison, arms),
        *_differences(pairs),
        *_costs(arms, pairs),
        *_settings(arms),
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _introduction(comparison: dict) -> list[str]:
    environment, ledger = comparison["environment"], comparison["ledger"]
    return [
        f"# {comparison['name']}: the same training by each arm",
        "",
        f"`{comparison['model']['name']}` ({comparison['model']['parameters'] / 1e6:.1f} M parameters) on "
        f"{plural(ledger['documents'], 'document')}, {plural(ledger['bytes'], 'byte')}. Every arm starts from the same weights, in a new process; "
        f"{plural(comparison['config']['repeats'], 'run')} of each, in turn. {environment['device'] or 'CPU'}, {environment['precision']}, "
        f"{plural(environment['threads'], 'thread')}, torch {environment['torch']}, transformers {environment['transformers']}, "
        f"Python {environment['python']}.",
        "",
        *_verdict(comparison["pairs"]),
        "* `mori` is the loop of this project; `mori-exact` is the same loop without the options that change the order of "
        "floating-point operations.",
        "* `trainer` is `transformers.Trainer` on the same windows in the same order; `trainer-tuned` adds `torch.compile` and "
        "data-loader workers, and switches off reporting and the NaN filter.",
        "* `course` is the recipe of many tutorials: one row per line, `truncation=True, max_length=1024`, Trainer's own "
        "shuffling and label shift.",
        "",
        "`mori` and `trainer` share the windows and their order, the seed and the evaluation. Each has its own forward pass, "
        "loss, backward pass, clipping, optimizer and schedule. Trainer gets the sampler, a data loader with its own random "
        "generator, and the shifted labels as both `labels` and `shift_labels`.",
        "",
        "Compiled dropout draws other random numbers: use `--dropout 0` for a comparison with `trainer-tuned`.",
        "",
    ]


def _verdict(pairs: dict) -> list[str]:
    ours = next((arm for arm in ("mori-exact", "mori") if f"{arm}|trainer" in pairs), None)
    if not ours:
        return []
    pair = pairs[f"{ours}|trainer"]
    if any(pair[f"max_abs_{name}_diff"] != 0 for name in _DIFFERENCES):
        return [f"**`{ours}` and `trainer` are not equal: see *Differences*.**", ""]
    return [
        f"**`{ours}` and `trainer` are equal to the last bit: every loss, gradient norm and learning rate of {pair['steps']} "
        "logged steps, and every final weight.**",
        "",
    ]


def _outcome(comparison: dict, arms: dict) -> list[str]:
    ledger = comparison["ledger"]
    lines = [
        "## Outcome",
        "",
        "The same code evaluates every arm on the same held-out text.",
        "",
        "| arm | steps | distinct tokens | targets | held-out loss before | after | perplexity | bits per byte |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in arms.items():
        before, after = arm["held_out"]["before"], arm["held_out"]["after"]
        lines.append(
            f"| `{name}` | {arm['steps']} | {arm['tokens_trained']:,} | {arm['targets']:,} | {before['loss']:.6f} | {after['loss']:.6f} "
            f"| {after['perplexity']:.2f} | {_bits(after['bits_per_byte'])} |"
        )
    lines += ["", *(f"`{name}`: {arm['error']}\n" for name, arm in comparison["arms"].items() if arm["error"])]
    return [
        *lines,
        f"The corpus has {plural(ledger['tokens'], 'token')}: {ledger['train_tokens']:,} to train on, {ledger['held_out_tokens']:,} held out, "
        f"{ledger['dropped_tokens']:,} dropped because they do not fill a window. *Distinct tokens* counts the training tokens that "
        "were in a batch at least once, *targets* all predictions, repetitions included.",
        "",
    ]


def _differences(pairs: dict) -> list[str]:
    lines = [
        "## Differences",
        "",
        "The largest absolute difference over all logged steps, and over all final weights. 0 means equal to the last bit.",
        "",
        "| arms | steps | loss | gradient norm | learning rate | final weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, pair in pairs.items():
        values = [_difference(pair[f"max_abs_{quantity}_diff"]) for quantity in _DIFFERENCES]
        steps = "not the same" if pair["steps"] is None else pair["steps"]
        lines.append(f"| `{name.replace('|', '` and `')}` | {steps} | " + " | ".join(values) + " |")
    return [*lines, ""]


def _costs(arms: dict, pairs: dict) -> list[str]:
    lines = [
        "## Speed and memory",
        "",
        "| arm | tokens per second | seconds to the first step | peak memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, arm in arms.items():
        lines.append(
            f"| `{name}` | {_median(arm['tokens_per_second'], '{:,.0f}')} | {_median(arm['first_step_seconds'], '{:.1f}')} "
            f"| {arm['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    lines += [
        "",
        "Ratios of runs in the same turn: median (minimum to maximum). Speed above 1: the first arm is faster; seconds or memory "
        "above 1: it needs more. A range that includes 1 shows no difference.",
        "",
        "| arms | speed | seconds to the first step | memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, pair in pairs.items():
        title = f"`{name.replace('|', '` / `')}`"
        if pair["timing_valid"]:
            ratios = [_median(pair[key], "{:.2f}") for key in ("speed_ratio", "first_step_ratio", "memory_ratio")]
            lines.append(f"| {title} | " + " | ".join(ratios) + " |")
        else:
            lines.append(f"| {title} | void: the losses differ, so the arms did not do the same work | | |")
    return [
        *lines,
        "",
        "Speed counts training and logging, without evaluation and saving, after the first 3 steps. *Seconds to the first step* "
        "start with the process and include an evaluation of the untrained model. Memory is the peak of the GPU, or of the process "
        "on a CPU.",
        "",
    ]


def _settings(arms: dict) -> list[str]:
    lines = ["## Settings", ""]
    for name, arm in arms.items():
        settings = [f"{key}: {value}" for key, value in sorted(arm["settings"].items()) if value not in (None, "", [])]
        lines += [f"<details><summary><code>{name}</code></summary>", "", "```", *settings, "```", "", "</details>", ""]
    return lines


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _difference(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.2e}"


def _median(spread: dict, form: str) -> str:
    median = form.format(spread["median"])
    if spread["min"] == spread["max"]:
        return median
    return f"{median} ({form.format(spread['min'])} to {form.format(spread['max'])})"


def _draw(path: Path, arms: list[str], curves: dict[str, list[dict]]) -> bool:
    """Draw the losses of all arms, and the difference of their training losses from Trainer's; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 9), layout="constrained")
    training, held_out, difference = figure.subplots(3, 1)
    losses = {name: _points(curves[name], "train/loss") for name in arms}
    reference = "trainer" if "trainer" in arms else next(iter(arms), None)
    equal = []
    for number, name in enumerate(arms):
        # Equal curves cover each other, so each is thinner than the one below it.
        style = {"color": _COLOURS[number % 5], "linewidth": 1.2 + 1.6 * (len(arms) - 1 - number), "label": name}
        training.plot(losses[name].keys(), losses[name].values(), **style)
        evaluations = _points(curves[name], "eval/loss")
        held_out.plot(evaluations.keys(), evaluations.values(), **style)
        if name == reference or losses[name].keys() != losses[reference].keys():
            continue
        differences = [losses[name][step] - losses[reference][step] for step in losses[name]]
        difference.plot(losses[name].keys(), differences, color=_COLOURS[number % 5], label=name, linewidth=1.2)
        if not any(differences):
            equal.append(f"{name}: 0 at all {len(differences)} steps")
    training.set(title="Training loss", ylabel="nats per token")
    held_out.set(title="Held-out loss", ylabel="nats per token")
    title = "; ".join([f"Training loss minus that of {reference}", *equal])
    difference.set(title=title, xlabel="step", ylabel="difference")
    for axes in (training, held_out, difference):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    return True


def _points(lines: list[dict], tag: str) -> dict[int, float]:
    """The values of `tag` by step."""
    return {line["step"]: line[tag] for line in lines if tag in line}
