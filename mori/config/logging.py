"""When a run logs, evaluates and saves, where its numbers go, and a call of `mori report`."""

import importlib.util
import re
from dataclasses import dataclass

from mori.cli import Config, flag

# The figures of an evaluation that may name the best one; lower is better for all of them.
METRICS = tuple(prefix + name for prefix in ("", "eval_") for name in ("loss", "perplexity", "bits_per_byte"))
# Where a run's numbers go, besides metrics.jsonl: the package that is needed, and the class that writes to it.
LOGGERS = {
    "tensorboard": "mori.tracking.tensorboard:TensorBoard",
    "wandb": "mori.tracking.loggers:WandbRun",
    "none": "",
}
_MOST_PROFILED = 100  # steps: a profile is kept in memory, some megabytes for each of them


@dataclass
class LoggingConfig(Config):
    """When a run logs, evaluates and saves."""

    group, may_change = "logging", True

    report_to: list[str] = flag(
        ["tensorboard"],
        "where the numbers and samples go, besides metrics.jsonl: TensorBoard events in the run's folder, Weights & Biases "
        "(WANDB_PROJECT names the project, WANDB_MODE=offline needs no network), or none",
        choices=LOGGERS,
    )
    profile_steps: str = flag(
        "",
        "steps a:b to record with PyTorch's profiler, counted from 1: a trace for Perfetto and TensorBoard, and the ten heaviest "
        "operations in profile.json, both in the run's folder",
    )
    logging_strategy: str = flag(
        "steps", "log every logging_steps, or at the end of each epoch", choices=("steps", "epoch")
    )
    logging_steps: int = flag(10, "interval of logging, in steps", above=0)
    eval_strategy: str = flag(
        "steps",
        "evaluate and sample every eval_steps, or at the end of each epoch; both also at the end of the run; no: never",
        choices=("steps", "epoch", "no"),
    )
    eval_steps: float = flag(
        0.1, "interval of evaluation and samples, in steps; below 1 a fraction of all steps", above=0, share=True
    )
    eval_on_start: bool = flag(True, "evaluate and sample before the first step as well")
    max_eval_windows: int | None = flag(
        None,
        "held-out windows that an evaluation scores, spread evenly; 0 takes all, unset as many as a tenth of the training time "
        "allows",
        kind=int,
        min=0,
    )
    per_device_eval_batch_size: int = flag(8, "windows in one batch of the evaluation", above=0)
    save_strategy: str = flag(
        "steps",
        "save a checkpoint every save_steps, or at the end of each epoch, both also at the end of the run; best: at each "
        "evaluation that is better than all before; no: never, so that a killed run starts over. A signal always saves, and the "
        "end always writes the trained model",
        choices=("steps", "epoch", "best", "no"),
    )
    save_steps: float = flag(
        0.1, "interval of checkpoints, in steps; below 1 a fraction of all steps", above=0, share=True
    )
    save_total_limit: int = flag(2, "checkpoints to keep, besides the best one", above=0)
    async_save: bool = flag(
        False,
        "write checkpoints in a thread while training goes on; takes host memory of the size of a checkpoint for a copy",
    )
    load_best_model_at_end: bool = flag(
        False,
        "publish the weights of the best evaluation instead of the last; each evaluation that is better than all before is saved",
    )
    metric_for_best_model: str = flag(
        "loss", "what the best evaluation has the lowest value of, with or without eval_ before it", choices=METRICS
    )
    greater_is_better: bool | None = flag(None, "as in Trainer; off for all metrics, the lowest is best", kind=bool)
    early_stopping_patience: int | None = flag(
        None,
        "stop the run after this many evaluations in a row without an improvement; a larger one continues the run",
        kind=int,
        above=0,
    )
    early_stopping_threshold: float = flag(
        0.0, "an improvement, for the patience, is a difference of more than this to the best evaluation", min=0
    )

    def contradictions(self) -> list[str]:
        """Loggers that contradict each other, or whose package is missing."""
        specs = {name: importlib.util.find_spec(name) for name in self.report_to if name != "none"}
        # A folder of that name is a package without an origin.
        missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
        mistakes = [f"report_to {name} needs {name}: pip install {name}" for name in missing]
        if self.profile_steps and not self.profiled_steps:
            mistakes.append(
                f"profile_steps is {self.profile_steps!r}, must be the first and the last step, as 10:12, of at most {_MOST_PROFILED}"
            )
        if "none" in self.report_to and specs:
            mistakes.append(f"report_to none and {', '.join(specs)} contradict each other; leave one out")
        return mistakes + super().contradictions()

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step to profile; None if there are none, or if `profile_steps` is malformed."""
        match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.profile_steps, re.ASCII)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        return (first, last) if 1 <= first <= last < first + _MOST_PROFILED else None

    @property
    def loggers(self) -> list[str]:
        """The names of the loggers to report to."""
        return [name for name in dict.fromkeys(self.report_to) if name != "none"]


@dataclass
class ReportConfig(Config):
    """A call of `mori report`."""

    group = "report"

    folder: list[str] = flag(
        ["runs"],
        "the folder of a run, or a folder of runs, which are compared; a word without a flag is one too",
        path=True,
        loose=True,
    )
