"""What TensorBoard shows of runs, read with its own readers and plugins."""

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, stop_after
from safetensors.torch import load_file
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.util import tensor_util
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from mori.config import TrainConfig
from mori.tracking.loggers import read_metrics
from mori.tracking.tensorboard import DESCRIPTIONS, LAYOUT, TensorBoard, table


def board(folder: Path) -> TBContext:
    """What TensorBoard's plugins read: the events under `folder`."""
    multiplexer = EventMultiplexer(size_guidance={}).AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    return TBContext(data_provider=provider, logdir=str(folder), plugin_name_to_instance={})


def hparams(folder: Path) -> tuple[api_pb2.Experiment, dict[str, api_pb2.SessionGroup]]:
    """The HParams tab: its columns, and its rows by run."""
    context, request = Context(board(folder)), RequestContext()
    columns = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest(include_metrics=True)).run()
    asked = api_pb2.ListSessionGroupsRequest(
        slice_size=100, allowed_statuses=api_pb2.Status.values(), include_metrics=True
    )
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    return columns, {group.sessions[0].name: group for group in groups}


def test_hparams_tab_has_a_value_in_every_column_of_finished_killed_and_resumed_runs(run_train, tmp_path):
    """The metrics are the newest values of metrics.jsonl, in the run's own row."""
    run_train(run_name="finished", learning_rate=1e-4)
    stop_after(7, lambda: run_train(run_name="killed", dropout=0.2))
    stop_after(7, lambda: run_train(run_name="resumed", optim="muon"))
    run_train(run_name="resumed", optim="muon")
    columns, rows = hparams(tmp_path / "runs")
    assert set(rows) == {"finished", "killed", "resumed"}
    names = [info.name for info in columns.hparam_infos]
    tags = [info.name.tag for info in columns.metric_infos]
    assert {"learning_rate", "optim", "dropout", "model", "max_steps", "seed"} <= set(names)
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "train/loss", "perf/tokens_per_second"} <= set(tags)
    for name, row in rows.items():
        assert set(names) == set(row.hparams)
        newest = {}
        for line in read_metrics(tmp_path / "runs" / name / "metrics.jsonl"):
            newest |= {tag: (line["step"], value) for tag, value in line.items()}
        values = {value.name.tag: (value.training_step, value.value) for value in row.metric_values}
        assert set(values) == set(tags)
        for tag, (step, value) in values.items():
            assert (step, value) == (newest[tag][0], pytest.approx(newest[tag][1]))
        assert row.hparams["optim"].string_value == ("muon" if name == "resumed" else "adamw_torch_fused")
        assert row.hparams["learning_rate"].number_value == (1e-4 if name == "finished" else 1e-3)
        assert row.hparams["dropout"].string_value == ("0.2" if name == "killed" else "unset")
    steps = {
        name: next(v.training_step for v in row.metric_values if v.name.tag == "train/loss")
        for name, row in rows.items()
    }
    assert steps == {"finished": 12, "killed": 7, "resumed": 12}


def test_every_scalar_of_a_run_is_described(run_train, tmp_path):
    run_train(gradient_accumulation_steps=2, auto_find_batch_size=True)
    run_dir = tmp_path / "runs/run"
    logged = {tag for line in read_metrics(run_dir / "metrics.jsonl") for tag in line} - {"step"}
    events = EventAccumulator(str(run_dir)).Reload()
    assert logged == set(events.Tags()["scalars"]) and logged <= set(DESCRIPTIONS)
    for tag in [*logged, "eval/token_loss"]:
        assert events.SummaryMetadata(tag).summary_description == DESCRIPTIONS[tag]


def test_every_tag_in_the_source_is_described():
    """Also those that a small run does not log."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mori").rglob("*.py"))
    tags = set(re.findall(r"\"((?:train|eval|perf|copying)/\w+)\"", sources))
    assert "train/micro_batch_size" in tags and tags <= set(DESCRIPTIONS)
    assert all(text.endswith(".") for text in DESCRIPTIONS.values())


def test_custom_scalars_show_the_same_charts_once_for_all_runs(run_train, tmp_path):
    for name in ("a", "b"):
        run_train(max_steps=2, eval_steps=1, run_name=name)
    layout = CustomScalarsPlugin(board(tmp_path / "runs")).layout_impl(RequestContext(), "")
    layout = json.loads(layout)["category"]
    assert {c["title"]: [chart["title"] for chart in c["chart"]] for c in layout} == {
        category: list(charts) for category, charts in LAYOUT.items()
    }
    assert layout[0]["chart"][0]["multiline"]["tag"] == ["train/loss$", "eval/loss$"]
    tags = EventAccumulator(str(tmp_path / "runs/a")).Reload().Tags()["scalars"]
    for charts in LAYOUT.values():
        for expressions in charts.values():
            assert all(any(re.match(expression, tag) for tag in tags) for expression in expressions)


def test_texts_hold_settings_ledger_and_environment(run_train, tmp_path):
    run_train(max_steps=1, prompt=["<b> | *x*"])
    run_dir = tmp_path / "runs/run"
    events = EventAccumulator(str(run_dir)).Reload()
    for title in ("config", "ledger", "environment"):
        [event] = events.Tensors(f"setup/{title}/text_summary")
        page = markdown_to_safe_html(event.tensor_proto.string_val[0])
        names = re.findall(r"<tr>\s*<td>(.*?)</td>", page)
        rows = json.loads((run_dir / f"{title}.json").read_text())
        assert sorted(names) == sorted(rows)
        if title == "config":  # what differs from the defaults comes first
            changed = [name for name in names if rows[name] != getattr(TrainConfig(), name)]
            assert names[: len(changed)] == changed and {"model", "block_size", "max_steps"} <= set(changed)
        assert title != "config" or "&lt;b&gt; | *x*" in page


def test_table_shows_values_as_a_person_writes_them():
    rows = {
        "n": 1234567,
        "share": 0.05,
        "words": ["a b", "c"],
        "off": False,
        "none": None,
        "text": "<x>",
        "map": {"a": 1},
    }
    shown = re.findall(r"<td>(.*?)</td><td>(.*?)</td>", table(rows))
    values = ["1,234,567", "0.05", "&#x27;a b&#x27; c", "false", "", "&lt;x&gt;", "{&quot;a&quot;: 1}"]
    assert shown == list(zip(rows, values, strict=True))


def test_histogram_counts_the_token_losses_of_the_held_out_text(run_train, settings, tmp_path):
    """Against the losses of transformers' model on the same windows, and numpy's histogram."""
    summary = run_train()
    events = EventAccumulator(str(tmp_path / "runs/run"), size_guidance={"tensors": 0}).Reload()
    events = events.Tensors("eval/token_loss")
    assert [event.step for event in events] == [0, 6, 12]
    shown = tensor_util.make_ndarray(events[-1].tensor_proto)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "brain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "brain").eval()
    ids = tokenizer(Path(settings["corpus"][0]).read_text())["input_ids"] + [tokenizer.eos_token_id]
    ids, losses = ids[-summary["ledger"]["held_out_tokens"] :], []
    for first in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[first : first + 17]])
        with torch.no_grad():
            losses += cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="none").tolist()
    counts, edges = numpy.histogram(losses, bins=numpy.arange(0, 15.5, 0.5))
    assert shown[:, 2].tolist() == counts.tolist() and sum(counts) == summary["ledger"]["held_out_tokens"] - 1
    assert shown[:, 0].tolist() == edges[:-1].tolist() and shown[:, 1].tolist() == edges[1:].tolist()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon", "adafactor", "sgd"])
def test_update_ratio_is_that_of_the_checkpoints_before_and_after_a_step(run_train, tmp_path, optim):
    run_train(max_steps=3, save_steps=1, save_total_limit=3, eval_strategy="no", optim=optim, weight_decay=0.1)
    checkpoints = sorted((tmp_path / "runs/run/checkpoints").iterdir())
    flat = [torch.cat([t.flatten() for t in load_file(path / "model.safetensors").values()]) for path in checkpoints]
    logged = [line["train/update_ratio"] for line in read_metrics(tmp_path / "runs/run/metrics.jsonl")]
    assert len(flat) == len(logged) == 3
    for before, after, ratio in zip(flat[:-1], flat[1:], logged[1:], strict=True):
        assert ratio == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5) and ratio > 0


def test_tensorboard_writes_nothing_about_a_run_that_it_knows_nothing_of(tmp_path):
    log = TensorBoard(tmp_path, 0, {})
    log.scalars(1, {"eval/loss": 1.0})
    log.close()
    columns, rows = hparams(tmp_path)
    assert not columns.hparam_infos and not rows
