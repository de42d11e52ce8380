"""The GPU day stays ready: every part can be called, most are run on a CPU in tiny sizes, and the table judges what they report."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STORIES

from mori.model.lm import CausalLMLoss
from tests.gpu_day import runner, table
from tests.gpu_day.__main__ import publish
from tests.gpu_day.parts import PARTS

# The others train in many processes, or compile.
QUICK = ["float64", "attention", "one-rank", "curves", "parity-bf16", "oom", "graphs", "decode", "graph-cost", "syncs"]
# On the simulated GPU (`python -m tests.sim`), which has neither NCCL nor a compiler, and runs in one process.
SIMULATED = (
    "float64 attention curves parity-fp16 oom graphs decode decode-more syncs graph-cost attention-speed head".split()
)


@pytest.fixture
def run_part(tmp_path, capsys, monkeypatch):
    """Do a part in this process, dry; returns its result as the runner keeps it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(CausalLMLoss, "forward", CausalLMLoss.forward)  # a part replaces it
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()

    def run(name: str, device: str = "cpu") -> dict:
        (tmp_path / "place").mkdir()
        task = {"limit": 300.0, "device": device, "dry": True, "stories": str(STORIES) if STORIES.is_dir() else ""}
        runner.run_part(name, {**task, "place": str(tmp_path / "place"), "out": str(tmp_path)})
        return runner.result_of("ok", 0.0, capsys.readouterr().out)

    yield run
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.parametrize("name", PARTS)
def test_part_names_a_function_and_its_arguments(name):
    module, function = PARTS[name].function.split(".")
    function = getattr(importlib.import_module(f"tests.gpu_day.{module}"), function)
    inspect.signature(function).bind(None, **PARTS[name].arguments)
    assert PARTS[name].needs < PARTS[name].limit


@pytest.mark.parametrize("name", QUICK)
def test_part_runs_dry(name, run_part):
    result = run_part(name)
    assert result["status"] == "ok" and len(result) > 2, result


@pytest.mark.skipif(not hasattr(torch.cuda, "simulated"), reason="this is not the simulated GPU")
@pytest.mark.parametrize("name", SIMULATED)
def test_part_runs_on_a_gpu_that_is_simulated(name, run_part):
    result = run_part(name, "cuda")
    assert result["status"] == "ok" and len(result) > 2, result


def test_command_runs_parts_and_prints_the_table(tmp_path):
    """A part in a process of its own; another has no time and is named."""
    command = [sys.executable, "-m", "tests.gpu_day", "--dry", "--only", "machine,bench", "--deadline", "39"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["machine", "bench"]
    assert lines[0]["status"] == "ok" and torch.__version__.startswith(lines[0]["versions"]["torch"])
    assert lines[1]["status"].startswith("skipped")
    assert "| decoding graphs by family | – | all |" in done.stdout and "bench: skipped" in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8


def test_part_past_its_limit_is_killed_and_named(tmp_path):
    command = [sys.executable, "-m", "tests.gpu_day", "--dry", "--only", "machine", "--patience", "0.005"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads((tmp_path / "results.jsonl").read_text())["status"] == "timeout"


def test_result_keeps_what_a_killed_part_reported():
    printed = '@@ {"a": {"ok": true}}\nnoise\n@@ {"b": {"ok": false, "gap": 1.0}}\n@@ {"c": {"o'
    assert runner.result_of("ok", 1.0, printed)["status"] == "WRONG"
    result = runner.result_of("timeout", 1.0, printed)
    assert result["status"] == "timeout" and result["wrong"] == ["b"] and result["a"] == {"ok": True}
    assert "c" not in result and result["last_lines"] == ["noise"]


RESULTS = {
    "machine": {"name": "NVIDIA H100 80GB HBM3", "python": "3.12.3", "versions": {"torch": "2.11.0"}},
    "train-mini-bf16": {"status": "ok"},
    "train-mini-fp16": {"status": "WRONG", "wrong": ["killed"]},
    "train-stories-bf16": {"skipped": "stories260K is not at hand"},
    "curves": {"curve_fp32": {"largest_relative_gap": 2e-3}, "curve_bf16": {"largest_relative_gap": 5e-3}},
    "parity-fp32": {"mori_exact_equals_trainer": {"ok": True, "max_abs_loss_diff": 0.0, "max_abs_weight_diff": 0.0}},
    "parity-bf16": {"mori_exact_equals_trainer": {"ok": False, "max_abs_loss_diff": 0.0, "max_abs_weight_diff": 1e-9}},
    "graphs": {"gpt2": {"ok": True}, "llama": {"ok": True}},
    "suite": {"tests": {"ok": True, "absent": "pytest is not installed"}},
    "oom": {"halved": {"ok": True}, "same_weights": {"ok": True}},
    "syncs": {"bf16": {"ok": False, "syncs": 2}, "fp16": {"ok": True, "syncs": 0}},
    "bench": {"tokens_per_second": {"mori": 300_000, "trainer": 200_000}, "peak_gib": {"mori": 4.0, "trainer": 10.0}},
    "bench-tuned": {"tokens_per_second": {"mori": 300_000, "trainer-tuned": 299_000}},
    "decode": {"bfloat16 batch 1": {"mori-greedy": 900, "generate-greedy": 100}},
    "decode-compiled": {"bfloat16 batch 1": {"mori-greedy": 900, "generate-compiled": 600}},
    "bench-fp16-128": {"tokens_per_second": {"mori": 13, "trainer": 10}, "peak_gib": {"mori": 7.1, "trainer": 10.0}},
}
VERDICTS = {
    "mini: trains, is killed, resumes, generates": ("1 of 3; wrong: fp16; not measured: fp32", "WRONG"),
    "stories: trains, is killed, resumes, generates": ("–", "not measured"),
    "loss curve against a CPU in fp32, 50 steps: fp32": ("2.0e-03", "WRONG"),
    "loss curve against a CPU in fp32, 50 steps: bf16": ("5.0e-03", "ok"),
    "mori-exact against Trainer, deterministic, bf16: largest difference": ("1.0e-09", "WRONG"),
    "mori-exact against Trainer, deterministic, fp16: largest difference": ("–", "not measured"),
    "mori-exact against Trainer, deterministic, fp32: largest difference": ("0.0e+00", "ok"),
    "decoding graphs by family": ("2 of 2", "ok"),
    "tests that need a GPU": ("–", "not measured, pytest is not installed"),
    "a batch too large: redone in halves, same weights": ("2 of 2", "ok"),
    "host syncs between log points": ("2", "WRONG"),
    "124M bf16 B16 x T1024: tokens/s, Trainer = 1": ("1.50", "ok"),
    "124M bf16 B16 x T1024: tokens/s, tuned Trainer = 1": ("1.00", "WRONG"),
    "124M bf16 B16 x T1024: tokens/s": ("300,000", "ok"),
    "124M bf16 B16 x T1024: peak memory, Trainer = 1": ("0.40", "goal"),
    "decode 124M bfloat16, batch 1: tokens/s, generate() = 1": ("9.00", "goal"),
    "decode 124M bfloat16, batch 1: tokens/s, static cache, compiled = 1": ("1.50", "ok"),
    "decode 124M float32, batch 1: tokens/s, generate() = 1": ("–", "not measured"),
    "decode 124M float32, batch 1: tokens/s, static cache, compiled = 1": ("–", "not measured"),
    "124M fp16 B4 x T128: tokens/s, Trainer = 1": ("1.30", "ok"),
    "124M fp16 B4 x T128: peak memory, Trainer = 1": ("0.71", "WRONG"),
    "124M fp16 B16 x T512: tokens/s, Trainer = 1": ("–", "not measured"),
    "124M fp16 B16 x T512: peak memory, Trainer = 1": ("–", "not measured"),
}


def test_table_judges_by_floor_and_goal():
    results = {part: {"status": "ok", **result} for part, result in RESULTS.items()}
    rows = table.report(results)["rows"]
    assert {row["row"]: (row["measured"], row["verdict"]) for row in rows} == VERDICTS


def test_table_without_results_has_every_row_unmeasured():
    report = table.report({})
    assert [row["row"] for row in report["rows"]] == list(VERDICTS) and {row["verdict"] for row in report["rows"]} == {
        "not measured"
    }
    assert "not measured" in table.text(report)


def test_table_of_two_calls_takes_the_later_result_unless_it_was_skipped(tmp_path):
    calls = [
        [{"part": "bench", "status": "ok", "n": 1}, {"part": "decode", "status": "ok", "n": 1}],
        [{"part": "bench", "status": "skipped: 3 s left, 40 needed"}, {"part": "decode", "status": "WRONG", "n": 2}],
    ]
    for number, lines in enumerate(calls):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    results = table.read_results([tmp_path / "0", tmp_path / "1"])
    assert results["bench"]["n"] == 1 and results["decode"]["n"] == 2


def test_publish_writes_files_that_tables_can_read(tmp_path):
    """Each report in a file of its own, with the commit that the machine did not know."""
    (tmp_path / "bench.json").write_text(json.dumps({"train-124m": {"bench": "train", "commit": None}}))
    publish(table.report({"machine": RESULTS["machine"] | {"status": "ok"}}, "abc"), [tmp_path], tmp_path / "h100")
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "h100").iterdir()}
    assert files.keys() == {"gpu-day", "train-124m"} and {report["commit"] for report in files.values()} == {"abc"}
    assert files["gpu-day"]["device"] == "NVIDIA H100 80GB HBM3" and files["gpu-day"]["versions"]["torch"] == "2.11.0"
