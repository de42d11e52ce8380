"""TensorBoard events in the run's folder: scalars with a description, texts, histograms, settings for the HParams tab, a layout."""

import html
import json
import re
import shlex
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields

from mori.config import TrainConfig
from mori.tracking import copying
from mori.tracking.loggers import Logger, spans

# What each scalar is, its unit, and what is good, by its tag; TensorBoard shows it at the chart.
DESCRIPTIONS = {
    "train/loss": "Mean loss of the training steps since the last point, in nats per token; lower is better. If it falls while "
    "eval/loss rises, the model memorizes.",
    "train/grad_norm": "L2 norm of the gradient before clipping; a steady curve is good, spikes are steps that clipping tamed.",
    "train/learning_rate": "Learning rate of the step; the schedule sets it.",
    "train/update_ratio": "Length of the step's change of the weights, divided by the length of the weights before it, on an even "
    "sample of both; about 0.001 is usual, much more is unstable, much less learns slowly.",
    "train/epoch": "Passes over the training text so far.",
    "train/skipped_steps": "Steps so far that were skipped because the gradient was not finite; 0 is good.",
    "train/micro_batch_size": "Windows in a micro-batch from this step on; it is halved when memory runs out.",
    "eval/loss": "Mean loss on the held-out text, in nats per token; lower is better. Its lowest point is the best model.",
    "eval/perplexity": "exp(eval/loss): among how many equally likely tokens the model hesitates; lower is better.",
    "eval/bits_per_byte": "Bits to encode a byte of the held-out text; lower is better, and models with different tokenizers compare.",
    "perf/tokens_per_second": "Training tokens per second since the last point, over all ranks, without evaluations and saves; higher "
    "is better.",
    "perf/data_wait": "Share of the training time spent on preparing batches, from 0 to 1; near 0 is good.",
    "perf/peak_memory_gib": "Most memory in use so far, in GiB: PyTorch's on a GPU, else that of the process; lower is better.",
    "perf/mfu": "Model FLOPs utilization: the operations that the model needs, as a share of the device's peak, from 0 to 1; higher is "
    "better.",
    "eval/token_loss": "Losses of the single tokens of the held-out text, in nats, in bins of equal width; the last bin also holds all "
    "above it. Mass that moves left is good.",
    **copying.DESCRIPTIONS,
}  # fmt: skip
# The charts of the Custom Scalars tab: title -> charts, each with the regular expressions of its tags.
LAYOUT = {
    "Learning": {
        "training and held-out loss (nats per token)": ["train/loss$", "eval/loss$"],
        "held-out bits per byte": ["eval/bits_per_byte$"],
        "longest copied run (tokens)": ["copying/(.*_)?longest_run$"],
        "share of windows of 8 tokens that are copied": ["copying/(.*_)?share_of_8_tokens$"],
    },
    "Optimizer": {
        "learning rate": ["train/learning_rate$"],
        "gradient norm before clipping": ["train/grad_norm$"],
        "length of the update / length of the weights": ["train/update_ratio$"],
    },
    "Speed and memory": {
        "tokens per second": ["perf/tokens_per_second$"],
        "peak memory (GiB)": ["perf/peak_memory_gib$"],
        "share of the peak FLOPs, and of time waiting for data": ["perf/mfu$", "perf/data_wait$"],
    },
}
# The columns of the HParams tab: settings that have a value in every run, and the newest value of some scalars. It shows five
# settings at first.
_SHOWN_FIRST = ("model", "block_size", "per_device_train_batch_size", "learning_rate", "optim")
_SETTINGS = (
    *_SHOWN_FIRST, "corpus", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs",
    "max_steps", "dropout", "use_peft", "precision", "seed",
)  # fmt: skip
_EVALUATION, _TRAINING = (
    ("eval/loss", "eval/perplexity", "eval/bits_per_byte"),
    ("train/loss", "perf/tokens_per_second"),
)
_EVENTS_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\b")


class TensorBoard(Logger):
    """TensorBoard events in the run's folder."""

    name, in_background = "TensorBoard", False
    _records, _started, _columns_named = None, False, False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write `values` at `step` and flush."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary
        from tensorboard.plugins.scalar.metadata import create_summary_metadata

        def metadata(tag: str):
            result = create_summary_metadata(display_name=None, description=DESCRIPTIONS.get(tag, ""))
            result.data_class = DATA_CLASS_SCALAR  # TensorBoard's data server drops the description without it
            return result

        written = [Summary.Value(tag=tag, simple_value=value, metadata=metadata(tag)) for tag, value in values.items()]
        self._write(step, self._columns(values) + [Summary(value=[value]) for value in written])

    def text(self, step: int, tag: str, text: str, marked: Sequence[tuple[int, int]] = ()) -> None:
        """Show `text` word for word, with long lines folded and the `marked` spans in bold."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._write(step, [text_summary(tag, preformatted(text, marked))])

    def histogram(self, step: int, tag: str, edges: Sequence[float], counts: Sequence[int]) -> None:
        """Write a histogram of given counts."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.histogram.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        bins = [list(map(float, values)) for values in zip(edges[:-1], edges[1:], counts, strict=True)]
        metadata = create_summary_metadata(display_name=None, description=DESCRIPTIONS.get(tag, ""))
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(bins, dtype="float64"))
        self._write(step, [Summary(value=[value])])

    def close(self) -> None:
        """Close the events file."""
        if self._records:
            self._records.close()

    def _write(self, step: int, summaries: list) -> None:
        """Append an event for each summary. After an error, the next write starts a new file: this one may end in a part."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [Event(step=step, summary=summary) for summary in summaries]
        if not self._records:
            first = [Event(file_version="brain.Event:2")]
            if not self._started:  # TensorBoard forgets the events of this step and later ones that it has read before
                first.append(Event(step=self.first_lost_step, session_log=SessionLog(status=SessionLog.START)))
                begun = max(self.first_lost_step - 1, 0)
                first += [Event(step=begun, summary=summary) for summary in self._beginning()]
            events = first + events
            self._records = RecordWriter((self.run_dir / self._new_name()).open("xb"))
        try:
            for event in events:
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._records.flush()
            self._started = True
        except OSError:
            self._records = None
            raise

    def _beginning(self) -> list:
        """What is known before the first step: tables as texts, the layout, and the settings for the HParams tab."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.util.tensor_util import make_tensor_proto
        from torch.utils.tensorboard.summary import text as text_summary

        categories = []
        for category, charts in LAYOUT.items():
            lines = {title: layout_pb2.MultilineChartContent(tag=tags) for title, tags in charts.items()}
            charts = [layout_pb2.Chart(title=title, multiline=content) for title, content in lines.items()]
            categories.append(layout_pb2.Category(title=category, chart=charts))
        layout = make_tensor_proto(layout_pb2.Layout(category=categories).SerializeToString(), dtype="string")
        value = Summary.Value(
            tag=metadata.CONFIG_SUMMARY_TAG, metadata=metadata.create_summary_metadata(), tensor=layout
        )
        texts = [text_summary(f"setup/{title}", table(rows)) for title, rows in self._tables()]
        settings = [hparams_pb(self._settings(), trial_id=self.run_dir.name)] if self.about else []
        return [Summary(value=[value]), *texts, *settings]

    def _tables(self) -> list[tuple[str, dict]]:
        """The tables by title; the settings that differ from the defaults come first."""
        defaults = {f.name: getattr(TrainConfig(), f.name) for f in fields(TrainConfig)}
        tables = []
        for title, rows in self.about.items():
            names = sorted(rows, key=lambda name: title == "config" and rows[name] == defaults.get(name))
            tables.append((title, {name: rows[name] for name in names}))
        return tables

    def _settings(self) -> dict[str, float | str | bool]:
        """The settings that are columns of the HParams tab."""
        values = {**self.about["config"], "precision": self.about["environment"]["precision"]}
        values["dropout"] = _shown(values["dropout"])  # a column has values of one type
        values = {name: values[name] for name in _SETTINGS}
        return {n: v if isinstance(v, (bool, int, float)) else _shown(v) or "unset" for n, v in values.items()}

    def _columns(self, values: dict[str, float]) -> list:
        """The columns of the HParams tab, at the first evaluation, which tells what there is to compare; else an empty list."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        evaluation = [tag for tag in _EVALUATION if tag in values]
        if self._columns_named or not (evaluation and self.about):
            return []
        self._columns_named = True
        kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
        experiment = api_pb2.Experiment(
            hparam_infos=[
                api_pb2.HParamInfo(
                    name=n, type=kinds.get(type(v), api_pb2.DATA_TYPE_FLOAT64), differs=n in _SHOWN_FIRST
                )
                for n, v in self._settings().items()
            ],
            metric_infos=[
                api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), description=DESCRIPTIONS[tag])
                for tag in [*evaluation, *_TRAINING]
            ],
        )
        content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(experiment=experiment))
        return [
            Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=content, tensor=metadata.NULL_TENSOR)])
        ]

    def _new_name(self) -> str:
        """The name of a file that TensorBoard reads after those present: it sorts them by name, and a clock may go back."""
        times = [int(name[1]) for path in self.run_dir.glob("events*") if (name := _EVENTS_NAME.match(path.name))]
        return f"events.out.tfevents.{max([int(time.time()), *(latest + 1 for latest in times)]):010d}.mori"


def table(rows: dict) -> str:
    """Names and values as an HTML table."""
    cells = [(html.escape(name), html.escape(_shown(value))) for name, value in rows.items()]
    return f"<table>{''.join(f'<tr><td>{name}</td><td>{value}</td></tr>' for name, value in cells)}</table>"


def _shown(value) -> str:
    """A value as a person writes it: numbers with separators, lists as words, nothing for None."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return shlex.join(value)
    if isinstance(value, str) or value is None:
        return value or ""
    return f"{value:,}" if type(value) is int else json.dumps(value, ensure_ascii=False)


# Noncharacters of Unicode, which stand for the tags until the text is escaped.
_BOLD = {"\ufdd0": "<strong>", "\ufdd1": "</strong>"}


def preformatted(text: str, marked: Iterable[tuple[int, int]] = ()) -> str:
    """`text` as HTML that shows it word for word: escaped, folded at 110 columns, the `marked` spans in bold."""
    begin, end = _BOLD
    text = text.translate(dict.fromkeys(map(ord, _BOLD), "\ufffd"))
    text = "".join(f"{begin}{part}{end}" if is_marked else part for part, is_marked in spans(text, marked))
    folded = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, 110) or [""])
    return f"<pre>{html.escape(folded, quote=False).translate(str.maketrans(_BOLD))}</pre>"
