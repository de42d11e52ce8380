"""A run in a few printed lines, before its first step and after its last, and `environment.json`."""

import contextlib
import json
import platform
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sized
from dataclasses import fields
from pathlib import Path

import torch
import transformers

from mori import __version__
from mori.cli import escaped_text, json_list, plural
from mori.config import GenerateConfig, TrainConfig


def environment(device: torch.device, precision: str, world_size: int) -> dict:
    """Versions, hardware and command of this process, for `environment.json`."""
    gpu = device.type == "cuda"
    return {
        "mori": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "command": sys.argv,
    }


def _processor() -> str:
    """The processor's name as its maker gives it, or else its architecture."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def introduction(
    config: TrainConfig,
    *,
    environment: dict,
    device: torch.device,
    text: str,
    parameters: int,
    total_steps: int,
    steps_per_epoch: int,
    evaluations: str,
    faster: str,
    windows_per_step: int,
    special: str,
    run_dir: Path,
    resumed: tuple[int, Path] | None = None,
    notes: Iterable[str] = (),
) -> str:
    """The lines printed before the first step: what is read, what is trained, and what is written.

    Args:
        environment: of this process, as `environment` returns it.
        text: the corpus in words (its ledger).
        parameters: of the model.
        evaluations: how much text is evaluated, and when, in words.
        faster: what speeds up this run, in words.
        windows_per_step: on all ranks together.
        special: the special tokens of documents, prompts and answers, in words.
        resumed: the step and the checkpoint that the run resumes from.
        notes: further lines.
    """
    accumulation, ranks = config.gradient_accumulation_steps, environment["world_size"]
    batch = [plural(config.per_device_train_batch_size, "window")]
    batch += [plural(accumulation, "micro-batch", "micro-batches")] * (accumulation > 1)
    batch += [plural(ranks, "rank")] * (ranks > 1)
    if windows_per_step != config.per_device_train_batch_size * accumulation * ranks:  # the run began on other ranks
        batch = [f"{plural(windows_per_step, 'window')} on {plural(ranks, 'rank')}"]
    batch.append(plural(config.block_size, "token"))
    board = f" (tensorboard --logdir {shlex.quote(config.logging_dir)})" * ("tensorboard" in config.loggers)
    rows = {
        "reads": text,
        "model": f"{config.model}, {parameters / 1e6:.1f} M parameters",
        "trains": f"{plural(total_steps, 'step')} ({steps_per_epoch:,} an epoch) of {' x '.join(batch)}",
        "checks": evaluations,
        "faster": faster,
        "tokens": special,
        "writes": f"{_short(run_dir)}/{board}, the brain to {config.output_dir}/",
    }
    versions = (
        f"mori {environment['mori']}, torch {environment['torch']}, transformers {environment['transformers']}; "
        f"{device}, {environment['precision']}, {plural(environment['threads'], 'thread')}"
    )
    lines = [versions, *(f"{name:8}{value}" for name, value in rows.items())]
    if resumed:
        rest = ": no step is left to train" * (resumed[0] >= total_steps)
        lines.append(f"resumed at step {resumed[0]:,} ({_short(resumed[1])}){rest}")
    return "\n".join(_folded(line) for line in [*lines, *notes])


def evaluations_in_words(config: TrainConfig, every: int, scored: int, held_out: Sized | None) -> str:
    """How much text is evaluated, and when, in words: `scored` of the windows `held_out`, `every` so many steps."""
    if config.eval_strategy == "no":
        return "no evaluation and no samples (eval_strategy no)"
    interval = "every step" if every == 1 else f"every {every:,} steps"
    if held_out is None:
        return f"no text is held out; samples {interval}"
    more = " (--max_eval_windows 0 takes all)" if scored < len(held_out) else ""
    return f"{scored:,} of {plural(len(held_out), 'held-out window')} {interval}{more}"


def plan(figures: dict) -> str:
    """The lines that say how long a run will take and what it needs; `figures` are those of its preflight.json."""
    seconds, disk = figures["seconds"], figures["disk"]
    parts = [f"{about(seconds[name])} {name}" for name in ("training", "evaluation", "saving") if seconds[name]]
    peaks = figures["peak_memory_bytes"]
    memory = f"{size(peaks['device'])} of GPU memory, {size(peaks['host'])} of host memory" if "device" in peaks else ""
    checkpoints = f"{plural(disk['checkpoints'], 'checkpoint')} of {size(disk['checkpoint_bytes'])}"
    needed = disk["checkpoints"] * disk["checkpoint_bytes"] + disk["model_bytes"]
    rows = {
        "takes": f"about {about(seconds['total'])}: {', '.join(parts)}",
        "memory": f"{memory or size(peaks['host'])} at the peak",
        "disk": f"{size(needed)} more at most ({checkpoints}, the model {size(disk['model_bytes'])}); {size(disk['free_bytes'])} are free",
        "learns": f"from {figures['tokens']:,} tokens, {figures['tokens_per_parameter']:.3g} per trained parameter",
    }
    return "\n".join(_folded(f"{name:8}{value}") for name, value in rows.items())


def about(seconds: float) -> str:
    """A duration to two digits or so: `0.4 s`, `40 s`, `3 min`, `1 h 20 min`, `2 d 3 h`."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def size(count: int) -> str:
    """A number of bytes: `512 KiB`, `36.4 MiB`, `1.3 GiB`."""
    power = min(max((count.bit_length() - 1) // 10, 1), 4)
    return f"{count / 1024**power:,.1f} {' KMGT'[power]}iB"


def _short(path: Path) -> Path:
    """The path from the current folder, if it is in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _folded(line: str) -> str:
    """A line as wide as the terminal, its continuation below the values; in files, which are searched by line, it stays long."""
    if not sys.stdout.isatty():
        return line
    columns = max(shutil.get_terminal_size().columns, 30)
    return textwrap.fill(line, columns, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)


def results(summary: dict, command: str, same_text: bool = True) -> str:
    """The lines printed after the last step: cost, held-out loss, and the command that draws the samples again.

    `summary` is what `summary.json` holds; `same_text`, whether `command` prints the samples of the last evaluation to the letter.
    """
    evaluation, steps = summary["eval"], summary["steps"]
    losses, best, after = "", evaluation["best"], evaluation["after"]
    if after and after["loss"] is not None:
        before = f"{evaluation['before']['loss']:.4f} -> " if evaluation["before"] else ""
        lowest = f" (best {best['loss']:.4f} at step {best['step']})" if best else ""
        losses = f"; held-out loss {before}{after['loss']:.4f}{lowest}"
    speed = f"{summary['tokens_per_second']:,.0f} tokens/s"
    lines = [
        _folded(f"{plural(steps, 'step')} in {summary['wall_seconds']:.0f} s, {speed}{losses}"),
        f"the brain is in {summary['output_dir']}/; {'the text above' if same_text else 'a text'} from it:",
        command,
    ]
    published, checkpoint = summary.get("published_step", steps), summary.get("best_checkpoint")
    if published != steps:
        lines[1] = f"the weights are those of step {published}, the best; {lines[1]}"
    elif best and best["step"] != steps and checkpoint and checkpoint.endswith(f"{best['step']:08d}"):
        lines.append(
            f"better at step {best['step']} (held-out loss {best['loss']:.4f}, last {after['loss']:.4f}): the same command with "
            f"--load_best_model_at_end publishes it, or {shlex.join([*command_words('generate'), *flag_words('model', checkpoint)])}"
        )
    if summary["skipped_steps"]:
        warning = f"WARNING: {plural(summary['skipped_steps'], 'step')} of {steps:,} skipped for a gradient that was not finite"
        lines.insert(0, _folded(warning))
    return "\n".join(lines)


def sample_command(config: TrainConfig, model_settings: dict) -> str:
    """The command that draws a run's samples again from its trained model, in the words of the run's own command.

    `model_settings` are the sampling fields that the model's generation_config.json sets. In fp32 the texts are equal.
    """
    command = command_words("generate")
    defaults = {**{f.name: getattr(GenerateConfig(), f.name) for f in fields(GenerateConfig)}, **model_settings}
    wanted = {"prompt": config.prompt, "seed": config.seed, "device": config.device, **config.sampling()}
    changed = {name: value for name, value in wanted.items() if value != defaults[name]}
    for name, value in {"model": config.output_dir, **changed}.items():
        command += [word for text in _texts(name, value) for word in flag_words(name, text)]
    return shlex.join(command)


def command_words(name: str) -> list[str]:
    """How to call the command `name`, in the way in which this process was called."""
    program = Path(sys.argv[0])
    if program.suffix == ".py" and program.parent.name == "scripts":
        return ["python", str(program.with_name(f"{name}.py"))]
    return [*(["mori"] if program.name == "mori" else ["python", "-m", "mori"]), name]


def _texts(name: str, value) -> list[str]:
    """The texts from which the command line reads `value`; several for a flag that is repeated."""
    kind = GenerateConfig.__dataclass_fields__[name].metadata["type"]
    if kind is json_list:
        return [json.dumps(value)]
    texts = [str(item) for item in (value if isinstance(value, list) else [value])]
    if kind is escaped_text:
        texts = [text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") for text in texts]
    return texts


def flag_words(name: str, text: str) -> list[str]:
    """The words of a flag; a value that looks like a flag follows an equals sign."""
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
