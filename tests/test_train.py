import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STORIES, assert_equal_weights, door, flags, needs_stories, weights
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mori.train
from mori import model as models
from mori import optim
from mori.config import RunFailed, TrainConfig, UserError
from mori.monitor import Monitor, read_metrics
from mori.train import train


def test_a_run_leaves_what_is_promised(run_train, settings, tmp_path):
    summary = run_train()
    run_dir = tmp_path / "runs" / "run"
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    ledger = summary["ledger"]
    assert ledger["tokens"] == ledger["train_tokens"] + ledger["held_out_tokens"] + ledger["dropped_tokens"]
    assert ledger["dropped_tokens"] < 16 and ledger["documents"] == 1
    assert ledger["bytes"] == Path(settings["corpus"][0]).stat().st_size
    for name in ("before", "best", "after"):
        assert {"loss", "perplexity", "bits_per_byte"} <= set(summary["eval"][name])
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert summary["steps"] == 12 and summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 0
    assert summary["samples"]["before"][0].startswith("Halo") and summary["samples"]["after"][0].startswith("Halo")
    assert TrainConfig.from_json((run_dir / "config.json").read_text()).max_steps == 12
    assert json.loads((run_dir / "environment.json").read_text())["torch"] == torch.__version__
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]

    board = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    board.Reload()
    tags = {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "perf/tokens_per_second"}
    tags |= {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "perf/peak_memory_gib"}
    assert tags <= set(board.Tags()["scalars"])
    assert len(board.Tensors("samples/0/text_summary")) == 3  # at steps 0, 6 and 12
    logged = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in logged if "eval/loss" in line] == [0, 6, 12]
    shown = [event.value for event in board.Scalars("train/loss")]
    assert shown == pytest.approx([line["train/loss"] for line in logged if "train/loss" in line])


def test_the_brain_loads_with_transformers_alone(settings, tmp_path, monkeypatch):
    trained = {}
    save = models.save
    monkeypatch.setattr(models, "save", lambda model, *rest: (trained.update(model=model), save(model, *rest)))
    train(TrainConfig(**settings))
    brain = AutoModelForCausalLM.from_pretrained(tmp_path / "brain").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "brain")
    input_ids = tokenizer("Halo semua, selamat datang", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(brain(input_ids).logits, trained["model"].eval()(input_ids).logits)
    spoken = pipeline("text-generation", model=str(tmp_path / "brain"))("Halo", max_new_tokens=4)
    assert spoken[0]["generated_text"].startswith("Halo")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        f"M.from_pretrained({str(tmp_path / 'brain')!r}); T.from_pretrained({str(tmp_path / 'brain')!r})\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'mori']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_brain_before_stays_beside_the_new_one(run_train, settings, tmp_path):
    run_train(max_steps=2)
    first = weights(tmp_path / "brain")
    run_train(max_steps=3, run_name="second")
    previous = weights(tmp_path / "brain.previous")
    assert all(torch.equal(first[name], previous[name]) for name in first)
    assert not list(tmp_path.glob(".brain*"))


def test_evaluation_equals_the_models_own_loss(run_train, settings, tmp_path):
    """Transformers' own shifted mean over the held-out tokens, window by window."""
    summary = run_train(max_steps=1, learning_rate=1e-9)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    text = Path(settings["corpus"][0]).read_text()
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    held_out = ids[summary["ledger"]["train_tokens"] + summary["ledger"]["dropped_tokens"] :]
    assert len(held_out) == summary["ledger"]["held_out_tokens"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"]).eval()
    nats = 0.0
    for first in range(0, len(held_out) - 1, 16):
        window = torch.tensor([held_out[first : first + 17]])
        with torch.no_grad():
            nats += model(window, labels=window).loss.double().item() * (window.size(1) - 1)
    found = summary["eval"]["before"]
    assert found["loss"] == pytest.approx(nats / (len(held_out) - 1), rel=1e-5)
    size = len(tokenizer.decode(held_out[1:-1]).encode())
    assert found["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2.718281828459045 ** found["loss"])


def test_drawing_samples_and_evaluating_does_not_move_the_training(run_train, tmp_path):
    run_train(output_dir=str(tmp_path / "a"), run_name="a", eval_steps=1, num_return_sequences=3)
    run_train(output_dir=str(tmp_path / "b"), run_name="b", eval_steps=12, prompt=["lain sekali"])
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_and_resumes_on_the_cpu(run_train, tmp_path, precision):
    """The scaler's state counts too: an injected overflow before the checkpoint makes it differ from a fresh one."""
    options = {"precision": precision, "gradient_accumulation_steps": 2, "logging_steps": 5}
    summary = run_train(**options, output_dir=str(tmp_path / "whole"), run_name="whole")
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    _stop_after(7, lambda: run_train(**options))
    run_train(**options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    whole, resumed = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "run"))
    numbers = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
    assert [[line.get(n) for n in numbers] for line in whole] == [[line.get(n) for n in numbers] for line in resumed]


class Stop(Exception):
    """Stands for a power cut."""


def _stop_after(step: int, run) -> None:
    """Run until `step` optimizer steps are begun, and break off in the middle of the next."""
    taken, real = [], optim.set_learning_rate

    def counted(*arguments):
        taken.append(1)
        if len(taken) > step:
            raise Stop
        real(*arguments)

    optim.set_learning_rate = counted
    try:
        with pytest.raises(Stop):
            run()
    finally:
        optim.set_learning_rate = real


def test_fp16_overflow_is_skipped_and_the_scale_is_restored(run_train, settings, tmp_path, monkeypatch):
    """A scale so large that the first steps overflow: they are skipped, and resuming remembers the smaller scale."""
    from mori.runtime import Runtime

    scalers = []

    def large(self):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**40))
        return scalers[-1]

    monkeypatch.setattr(Runtime, "grad_scaler", large)
    options = {"precision": "fp16", "max_nonfinite_steps": 40, "max_steps": 40, "save_steps": 35}
    _stop_after(36, lambda: run_train(**options))
    lowered = scalers[0].get_scale()
    assert lowered < 2.0**40
    summary = run_train(**options)
    assert scalers[1].get_scale() <= lowered
    assert 0 < summary["skipped_steps"] < 40
    assert all(value.isfinite().all() for value in weights(tmp_path / "brain").values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_that_are_never_finite_stop_the_run_and_spoil_nothing(run_train, tmp_path, monkeypatch, precision):
    real, calls = models.cross_entropy_sum, []

    def poisoned(logits, labels):
        calls.append(torch.is_grad_enabled())
        loss = real(logits, labels)
        return loss * torch.nan if sum(calls) > 5 else loss

    monkeypatch.setattr(models, "cross_entropy_sum", poisoned)
    with pytest.raises(RunFailed, match="3 steps in a row, up to step 8.*loss nan"):
        run_train(precision=precision, max_nonfinite_steps=3, eval_steps=100, save_steps=1)
    logged = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert logged[-1]["train/skipped_steps"] == 3 and logged[-1]["train/loss"] != logged[-1]["train/loss"]
    from safetensors.torch import load_file

    for path in (tmp_path / "runs" / "run" / "checkpoints").glob("*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert not (tmp_path / "brain").exists()


def first_gradient(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The gradient of the first step in float64, as the loop itself makes it, read just before the update."""
    real_load, real_skip, found = models.load_model, optim.skip_unless_finite, {}

    def load(*arguments):
        found["model"] = real_load(*arguments).double()
        return found["model"]

    def skip(optimizer, grad_norm):
        found.setdefault("gradient", {n: p.grad.clone() for n, p in found["model"].named_parameters()})
        return real_skip(optimizer, grad_norm)

    models.load_model, optim.skip_unless_finite = load, skip
    try:
        train(config)
    finally:
        models.load_model, optim.skip_unless_finite = real_load, real_skip
    return found["gradient"]


LAYOUTS = {"1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}


@pytest.mark.parametrize("windows", [8, 7, 5])
def test_accumulation_gives_the_gradient_of_the_whole_step(settings, tmp_path, windows):
    """8 windows in four layouts, and a short group of 7 and 5; the whole in one batch is the measure."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    text = Path(settings["corpus"][0]).read_text()
    ids = tokenizer(text)["input_ids"][: windows * 16 + 1 + 17 - 1]
    (tmp_path / "short.txt").write_text(tokenizer.decode(ids))
    gradients = {}
    for name, (batch_size, accumulation) in {"whole": (windows, 1), **LAYOUTS}.items():
        changed = {
            "corpus": [str(tmp_path / "short.txt")], "held_out_fraction": 0.01, "dropout": 0.0, "max_grad_norm": 0.0,
            "max_steps": 1, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
            "run_name": name,
        }  # fmt: skip
        gradients[name] = first_gradient(TrainConfig(**{**settings, **changed}))
    for name in LAYOUTS:
        for parameter, expected in gradients["whole"].items():
            difference = (gradients[name][parameter] - expected).norm() / expected.norm()
            assert difference < 1e-12, (name, parameter)


def test_two_processes_give_the_gradient_of_one(settings, tmp_path):
    script = (
        "import sys, torch; sys.path.insert(0, 'tests'); from test_train import first_gradient\n"
        "from mori.config import TrainConfig\n"
        "from safetensors.torch import save_file; import os\n"
        "g = first_gradient(TrainConfig.from_json(open(sys.argv[1]).read()))\n"
        "save_file(g, sys.argv[2] + os.environ['RANK'])\n"
    )
    (tmp_path / "script.py").write_text(script)
    from safetensors.torch import load_file

    changed = {"dropout": 0.0, "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": 8}
    expected = first_gradient(TrainConfig(**{**settings, **changed}))
    for batch_size, accumulation in ((1, 4), (2, 2), (4, 1)):
        layout = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        config = TrainConfig(**{**settings, **changed, **layout, "run_name": f"two-{batch_size}"})
        (tmp_path / "config.json").write_text(config.to_json())
        command = ["torchrun", "--nproc-per-node=2", "--master-port=0", "--standalone", str(tmp_path / "script.py")]
        command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
        command += [str(tmp_path / "config.json"), str(tmp_path / "gradient")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        for rank in "01":
            found = load_file(tmp_path / f"gradient{rank}")
            for name, value in expected.items():
                assert (found[name] - value).norm() / value.norm() < 1e-12, (batch_size, rank, name)


def test_torchrun_trains_resumes_and_speaks_once(settings, tmp_path):
    """An epoch of two ranks ends with a step in which one rank has nothing left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "scripts/train.py"]
    for name, killed in (("whole", False), ("run", True)):
        brain = str(tmp_path / f"brain-{name}")
        words = flags({**settings, "num_train_epochs": 2, "run_name": name, "output_dir": brain, "max_steps": -1})
        command = torchrun + words + ["--save_steps", "3"]
        if killed:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _wait_for(tmp_path / "runs" / name / "checkpoints" / "step-00000003" / "manifest.json", process)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, workers)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("reads ") == 1 and ("\nresumes " in done.stdout) == killed
    assert_equal_weights(tmp_path / "brain-whole", tmp_path / "brain-run")


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its checkpoint"
        time.sleep(0.005)


def test_killed_and_started_again_it_ends_with_the_same_weights(settings, tmp_path):
    """SIGKILL after a checkpoint; dropout on, accumulation 2, a save that falls between two log lines."""
    words = flags({**settings, "gradient_accumulation_steps": 2, "max_steps": 40, "save_steps": 7, "logging_steps": 5})
    whole = door("train.py", *words, "--run_name", "whole", "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for checkpoint in ("step-00000007", "step-00000021"):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(tmp_path / "runs" / "run" / "checkpoints" / checkpoint / "manifest.json", process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = door("train.py", *words)
    assert done.returncode == 0 and "\nresumes " in done.stdout, done.stderr
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    both = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "run")]
    losses = [[(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] for lines in both]
    assert losses[0] == losses[1]


def test_a_finished_run_is_not_trained_again(run_train, tmp_path, capsys):
    first = run_train()
    made_at = (tmp_path / "brain").stat().st_mtime_ns
    assert run_train() == json.loads(json.dumps(first))
    assert "is finished (12 steps)" in capsys.readouterr().out
    assert (tmp_path / "brain").stat().st_mtime_ns == made_at and not (tmp_path / "brain.previous").exists()


def test_killed_before_the_brain_was_written_it_is_written(run_train, tmp_path, monkeypatch):
    def cut(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(models, "save", cut)
        with pytest.raises(Stop):
            run_train()
    first = json.loads(json.dumps(run_train()))
    assert (tmp_path / "brain" / "config.json").exists()
    whole = run_train(run_name="whole", output_dir=str(tmp_path / "whole"))
    assert first["eval"] == whole["eval"] and first["samples"] == whole["samples"]
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


def test_a_run_with_other_settings_is_not_resumed(run_train, text_file, tmp_path):
    run_train(max_steps=4)
    with pytest.raises(UserError, match=r"learning_rate \(0.001, 0.002\)"):
        run_train(max_steps=4, learning_rate=2e-3)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + " lain")
    with pytest.raises(UserError, match="corpus_sha256"):
        run_train(max_steps=4, corpus=[str(other)])
    run_train(max_steps=4, learning_rate=2e-3, resume_from_checkpoint="none")
    assert (tmp_path / "runs" / "run.1" / "summary.json").exists()  # the old run is set aside


def test_a_run_is_extended_to_a_new_length_only_when_asked(run_train, tmp_path, monkeypatch):
    run_train(max_steps=4, lr_scheduler_type="constant")
    with pytest.raises(UserError, match=r"max_steps \(4, 8\).*--extend"):
        run_train(max_steps=8, lr_scheduler_type="constant")
    with pytest.raises(UserError, match=r"learning_rate \(0.001, 0.002\)"):
        run_train(max_steps=8, lr_scheduler_type="constant", learning_rate=2e-3, extend=True)
    with pytest.raises(UserError, match="has done 4 steps already"):
        run_train(max_steps=3, lr_scheduler_type="constant", extend=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        run_train(run_name="new", extend=True)
    # A constant learning rate does not know how long the run is: extended, it is the run that was as long from the start.
    run_train(max_steps=8, lr_scheduler_type="constant", extend=True)
    run_train(max_steps=8, lr_scheduler_type="constant", run_name="long", output_dir=str(tmp_path / "long"))
    assert_equal_weights(tmp_path / "brain", tmp_path / "long")
    assert run_train(max_steps=8, lr_scheduler_type="constant")["steps"] == 8  # its length is 8 now


def test_an_extended_run_goes_on_along_the_schedule_of_its_new_length(run_train, tmp_path):
    run_train(max_steps=4)
    run_train(max_steps=8, extend=True)
    rates = [
        line["train/learning_rate"]
        for line in read_metrics(tmp_path / "runs/run/metrics.jsonl")
        if "train/loss" in line
    ]
    assert rates == pytest.approx([1e-3 * x for x in (1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])


def test_memory_that_runs_out_is_remembered(run_train, tmp_path, monkeypatch, capsys):
    real, sizes = models.CausalLMLoss.forward, []

    def forward(self, input_ids, labels, n_targets=None):
        if n_targets is not None:
            sizes.append(len(input_ids))
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, input_ids, labels, n_targets)

    monkeypatch.setattr(models.CausalLMLoss, "forward", forward)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 8}
    _stop_after(4, lambda: run_train(**options))
    assert sizes == [4] + [2] * 10  # the step that is broken off among them
    assert "step 1: memory ran out" in capsys.readouterr().out
    sizes.clear()
    run_train(**options)
    assert sizes == [2] * 8  # 4 is not tried again
    monkeypatch.undo()
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run_train(**options, run_name="small", output_dir=str(tmp_path / "small"))
    assert_equal_weights(tmp_path / "small", tmp_path / "brain")


def test_where_not_even_one_window_fits_it_says_so(run_train, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(models.CausalLMLoss, "forward", forward)
    with pytest.raises(RunFailed, match="not even one window fits"):
        run_train()


def test_the_failed_pass_is_let_go_before_the_step_is_done_again(run_train, monkeypatch):
    real, kept, alive = models.CausalLMLoss.forward, [], []

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def forward(self, input_ids, labels, n_targets=None):
        if n_targets is None:
            return real(self, input_ids, labels)
        if kept:
            alive.append(kept[0]() is not None)
        loss = real(self, input_ids, labels, n_targets)
        if len(input_ids) > 2:
            hidden = loss * 1  # stands for all that the failed pass holds
            kept.append(weakref.ref(hidden))
            loss = hidden * 1
            loss.register_hook(full)
            loss.hidden = hidden
        return loss

    monkeypatch.setattr(models.CausalLMLoss, "forward", forward)
    run_train(per_device_train_batch_size=4, max_steps=1)
    assert alive and not any(alive)


def test_a_run_that_was_extended_and_stopped_is_not_taken_for_finished(run_train, tmp_path, monkeypatch):
    run_train(max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(mori.train, "_publish", lambda *_: (_ for _ in ()).throw(RunFailed("no room")))
        with pytest.raises(RunFailed):
            run_train(max_steps=8, extend=True)
    assert run_train(max_steps=8)["steps"] == 8
    run_train(max_steps=4, run_name="first", output_dir=str(tmp_path / "first"))
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in ("brain", "first")))


def test_what_was_asked_of_the_first_start_is_not_asked_of_a_restart(run_train, tmp_path, monkeypatch):
    _stop_after(6, run_train)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_train(resume_from_checkpoint="none")
    assert not (tmp_path / "runs" / "run.1").exists()


def test_what_could_not_be_saved_is_no_interruption_but_a_failure(run_train, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mori.train.checkpoint, "save", full)
    real = optim.set_learning_rate
    monkeypatch.setattr(optim, "set_learning_rate", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), real(*a)))
    with pytest.raises(RunFailed, match="stopped by SIGTERM, NOT saved at step 1"):
        run_train()


def test_a_run_that_only_skips_is_stopped_between_the_logs_too(run_train, tmp_path, monkeypatch):
    real = models.CausalLMLoss.forward

    def forward(self, input_ids, labels, n_targets=None):
        loss = real(self, input_ids, labels, n_targets)
        return loss if n_targets is None else loss * torch.nan

    monkeypatch.setattr(models.CausalLMLoss, "forward", forward)
    with pytest.raises(RunFailed, match="in 3 steps in a row, up to step 3 .*the loss, on the training windows"):
        run_train(max_nonfinite_steps=3, logging_steps=1000, max_steps=20)
    [line] = [line for line in read_metrics(tmp_path / "runs/run/metrics.jsonl") if "train/loss" in line]
    assert line["step"] == 3 and line["train/loss"] != line["train/loss"]  # the real figure, not 0


def test_a_prune_that_fails_is_no_failed_save(run_train, tmp_path, capsys, monkeypatch):
    def busy(*_):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(mori.train.checkpoint, "prune", busy)
    run_train()
    assert "an old checkpoint is left" in capsys.readouterr().out
    assert len(list((tmp_path / "runs/run/checkpoints").iterdir())) == 3


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_norm_that_overflows_is_skipped_under_a_scaler_too(
    run_train, small_model, tmp_path, monkeypatch, max_grad_norm
):
    """Gradients of 1e30 are finite, their norm is not."""
    real = models.CausalLMLoss.forward

    def forward(self, input_ids, labels, n_targets=None):
        loss = real(self, input_ids, labels, n_targets)
        if n_targets is not None:
            for parameter in self.parameters():
                parameter.register_hook(lambda grad: torch.full_like(grad, 1e30))
        return loss

    monkeypatch.setattr(models.CausalLMLoss, "forward", forward)
    with pytest.raises(RunFailed, match="3 steps in a row"):
        run_train(precision="fp16", max_grad_norm=max_grad_norm, max_nonfinite_steps=3, save_steps=1)
    start = AutoModelForCausalLM.from_pretrained(small_model).state_dict()
    for folder in (tmp_path / "runs/run/checkpoints").iterdir():
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert torch.equal(tensor, start[name]), name


def test_an_error_that_is_not_about_memory_is_not_swallowed(run_train, monkeypatch):
    def forward(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(models.CausalLMLoss, "forward", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        run_train()


def test_a_log_that_a_kill_cut_short_is_mended(run_train, tmp_path):
    _stop_after(6, run_train)
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    with path.open("a") as lines:
        lines.write('{"step": 6, "train/lo')
    run_train()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines() if "train/loss" in line]
    assert steps == list(range(1, 13))


def test_an_attempt_that_was_killed_before_its_first_checkpoint_leaves_no_lines(run_train, tmp_path):
    _stop_after(2, lambda: run_train(save_steps=100))
    run_train()
    logged = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [line["step"] for line in logged if "eval/loss" in line] == [0, 6, 12]
    board = EventAccumulator(str(tmp_path / "runs" / "run"))
    board.Reload()
    assert [event.step for event in board.Scalars("eval/loss")] == [0, 6, 12]


def test_a_checkpoint_can_be_named(run_train, tmp_path):
    run_train(save_total_limit=9)
    named = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    run_train(run_name="from4", output_dir=str(tmp_path / "from4"), resume_from_checkpoint=str(named))
    assert_equal_weights(tmp_path / "brain", tmp_path / "from4")
    with pytest.raises(UserError, match="not a folder"):
        run_train(resume_from_checkpoint=str(tmp_path / "none"))


def test_the_best_checkpoint_is_kept(run_train, tmp_path):
    """A learning rate that rises until it is far too high makes an early evaluation the best; one newer checkpoint may stay."""
    summary = run_train(
        max_steps=12, save_steps=2, eval_steps=2, learning_rate=2.0, save_total_limit=1, warmup_steps=12
    )
    best = summary["eval"]["best"]["step"]
    assert best < 12
    kept = sorted(p.name for p in (tmp_path / "runs" / "run" / "checkpoints").iterdir())
    assert kept == sorted({f"step-{step:08d}" for step in (best, 12) if step})


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"corpus": ["no/such.txt"]}, "does not exist"),
        ({"model": "./no-such-model"}, "does not exist"),
        ({"model": "no-such-model"}, "no preset"),
        ({"block_size": 65}, "longer than the model's context of 64"),
        ({"block_size": 64, "held_out_fraction": 0.99}, "needs at least"),
        ({"output_dir": __file__}, "is a file"),
        ({"logging_dir": __file__ + "/runs"}, "Not a directory"),
        ({"prompt": ["halo semua " * 40]}, "context is 64"),
        ({"device": "cuda:77"}, "does not exist"),
        ({"block_size": 0, "seed": -1}, "block_size.*seed"),
    ],
)
def test_mistakes_leave_nothing_behind(run_train, tmp_path, changed, named):
    with pytest.raises(UserError, match=named) as error:
        run_train(**changed)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "run").exists() and not (tmp_path / "brain").exists()


def test_ids_beyond_the_embedding_are_refused(run_train, small_model, tmp_path):
    cropped = AutoModelForCausalLM.from_pretrained(small_model)
    cropped.resize_token_embeddings(100)
    cropped.save_pretrained(tmp_path / "cropped")
    AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "cropped")
    with pytest.raises(UserError, match=r"token id \d+, but the model has embeddings for 100"):
        run_train(model=str(tmp_path / "cropped"))


def test_what_is_no_model_is_not_replaced(run_train, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no model and would be replaced"):
        run_train(output_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", [".", "..", "runs/run", "runs", "runs/run/checkpoints/x"])
def test_the_model_does_not_go_where_other_things_are(run_train, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="output_dir"):
        run_train(output_dir=name)


def test_a_link_is_written_through(run_train, tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big-disk" / "brain")
    run_train(max_steps=2, output_dir=str(tmp_path / "link"))
    assert (tmp_path / "big-disk" / "brain" / "config.json").is_file() and (tmp_path / "link").is_symlink()


def test_a_finished_run_whose_model_was_replaced_puts_its_own_back(run_train, tmp_path):
    run_train(max_steps=2, run_name="a")
    first = weights(tmp_path / "brain")
    run_train(max_steps=3, run_name="b")
    run_train(max_steps=2, run_name="a")
    again = weights(tmp_path / "brain")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weights_that_are_missing_are_not_made_up(run_train, small_model, tmp_path):
    from safetensors.torch import load_file, save_file

    for name, change in (
        ("renamed", lambda tensors: {f"x.{k}": v for k, v in tensors.items()}),
        ("fewer", lambda tensors: {k: v for k, v in tensors.items() if ".h.1." not in k}),
        (
            "smaller",
            lambda tensors: {k: v[:, :8].contiguous() if "attn.c_attn.weight" in k else v for k, v in tensors.items()},
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for path in small_model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        save_file(change(load_file(small_model / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="does not hold all its weights"):
            run_train(model=str(folder))


def test_two_runs_do_not_share_a_folder(run_train, tmp_path):
    from mori.prepare import lock

    run_train(max_steps=2)
    with lock(tmp_path / "runs" / "run"):
        for how in ("auto", "none"):
            with pytest.raises(UserError, match="another process is writing"):
                run_train(max_steps=2, output_dir=str(tmp_path / "other"), resume_from_checkpoint=how)
    assert not (tmp_path / "runs" / "run.1").exists()


def test_a_mistake_does_not_set_the_old_run_aside(run_train, small_model, tmp_path):
    run_train(max_steps=2)
    with pytest.raises(UserError):
        run_train(model=str(tmp_path / "none"), resume_from_checkpoint="none")
    assert (tmp_path / "runs" / "run").exists() and not (tmp_path / "runs" / "run.1").exists()


def test_going_back_in_a_run_is_refused(run_train, tmp_path):
    run_train(save_total_limit=9)
    with pytest.raises(UserError, match="has gone on to step-00000012"):
        run_train(resume_from_checkpoint=str(tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"))


def test_a_model_that_diverges_is_trained_to_the_end_or_stopped_in_one_line(run_train, tmp_path):
    try:
        summary = run_train(learning_rate=1e30, max_grad_norm=0.0)
    except RunFailed:
        return
    assert summary["skipped_steps"] > 0 and "no sample" in summary["samples"]["after"][0]


def test_nobody_reads_any_more_and_the_training_goes_on(settings, tmp_path):
    words = " ".join(flags({**settings, "prompt": "Halo"}))
    shell = f"set -o pipefail; {sys.executable} {ROOT}/scripts/train.py {words} | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "brain" / "config.json").exists(), done.stderr


def test_a_broken_model_folder_is_one_line(run_train, small_model, tmp_path):
    broken = [("config.json", "{"), ("config.json", "[]"), ("config.json", '{"model_type": "gpt2", "n_embd": "abc"}')]
    broken += [("model.safetensors", "junk"), ("tokenizer.json", "{}"), ("tokenizer.json", "[]")]
    for number, (name, content) in enumerate(broken):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in small_model.iterdir():
            (folder / path.name).write_bytes(content.encode() if path.name == name else path.read_bytes())
        with pytest.raises(UserError, match="cannot load model") as error:
            run_train(model=str(folder))
        assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_does_not_stop_the_training(run_train, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mori.train.checkpoint.os, "write", full)
    monkeypatch.setattr(mori.train.checkpoint, "write_json", lambda *_: None)
    with pytest.raises(RunFailed, match="last checkpoint could not be saved"):
        run_train(max_steps=4, save_steps=2)
    said = capsys.readouterr().out
    for step in (2, 4):  # the next save tries again
        assert f"WARNING: no checkpoint at step {step}: {tmp_path}/runs/run/checkpoints: No space left" in said
    assert re.search(r"it needs 0\.\d MiB", said) and "MiB are free" in said
    assert not list((tmp_path / "runs" / "run" / "checkpoints").iterdir())
    monkeypatch.undo()
    first = weights(tmp_path / "brain")
    run_train(max_steps=4, save_steps=2)  # with room again, it begins anew, and ends alike
    assert all(torch.equal(value, first[name]) for name, value in weights(tmp_path / "brain").items())


def test_a_log_that_cannot_be_written_does_not_stop_the_training(run_train, tmp_path, capsys, monkeypatch):
    """For a while the log's folder is gone: each write fails, is told once, and is tried again."""
    real, calls = Monitor.scalars, []

    def scalars(self, *arguments):
        calls.append(1)
        here = tmp_path / ("gone" if 3 <= len(calls) < 6 else "runs/run") / "metrics.jsonl"
        self._path = here
        real(self, *arguments)

    monkeypatch.setattr(Monitor, "scalars", scalars)
    run_train(eval_steps=100)
    assert capsys.readouterr().out.count("cannot be written") == 1
    steps = [line["step"] for line in read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")]
    assert steps == [0, 1, *range(5, 13), 12]


def test_a_weight_that_is_not_finite_is_never_published(run_train, tmp_path, capsys, monkeypatch):
    real, calls = optim.set_learning_rate, []

    def poison(optimizer, value):
        calls.append(1)
        if len(calls) == 6:
            optimizer.param_groups[0]["params"][0].data[0, 0] = torch.nan
        real(optimizer, value)

    monkeypatch.setattr(optim, "set_learning_rate", poison)
    with pytest.raises(RunFailed, match="tensors are not finite"):
        run_train(max_steps=12, save_steps=4, eval_steps=100)
    assert not (tmp_path / "brain").exists()
    assert "is not finite" in capsys.readouterr().out
    kept = [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000004"]


def test_the_preset_learns_its_own_tokenizer(settings, tmp_path):
    del settings["model"], settings["learning_rate"]
    summary = train(TrainConfig(**{**settings, "max_steps": 2}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "brain")
    text = Path(settings["corpus"][0]).read_text()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) + 1 == summary["ledger"]["tokens"]


@needs_stories
def test_a_pretrained_model_starts_far_better_than_a_random_one(run_train, tmp_path):
    """On its own kind of text, 260K parameters that were trained know far more than ln(512) = 6.24 nats."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 30
    (tmp_path / "story.txt").write_text(story)
    summary = run_train(model=str(STORIES), corpus=[str(tmp_path / "story.txt")], block_size=64, max_steps=6)
    assert summary["eval"]["before"]["loss"] < 3.0
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
