"""`--profile_steps`: what is recorded, and what a run does that ends before."""

import gzip
import json
import re
import time
import types
from collections import Counter

import pytest
import torch
from conftest import assert_equal_weights, flags, run_script, stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from mori.cli import UserError
from mori.config import TrainConfig
from mori.tracking.profiler import TRACE, heaviest


def trace(run_dir) -> list[dict]:
    """The events of the trace in the format of Chrome and Perfetto: complete ones, with a beginning and a duration."""
    with gzip.open(run_dir / TRACE, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def steps_in(events: list[dict]) -> list[str]:
    """The names of the recorded steps, in their order."""
    marks = {event["ts"]: event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    return [marks[ts].removeprefix("ProfilerStep#") for ts in sorted(marks)]


def test_profile_holds_the_operations_of_the_steps(run_train, tmp_path, capsys):
    """The trace and the table come from different parts of PyTorch's profiler; they count the same calls."""
    run_train(profile_steps="3:5", max_steps=8)
    run_dir = tmp_path / "runs/run"
    events = trace(run_dir)
    assert steps_in(events) == ["3", "4", "5"]
    marks = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("ProfilerStep#")]
    optimizer = [e["ts"] for e in events if e["name"].startswith("aten::_fused_adamw")]
    assert len(optimizer) >= 3 and all(any(begin <= ts < end for begin, end in marks) for ts in optimizer)
    table = json.loads((run_dir / "profile.json").read_text())
    assert table["steps"] == [3, 5] and table["device"] == "cpu" and len(table["operations"]) == 10
    calls, times = Counter(e["name"] for e in events), Counter()
    for event in events:
        times[event["name"]] += event["dur"] / 1000
    for operation in table["operations"]:
        assert (
            0 < operation["calls"] <= calls[operation["name"]]
        )  # an operation that calls itself counts once in the table
        assert 0 < operation["ms"] <= times[operation["name"]] + 0.01
        assert operation["share"] == pytest.approx(operation["ms"] / table["total_ms"], abs=1e-4)
    milliseconds = [operation["ms"] for operation in table["operations"]]
    assert milliseconds == sorted(milliseconds, reverse=True) and sum(milliseconds) <= table["total_ms"]
    assert "profiled steps 3 to 5: " in capsys.readouterr().out
    [text] = EventAccumulator(str(run_dir)).Reload().Tensors("profile/heaviest_operations/text_summary")
    assert text.step == 5 and table["operations"][0]["name"] in text.tensor_proto.string_val[0].decode()
    assert not list(run_dir.glob("unfinished*"))


def test_heaviest_counts_the_time_of_kernels_once_on_a_gpu():
    def event(key: str, start: int, end: int, device_type: DeviceType, is_user_annotation: bool = False):
        return FunctionEvent(
            id=0, name=key, thread=0, start_us=start, end_us=end, device_type=device_type, use_device="cuda",
            is_user_annotation=is_user_annotation,
        )  # fmt: skip

    launch = event("aten::mm", 10, 20, DeviceType.CPU)
    launch.append_kernel("gemm", 0, 3000)
    events = [
        event("ProfilerStep*", 0, 50, DeviceType.CPU, True),
        launch,
        event("ProfilerStep*", 1000, 9000, DeviceType.CUDA, True),
        event("Optimizer.step#AdamW.step", 5000, 6000, DeviceType.CUDA, True),
        event("gemm", 1000, 4000, DeviceType.CUDA),
        event("adamw", 5000, 6000, DeviceType.CUDA),
        event("evaluation", 9500, 19500, DeviceType.CUDA),
    ]
    table = heaviest(events, [7], torch.device("cuda"))
    assert (table["steps"], table["total_ms"]) == ([7, 7], 4.0)
    assert [(o["name"], o["calls"], o["ms"], o["share"]) for o in table["operations"]] == [
        ("gemm", 1, 3.0, 0.75),
        ("adamw", 1, 1.0, 0.25),
    ]


def test_profile_table_leaves_out_what_lies_between_the_steps(run_train, tmp_path):
    run_train(profile_steps="3:5", max_steps=6, eval_steps=4)
    events = trace(tmp_path / "runs/run")
    marks = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("ProfilerStep#")]
    inside = Counter(e["name"] for e in events if any(begin <= e["ts"] <= end for begin, end in marks))
    everywhere = Counter(e["name"] for e in events)
    operations = json.loads((tmp_path / "runs/run/profile.json").read_text())["operations"]
    assert any(inside[o["name"]] < everywhere[o["name"]] for o in operations)
    assert all(o["calls"] <= inside[o["name"]] for o in operations)


def test_tokens_per_second_leave_out_the_writing_of_a_profile(run_train, monkeypatch):
    """The clock leaps by an hour while the trace is written."""
    hours, export = [0], torch.profiler.profile.export_chrome_trace

    def slow(self, path):
        export(self, path)
        hours[0] += 1

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", slow)
    clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * hours[0])
    monkeypatch.setattr("mori.tracking.throughput.time", clock)
    summary = run_train(profile_steps="2:3", max_steps=4)
    assert hours == [1] and summary["tokens_per_second"] > 4 * 64 / 3600 * 10


def test_profile_changes_no_weights(run_train, tmp_path):
    run_train(run_name="a", output_dir=str(tmp_path / "a"))
    run_train(run_name="b", output_dir=str(tmp_path / "b"), profile_steps="2:4")
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "runs/a" / TRACE).exists() and not (tmp_path / "runs/a/profile.json").exists()


def test_profile_of_a_shorter_run_holds_the_steps_there_are(run_train, tmp_path):
    run_train(max_steps=4, profile_steps="3:50")
    assert steps_in(trace(tmp_path / "runs/run")) == ["3", "4"]
    assert json.loads((tmp_path / "runs/run/profile.json").read_text())["steps"] == [3, 4]


def test_profile_of_a_run_that_breaks_off_holds_the_steps_until_then(run_train, tmp_path):
    stop_after(6, lambda: run_train(profile_steps="6:9"))
    run_dir = tmp_path / "runs/run"
    assert steps_in(trace(run_dir)) == ["6", "7"]  # the seventh was not finished
    run_train(profile_steps="6:9")  # resumes at step 4
    assert steps_in(trace(run_dir)) == ["6", "7", "8", "9"]


def test_profile_that_cannot_be_written_stops_nothing(run_train, tmp_path, monkeypatch, capsys):
    def fail(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    assert run_train(profile_steps="2:3", max_steps=4)["steps"] == 4
    assert capsys.readouterr().out.count("WARNING: the profile in ") == 1
    assert not list((tmp_path / "runs/run").glob("*profile*"))


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "1:101", "a:b", "1:2:3", "-1:2", "1 : 2"])
def test_profile_steps_that_are_none_are_refused(steps):
    [mistake] = TrainConfig(profile_steps=steps).mistakes()
    assert "must be the first and the last step, as 10:12, of at most 100" in mistake


def test_profile_after_the_last_step_is_refused_before_the_first(run_train):
    with pytest.raises(UserError, match="profile_steps 5:6 begins after the run's 4 steps"):
        run_train(max_steps=4, profile_steps="5:6")


def test_script_prints_nothing_but_its_own_lines_about_a_profile(settings, tmp_path):
    done = run_script("train.py", *flags({**settings, "max_steps": 2, "profile_steps": "1:2"}))
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not re.search("kineto|USDT", done.stdout, re.IGNORECASE)
