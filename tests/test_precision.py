"""The precision that `auto` takes on a CPU. A stand-in replaces the measurement: no test depends on the processor."""

import dataclasses
import json

import pytest
import torch
from conftest import assert_equal_weights, stop_after
from families import small_config

from mori.bench import arms, compare
from mori.bench.options import CompareConfig
from mori.config import EvaluateConfig
from mori.distributed import Runtime
from mori.evaluate import evaluate_text
from mori.prepare import settle_precision
from mori.speed import precision
from mori.speed.matmul import cpu_peak_flops

NOTE = "bf16: this CPU multiplies it 4.0 times as fast as fp32"


def model_config(width: int):
    """Of a GPT-2 of that width."""
    config = small_config("gpt2", 97)
    config.hidden_size = width
    return config


def runtime_on(device: str = "cpu") -> Runtime:
    return Runtime(torch.device(device), 0, 1, "fp32")


@pytest.fixture
def cpu_multiplies(monkeypatch):
    """Set how many times as fast as fp32 this CPU multiplies bf16; any model's steps are matmuls alone."""
    monkeypatch.setattr(precision, "_EVEN_WIDTH", 0)

    def multiplies(speedup: float) -> None:
        monkeypatch.setattr(precision, "bf16_speedup", lambda rows, width: speedup)

    return multiplies


@pytest.mark.parametrize(
    "width, speedup, expected",
    [
        (768, 1.95, "bf16"),  # GPT-2 124M on a processor with AVX512-BF16: a step takes 0.67 of its time in fp32
        (576, 1.95, "bf16"),
        (256, 1.95, "fp32"),  # 0.83
        (256, 8.0, "bf16"),
        (768, 1.3, "fp32"),
        (768, 0.05, "fp32"),  # without instructions for it
        (64, 1e9, "fp32"),  # what a step of a narrow model takes is not its matmuls
        (0, 8.0, "fp32"),  # not known
    ],
)
def test_auto_precision_is_bf16_where_a_step_gains(width, speedup, expected, monkeypatch):
    times = {"fp32": [9.0, 1.0], "bf16": [1.0 / speedup]}
    monkeypatch.setattr(precision, "best_of_five", lambda shape, clock, name: times[name])
    monkeypatch.setattr(precision, "_has_kernels", lambda: True)
    runtime = runtime_on()
    measured = settle_precision("auto", runtime, model_config(width), rows=512)
    assert runtime.precision == expected
    assert measured == pytest.approx(speedup if width > 64 else 0.0)


def test_auto_precision_asks_pytorch_for_kernels_first(monkeypatch):
    monkeypatch.setattr(precision, "_has_kernels", lambda: False)
    monkeypatch.setattr(precision, "best_of_five", None)
    runtime = runtime_on()
    assert settle_precision("auto", runtime, model_config(768), rows=512) == 0.0 and runtime.precision == "fp32"


@pytest.mark.parametrize("setting, device", [("fp32", "cpu"), ("auto", "cuda")])
def test_settled_precision_is_for_auto_on_a_cpu(setting, device, cpu_multiplies):
    cpu_multiplies(8.0)
    runtime = runtime_on(device)
    assert settle_precision(setting, runtime, model_config(768), rows=512) == 0.0 and runtime.precision == "fp32"


def test_auto_precision_is_that_of_the_main_rank(cpu_multiplies, monkeypatch):
    cpu_multiplies(1.0)
    monkeypatch.setattr(Runtime, "on_main", lambda self, action: 8.0)
    runtime = runtime_on()
    settle_precision("auto", runtime, model_config(768), rows=512)
    assert runtime.precision == "bf16"


def test_bf16_speedup_is_measured_and_moves_no_random_number():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    speedup, peaks = precision.bf16_speedup(64, 256), [cpu_peak_flops(name) for name in ("fp32", "bf16")]
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert 0 <= speedup < 1000 and all(1e6 < peak < 1e15 for peak in peaks)
    assert precision.bf16_speedup(64, 64) == 0.0


def test_resumed_run_keeps_its_precision_on_another_processor(cpu_multiplies, run_train, tmp_path, capsys):
    cpu_multiplies(4.0)
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(8, run_train)
    told = capsys.readouterr().out
    assert told.count(NOTE) == 2 and "cpu, bf16" in told
    cpu_multiplies(0.5)
    run_train()
    told = capsys.readouterr()
    assert "cpu, bf16" in told.out and "0.5 times as fast" in told.out and "other settings" not in told.err
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    state = json.loads((tmp_path / "runs/run/checkpoints/step-00000012/state.json").read_text())
    assert state["precision"] == "bf16"


def test_resumed_fp32_run_stays_in_fp32_on_a_processor_with_bf16(cpu_multiplies, run_train, tmp_path, capsys):
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"), precision="fp32")
    stop_after(8, lambda: run_train(precision="fp32"))
    cpu_multiplies(4.0)
    run_train()
    told = capsys.readouterr()
    assert "cpu, bf16" not in told.out and "bf16:" not in told.out and "other settings" not in told.err
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


def test_resumed_run_takes_the_precision_of_a_flag(cpu_multiplies, run_train, capsys):
    cpu_multiplies(4.0)
    stop_after(8, run_train)
    run_train(precision="fp32")
    assert "precision ('bf16', 'fp32')" in capsys.readouterr().err


def test_evaluation_takes_the_precision_of_training(cpu_multiplies, run_train, settings, tmp_path):
    cpu_multiplies(4.0)
    run_train()
    config = EvaluateConfig(
        model=settings["output_dir"], corpus=settings["corpus"], block_size=16, logging_dir=str(tmp_path / "logs")
    )
    losses = [evaluate_text(dataclasses.replace(config, precision=name))["loss"] for name in ("auto", "bf16", "fp32")]
    assert losses[0] == losses[1] != losses[2] == pytest.approx(losses[0], rel=5e-3)


def test_comparison_gives_trainer_the_precision_of_mori(cpu_multiplies, settings, tmp_path, monkeypatch):
    given = []

    def run_arm(arm, config, folder, **_):
        given.append(config.precision)
        return arms.run_arm(arm, config, folder, 0.0)

    cpu_multiplies(4.0)
    monkeypatch.setattr(compare.harness, "run_arm", run_arm)
    fields = {f.name for f in dataclasses.fields(CompareConfig)}
    config = CompareConfig(**{k: v for k, v in settings.items() if k in fields}, arms=["mori-exact", "trainer"])
    comparison = compare.compare(config)
    assert given == ["bf16", "bf16"] and comparison["environment"]["precision"] == "bf16"
    assert comparison["pairs"]["mori-exact|trainer"]["max_abs_loss_diff"] == 0.0
