"""Loggers, throughput, the overview of a run."""

import html
import importlib.machinery
import importlib.util
import itertools
import json
import os
import shlex
import struct
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from conftest import ROOT, flags, run_script, stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

import mori
from mori.cli import UserError, parse
from mori.config import GenerateConfig, TrainConfig
from mori.config.logging import LOGGERS
from mori.tracking import monitor, overview
from mori.tracking.loggers import Background, Logger, MetricsFile, WandbRun, read_metrics
from mori.tracking.monitor import Monitor
from mori.tracking.tensorboard import TensorBoard
from mori.tracking.throughput import Throughput

NOTEBOOK = """
from mori.tracking.loggers import Logger

entries = []

class Notebook(Logger):
    name = "the notebook"

    def __init__(self, run_dir, first_lost_step, about):
        super().__init__(run_dir, first_lost_step, about)
        entries.append(("first lost step", first_lost_step, run_dir.name, sorted(about)))

    def scalars(self, step, values):
        entries.append(("scalars", step, dict(values)))

    def text(self, step, tag, text, marked=()):
        entries.append(("text", step, tag, text))

    def sync(self):
        entries.append(("sync",))

    def close(self):
        entries.append(("close",))
"""


@pytest.fixture
def notebook(monkeypatch, tmp_path_factory):
    """Add a logger, a class in a module `notebook` and an entry in `LOGGERS`; the fixture is the list of what it was told."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "notebook.py").write_text(NOTEBOOK)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "notebook", raising=False)
    monkeypatch.setitem(LOGGERS, "notebook", "notebook:Notebook")
    return importlib.import_module("notebook").entries


def test_added_logger_is_told_scalars_and_texts_of_a_run(run_train, notebook, tmp_path):
    summary = run_train(max_steps=4, eval_steps=2, save_steps=2, report_to=["notebook"])
    assert notebook[0] == ("first lost step", 0, "run", ["config", "environment", "ledger"])
    scalars = [{"step": entry[1], **entry[2]} for entry in notebook if entry[0] == "scalars"]
    assert scalars == read_metrics(tmp_path / "runs/run/metrics.jsonl")
    assert [line["step"] for line in scalars if "train/loss" in line] == [1, 2, 3, 4]
    texts = {entry[1:] for entry in notebook if entry[0] == "text"}
    assert (4, "samples/0", summary["samples"]["after"][0]) in texts and {step for step, *_ in texts} == {0, 2, 4}
    assert notebook.count(("sync",)) == 2 and notebook.count(("close",)) == 1 and notebook[-1] == ("close",)
    assert not list((tmp_path / "runs/run").glob("events*"))


def test_added_logger_is_a_word_of_the_flag(notebook):
    """The class and the entry are all: --help and the check of the words know it."""
    assert parse(TrainConfig, "", ["--report_to", "notebook", "tensorboard"]).loggers == ["notebook", "tensorboard"]


def test_added_logger_is_told_which_steps_are_lost(run_train, notebook):
    stop_after(6, lambda: run_train(report_to=["notebook"]))
    notebook.clear()
    run_train(report_to=["notebook"])
    assert notebook[0][:2] == ("first lost step", 5)  # the checkpoint is of step 4
    assert [entry[1] for entry in notebook if entry[0] == "scalars" and "train/loss" in entry[2]] == list(range(5, 13))


FAULTS = {
    "raises": "class OddError(Exception): pass\n        raise OddError('no\\nconnection')",
    "exits": "raise SystemExit",
    "is interrupted": "raise KeyboardInterrupt",
    "hangs": "import time; time.sleep(10 ** 6)",
    "prints": "print('Please log in: ')",
}
REASONS = {
    "raises": "no connection",
    "exits": "SystemExit",
    "is interrupted": "KeyboardInterrupt",
    "hangs": "does not end",
}


@pytest.mark.parametrize("method", ["__init__", "scalars", "text", "sync", "close"])
@pytest.mark.parametrize("fault", FAULTS)
def test_logger_with_a_fault_is_reported_once_and_stops_nothing(
    run_train, notebook, monkeypatch, tmp_path, capsys, method, fault
):
    class_ = sys.modules["notebook"].Notebook
    code = f"def {method}(self, *values):\n    if True:\n        {FAULTS[fault]}"
    methods = {}
    exec(code, methods)
    monkeypatch.setattr(class_, method, methods[method])
    if method == "__init__" and fault == "prints":
        monkeypatch.setattr(class_, "notes", [], raising=False)
    monkeypatch.setattr(monitor, "_CLOSE_SECONDS", 0.2 if fault == "hangs" else 30)
    summary = run_train(max_steps=4, save_steps=2, report_to=["notebook"])
    output = capsys.readouterr().out
    assert output.count("WARNING: notebook in ") == (fault != "prints")
    assert fault == "prints" or f"cannot be written: {REASONS[fault]}" in output.replace("it does", "does")
    assert [line["step"] for line in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [0, 1, 2, 3, 4, 4]
    assert summary["steps"] == 4 and (tmp_path / "brain" / "config.json").exists()


def test_background_drops_calls_of_a_logger_that_does_not_keep_up(tmp_path):
    """The thread makes the earlier calls in their order and still hears the last one, `close`."""
    begun, go_on, calls = threading.Event(), threading.Event(), []

    class Slow(Logger):
        def scalars(self, step, values):
            begun.set()
            go_on.wait()
            calls.append(step)

        def close(self):
            calls.append("close")

    background = Background("slow", lambda: Slow(tmp_path, 0, {}))
    background.call("scalars", 0, {})
    begun.wait()
    for step in range(1, 1001):
        background.call("scalars", step, {})
    with pytest.raises(RuntimeError, match="does not keep up"):
        background.call("scalars", 1001, {})
    with pytest.raises(RuntimeError, match="does not keep up"):
        background.call("close")
    go_on.set()
    with pytest.raises(RuntimeError):
        background.wait(60)
    assert calls == [0, *range(2, 1001), "close"]


def test_script_ends_although_a_logger_leaves_an_exit_hook_and_a_thread_that_hang(settings, tmp_path):
    (tmp_path / "clingy.py").write_text(
        "import atexit, threading, time\nfrom mori.tracking.loggers import Logger\n"
        "class Clingy(Logger):\n"
        "    def scalars(self, step, values):\n"
        "        if step == 0:\n"
        "            atexit.register(time.sleep, 10 ** 6)\n"
        "            threading.Thread(target=time.sleep, args=[10 ** 6]).start()\n"
    )
    code = (
        "import sys; from mori.cli import errors; from mori.config import logging; from mori.__main__ import main\n"
        "errors._EXIT_SECONDS = 0.2; logging.LOGGERS['clingy'] = 'clingy:Clingy'\n"
        "sys.argv = ['mori', 'train', *sys.argv[1:]]; main()"
    )
    words = flags({**settings, "max_steps": 2, "report_to": ["clingy"]})
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "2 steps in" in done.stdout, done.stderr


@pytest.mark.parametrize("method", ["scalars", "text", "sync", "close"])
def test_tensorboard_that_fails_is_reported_once_and_stops_nothing(run_train, monkeypatch, tmp_path, capsys, method):
    def fail(*_):
        raise OSError("no disk")

    monkeypatch.setattr(TensorBoard, method, fail)
    run_train(max_steps=4, save_steps=2)
    output = capsys.readouterr().out
    assert output.count("WARNING: TensorBoard in ") == 1 and "cannot be written: no disk; training goes on" in output
    assert [line["step"] for line in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "words, loggers",
    [
        ("", ["tensorboard"]),
        ("--report_to none", []),
        ("--report_to tensorboard", ["tensorboard"]),
        ("--report_to all", ["tensorboard"]),
        ("--report_to=TensorBoard,tensorboard", ["tensorboard"]),
        ("--report_to False", []),
        ("--wandb_log False", ["tensorboard"]),
    ],
)
def test_report_to_reads_the_words_of_peers(words, loggers):
    assert parse(TrainConfig, "", words.split()).loggers == loggers


def test_report_to_names_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    """A folder `wandb`, which wandb leaves behind where it ran, is not the package."""
    missing = {name: spec for name, spec in sys.modules.items() if name.split(".")[0] == "wandb"}
    for name in missing:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb").mkdir()
    real = importlib.util.find_spec
    finder = importlib.machinery.PathFinder
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: finder.find_spec(name, [str(tmp_path)]) if name == "wandb" else real(name),
    )
    for words, line in {
        "wandb": "report_to wandb needs wandb: pip install wandb",
        "none tensorboard": "report_to none and tensorboard contradict each other",
        "comet_ml": "comet_ml",
    }.items():
        with pytest.raises(UserError, match=line):
            parse(TrainConfig, "", ["--report_to", *words.split()])
    assert "must be one of tensorboard, wandb, none" in TrainConfig(report_to=["wandb", "comet_ml"]).mistakes()[0]


def wandb_records(path) -> list:
    """The records of a `.wandb` file: protocol buffers in the log format of LevelDB, after a header of 7 bytes."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, parts, result = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block that holds no header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts, position = parts + data[position + 7 : position + 7 + length], position + 7 + length
        if kind in (1, 4):  # whole, or the last part
            result, parts = [*result, records.Record.FromString(parts)], b""
    return result


def test_wandb_offline_holds_the_numbers_of_a_run_and_of_its_continuation_under_one_id(settings, tmp_path):
    pytest.importorskip("wandb")
    words = flags({**settings, "report_to": ["wandb"], "eval_steps": 2, "save_steps": 2, "max_steps": 2})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "WANDB_PROJECT": "voices", "HOME": str(tmp_path)}
    for more in ([], ["--max_steps", "4", "--extend"]):
        done = run_script("train.py", *words, *more, env=environment)
        assert done.returncode == 0 and "wandb:" not in done.stderr + done.stdout, done.stderr
    run_dir = tmp_path / "runs/run"
    records = [wandb_records(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]
    runs = [[record.run for record in part if record.WhichOneof("record_type") == "run"][0] for part in records]
    assert [(run.run_id, run.project, run.display_name) for run in runs] == [
        ((run_dir / "wandb_id").read_text(), "voices", "run")
    ] * 2
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["config"]["block_size"] == 16 and config["ledger"]["documents"] == 1
    lines = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in itertools.chain(*records)
        if record.WhichOneof("record_type") == "history"
    ]
    tags = {tag for line in read_metrics(run_dir / "metrics.jsonl") for tag in line}
    scalars = [{tag: value for tag, value in line.items() if tag in tags} for line in lines]
    assert [line for line in scalars if len(line) > 1] == read_metrics(run_dir / "metrics.jsonl")
    assert {line["step"] for line in lines if any(tag.startswith("samples/0") for tag in line)} == {0, 2, 4}


@pytest.mark.parametrize("netrc", ["", "machine api.wandb.ai\n  login user\n  password secret\n"])
def test_wandb_without_a_login_asks_nothing_and_keeps_the_run_in_its_folder(tmp_path, monkeypatch, netrc):
    """A fake client: what is tested is that `init` is called online only with a key at hand, and offline after an error."""
    (tmp_path / ".netrc").write_text(netrc)
    inits = []

    def init(mode="online", **options):
        inits.append((mode, options["id"], options["resume"]))
        if mode == "online":
            raise ConnectionError("no network")
        return types.SimpleNamespace(log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None)

    logged = []
    client = types.SimpleNamespace(
        init=init, teardown=lambda: None, Settings=dict,
        setup=lambda settings: types.SimpleNamespace(
            settings=types.SimpleNamespace(api_key=None, base_url="https://api.wandb.ai")
        ),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", client)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    log = WandbRun(tmp_path, 0, {})
    log.scalars(1, {"a": 1.0})
    log.scalars(2, {"a": 2.0})
    identity = (tmp_path / "wandb_id").read_text()
    assert inits == [("online", identity, "allow")] * bool(netrc) + [("offline", identity, "allow")]
    assert logged == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    reason = "WARNING: wandb: no network" if netrc else "wandb: not logged in (wandb login), so"
    assert len(log.notes) == 1 and log.notes[0].startswith(reason) and "wandb sync" in log.notes[0]


def test_missing_package_ends_a_run_before_it_reads_anything(settings, tmp_path):
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'wandb' else real(name, *rest)\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, 'wandb' in sys.modules))\n"
        "from mori.__main__ import main; sys.argv = ['mori', 'train', *sys.argv[1:]]; main()"
    )
    words = flags({**settings, "report_to": ["tensorboard", "wandb"]})
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False False\n"
    assert done.stderr.splitlines() == ["mori train: error: report_to wandb needs wandb: pip install wandb"]


def test_monitor_of_another_rank_writes_nothing(tmp_path, notebook):
    silent = Monitor(tmp_path, report_to=["notebook"], first_step=0, total_steps=3, enabled=False)
    silent.scalars(1, {"train/loss": 1.0})
    silent.text(1, "samples/0", "a")
    silent.progress(1, {"train/loss": 1.0})
    silent.move(1)
    silent.say("a")
    silent.sync()
    silent.close()
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
        board = TensorBoard(tmp_path, 0, {})
        for step in range(1, 5):
            board.scalars(step, {"a": step})
    else:
        board = SummaryWriter(str(tmp_path))
        for step in range(1, 5):
            board.add_scalar("a", step, step)
    board.close()
    monkeypatch.setattr(time, "time", lambda: float(clock))
    for lost in (3, 4):
        board = TensorBoard(tmp_path, lost, {})
        for step in range(lost, 7):
            board.scalars(step, {"a": 10 * lost + step})
        board.close()
    assert on_the_board(tmp_path) == [(1, 1), (2, 2), (3, 33), (4, 44), (5, 45), (6, 46)]


def test_tensorboard_reads_what_is_written_after_a_failed_write(tmp_path, monkeypatch):
    def write_a_part(self, record):
        self._writer.write(b"part of a record")
        self._writer.flush()
        raise OSError(28, "No space left on device")

    board = TensorBoard(tmp_path, 0, {})
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
    board = TensorBoard(tmp_path, 0, {})
    board.text(1, "a", text, marked)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload().Tensors("a/text_summary")
    page = markdown_to_safe_html(events[0].tensor_proto.string_val[0])
    assert html.unescape(page.strip().replace("<strong>", "**").replace("</strong>", "**")) == f"<pre>{shown}</pre>"


def test_metrics_file_drops_lost_lines_before_it_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"step": 3, "b')
    log = MetricsFile(tmp_path, 3, {})
    log.sync()
    assert read_metrics(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    log.scalars(3, {"a": 4.0})
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 4.0}\n'


def test_metrics_file_ends_an_incomplete_line_after_a_failed_write(tmp_path):
    log = MetricsFile(tmp_path, 0, {})
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
        "total_steps": 12, "windows_per_step": 24, "steps_per_epoch": 5, "faster": "nothing", "run_dir": tmp_path,
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
    finished = overview.introduction(config, **values, resumed=(12, tmp_path))
    assert finished.endswith(f"\nresumed at step 12 ({tmp_path}): no step is left to train")


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
