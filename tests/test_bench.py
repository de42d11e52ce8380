"""The benchmarks: what they leave, and when they refuse to. How long anything takes is not looked at here."""

import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, door
from transformers import AutoConfig, AutoModelForCausalLM

from mori import distributed as runtime
from mori.bench import compare
from mori.bench import harness as bench
from mori.bench import tokenize as bench_tokenize
from mori.bench import train as bench_train
from mori.config import (
    DecodeBenchConfig,
    MemoryBenchConfig,
    RunFailed,
    TokenizeBenchConfig,
    TrainBenchConfig,
    UserError,
    checked,
)
from mori.model import options as fast
from mori.speed.matmul import Race

PROMISED = {"bench", "model", "shape", "arms", "ratios", "versions", "device", "threads", "commit"}


def assert_complete(report: dict, arms: set[str], repeats: int, figures: tuple[str, ...]) -> None:
    """All that is promised stands in the JSON, each figure with all its repeats, and nothing of this machine's folders."""
    assert report.keys() == PROMISED and report["arms"].keys() == arms
    for arm in report["arms"].values():
        assert all(len(arm[name]) == repeats and min(arm[name]) > 0 for name in figures)
        assert arm["min"] <= arm["median"] <= arm["max"]
    assert len(report["ratios"]) == len(arms) - 1
    for ratio in report["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert {"python", "torch", "transformers"} <= report["versions"].keys()
    assert report["threads"] >= 1
    assert not re.search(r'[" =]/\w', json.dumps(report))


def test_a_training_is_measured_by_every_arm(tmp_path):
    words = (
        "train --shape tiny --block_size 16 --max_steps 6 --logging_steps 3 --uncounted_steps 2 --repeats 1 --threads 1"
    )
    done = door(
        "bench.py", *words.split(), "--arms", "trainer,bare", "mori", "--device", "cpu", "--output_dir", tmp_path
    )
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("train-tiny-*.json")
    report = json.loads(path.read_text())
    figures = ("seconds", "steps_per_second", "tokens_per_second", "training_peak_memory_bytes")
    assert_complete(report, {"mori", "trainer", "bare"}, 1, figures)
    assert set(report["ratios"]) == {"trainer / mori", "bare / mori"}
    assert report["shape"]["block_size"] == 16 and "accelerate" in report["versions"]
    for arm in report["arms"].values():
        assert arm["losses"].keys() == {"3", "6"} and arm["max_relative_loss_diff"] <= 1e-4
        assert arm["losses"]["3"] == pytest.approx(math.log(8192), rel=0.02)  # random weights know nothing yet
        assert arm["tokens_per_second"][0] * arm["seconds"][0] == pytest.approx(4 * 4 * 16)


@pytest.fixture
def no_processes(monkeypatch):
    """Arms run in this process, so that a test can look into them; `wrong` is the arm that does something else."""
    wrong = []

    def run(arm, command, threads=0):
        room = {"mori.bench.compare": compare, "mori.bench.train": bench_train}[command[1]]
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        room._main(command[2])
        if arm in wrong:
            result = Path(command[2]).with_name("result.json")
            found = json.loads(result.read_text())
            found["metrics"][-1]["loss"] *= 1.001
            result.write_text(json.dumps(found))
        return ""

    monkeypatch.setattr(bench, "in_a_process", run)
    return wrong


def small(cls, tmp_path, **changed):
    values = {"shape": "tiny", "block_size": 16, "max_steps": 4, "uncounted_steps": 2, "logging_steps": 2, "repeats": 2}
    return checked(cls(**{**values, "threads": 1, "device": "cpu", "output_dir": str(tmp_path), **changed}))


def test_memory_is_measured_in_every_repeat(no_processes, tmp_path):
    bench_train.memory(small(MemoryBenchConfig, tmp_path, arms=["mori", "bare"]))
    report = json.loads((tmp_path / "memory-tiny-batch4-block16-fp32-cpu.json").read_text())
    assert_complete(report, {"mori", "bare"}, 2, ("training_peak_memory_bytes",))
    assert set(report["ratios"]) == {"mori / bare"}


def test_another_loss_makes_the_timing_void(no_processes, tmp_path):
    no_processes.append("bare")
    with pytest.raises(RunFailed, match="losses of bare and mori differ by 1.0e-03.*void"):
        bench_train.train(small(TrainBenchConfig, tmp_path, arms=["bare", "mori"]))
    assert not list(tmp_path.iterdir())


def test_losses_agree_within_the_precision():
    ours = {2: 4.0, 4: 2.0}
    assert bench_train.check_losses("bare", ours, {2: 4.0, 4: 2.0001}, "fp32") == pytest.approx(5e-5)
    assert bench_train.check_losses("bare", ours, {2: 4.03, 6: 9.0}, "bf16") == pytest.approx(0.0075)
    for theirs, precision in (({2: 4.001}, "fp32"), ({2: 4.05}, "bf16"), ({2: math.nan}, "bf16"), ({3: 4.0}, "fp32")):
        with pytest.raises(RunFailed, match="void"):
            bench_train.check_losses("bare", ours, theirs, precision)


@pytest.mark.parametrize("visible, named", [("", "1"), ("3,5", "5"), ("GPU-a,GPU-b,GPU-c", "GPU-b")])
def test_the_arms_see_the_one_gpu_that_was_asked_for(visible, named, monkeypatch):
    """Trainer would train on all, and on the first where another is asked for."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert runtime.for_children(torch.device("cpu")) == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert runtime.for_children(torch.device("cuda:1")) == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == named


def test_arms_take_turns_and_turn_round():
    order = []
    found = bench.in_turn(["a", "b", "c"], 3, lambda arm: order.append(arm) or {"seconds": float(len(order))})
    assert "".join(order) == "abccbaabc"
    assert [run["seconds"] for run in found["a"]] == [1.0, 6.0, 7.0]
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_shapes_are_the_ones_they_are_named_after():
    """Parameters counted by hand: embeddings, 12 d^2 + 13 d in a block of GPT-2, the last norm; Llama has no biases."""
    counts = {}
    for name, shape in bench.SHAPES.items():
        with torch.device("meta"):
            config = AutoConfig.for_model(**shape, max_position_embeddings=1024)
            model = AutoModelForCausalLM.from_config(config)
        assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
        counts[name] = sum(parameter.numel() for parameter in model.parameters())

    def gpt2(layers, d, vocabulary):
        return vocabulary * d + 1024 * d + layers * (12 * d * d + 13 * d) + 2 * d

    def llama(layers, d, kv, mlp, vocabulary, heads):
        return heads * vocabulary * d + layers * (2 * d * d + 2 * d * kv + 3 * d * mlp + 2 * d) + d

    assert counts == {
        "tiny": gpt2(2, 64, 8192),
        "mini": gpt2(4, 256, 8192),
        "small": gpt2(4, 128, 8192),
        "124m": gpt2(12, 768, 50_257),
        "llama-160m": llama(12, 768, 768, 2048, 32_000, 2),
        "llama-1b": llama(16, 2048, 512, 8192, 128_256, 1),
    }


def test_tokenizing_is_measured_where_the_ids_are_the_same(monkeypatch, tmp_path, text_file, capfd):
    def run(arm, command, threads=0):
        bench_tokenize._main(json.loads(command[2]))
        return capfd.readouterr().out

    monkeypatch.setattr(bench, "in_a_process", run)
    config = TokenizeBenchConfig(
        corpus=[str(text_file)], megabytes=0.01, repeats=2, arms=["mori,one-call"], output_dir=str(tmp_path)
    )
    bench_tokenize.tokenize(checked(config))
    report = json.loads((tmp_path / "tokenize.json").read_text())
    assert_complete(report, {"mori", "one-call"}, 2, ("seconds", "megabytes_per_second", "peak_memory_bytes"))
    assert set(report["ratios"]) == {"one-call / mori"} and report["shape"]["bytes"] >= 10_000
    (tmp_path / "tokenize.json").unlink()

    def one_id_less(*arguments):
        ids, in_blocks = bench_tokenize._one_call(*arguments)
        return ids[1:], in_blocks

    monkeypatch.setitem(bench_tokenize._ARMS, "one-call", one_id_less)
    with pytest.raises(RunFailed, match="ids of one-call differ.*void"):
        bench_tokenize.tokenize(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_package_that_is_not_there_is_named_before_anything_is_done(tmp_path):
    with pytest.raises(UserError, match="pip install datasets"):
        bench_tokenize.tokenize(TokenizeBenchConfig(output_dir=str(tmp_path)))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_the_usual_script_finds_the_same_ids(tmp_path, text_file):
    words = f"tokenize --corpus {text_file} --megabytes 0.01 --repeats 1 --arms mori run_clm --output_dir {tmp_path}"
    done = door("bench.py", *words.split())
    assert done.returncode == 0, done.stderr
    assert "datasets" in json.loads((tmp_path / "tokenize.json").read_text())["versions"]


@pytest.mark.parametrize("lines", ["MORI_LINES", "TRAINER_LINES"])
def test_the_first_step_is_told(lines, small_model, text_file, tmp_path):
    """What `startup` runs are texts here: they must be programs."""
    begin, place = "0", str(tmp_path)
    words = [begin, str(small_model), str(text_file), place, "2", "16", "cpu"]
    if lines == "MORI_LINES":
        words = [
            begin,
            "--model",
            str(small_model),
            "--corpus",
            str(text_file),
            "--max_steps",
            "1",
            "--block_size",
            "16",
        ]
        words += ["--logging_dir", place, "--output_dir", place + "/brain", "--max_new_tokens", "1"]
    printed = bench.in_a_process(lines, ["-c", getattr(bench_train, lines), *words], threads=1)
    assert len(re.findall(r"^first step \d+\.\d+$", printed, re.M)) == 1


def test_the_memory_of_whoever_starts_an_arm_is_not_the_arms():
    """getrusage's figure begins with the peak of the parent, where that is larger."""
    held = bytearray(1 << 30)
    held[:: 1 << 12] = b"1" * len(held[:: 1 << 12])
    del held
    code = "import torch; from mori.tracking.memory import peak_memory_bytes as peak; print(peak(torch.device('cpu')))"
    assert 50 << 20 < int(bench.in_a_process("mori", ["-c", code], threads=1)) < 1 << 30


def test_an_arm_that_fails_is_named():
    with pytest.raises(RunFailed, match="^bare failed: ZeroDivisionError"):
        bench.in_a_process("bare", ["-c", "1 / 0"])
    with pytest.raises(RunFailed, match="^bare was killed by signal 9"):
        bench.in_a_process("bare", ["-c", "import os; os.kill(os.getpid(), 9)"])


@pytest.mark.parametrize(
    "words, named",
    [
        ("", "train, decode, tokenize, startup, memory"),
        ("train --shape giant", "shape"),
        ("train --arms trainr mori --repeats 0 --block_size 2000", "arm 'trainr'.*|repeats is 0.*|block_size 2000"),
        ("train --arms trainer", "must have mori"),
        ("train --arms mori mori", "each once"),
        ("train --max_steps 5", "logging_steps 10 is more than max_steps 5.*"),
        ("train --max_steps 3", "uncounted_steps 5 leaves none"),
        ("memory --step 3", "unknown flag --step"),
        ("tokenize --megabytes nan", "megabytes is nan"),
        ("tokenize --megabytes 0", "megabytes is 0"),
        ("decode --rounds 0", "rounds is 0"),
    ],
)
def test_a_mistake_is_one_line(words, named):
    done = door("bench.py", *words.split())
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(re.search(part, done.stderr) for part in named.split(".*|")), done.stderr


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as error:
        checked(TrainBenchConfig(repeats=0, threads=-1, device="gpu", block_size=0, precision="int8", output_dir=""))
    for name in ("repeats", "threads", "device", "block_size", "precision", "output_dir"):
        assert name in str(error.value)
    with pytest.raises(UserError, match="batch_size.*rounds"):
        checked(DecodeBenchConfig(rounds=0, batch_size=0))


def test_figures_that_could_not_be_written_are_not_taken(tmp_path):
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="output_dir: cannot write"):
            bench_train.train(small(TrainBenchConfig, output_dir))


def test_help_is_instant():
    code = (
        "import sys, runpy; sys.argv = ['bench.py', 'train', '--help']\n"
        "try: runpy.run_path('scripts/bench.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--uncounted_steps" in done.stdout, done.stderr


def test_a_gpu_without_bf16_is_told_so(monkeypatch, tmp_path):
    real = runtime.start
    monkeypatch.setattr(runtime, "start", lambda device, *_: runtime.Runtime(real(device).device, 0, 1, "fp16"))
    with pytest.raises(UserError, match="say --precision fp32"):
        bench_train.train(small(TrainBenchConfig, tmp_path, arms=["mori"]))


def test_the_peak_is_taken_anew_for_every_process(monkeypatch):
    rates = iter([(2.0, 1.0), (1.0, 0.5), (4.0, 3.0), (9.0, 8.0), (4.0, 4.0), (7.0, 5.0)])  # seconds, whole and cut
    cached = functools.cache(lambda: Race(*next(rates), None, 100, True))
    for room in (bench_train, fast):
        monkeypatch.setattr(room, "race", cached)
    where = runtime.Runtime(torch.device("cpu"), 0, 1, "fp32")
    assert [bench_train._peak(where), bench_train._peak(where)] == [200.0, 25.0]
