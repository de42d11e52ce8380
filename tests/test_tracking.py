"""Loggers, throughput, the overview of a run."""

import html
import json
import shlex
import subprocess
import sys
import time

import pytest
import torch
from conftest import flags, run_script, stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

import mori
from mori.cli import parse
from mori.config import GenerateConfig, TrainConfig
from mori.tracking import loggers, overview
from mori.tracking.loggers import Logger, MetricsFile, TensorBoard, read_metrics
from mori.tracking.monitor import Monitor
from mori.tracking.throughput import Throughput


@pytest.fixture
def notebook(monkeypatch):
    """Add a made-up logger to `LOGGERS`; the fixture is the list of what it was told."""
    entries = []

    class Notebook(Logger):
        name = "the notebook"

        def __init__(self, run_dir, first_lost_step):
            super().__init__(run_dir, first_lost_step)
            entries.append(("first lost step", first_lost_step, run_dir.name))

        def scalars(self, step, values):
            entries.append(("scalars", step, dict(values)))

        def text(self, step, tag, text, marked=()):
            entries.append(("text", step, tag, text))

        def sync(self):
            entries.append(("sync",))

        def close(self):
            entries.append(("close",))

    monkeypatch.setattr(loggers, "LOGGERS", [*loggers.LOGGERS, Notebook])
    return entries


def test_added_logger_is_told_scalars_and_texts_of_a_run(run_train, notebook, tmp_path):
    summary = run_train(max_steps=4, eval_steps=2, save_steps=2)
    assert notebook[0] == ("first lost step", 0, "run")
    scalars = [{"step": entry[1], **entry[2]} for entry in notebook if entry[0] == "scalars"]
    assert scalars == read_metrics(tmp_path / "runs/run/metrics.jsonl")
    assert [line["step"] for line in scalars if "train/loss" in line] == [1, 2, 3, 4]
    texts = {entry[1:] for entry in notebook if entry[0] == "text"}
    assert (4, "samples/0", summary["samples"]["after"][0]) in texts and {step for step, *_ in texts} == {0, 2, 4}
    assert notebook.count(("sync",)) == 2 and notebook.count(("close",)) == 1 and notebook[-1] == ("close",)


def test_added_logger_is_told_which_steps_are_lost(run_train, notebook):
    stop_after(6, run_train)
    notebook.clear()
    run_train()
    assert notebook[0] == ("first lost step", 5, "run")  # the checkpoint is of step 4
    assert [entry[1] for entry in notebook if entry[0] == "scalars" and "train/loss" in entry[2]] == list(range(5, 13))


@pytest.mark.parametrize("method", ["scalars", "text", "sync", "close"])
def test_logger_that_fails_is_reported_once_and_stops_nothing(run_train, monkeypatch, tmp_path, capsys, method):
    class OddError(Exception):
        pass

    def fail(*_):
        raise OddError("no\nconnection")

    broken = type("Broken", (Logger,), {"name": "the server", "scalars": lambda *_: None, method: fail})
    monkeypatch.setattr(loggers, "LOGGERS", [broken, *loggers.LOGGERS])
    run_train(max_steps=4, save_steps=2)
    output = capsys.readouterr().out
    assert (
        output.count("WARNING: the server in ") == 1 and "cannot be written: no connection; training goes on" in output
    )
    assert [line["step"] for line in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [0, 1, 2, 3, 4, 4]


def test_monitor_of_another_rank_writes_nothing(tmp_path, notebook):
    monitor = Monitor(tmp_path, first_step=0, total_steps=3, enabled=False)
    monitor.scalars(1, {"train/loss": 1.0})
    monitor.text(1, "samples/0", "a")
    monitor.progress(1, {"train/loss": 1.0})
    monitor.move(1)
    monitor.say("a")
    monitor.sync()
    monitor.close()
    assert not notebook and not list(tmp_path.iterdir())


def on_the_board(folder) -> list[tuple[int, float]]:
    """The steps and values that TensorBoard shows."""
    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("a")]


@pytest.mark.parametrize("clock", [2_000_000_000, 1_999_999_999, 10], ids=["same second", "back", "far back"])
@pytest.mark.parametrize("earlier", ["mori", "SummaryWriter"])
def test_tensorboard_reads_a_resumed_run_last(tmp_path, monkeypatch, clock, earlier):
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    if earlier == "mori":
        board = TensorBoard(tmp_path, 0)
        for step in range(1, 5):
            board.scalars(step, {"a": step})
    else:
        board = SummaryWriter(str(tmp_path))
        for step in range(1, 5):
            board.add_scalar("a", step, step)
    board.close()
    monkeypatch.setattr(time, "time", lambda: float(clock))
    for lost in (3, 4):
        board = TensorBoard(tmp_path, lost)
        for step in range(lost, 7):
            board.scalars(step, {"a": 10 * lost + step})
        board.close()
    assert on_the_board(tmp_path) == [(1, 1), (2, 2), (3, 33), (4, 44), (5, 45), (6, 46)]


def test_tensorboard_reads_what_is_written_after_a_failed_write(tmp_path, monkeypatch):
    def write_a_part(self, record):
        self._writer.write(b"part of a record")
        self._writer.flush()
        raise OSError(28, "No space left on device")

    board = TensorBoard(tmp_path, 0)
    board.scalars(1, {"a": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write_a_part)
        with pytest.raises(OSError):
            board.scalars(2, {"a": 2.0})
    for step in (3, 4):
        board.scalars(step, {"a": float(step)})
    board.close()
    assert [step for step, _ in on_the_board(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize(
    "text, marked, shown",
    [
        ("Halo <b> & *semua*", [], "Halo <b> & *semua*"),
        ("Halo semua", [(5, 10)], "Halo **semua**"),
        ("aa bb cc", [(3, 5), (0, 2)], "**aa** **bb** cc"),
        ("aa bb cc", [(0, 4), (2, 7)], "**aa b****b c**c"),
        ("a\n\n- b\n\n# c", [(0, 6)], "**a\n\n- b**\n\n# c"),
        ("a\ufdd0b\ufdd1c", [(0, 1)], "**a**\ufffdb\ufffdc"),
        ("ab", [(1, 1), (1, 99)], "a**b**"),
        ("a " * 80, [(0, 2)], "**a **" + " ".join(["a"] * 53) + "\n" + " ".join(["a"] * 26)),
    ],
)
def test_tensorboard_shows_a_text_word_for_word_with_marked_spans_in_bold(tmp_path, text, marked, shown):
    """Through TensorBoard's own conversion of Markdown to HTML."""
    board = TensorBoard(tmp_path, 0)
    board.text(1, "a", text, marked)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload().Tensors("a/text_summary")
    page = markdown_to_safe_html(events[0].tensor_proto.string_val[0])
    assert html.unescape(page.strip().replace("<strong>", "**").replace("</strong>", "**")) == f"<pre>{shown}</pre>"


def test_metrics_file_drops_lost_lines_before_it_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"step": 3, "b')
    log = MetricsFile(tmp_path, first_lost_step=3)
    log.sync()
    assert read_metrics(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    log.scalars(3, {"a": 4.0})
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 4.0}\n'


def test_metrics_file_ends_an_incomplete_line_after_a_failed_write(tmp_path):
    log = MetricsFile(tmp_path, first_lost_step=0)
    log.scalars(1, {"a": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.rename(tmp_path / "hidden")
    path.mkdir()
    with pytest.raises(OSError):
        log.scalars(2, {"a": 2.0})
    path.rmdir()
    (tmp_path / "hidden").rename(path)
    with path.open("a") as lines:
        lines.write('{"step": 2, "a"')  # what the failed write may have left
    for step in (3, 4):
        log.scalars(step, {"a": 3.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4]
    assert len(path.read_text().splitlines()) == 4


def test_throughput_counts_training_only(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 10.0, 20.0, 24.0, 26.0, 26.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    speed = Throughput(tokens=100, seconds=5.0)
    speed.start()  # at 0
    with speed.waiting():  # from 2 to 3
        pass
    speed.tokens += 40
    speed.stop()  # at 10
    assert speed.seconds == 15.0 and speed.since_last() == (4.0, 0.1)
    speed.start()  # at 20
    speed.tokens += 12
    speed.stop()  # at 24
    assert speed.since_last() == (3.0, 0.0) and speed.since_last() == (0.0, 0.0)


def test_introduction_says_what_is_read_trained_and_written(tmp_path):
    environment = overview.environment(torch.device("cpu"), "bf16", 2)
    assert environment["mori"] == mori.__version__ and json.loads(json.dumps(environment)) == environment
    config = TrainConfig(model="m", block_size=16, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    values = {
        "environment": environment, "device": torch.device("cpu"), "text": "the text", "parameters": 2_500_000,
        "total_steps": 12, "steps_per_epoch": 5, "faster": "nothing", "run_dir": tmp_path,
        "evaluations": "all held-out windows", "special": "none",
    }  # fmt: skip
    lines = overview.introduction(config, **values).splitlines()
    assert "cpu, bf16" in lines[0] and lines[1] == "reads   the text"
    assert lines[2:5] == [
        "model   m, 2.5 M parameters",
        "trains  12 steps (5 an epoch) of 4 windows x 3 micro-batches x 2 ranks x 16 tokens",
        "checks  all held-out windows",
    ]
    assert len(lines) == 8 and lines[6] == "tokens  none" and str(tmp_path) in lines[7]
    assert overview.introduction(config, **values, notes=["a", "b"]).endswith("\na\nb")
    assert overview.introduction(config, **values, resumed=(7, tmp_path)).endswith(f"\nresumed at step 7 ({tmp_path})")


def test_results_say_loss_and_skipped_steps():
    evaluations = {"before": None, "best": {"step": 6, "loss": 1.5}, "after": {"step": 12, "loss": 2.0}}
    summary = {
        "steps": 12, "eval": evaluations, "wall_seconds": 3.0, "tokens_per_second": 640.0, "skipped_steps": 0, "output_dir": "my brain",
    }  # fmt: skip
    cost, place, command = overview.results(summary, "python generate").splitlines()
    assert cost == "12 steps in 3 s, 640 tokens/s; held-out loss 2.0000 (best 1.5000 at step 6)"
    assert place == "the brain is in my brain/; the text above from it:" and command == "python generate"
    evaluations["before"] = {"step": 0, "loss": 5.0}
    warning, cost, *_ = overview.results(summary | {"skipped_steps": 2}, "").splitlines()
    assert warning.startswith("WARNING: 2 steps of 12 skipped") and "held-out loss 5.0000 -> 2.0000" in cost


@pytest.mark.parametrize(
    "program, start", [("../scripts/train.py", "python ../scripts/generate.py "), ("/bin/mori", "mori generate ")]
)
def test_sample_command_is_read_as_the_settings_of_the_run(monkeypatch, program, start):
    monkeypatch.setattr(sys, "argv", [program])
    settings = {
        "output_dir": "my brain", "prompt": ["-- Halo \"semua\" $5 it's", "Apa\nkabar", ""], "stop_strings": ["\n", "a\\nb"],
        "bad_words_ids": [[5, 7], [9]], "suppress_tokens": [3, 4], "frequency_penalty": -0.5, "top_k": 0, "max_new_tokens": 7,
    }  # fmt: skip
    config = TrainConfig(**settings)
    command = overview.sample_command(config, {"top_k": 40})
    assert command.startswith(start)
    read = parse(GenerateConfig, "", shlex.split(command)[len(start.split()) :])
    assert (read.model, read.prompt, read.seed) == ("my brain", settings["prompt"], 42)
    assert read.sampling() == config.sampling() and "top_k" in read.given


def test_last_line_of_a_run_prints_the_samples_again(settings, tmp_path):
    words = flags({**settings, "max_steps": 3, "max_new_tokens": 12, "prompt": ["Halo semua", 'it\'s -- "x"']})
    done = run_script("train.py", *words)
    shown, command = done.stdout.partition("\nafter:\n")[2], done.stdout.splitlines()[-1]
    texts = shown.partition("\n3 steps in ")[0]
    again = run_script("generate.py", *shlex.split(command)[2:], stdin=subprocess.DEVNULL)
    assert again.stdout.replace(f"\n{'-' * 40}\n", "\n") == texts + "\n", again.stderr
    assert done.stderr.startswith("mori ") and again.stderr.startswith("mori ")
