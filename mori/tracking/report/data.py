"""A run as its files tell it: every file may be missing, and every value in it may be of a wrong type."""

import json
import math
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mori.cli import UserError
from mori.config import TrainConfig
from mori.tracking.loggers import read_metrics
from mori.tracking.report.charts import drawable

METRICS = ("loss", "perplexity", "bits_per_byte")  # of an evaluation

# What the newest evaluation wrote, for a run that is not finished; it has the fields of summary.json.
PROGRESS = "progress.json"
_SIGNS_OF_A_RUN = ("environment.json", "ledger.json", "metrics.jsonl", "summary.json", "preflight.json", PROGRESS)
_LARGEST = 1 << 53
_JSON_FILES = ("config", "environment", "ledger", "summary", "progress", "profile", "preflight")


@dataclass
class RunFiles:
    """The files of a run; a dict is empty where its file is missing or damaged.

    Attributes:
        results: summary.json, or progress.json of a run that has gone on since, or was never finished.
        finished: whether `results` is the end of the run.
        damage: a line for each damaged file.
    """

    folder: Path
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    ledger: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    profile: dict = field(default_factory=dict)
    preflight: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    finished: bool = False
    damage: list[str] = field(default_factory=list)
    _points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    def points(self, tag: str) -> list[tuple[int, float]]:
        """Steps and values of the scalar `tag`, in the order of the steps; of a step that is there twice, the last value."""
        if tag not in self._points:
            values = {line["step"]: value for line in self.metrics if (value := number(line, tag)) is not None}
            self._points[tag] = sorted(values.items())
        return self._points[tag]

    def tags(self, prefix: str) -> list[str]:
        """The tags that begin with `prefix`, in the order of their first line."""
        return list(dict.fromkeys(tag for line in self.metrics for tag in line if tag.startswith(prefix)))

    def last(self, tag: str) -> float | None:
        """The newest value of the scalar `tag`."""
        points = self.points(tag)
        return points[-1][1] if points else None

    @property
    def step(self) -> int | None:
        """The last step that a file tells of."""
        steps = [line["step"] for line in self.metrics]
        done = whole(self.results, "steps")
        return max([*steps, *([] if done is None else [done])], default=None)

    @property
    def first_evaluation(self) -> dict:
        """The evaluation before the first step; {} if there was none."""
        return mapping(self.results, "eval", "before") or self._evaluation_at(0)

    @property
    def last_evaluation(self) -> dict:
        """The evaluation of the weights that are published, or else the newest; {} if there was none."""
        evaluation, published = mapping(self.results, "eval"), number(self.results, "published_step")
        best, after = mapping(evaluation, "best"), mapping(evaluation, "after")
        if published is not None and number(best, "step") == published:
            return best
        newest = max((step for step, _ in self.points("eval/loss")), default=-1)
        return after if after and (number(after, "step") or 0) >= newest else self._evaluation_at(newest) or after

    @property
    def best_evaluation(self) -> dict:
        """The evaluation with the lowest held-out loss after the first step; {} if there is none."""
        later = [(loss, step) for step, loss in self.points("eval/loss") if step > 0 and drawable(loss)]
        return self._evaluation_at(min(later)[1]) if later else mapping(self.results, "eval", "best")

    def _evaluation_at(self, step: int) -> dict:
        values = {name: dict(self.points(f"eval/{name}")).get(step) for name in METRICS}
        return {"step": step, **values} if any(value is not None for value in values.values()) else {}

    @property
    def base(self) -> str:
        """The folder that the run's relative paths start from, as far as the name of its own folder tells."""
        parent = str(self.folder.resolve().parent)
        logging_dir = os.path.normpath(text(self.config, "logging_dir") or "runs")
        if os.path.isabs(logging_dir):
            return os.path.dirname(parent)
        return parent.removesuffix(logging_dir).rstrip(os.sep) or os.sep

    def relative(self, path: str) -> str:
        """An absolute path from `base`; any other text stays."""
        if not os.path.isabs(path):
            return path
        try:
            return Path(os.path.relpath(path, self.base)).as_posix()
        except ValueError:  # another drive, or a null character
            return os.path.basename(path)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, damaged or not."""
    return any((folder / name).is_file() for name in _SIGNS_OF_A_RUN)


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run. No content of a file raises an error; `damage` names what could not be read."""
    run, content = RunFiles(folder), {}
    for name in _JSON_FILES:
        try:
            content[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            content[name] = {}
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not whole JSON"
            run.damage.append(f"{name}.json cannot be used: it {reason}")
            content[name] = {}
        if not isinstance(content[name], dict):
            run.damage.append(f"{name}.json cannot be used: it holds no JSON object")
            content[name] = {}
    for name in ("config", "environment", "ledger", "profile", "preflight"):
        setattr(run, name, content[name])
    summary, progress = content["summary"], content["progress"]
    run.finished = bool(summary) and (not progress or progress.get("steps") == summary.get("steps"))
    run.results = summary if run.finished else progress
    run.ledger = run.ledger or mapping(run.results, "ledger")
    _read_metrics(run)
    return run


def _read_metrics(run: RunFiles) -> None:
    path = run.folder / "metrics.jsonl"
    try:
        run.metrics = [line for line in read_metrics(path) if 0 <= line["step"] < _LARGEST]
        lines = sum(bool(line.strip()) for line in path.open("rb")) if path.is_file() else 0
    except (OSError, RecursionError) as error:
        run.damage.append(f"metrics.jsonl cannot be read: {getattr(error, 'strerror', None) or 'nested too deeply'}")
        return
    if lost := lines - len(run.metrics):
        run.damage.append(f"metrics.jsonl: {lost} of {lines} lines are damaged and left out")


def number(value, *keys: str) -> int | float | None:
    """The number at the end of a path of keys; None if there is none. It may be NaN or infinite."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, float) or abs(value) < 1 << 63 else math.inf


def whole(value, *keys: str) -> int | None:
    """The whole number at the end of a path of keys; None if there is none."""
    figure = number(value, *keys)
    return int(figure) if figure is not None and abs(figure) < _LARGEST else None


def text(value, *keys: str) -> str:
    """The text at the end of a path of keys; "" if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def mapping(value, *keys: str) -> dict:
    """The object at the end of a path of keys; {} if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def texts(value, *keys: str) -> list[str]:
    """The texts in the list at the end of a path of keys; [] if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def changed_settings(run: RunFiles) -> dict:
    """The settings of a run that are not the defaults for its model, in the order of the config."""
    try:
        model, adapters = text(run.config, "model") or "mini", run.config.get("use_peft") is True
        defaults = asdict(TrainConfig(model=model, use_peft=adapters).resolve()) | {"use_peft": False}
    except (UserError, ValueError, OSError):
        defaults = asdict(TrainConfig())
    return {name: value for name, value in run.config.items() if name in defaults and value != defaults[name]}


def typed_command(run: RunFiles) -> str:
    """The command of the run, or its call from Python, with paths from the folder in which it was typed."""
    words = texts(run.environment, "command")
    program = Path(words[0]) if words else Path()
    if program.name == "mori":
        start = ["mori"]
    elif program.name == "__main__.py":
        start = ["python", "-m", "mori"]
    elif program.suffix == ".py" and program.parent.name == "scripts":
        start = ["python", f"scripts/{program.name}"]
    else:
        settings = {**changed_settings(run), "run_name": run.name}
        values = [f"{name}={_relative_value(run, value)!r}" for name, value in settings.items()]
        return f"mori.train({', '.join(values)})" if run.config else ""
    processes = whole(run.environment, "world_size") or 1
    if processes > 1:
        start = start[1:] if start[0] == "python" else ["--no-python", *start]
        start = ["torchrun", f"--nproc-per-node={processes}", *start]
    return shlex.join([*start, *(_relative_word(run, word) for word in words[1:])])


def _relative_value(run: RunFiles, value):
    if isinstance(value, list):
        return [_relative_value(run, item) for item in value]
    return run.relative(value) if isinstance(value, str) else value


def _relative_word(run: RunFiles, word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name}={run.relative(value)}" if equals and name.startswith("--") else run.relative(word)
