"""Training and generation on a GPU, or on the simulated one (`python -m tests.sim`)."""

from functools import partial

import pytest
import torch
from conftest import assert_equal_weights, needs_a_gpu, stop_after
from families import prompts_of, small_model

from mori import train as loop
from mori.config import SamplingConfig
from mori.distributed import Runtime
from mori.generation.replaying_reader import GraphReader, open_reader
from mori.generation.sampler import Sampler
from mori.model.lm import CausalLMLoss
from mori.tracking.loggers import read_metrics

pytestmark = needs_a_gpu
needs_a_real_gpu = pytest.mark.skipif(hasattr(torch.cuda, "simulated"), reason="the simulated GPU compiles nothing")

EXACT = {"chunked_loss": False, "mask_free_attention": False, "fused_activations": False, "tf32": False}
RUNS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "document mask": {"document_mask": True},
    "CUDA graphs": {"cuda_graphs": True, "gradient_accumulation_steps": 2},
    "CUDA graphs in fp16": {"cuda_graphs": True, "precision": "fp16"},
}
# In every step the host reads whether the gradient is finite, or transformers reads the mask.
SYNCHRONIZING_RUNS = {
    "no variants": EXACT,
    "bf16 weights": {"dtype": "bfloat16", "precision": "bf16"},
    "Muon": {"optim": "muon"},
    "Adafactor": {"optim": "adafactor"},
}
CONTROLS = {
    "bad_words_ids": [[3], [4, 5]],
    "dry_multiplier": 0.8,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "exponential_decay_length_penalty": [1, 1.5],
    "frequency_penalty": 0.5,
    "min_new_tokens": 9,
    "min_p": 0.1,
    "no_repeat_ngram_size": 2,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.3,
    "sequence_bias": [[[7], 2.0], [[8, 9], -3.0]],
    "suppress_tokens": [1, 2],
    "temperature": 0.7,
    "top_h": 0.4,
    "top_k": 5,
    "top_p": 0.8,
    "typical_p": 0.6,
    "xtc_probability": 1.0,
}


@pytest.fixture
def run_on_gpu(run_train):
    """Train for ten steps on the GPU, with greedy samples; returns the summary."""
    fixed = {"device": "cuda", "temperature": 0.0, "max_steps": 10, "eval_steps": 5}
    return lambda **changed: run_train(**{**fixed, **changed})


@pytest.mark.parametrize("name", [*RUNS, *SYNCHRONIZING_RUNS])
def test_run_on_a_gpu_resumes_to_the_same_weights(run_on_gpu, tmp_path, deterministic, name):
    options = {"dropout": 0.1, **{**RUNS, **SYNCHRONIZING_RUNS}[name]}
    whole = run_on_gpu(**options, run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(6, lambda: run_on_gpu(**options))
    resumed = run_on_gpu(**options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    assert resumed["eval"]["after"] == whole["eval"]["after"] and resumed["samples"] == whole["samples"]


def test_async_save_on_a_gpu_resumes_to_the_same_weights(run_on_gpu, tmp_path, deterministic):
    run_on_gpu(dropout=0.1, run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(6, lambda: run_on_gpu(dropout=0.1, async_save=True))
    run_on_gpu(dropout=0.1, async_save=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")


@pytest.mark.parametrize("name", [*RUNS, *SYNCHRONIZING_RUNS])
def test_losses_on_a_gpu_equal_those_of_a_cpu(run_on_gpu, tmp_path, name):
    """Relative differences: 1e-3 in fp32, 1e-2 in 16 bits."""
    options = {"dropout": 0.0, **{**RUNS, **SYNCHRONIZING_RUNS}[name]}
    run_on_gpu(**options, run_name="gpu")
    host = {key: value for key, value in options.items() if key not in ("cuda_graphs", "precision", "dtype")}
    run_on_gpu(**host, device="cpu", precision="fp32", run_name="cpu", output_dir=str(tmp_path / "cpu"))
    gpu, cpu = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("gpu", "cpu"))
    tolerance = 1e-3 if options.get("precision") == "fp32" else 1e-2
    assert len(gpu) == len(cpu) > 10
    for on_gpu, on_cpu in zip(gpu, cpu, strict=True):
        for key in on_gpu.keys() & {"train/loss", "eval/loss"}:
            assert on_gpu[key] == pytest.approx(on_cpu[key], rel=tolerance), on_gpu["step"]


@pytest.mark.parametrize("name", RUNS)
def test_step_on_a_gpu_has_no_host_sync(run_on_gpu, monkeypatch, name):
    steps, step = [], loop.train_step

    def watched(*args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", watched)
    run_on_gpu(**RUNS[name])
    assert len(steps) == 10


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_memory_running_out_on_a_gpu_gives_the_weights_of_the_smaller_batch(
    run_on_gpu, tmp_path, deterministic, monkeypatch, precision, cuda_graphs
):
    options = {"precision": precision, "cuda_graphs": cuda_graphs, "dropout": 0.1}
    forward = CausalLMLoss.forward

    def limited(module, input_ids, *args):
        if args[1:] and len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(module, input_ids, *args)

    monkeypatch.setattr(CausalLMLoss, "forward", limited)
    run_on_gpu(**options, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    monkeypatch.undo()
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "run_name": "small"}
    run_on_gpu(**options, **small, output_dir=str(tmp_path / "small"))
    assert_equal_weights(tmp_path / "small", tmp_path / "brain")


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_overflowing_steps_on_a_gpu_are_skipped(run_on_gpu, monkeypatch, cuda_graphs):
    """The scale of the loss halves until the gradients fit into fp16."""
    scalers = []  # that of the training, then that of the preflight
    create = partial(torch.amp.GradScaler, "cuda", init_scale=2.0**26)
    monkeypatch.setattr(Runtime, "grad_scaler", lambda runtime: scalers.append(create()) or scalers[-1])
    summary = run_on_gpu(precision="fp16", cuda_graphs=cuda_graphs, max_steps=20)
    assert 0 < summary["skipped_steps"] < 20
    assert scalers[0].get_scale() == 2.0 ** (26 - summary["skipped_steps"])
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]


@needs_a_real_gpu
def test_compiled_run_on_a_gpu_has_the_losses_of_the_uncompiled(run_on_gpu, tmp_path, capsys):
    for compiled in (False, True):
        run_on_gpu(torch_compile=compiled, precision="bf16", dropout=0.0, run_name=str(compiled))
    assert ", compiled" in capsys.readouterr().out
    eager, fast = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("False", "True"))
    for before, after in zip(eager, fast, strict=True):
        assert after.get("train/loss", 0) == pytest.approx(before.get("train/loss", 0), rel=1e-2)


@pytest.mark.parametrize("name", CONTROLS)
def test_control_on_a_gpu_equals_that_on_a_cpu(name):
    torch.manual_seed(0)
    logits, texts = torch.randn(4, 97) * 3, torch.randint(0, 12, (4, 20))
    config = SamplingConfig(**{name: CONTROLS[name]})
    filtered = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(range(4), config, device=device, eos_ids=[2], dry_breaker_ids=[11])
        filtered.append(sampler.filtered_logits(logits.to(device), texts.to(device), 8).cpu())
        assert sampler(logits.to(device), texts.to(device), 8).shape == (4, 1)
    torch.testing.assert_close(filtered[1], filtered[0])
    assert not torch.equal(filtered[0], logits)


@pytest.mark.parametrize(
    "controls",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2},
        *({name: value} for name, value in CONTROLS.items() if name != "dry_multiplier"),
    ],
    ids=" ".join,
)
def test_decoding_on_a_gpu_has_no_host_sync(controls):
    """Between the blocks of ids that the host reads, once the step is captured."""
    model, [prompt] = small_model("llama", 97).eval().cuda(), prompts_of(9)
    sampler = Sampler([1], SamplingConfig(**controls), device="cuda", eos_ids=[2])
    reader = open_reader(model, torch.zeros(1, 1, dtype=torch.long, device="cuda"), 64, 64)
    assert isinstance(reader, GraphReader)
    texts = torch.tensor([prompt + [0] * 20], device="cuda")
    try:
        for end in range(len(prompt), len(prompt) + 20):
            if end == len(prompt) + 5:  # the prompt, two recordings and a replay were before
                assert reader.replay
                torch.cuda.set_sync_debug_mode("error")
            with torch.inference_mode():
                texts[:, end : end + 1] = sampler(reader.read(texts[:, :end]), texts[:, :end], end - len(prompt))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert texts[0, len(prompt) :].unique().numel() > 1
