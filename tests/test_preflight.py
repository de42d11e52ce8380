"""What a run measures before its first step is undone to the bit, and is what then happens."""

import contextlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import ROOT, assert_equal_weights, flags, run_script, stop_after
from families import small_model
from safetensors.torch import load_file
from test_step_graph import counts  # noqa: F401

from mori import optim, output, preflight
from mori.checkpoint import optimizer_state
from mori.cli import RunFailed, UserError
from mori.config import TrainConfig
from mori.data.windows import Positions
from mori.model import loading, saving
from mori.model.lm import CausalLMLoss
from mori.run import build, check
from mori.tracking import overview
from mori.train import train, train_step

LONG = {"max_steps": 26, "eval_steps": 12, "save_steps": 12}


def bits(tensor: torch.Tensor) -> bytes:
    """The memory of a tensor: 0.0 and -0.0 differ."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def everything(run, state) -> dict:
    """All that a step changes, to the bit."""
    moments, plain = optimizer_state.pack(state.optimizer)
    saved = state.state_dict()
    for name in ("wall_seconds", "peak_memory_bytes"):
        saved["progress"].pop(name)
    return {
        "weights": {name: bits(tensor) for name, tensor in state.model.state_dict().items()},
        "buffers": {name: bits(buffer) for name, buffer in state.model.named_buffers()},
        "gradients": [parameter.grad for parameter in run.weights.parameters],
        "moments": {name: bits(tensor) for name, tensor in moments.items()},
        "optimizer": plain,
        "learning rates": [group["lr"] for group in state.optimizer.param_groups],
        "saved": saved,
        "training": [module.training for module in state.model.modules()],
        "waited": state.throughput.waited,
    }


def preflight_of(settings: dict):
    """Build a run and measure it; what was before, and what is after."""
    with contextlib.ExitStack() as locks:
        run = check(TrainConfig(**settings), locks)
        state = build(run, locks)
        before = everything(run, state)
        figures = preflight.preflight(run, state, train_step)
        return before, everything(run, state), figures


@pytest.fixture
def hard_weights(monkeypatch):
    """Every model that is loaded has a weight of -0.0, one too small for a normal number, and a buffer that a step changes."""
    real = loading.load_model

    def load(*arguments):
        model = real(*arguments)
        with torch.no_grad():
            weight = next(model.parameters())
            weight[3:5] = -0.0
            weight[5, 0] = 1e-39
        model.register_buffer("calls", torch.zeros(3))
        model.register_forward_pre_hook(lambda module, _: (module.calls.add_(1), None)[1])
        return model

    monkeypatch.setattr(loading, "load_model", load)


@pytest.mark.parametrize(
    "changed",
    [
        *({"optim": name} for name in optim.OPTIMIZERS),
        {"weight_decay": 0.1, "gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine", "warmup_steps": 4},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "auto_find_batch_size": True},
        {"precision": "fp16"},
        {"precision": "bf16", "dtype": "bfloat16"},
        {"gradient_checkpointing": True, "document_mask": True},
        {"use_peft": True, "lora_dropout": 0.2},
        {"use_peft": True, "load_in_4bit": True, "model": "llama"},
        {"freeze_trainable_layers": 1},
        {"held_out_fraction": 0.0, "eval_steps": 100},
        {"eval_strategy": "no", "save_strategy": "no"},
    ],
    ids=lambda changed: ",".join(f"{name}={value}" for name, value in changed.items()),
)
def test_preflight_is_undone_to_the_bit(settings, hard_weights, tokenizer, tmp_path, changed):
    settings = {**settings, **LONG, **changed}
    if settings["model"] == "llama":
        settings["model"] = str(tmp_path / "llama")
        saving.save(small_model("llama", len(tokenizer)), tokenizer, tmp_path / "llama")
    before, after, figures = preflight_of(settings)
    assert figures["seconds"]["training"] > 0 and after == before
    train(TrainConfig(**{**settings, "max_steps": 5, "save_strategy": "steps", "save_steps": 5}))
    resumed = {**settings, "extend": True, "save_strategy": "steps"}
    before, after, figures = preflight_of(resumed)
    assert figures["step"] == 5 and (before["moments"] or changed.get("optim") == "sgd") and after == before


def test_optimizers_at_rest_are_those_that_the_test_above_knows():
    assert set(optim.OPTIMIZERS) == preflight.AT_REST


def test_preflight_of_an_optimizer_that_moves_without_a_learning_rate_is_undone(settings, hard_weights, monkeypatch):
    class Restless(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["steps"] = torch.ones(())
                    parameter.data.add_(1.0)

    monkeypatch.setitem(
        optim.OPTIMIZERS, "restless", lambda model, config: Restless(optim.parameter_groups(model, 0.0))
    )
    config = TrainConfig(**{**settings, **LONG})
    with contextlib.ExitStack() as locks:
        run = check(config, locks)
        run.config.optim = "restless"
        state = build(run, locks)
        before = everything(run, state)
        preflight.preflight(run, state, train_step)
        assert everything(run, state) == before


def test_run_with_preflight_equals_one_without(run_train, settings, tmp_path, monkeypatch):
    options = {**LONG, "dropout": 0.2}
    stop_after(1, lambda: run_train(**options))  # in the middle of a measured step
    run_train(**options)
    monkeypatch.setattr(preflight, "FEWEST_STEPS", 100)
    run_train(**options, run_name="without", output_dir=str(tmp_path / "without"))
    assert_equal_weights(tmp_path / "brain", tmp_path / "without")
    runs = [tmp_path / "runs" / name for name in ("run", "without")]
    assert [(run / "preflight.json").is_file() for run in runs] == [True, False]
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert len(metrics[0]) == len(metrics[1]) >= 26
    for ours, theirs in zip(*metrics, strict=True):
        for values in (ours, theirs):
            for name in [name for name in values if name.startswith("perf/")]:
                values.pop(name)
        assert ours == theirs


def test_preflight_captures_no_graph_and_leaves_no_gradients(settings, counts):  # noqa: F811
    with contextlib.ExitStack() as locks:
        run = check(TrainConfig(**{**settings, **LONG, "gradient_accumulation_steps": 8}), locks)
        state = build(run, locks)
        before = everything(run, state)
        preflight.preflight(run, state, train_step)
        assert counts == {"captures": 0, "launches": 0} and everything(run, state) == before
        for _ in range(2):
            train_step(run, state)
        assert counts["captures"] == 1


def test_dry_run_leaves_nothing_that_changes_the_run(settings, tmp_path):
    words = flags({**settings, **LONG, "run_name": ""})[:-2]
    done = run_script("train.py", *words, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "takes   about " in done.stdout and "memory  " in done.stdout and "\ndisk    " in done.stdout
    [folder] = [path for path in (tmp_path / "runs").iterdir() if path.name[0] != "."]
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == ["preflight.json"]
    assert done.stdout.endswith(f"dry run: nothing is trained; these figures are in {folder / 'preflight.json'}\n")
    assert not (tmp_path / "brain").exists()
    other = run_script("train.py", *words, "--dry_run", "--learning_rate", "1e-4")
    assert other.returncode == 0 and len(list((tmp_path / "runs").glob("[!.]*"))) == 1
    assert run_script("train.py", *words).returncode == 0
    assert [path.name for path in (tmp_path / "runs").glob("[!.]*")] == [folder.name]
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 26
    assert "dry_run" not in json.loads((folder / "config.json").read_text())
    words[words.index(str(tmp_path / "brain"))] = str(tmp_path / "fresh")
    words[words.index(str(tmp_path / "runs"))] = str(tmp_path / "fresh_runs")
    assert run_script("train.py", *words).returncode == 0
    assert_equal_weights(tmp_path / "brain", tmp_path / "fresh")


def test_dry_run_of_a_resumed_a_finished_or_a_new_run_leaves_the_old_one(run_train, settings, tmp_path):
    run_train(max_steps=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    figures = run_train(max_steps=26, extend=True, dry_run=True)
    assert figures["step"] == 4 and figures["disk"]["checkpoints"] >= 1
    run_train(max_steps=4, dry_run=True)
    assert run_train(max_steps=4, resume_from_checkpoint="none", dry_run=True)["step"] == 0
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    after.pop(tmp_path / "runs/run/preflight.json")
    assert after == before


def out_of_memory_above(monkeypatch, windows: int, training: bool) -> list[int]:
    """Let passes of more than so many windows run out of memory; returns the numbers of windows that were tried."""
    real, sizes = CausalLMLoss.forward, []

    def forward(self, input_ids, *arguments, **options):
        if training == self.training and (len(arguments) > 1) == training:
            sizes.append(len(input_ids))
            if len(input_ids) > windows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, input_ids, *arguments, **options)

    monkeypatch.setattr(CausalLMLoss, "forward", forward)
    return sizes


def test_preflight_keeps_the_micro_batch_that_fits(run_train, tmp_path, monkeypatch, capsys):
    sizes = out_of_memory_above(monkeypatch, 2, training=True)
    run_train(**LONG)
    assert sizes == [4] + [2] * 2 * (2 + 26)
    said = (
        "memory ran out before step 1: micro-batches have 2 windows instead of 4 (the windows of a step stay the same)"
    )
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/run/preflight.json").read_text())["micro_batch_windows"] == 2
    monkeypatch.undo()
    run_train(
        **LONG, per_device_train_batch_size=2, gradient_accumulation_steps=2, run_name="b", output_dir=f"{tmp_path}/b"
    )
    assert_equal_weights(tmp_path / "brain", tmp_path / "b")


def test_preflight_keeps_the_evaluation_batch_that_fits(run_train, tmp_path, monkeypatch, capsys):
    sizes = out_of_memory_above(monkeypatch, 3, training=False)
    figures = run_train(**LONG, dry_run=True)
    assert figures["eval_batch_windows"] == 2 and [size for size in sizes if size > 1][:3] == [8, 4, 2]
    assert "memory ran out: evaluates 2 windows at a time instead of 8" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs/run").glob("[!.]*")] == ["preflight.json"]


def test_model_that_cannot_be_sampled_is_measured(run_train, monkeypatch):
    def fails(*_, **__):
        raise ValueError("this model writes nothing")

    monkeypatch.setattr(preflight, "generate", fails)
    assert run_train(**LONG, dry_run=True)["seconds"]["evaluation"] > 0


def test_evaluation_of_windows_without_a_label_is_measured(run_train, monkeypatch):
    real = preflight.evaluate

    def unlabelled(module, dataset, *rest, **options):
        dataset.without_label = Positions(numpy.arange(len(dataset.ids) - 16))
        return real(module, dataset, *rest, **options)

    monkeypatch.setattr(preflight, "evaluate", unlabelled)
    assert run_train(**LONG, dry_run=True)["seconds"]["evaluation"] > 0


def test_run_in_which_not_one_window_fits_ends_before_its_first_step(run_train, tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 0, training=True)
    with pytest.raises(RunFailed, match="not even one window fits in memory"):
        run_train(**LONG, dry_run=True)


@pytest.mark.parametrize("limit, most, dry_run", [(2, 3, False), (1, 3, True), (1, 2, False), (5, 3, True)])
def test_disk_too_small_for_all_checkpoints_is_told_before_the_first_step(
    run_train, tmp_path, monkeypatch, capsys, limit, most, dry_run
):
    """The newest and the best stay while the next is written; the run saves three times."""
    options = {**LONG, "save_total_limit": limit, "held_out_fraction": 0.1 if most == 3 else 0.0}
    figures = run_train(**options, dry_run=True, logging_dir=str(tmp_path / "dry"), output_dir=str(tmp_path / "d"))
    disk = figures["disk"]
    assert disk["checkpoints"] == most
    needed = most * disk["checkpoint_bytes"] + disk["model_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=needed - 1))
    with pytest.raises(UserError, match="make room, or keep fewer checkpoints"):
        run_train(**options, dry_run=dry_run)
    [refused] = json.loads((tmp_path / "runs/run/preflight.json").read_text())["refused"]
    assert "has room for" in refused and not (tmp_path / "brain").exists()
    assert not list((tmp_path / "runs/run").glob("checkpoints/*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=needed))
    run_train(**options)
    saved = sum(path.stat().st_size for path in (tmp_path / "runs/run/checkpoints/step-00000026").iterdir())
    published = (tmp_path / "brain/model.safetensors").stat().st_size
    assert 0.8 * saved < disk["checkpoint_bytes"] <= saved and 0.8 * published < disk["model_bytes"] <= published


def test_moments_of_every_optimizer_count_towards_the_disk(run_train, tmp_path):
    for name in ("sgd", "adafactor", "muon"):
        options = {**LONG, "optim": name, "run_name": name, "output_dir": str(tmp_path / name)}
        disk = run_train(**options, dry_run=True)["disk"]
        run_train(**options)
        folder = tmp_path / "runs" / name / "checkpoints/step-00000026"
        tensors = [
            *load_file(folder / "model.safetensors").values(),
            *load_file(folder / "optimizer.safetensors").values(),
        ]
        others = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".safetensors")
        known = disk["checkpoint_bytes"] - sum(tensor.nbytes for tensor in tensors)
        assert 0 <= known <= others


def test_resumed_run_counts_the_checkpoints_that_are_there(run_train):
    run_train(max_steps=8, save_total_limit=3)
    assert run_train(max_steps=40, extend=True, save_total_limit=3, dry_run=True)["disk"]["checkpoints"] == 3
    assert run_train(max_steps=40, extend=True, save_total_limit=1, dry_run=True)["disk"]["checkpoints"] == 1


@pytest.mark.parametrize("async_save, waits", [(False, 3), (True, 1)])
def test_time_is_that_of_steps_evaluations_samples_and_saves(async_save, waits, settings, monkeypatch):
    """By hand: 26 steps of 64 tokens; evaluations at 0, 12, 24 and 26; saves at 12, 24 and 26, and the model. In the background,
    training waits for the last save alone."""
    clock = [0.0]
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(seconds, real):
        def timed(*arguments, **options):
            result = real(*arguments, **options)
            clock[0] += seconds(arguments) if callable(seconds) else seconds
            return result

        return timed

    monkeypatch.setattr(preflight, "evaluate", takes(3.0, preflight.evaluate))
    monkeypatch.setattr(preflight, "generate", takes(1.0, preflight.generate))
    rehearsed = takes(lambda arguments: 1.5 if any(arguments[2:]) else 0.5, output.rehearse_checkpoint)
    monkeypatch.setattr(output, "rehearse_checkpoint", rehearsed)
    warm_up = iter([100.0])
    step = takes(lambda _: next(warm_up, 2.0), train_step)
    with contextlib.ExitStack() as locks:
        run = check(TrainConfig(**{**settings, **LONG, "max_new_tokens": 32, "async_save": async_save}), locks)
        state = build(run, locks)
        figures = preflight.preflight(run, state, step)
    seconds, disk = figures["seconds"], figures["disk"]
    assert seconds["training"] == pytest.approx(26 * 2.0)
    assert len(run.data.held_out) == 12 and seconds["evaluation"] == pytest.approx(4 * (3.0 * 12 / 8 + 1.0 * 32 / 16))
    largest = max(tensor.nbytes for tensor in state.model.state_dict().values())
    per_byte = 1.0 / largest
    by_hand = waits * (0.5 + per_byte * disk["checkpoint_bytes"]) + 0.5 + per_byte * disk["model_bytes"]
    assert seconds["saving"] == pytest.approx(by_hand)
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in ("training", "evaluation", "saving")))
    assert figures["tokens"] == 26 * 64 and figures["tokens_per_parameter"] == 26 * 64 / state.model.num_parameters()


def test_dry_run_counts_the_copy_of_a_save_in_the_background(run_train, monkeypatch):
    monkeypatch.setattr(preflight, "peak_memory_bytes", lambda device: 1000)
    for async_save in (False, True):
        figures = run_train(dry_run=True, async_save=async_save)
        assert figures["peak_memory_bytes"]["host"] == 1000 + async_save * figures["disk"]["checkpoint_bytes"]


def test_plan_says_time_memory_disk_and_tokens():
    figures = {
        "seconds": {"training": 124.0, "evaluation": 40.2, "saving": 9.96, "total": 174.0},
        "peak_memory_bytes": {"host": 3 << 29},
        "disk": {"checkpoints": 4, "checkpoint_bytes": 100 << 20, "model_bytes": 50 << 20, "free_bytes": 5 << 40},
        "tokens": 12_345, "tokens_per_parameter": 20.04,
    }  # fmt: skip
    assert overview.plan(figures).splitlines() == [
        "takes   about 3 min: 2 min training, 40 s evaluation, 10 s saving",
        "memory  1.5 GiB at the peak",
        "disk    450.0 MiB more at most (4 checkpoints of 100.0 MiB, the model 50.0 MiB); 5.0 TiB are free",
        "learns  from 12,345 tokens, 20 per trained parameter",
    ]
    figures["peak_memory_bytes"]["device"] = 7 << 30
    assert "memory  7.0 GiB of GPU memory, 1.5 GiB of host memory at the peak" in overview.plan(figures)
    assert [overview.about(seconds) for seconds in (0.04, 9.94, 9.96, 99.4, 100, 5960, 6000, 90_000, 200_000)] == [
        "0.0 s", "9.9 s", "10 s", "99 s", "2 min", "99 min", "1 h 40 min", "1 d 1 h", "2 d 7 h",
    ]  # fmt: skip
    assert [overview.size(count) for count in (0, 900, 1024, 1 << 20, (1 << 30) - 1, 1 << 62)] == [
        "0.0 KiB", "0.9 KiB", "1.0 KiB", "1.0 MiB", "1,024.0 MiB", "4,194,304.0 TiB",
    ]  # fmt: skip


def test_ranks_measure_together_and_train_as_without(settings, tmp_path):
    program = tmp_path / "train.py"
    program.write_text(
        "import sys\nfrom mori import preflight\npreflight.FEWEST_STEPS = int(sys.argv.pop(1))\n"
        "from mori.__main__ import run_command\nrun_command('train', 'train.py')"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    for name, fewest in (("with", 20), ("without", 100)):
        words = flags({**settings, **LONG, "run_name": name, "output_dir": tmp_path / name})
        command = list(map(str, [*torchrun, fewest, *words]))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("takes   about") == (name == "with")
    assert_equal_weights(tmp_path / "with", tmp_path / "without")
