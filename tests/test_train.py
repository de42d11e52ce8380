import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    STORIES,
    assert_equal_weights,
    needs_stories,
    stop_after,
    weights,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mori
from mori import optim
from mori.cli import UserError
from mori.config import TrainConfig
from mori.distributed import Runtime
from mori.model import lm, loading, saving
from mori.tracking.loggers import read_metrics
from mori.train import train


def test_train_writes_summary_metrics_events_and_checkpoints(run_train, settings, tmp_path):
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
    assert TrainConfig(**json.loads((run_dir / "config.json").read_text())).max_steps == 12
    assert json.loads((run_dir / "environment.json").read_text())["torch"] == torch.__version__
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]

    board = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    board.Reload()
    tags = {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "perf/tokens_per_second"}
    tags |= {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "perf/peak_memory_gib", "perf/data_wait", "perf/mfu"}
    assert tags <= set(board.Tags()["scalars"])
    assert len(board.Tensors("samples/0/text_summary")) == 3  # at steps 0, 6 and 12
    logged = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in logged if "eval/loss" in line] == [0, 6, 12]
    assert all(0 <= line["perf/data_wait"] < 1 and line["perf/mfu"] > 0 for line in logged if "train/loss" in line)
    shown = [event.value for event in board.Scalars("train/loss")]
    assert shown == pytest.approx([line["train/loss"] for line in logged if "train/loss" in line])


def test_train_publishes_a_model_that_loads_without_mori(settings, tmp_path, monkeypatch):
    trained = {}
    save = saving.save
    monkeypatch.setattr(
        saving,
        "save",
        lambda model, *rest, **options: (trained.update(model=model), save(model, *rest, **options)),
    )
    train(TrainConfig(**settings, fused_activations=False))  # PyTorch's GELU may round the last bit otherwise
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


def test_train_keeps_the_previous_model(run_train, settings, tmp_path):
    run_train(max_steps=2)
    first = weights(tmp_path / "brain")
    run_train(max_steps=3, run_name="second")
    previous = weights(tmp_path / "brain.previous")
    assert all(torch.equal(first[name], previous[name]) for name in first)
    assert not list(tmp_path.glob(".brain*"))


def test_evaluate_equals_the_loss_of_transformers(run_train, settings, tmp_path):
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


def test_train_weights_do_not_depend_on_evaluations_and_samples(run_train, tmp_path):
    run_train(output_dir=str(tmp_path / "a"), run_name="a", eval_steps=1, num_return_sequences=3)
    run_train(output_dir=str(tmp_path / "b"), run_name="b", eval_steps=12, prompt=["lain sekali"])
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


def test_train_without_evaluation_at_the_start_gives_the_same_weights(run_train, tmp_path, capsys):
    run_train(output_dir=str(tmp_path / "a"), run_name="a")
    summary = run_train(output_dir=str(tmp_path / "b"), run_name="b", eval_on_start=False)
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert summary["eval"]["before"] is None and summary["samples"]["before"] == []
    logged = read_metrics(tmp_path / "runs" / "b" / "metrics.jsonl")
    assert [line["step"] for line in logged if "eval/loss" in line] == [6, 12]
    assert f"held-out loss {summary['eval']['after']['loss']:.4f} (best" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_resumes_in_every_precision(run_train, tmp_path, precision):
    """The scaler's state counts too: an injected overflow before the checkpoint makes it differ from a fresh one."""
    options = {"precision": precision, "gradient_accumulation_steps": 2, "logging_steps": 5}
    summary = run_train(**options, output_dir=str(tmp_path / "whole"), run_name="whole")
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    stop_after(7, lambda: run_train(**options))
    run_train(**options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    whole, resumed = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("whole", "run"))
    numbers = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
    assert [[line.get(n) for n in numbers] for line in whole] == [[line.get(n) for n in numbers] for line in resumed]


def test_train_in_fp16_moves_the_loss_scale_alike_with_chunked_and_whole_loss(run_train, tmp_path, monkeypatch):
    """Growth and back-off follow the overflows, which the chunked loss must meet at the same steps."""
    scalers, of_runs = [], []

    def quick(self):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4))
        return scalers[-1]

    monkeypatch.setattr(Runtime, "grad_scaler", quick)
    losses, skipped_steps = [], []
    for chunked in (True, False):
        scalers.clear()
        run_train(precision="fp16", max_steps=24, run_name=f"{chunked}", chunked_loss=chunked, logging_steps=1)
        of_runs.append(scalers[0].state_dict())  # the next one belongs to the preflight
        lines = [
            line for line in read_metrics(tmp_path / "runs" / f"{chunked}" / "metrics.jsonl") if "train/loss" in line
        ]
        losses.append(torch.tensor([line["train/loss"] for line in lines]))
        skipped_steps.append([line["train/skipped_steps"] for line in lines])
    assert skipped_steps[0] == skipped_steps[1] and 0 < skipped_steps[0][-1] < 20
    assert of_runs[0] == of_runs[1]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_train_in_fp16_computes_the_gradients_at_the_size_of_the_scaled_loss(run_train, monkeypatch):
    """The scale divided by the labels of the step: 2 micro-batches of 4 windows of 16 tokens."""
    scales, chunked = [], lm.chunked_cross_entropy_sum

    def record(hidden, head, labels, grad_scale=None, *rest):
        scales.append(grad_scale)
        return chunked(hidden, head, labels, grad_scale, *rest)

    monkeypatch.setattr(lm, "chunked_cross_entropy_sum", record)
    run_train(precision="fp16", max_steps=1, gradient_accumulation_steps=2, eval_on_start=False)
    assert [scale.item() for scale in scales if scale is not None] == [65536 / (2 * 4 * 16)] * 2
    scales.clear()
    run_train(precision="bf16", max_steps=1, run_name="bf16")
    assert scales and scales == [None] * len(scales)


def test_train_skips_fp16_overflow_and_restores_the_scale(run_train, settings, tmp_path, monkeypatch):
    """A scale so large that the first steps overflow: they are skipped, and resuming remembers the smaller scale."""
    scalers = []

    def large(self):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**40))
        return scalers[-1]

    monkeypatch.setattr(Runtime, "grad_scaler", large)
    options = {"precision": "fp16", "max_nonfinite_steps": 40, "max_steps": 40, "save_steps": 35}
    stop_after(36, lambda: run_train(**options))
    lowered = scalers[0].get_scale()
    assert lowered < 2.0**40
    scalers.clear()
    summary = run_train(**options)
    assert scalers[0].get_scale() <= lowered
    assert 0 < summary["skipped_steps"] < 40
    assert all(value.isfinite().all() for value in weights(tmp_path / "brain").values())


def first_gradient(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The gradient of the first step in float64, as the loop itself makes it, read just before the update."""
    load_model, step_if_finite, gradients = loading.load_model, optim.step_if_finite, {}

    def load(*arguments):
        gradients["model"] = load_model(*arguments).double()
        return gradients["model"]

    def step(optimizer, grad_norm):
        gradients.setdefault("first", {n: p.grad.clone() for n, p in gradients["model"].named_parameters()})
        return step_if_finite(optimizer, grad_norm)

    loading.load_model, optim.step_if_finite = load, step
    try:
        train(config)
    finally:
        loading.load_model, optim.step_if_finite = load_model, step_if_finite
    return gradients["first"]


LAYOUTS = {"1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}


@pytest.mark.parametrize("windows", [8, 7, 5])
def test_accumulated_gradients_equal_those_of_the_whole_step(settings, tmp_path, windows):
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


def test_gradients_of_two_ranks_equal_those_of_one(settings, tmp_path):
    script = (
        "import json, sys, torch; sys.path.insert(0, 'tests'); from test_train import first_gradient\n"
        "from mori.config import TrainConfig\n"
        "from safetensors.torch import save_file; import os\n"
        "g = first_gradient(TrainConfig(**json.load(open(sys.argv[1]))))\n"
        "save_file(g, sys.argv[2] + os.environ['RANK'])\n"
    )
    (tmp_path / "script.py").write_text(script)

    changed = {"dropout": 0.0, "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": 8}
    expected = first_gradient(TrainConfig(**{**settings, **changed}))
    for batch_size, accumulation in ((1, 4), (2, 2), (4, 1)):
        layout = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        config = TrainConfig(**{**settings, **changed, **layout, "run_name": f"two-{batch_size}"})
        (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
        command = ["torchrun", "--nproc-per-node=2", "--master-port=0", "--standalone", str(tmp_path / "script.py")]
        command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
        command += [str(tmp_path / "config.json"), str(tmp_path / "gradient")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        for rank in "01":
            found = load_file(tmp_path / f"gradient{rank}")
            for name, value in expected.items():
                assert (found[name] - value).norm() / value.norm() < 1e-12, (batch_size, rank, name)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"corpus": ["no/such.txt"]}, "does not exist"),
        ({"corpus": ["~nobody-of-that-name/a.txt"]}, "does not exist"),
        ({"model": "~nobody-of-that-name/model"}, "does not exist"),
        ({"model": "./no-such-model"}, "does not exist"),
        ({"model": "no-such-model"}, "no preset"),
        ({"block_size": 65}, "longer than the model's context of 64"),
        ({"block_size": 64, "held_out_fraction": 0.99}, "needs at least"),
        ({"output_dir": __file__}, "is a file"),
        ({"logging_dir": __file__ + "/runs"}, "Not a directory"),
        ({"prompt": ["halo semua " * 40]}, "context is 64"),
        ({"device": "cuda:77"}, "does not exist"),
        ({"dtype": "bfloat16", "precision": "fp32"}, "needs bf16 arithmetic"),
        ({"dtype": "bfloat16", "optim": "adamw_bnb_8bit"}, "does not round stochastically"),
        ({"block_size": 0, "seed": -1}, "block_size.*seed"),
    ],
)
def test_train_writes_nothing_after_a_mistake(run_train, tmp_path, changed, named):
    with pytest.raises(UserError, match=named) as error:
        run_train(**changed)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "run").exists() and not (tmp_path / "brain").exists()


def test_train_refuses_ids_beyond_the_embedding(run_train, small_model, tmp_path):
    cropped = AutoModelForCausalLM.from_pretrained(small_model)
    cropped.resize_token_embeddings(100)
    cropped.save_pretrained(tmp_path / "cropped")
    AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "cropped")
    with pytest.raises(UserError, match=r"token id \d+, but the model has embeddings for 100"):
        run_train(model=str(tmp_path / "cropped"))


def test_train_does_not_replace_a_folder_that_is_not_a_model(run_train, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a model and would be replaced"):
        run_train(output_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", [".", "..", "runs/run", "runs", "runs/run/checkpoints/x"])
def test_train_refuses_an_output_dir_with_other_things(run_train, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="output_dir"):
        run_train(output_dir=name)


def test_train_writes_through_a_link(run_train, tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big-disk" / "brain")
    run_train(max_steps=2, output_dir=str(tmp_path / "link"))
    assert (tmp_path / "big-disk" / "brain" / "config.json").is_file() and (tmp_path / "link").is_symlink()


def test_load_model_refuses_missing_weights(run_train, small_model, tmp_path):
    from safetensors.torch import save_file

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


def test_train_reports_a_broken_model_folder_in_one_line(run_train, small_model, tmp_path):
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


def test_train_preset_learns_a_tokenizer(settings, tmp_path):
    del settings["model"], settings["learning_rate"]
    summary = train(TrainConfig(**{**settings, "max_steps": 2}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "brain")
    text = Path(settings["corpus"][0]).read_text()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) + 1 == summary["ledger"]["tokens"]


@needs_stories
def test_train_starts_from_pretrained_weights(run_train, tmp_path):
    """On its own kind of text, 260K parameters that were trained know far more than ln(512) = 6.24 nats."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 30
    (tmp_path / "story.txt").write_text(story)
    summary = run_train(model=str(STORIES), corpus=[str(tmp_path / "story.txt")], block_size=64, max_steps=6)
    assert summary["eval"]["before"]["loss"] < 3.0
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_move_copies_weights_out_of_the_file(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")  # what other tests have loaded may be mapped still

    def is_mapped() -> bool:
        return f"{folder}/model.safetensors" in Path("/proc/self/maps").read_text()

    tokenizer = loading.load_tokenizer(str(folder), ())
    model = loading.load_model(str(folder), loading.load_config(str(folder), tokenizer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert is_mapped()
    model = loading.move(model, torch.device("cpu"))
    assert not is_mapped()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied as they were


def test_folder_whose_name_is_not_utf8_is_refused_before_the_run(run_train, tmp_path):
    with pytest.raises(UserError, match="is not UTF-8"):
        run_train(output_dir=str(tmp_path / "caf\udce9"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sample_of_the_last_evaluation_is_what_generate_writes(precision, run_train, settings, monkeypatch):
    """On a CPU samples are drawn in fp32, as the trained model is saved, in whichever precision it trained."""
    converted, real = [], mori.train.generate
    monkeypatch.setattr(
        mori.train, "generate", lambda *a, **k: (converted.append(torch.is_autocast_enabled("cpu")), real(*a, **k))[1]
    )
    changed = {"max_new_tokens": 40, "seed": 3}
    summary = run_train(precision=precision, learning_rate=0.02, **changed)
    assert converted and not any(converted)
    controls = TrainConfig(**{**settings, **changed}).sampling()
    again = mori.generate(settings["output_dir"], settings["prompt"], seed=3, **controls)
    assert again == summary["samples"]["after"]
