"""The benchmarks: what they write, and when they refuse. The tests ignore the measured times."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from transformers import AutoConfig, AutoModelForCausalLM

from mori import distributed
from mori.__main__ import run_command
from mori.bench import arms, harness
from mori.bench import decode as bench_decode
from mori.bench import tokenize as bench_tokenize
from mori.bench import train as bench_train
from mori.bench.options import (
    SHAPES,
    DecodeBenchConfig,
    MemoryBenchConfig,
    StartupBenchConfig,
    TokenizeBenchConfig,
    TrainBenchConfig,
)
from mori.cli import RunFailed, UserError, checked, parse
from mori.config import TrainConfig

KEYS = {"bench", "model", "shape", "arms", "ratios", "versions", "device", "threads", "commit"}


def assert_complete(report: dict, arms: set[str], repeats: int, figures: tuple[str, ...]) -> None:
    """The report has every key, each figure for every repeat, and no absolute path."""
    assert report.keys() == KEYS and report["arms"].keys() == arms
    for arm in report["arms"].values():
        assert all(len(arm[name]) == repeats and min(arm[name]) > 0 for name in figures)
        assert arm["min"] <= arm["median"] <= arm["max"]
    assert len(report["ratios"]) == len(arms) - 1
    for ratio in report["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert {"python", "torch", "transformers"} <= report["versions"].keys()
    assert report["threads"] >= 1
    assert not re.search(r'[" =]/\w', json.dumps(report))


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the arms in this process, which saves their imports; an arm in the returned list reports a wrong loss."""
    wrong_arms = []

    def run(arm, command, *_, **__):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert command[:2] == ["-m", "mori.bench.arms"]
        arms.main(command[2])
        if arm in wrong_arms:
            path = Path(command[2]).with_name("result.json")
            result = json.loads(path.read_text())
            result["metrics"][-1]["loss"] *= 1.001
            path.write_text(json.dumps(result))
        return ""

    monkeypatch.setattr(harness, "run_process", run)
    return wrong_arms


def small(cls, tmp_path, **changed):
    values = {"shape": "tiny", "block_size": 16, "max_steps": 4, "uncounted_steps": 2, "logging_steps": 2, "repeats": 2}
    return checked(cls(**{**values, "threads": 1, "device": "cpu", "output_dir": str(tmp_path), **changed}))


def test_bench_train_measures_every_arm(in_this_process, monkeypatch, tmp_path):
    words = "train --shape tiny --block_size 16 --max_steps 6 --logging_steps 3 --uncounted_steps 2 --repeats 1"
    words += f" --threads 1 --arms trainer,bare,nanogpt mori --device cpu --output_dir {tmp_path}"
    with pytest.raises(SystemExit) as end:
        run_command("bench", "bench.py", words.split())
    assert end.value.code == 0
    report = json.loads((tmp_path / "train-tiny-batch4-block16-fp32-cpu.json").read_text())
    figures = ("seconds", "steps_per_second", "tokens_per_second", "training_peak_memory_bytes")
    assert_complete(report, {"mori", "trainer", "bare", "nanogpt"}, 1, figures)
    assert set(report["ratios"]) == {"trainer / mori", "bare / mori", "nanogpt / mori"}
    assert report["shape"]["block_size"] == 16 and "accelerate" in report["versions"]
    for arm in report["arms"].values():
        assert arm["median_share_of_peak"] == arm["share_of_peak"][0] > 0
        assert arm["losses"].keys() == {"3", "6"} and arm["max_relative_loss_diff"] <= 1e-4
        assert arm["losses"]["3"] == pytest.approx(math.log(8192), rel=0.02)  # the loss of random weights
        assert arm["tokens_per_second"][0] * arm["seconds"][0] == pytest.approx(4 * 4 * 16)


def test_memory_measures_every_repeat(in_this_process, tmp_path):
    bench_train.memory(small(MemoryBenchConfig, tmp_path, arms=["mori", "bare"]))
    report = json.loads((tmp_path / "memory-tiny-batch4-block16-fp32-cpu.json").read_text())
    assert_complete(report, {"mori", "bare"}, 2, ("training_peak_memory_bytes",))
    assert set(report["ratios"]) == {"mori / bare"}


def test_train_refuses_an_arm_with_other_losses(in_this_process, tmp_path):
    in_this_process.append("bare")
    with pytest.raises(RunFailed, match=r"losses of bare differ from those of mori.*1.0e-03.*void"):
        bench_train.train(small(TrainBenchConfig, tmp_path, arms=["bare", "mori"]))
    assert not list(tmp_path.iterdir())


def test_check_losses_allows_the_rounding_of_the_precision():
    ours = {2: 4.0, 4: 2.0}
    assert bench_train.check_losses("bare", ours, {2: 4.0, 4: 2.0001}, "fp32") == pytest.approx(5e-5)
    assert bench_train.check_losses("bare", ours, {2: 4.03, 6: 9.0}, "bf16") == pytest.approx(0.0075)
    for theirs, precision in (({2: 4.001}, "fp32"), ({2: 4.05}, "bf16"), ({2: math.nan}, "bf16"), ({3: 4.0}, "fp32")):
        with pytest.raises(RunFailed, match="void"):
            bench_train.check_losses("bare", ours, theirs, precision)


@pytest.mark.parametrize("visible, named", [("", "1"), ("3,5", "5"), ("GPU-a,GPU-b,GPU-c", "GPU-b")])
def test_for_children_shows_only_the_chosen_gpu(visible, named, monkeypatch):
    """Trainer uses every visible GPU."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.for_children(torch.device("cpu")) == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert distributed.for_children(torch.device("cuda:1")) == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == named


def test_in_turn_reverses_the_order_of_every_second_repeat():
    order = []
    results = harness.in_turn(["a", "b", "c"], 3, lambda arm: order.append(arm) or {"seconds": float(len(order))})
    assert "".join(order) == "abccbaabc"
    assert [run["seconds"] for run in results["a"]] == [1.0, 6.0, 7.0]
    assert harness.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_shapes_have_the_parameters_of_their_models():
    """Counted by hand: embeddings, 12 d^2 + 13 d in a block of GPT-2, the last norm; Llama has no biases."""
    counts = {}
    for name, shape in SHAPES.items():
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
        "smollm2-135m": llama(30, 576, 192, 1536, 49_152, 1),
        "llama-1b": llama(16, 2048, 512, 8192, 128_256, 1),
    }


def test_tokenize_compares_arms_with_equal_ids(monkeypatch, tmp_path, text_file):
    monkeypatch.setattr(
        harness, "run_process", lambda arm, command: json.dumps(bench_tokenize.measure_arm(json.loads(command[2])))
    )
    config = TokenizeBenchConfig(
        corpus=[str(text_file)], megabytes=0.01, repeats=2, arms=["mori,one-call"], output_dir=str(tmp_path)
    )
    bench_tokenize.tokenize(checked(config))
    report = json.loads((tmp_path / "tokenize.json").read_text())
    assert_complete(report, {"mori", "one-call"}, 2, ("seconds", "megabytes_per_second", "peak_memory_bytes"))
    assert set(report["ratios"]) == {"one-call / mori"} and report["shape"]["bytes"] >= 10_000
    (tmp_path / "tokenize.json").unlink()

    one_call = bench_tokenize.ARMS["one-call"]
    monkeypatch.setitem(bench_tokenize.ARMS, "one-call", lambda *arguments: (one_call(*arguments)[0][1:], 0))
    with pytest.raises(RunFailed, match="ids of one-call differ.*void"):
        bench_tokenize.tokenize(config)
    assert not list(tmp_path.iterdir())


def test_decode_compares_arms_with_equal_ids(monkeypatch, tmp_path):
    other_ids = []

    def run(arm, command, threads):
        result = bench_decode.measure_arm(parse(DecodeBenchConfig, "", command[command.index("decode") + 1 :]))
        if arm in other_ids:
            result["ids"][0][0] += 1
        return json.dumps(result)

    monkeypatch.setattr(harness, "run_process", run)
    values = {"batch_size": 2, "new_tokens": 4, "rounds": 1, "repeats": 1, "threads": 1, "device": "cpu"}
    config = DecodeBenchConfig(**values, output_dir=str(tmp_path))
    bench_decode.decode(config)
    report = json.loads((tmp_path / "decode-small-batch2.json").read_text())
    assert set(report["ratios"]) == {"generate-greedy / mori-greedy", "generate-sampled / mori-sampled"}
    assert set(report["arms"]) == {"mori-greedy", "generate-greedy", "mori-sampled", "generate-sampled"}
    assert report["share_of_copy_bandwidth"][0] > 0
    (tmp_path / "decode-small-batch2.json").unlink()

    other_ids.append("generate-greedy")
    with pytest.raises(RunFailed, match="generate-greedy and mori-greedy generated different ids.*void"):
        bench_decode.decode(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_tokenize_names_a_missing_package_before_it_starts(tmp_path):
    with pytest.raises(UserError, match="pip install datasets"):
        bench_tokenize.tokenize(TokenizeBenchConfig(output_dir=str(tmp_path)))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_tokenize_gives_the_ids_of_run_clm(tmp_path, text_file):
    words = f"tokenize --corpus {text_file} --megabytes 0.01 --repeats 1 --arms mori run_clm --output_dir {tmp_path}"
    done = run_script("bench.py", *words.split())
    assert done.returncode == 0, done.stderr
    assert "datasets" in json.loads((tmp_path / "tokenize.json").read_text())["versions"]


@pytest.mark.parametrize("arm", ["mori", "trainer"])
def test_startup_programs_print_the_time_of_the_first_step(arm, small_model, text_file, tmp_path):
    shutil.copytree(small_model, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "corpus.txt")
    config = StartupBenchConfig(block_size=16, per_device_train_batch_size=2)
    command = bench_train.startup_command(arm, config, tmp_path, tmp_path / "run", "cpu")
    printed = harness.run_process(arm, command, threads=1)
    assert len(re.findall(r"^first step \d+\.\d+$", printed, re.M)) == (2 if arm == "mori" else 1)


def test_peak_memory_excludes_the_parent_process():
    """The peak that getrusage reports for a child starts at that of its parent."""
    data = bytearray(1 << 30)
    data[:: 1 << 12] = b"1" * len(data[:: 1 << 12])
    del data
    code = "import torch; from mori.tracking.memory import peak_memory_bytes as peak; print(peak(torch.device('cpu')))"
    assert 50 << 20 < int(harness.run_process("mori", ["-c", code], threads=1)) < 1 << 30


@pytest.mark.parametrize("logged", [False, True])
def test_run_process_names_the_arm_that_failed(logged, tmp_path):
    log = tmp_path / "output.txt" if logged else None
    with pytest.raises(RunFailed, match="^bare failed: ZeroDivisionError"):
        harness.run_process("bare", ["-c", "1 / 0"], log=log)
    with pytest.raises(RunFailed, match="^bare was killed by signal 9"):
        harness.run_process("bare", ["-c", "import os; os.kill(os.getpid(), 9)"], log=log)
    with pytest.raises(RunFailed, match="^bare failed: exit code 3"):
        harness.run_process("bare", ["-c", "raise SystemExit(3)"], log=log)


def test_write_works_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    harness.write(str(tmp_path), "report", {"ratios": {}})
    assert json.loads((tmp_path / "report.json").read_text())["commit"] is None


def test_tables_are_up_to_date():
    done = run_script("tables.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_check_reports_a_stale_file(tmp_path):
    for name in ("scripts/tables.py", "README.md", "runs/README.md", "tests/faults/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "runs/bench", tmp_path / "runs/bench")
    faults = tmp_path / "runs/bench/faults.json"
    faults.write_text(faults.read_text().replace('"held": 32', '"held": 31'))
    command = [sys.executable, tmp_path / "scripts/tables.py"]
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert stale.returncode == 1 and "tests/faults/README.md is not up to date" in stale.stdout
    assert "runs/README.md is" not in stale.stdout
    assert subprocess.run(command).returncode == 0 and subprocess.run([*command, "--check"]).returncode == 0
    assert "| 32 | 31 |" in (tmp_path / "tests/faults/README.md").read_text()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_write_nanogpt_the_share_of_the_peak_and_a_new_benchmark_into_the_readme(tmp_path):
    """A benchmark in bf16 with the arm nanogpt fills three cells of its row; each figure links to its entry."""
    for name in ("scripts/tables.py", "README.md", "runs/README.md", "tests/faults/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "runs/bench", tmp_path / "runs/bench")
    folder = tmp_path / "runs/bench/zen5"
    report = json.loads((folder / "train-124m-batch4-block512-fp32-cpu.json").read_text())
    report["ratios"]["nanogpt / mori"] = {"median": 1.444, "min": 1.4, "max": 1.5}
    report["arms"]["mori"]["median_share_of_peak"] = 0.613
    (folder / "train-124m-batch4-block512-bf16-cpu.json").write_text(json.dumps(report))
    assert subprocess.run([sys.executable, tmp_path / "scripts/tables.py"]).returncode == 0
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    [row] = [line for line in lines if "GPT-2, 4 windows of 512 tokens, fp32; bf16" in line]
    file = "runs/bench/zen5/train-124m-batch4-block512-bf16-cpu.json"
    assert f'[1.44 (1.40–1.50)]({file} "ratios.nanogpt / mori")' in row
    assert f'[0.61]({file} "arms.mori.median_share_of_peak")' in row


@pytest.mark.parametrize(
    "words, named",
    [
        ("x", "train, decode, tokenize, startup, memory"),
        ("train --shape giant", "shape"),
        ("train --arms trainr mori --repeats 0 --block_size 2000", "arm 'trainr'.*|repeats is 0.*|block_size 2000"),
        ("train --arms trainer", "must include mori"),
        ("train --arms mori mori", "each arm once"),
        ("train --max_steps 5", "logging_steps 10 is more than max_steps 5.*"),
        ("train --max_steps 3", "uncounted_steps 5 leaves none"),
        ("memory --step 3", "unknown flag --step"),
        ("tokenize --megabytes nan", "megabytes is nan"),
        ("tokenize --megabytes 0", "megabytes is 0"),
        ("decode --rounds 0", "rounds is 0"),
    ],
)
def test_bench_reports_a_mistake_in_one_line(words, named):
    done = run_script("bench.py", *words.split())
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(re.search(part, done.stderr) for part in named.split(".*|")), done.stderr


def test_checked_reports_all_mistakes_together():
    with pytest.raises(UserError) as error:
        checked(TrainBenchConfig(repeats=0, threads=-1, device="gpu", block_size=0, precision="int8", output_dir=""))
    for name in ("repeats", "threads", "device", "block_size", "precision", "output_dir"):
        assert name in str(error.value)
    with pytest.raises(UserError, match="batch_size.*rounds"):
        checked(DecodeBenchConfig(rounds=0, batch_size=0))


def test_bench_checks_the_output_folder_first(tmp_path):
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="output_dir: cannot write"):
            bench_train.train(small(TrainBenchConfig, output_dir))


def test_bench_help_imports_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['bench.py', 'train', '--help']\n"
        "try: runpy.run_path('scripts/bench.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--uncounted_steps" in done.stdout, done.stderr


def test_train_refuses_fp16_on_a_cpu(tmp_path):
    """accelerate has no fp16 autocast on a CPU and computes in fp32 without a warning."""
    with pytest.raises(UserError, match="use --precision bf16 or fp32"):
        bench_train.train(small(TrainBenchConfig, tmp_path, arms=["mori"], precision="fp16"))


def test_bare_arm_scales_the_loss_in_fp16(small_model, text_file, tmp_path, monkeypatch):
    """A scale that overflows in the first four steps: `bare` and `mori` skip the same ones."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**36, backoff_factor=2.0**-6)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    values = {"model": str(small_model), "corpus": [str(text_file)], "block_size": 16, "max_steps": 8}
    values |= {
        "logging_steps": 1,
        "learning_rate": 0.01,
        "dropout": 0.0,
        "precision": "fp16",
        "lr_scheduler_type": "constant",
    }
    where = {"logging_dir": str(tmp_path), "output_dir": str(tmp_path / "brain"), "run_name": "run", "prompt": ["Halo"]}
    config = TrainConfig(**values, **where, held_out_fraction=0.1).resolve()
    (tmp_path / "mori").mkdir()
    runs = [arms.run_arm(arm, config, tmp_path / arm, 0.0) for arm in ("mori", "bare")]
    expected, losses = ({line["step"]: line["loss"] for line in run["metrics"]} for run in runs)
    bench_train.check_losses("bare", expected, losses, "fp16")


@pytest.mark.parametrize(
    "device, dtype, refused", [("cpu", "bfloat16", True), ("cuda", "float32", True), ("cuda", "bfloat16", False)]
)
def test_decode_requires_equal_ids_except_in_bf16_on_a_gpu(device, dtype, refused, monkeypatch, tmp_path):
    """In bf16 logits are often equal, and kernels for different shapes round them to either side."""
    figures = {"seconds": 1.0, "weight_bytes": 1, "copy_bytes_per_second": 1.0}
    results = {arm: [figures] for arm in ("mori-greedy", "generate-greedy")}
    runtime = distributed.Runtime(torch.device(device), 0, 1, "fp32")
    monkeypatch.setattr(distributed, "start", lambda *_: runtime)
    monkeypatch.setattr(distributed, "for_children", lambda device: device.type)
    monkeypatch.setattr(
        bench_decode, "_run_arms", lambda *_: (results, {"mori-greedy": [[1]], "generate-greedy": [[2]]})
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    config = DecodeBenchConfig(dtype=dtype, device=device, output_dir=str(tmp_path))
    with pytest.raises(RunFailed, match="void") if refused else contextlib.nullcontext():
        bench_decode.decode(config)
    assert len(list(tmp_path.glob("*.json"))) == (not refused)


def test_measured_peak_is_measured_at_every_call():
    """A cached figure would be equal; two measurements of a time never are."""
    runtime = distributed.Runtime(torch.device("cpu"), 0, 1, "fp32")
    first, second = bench_train.measured_peak(runtime), bench_train.measured_peak(runtime)
    assert first > 0 and second > 0 and first != second


def test_measured_peak_is_the_best_of_three(monkeypatch):
    peaks = iter([1.0, 3.0, 2.0, 3.0, None, 2.0])
    monkeypatch.setattr(bench_train, "peak_flops", lambda *_: next(peaks))
    runtime = distributed.Runtime(torch.device("cpu"), 0, 1, "fp32")
    assert [bench_train.measured_peak(runtime), bench_train.measured_peak(runtime)] == [3.0, None]
