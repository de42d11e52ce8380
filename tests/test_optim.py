"""Optimizers and the learning rate, against Trainer, PyTorch and transformers; every optimizer resumes to the bit."""

import pytest
import torch
from conftest import assert_equal_weights, stop_after
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, get_scheduler

from mori import optim
from mori.checkpoint import checkpoints, writing
from mori.cli import UserError
from mori.config import TrainConfig
from mori.model.loading import store_in_bfloat16
from mori.tracking.loggers import read_metrics

KEYWORDS = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {"timescale": 5},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 10, "min_lr_ratio": 0.1},
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.5},
    "greedy": {"patience": 1, "factor": 0.8, "smooth": True},
}


def schedule_of(name, warmup=0, keywords=None):
    config = TrainConfig(lr_scheduler_type=name, learning_rate=3e-4, lr_scheduler_kwargs=keywords)
    return optim.Schedule(config, warmup, 40)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 39])
def test_learning_rate_equals_a_stepped_scheduler_to_the_bit(name, warmup):
    """The steps are asked for in any order; a schedule that follows the evaluations sees one every fourth step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, optimizer, warmup, 40, KEYWORDS.get(name))
    ours, losses = schedule_of(name, warmup, KEYWORDS.get(name)), [3.0, 2.0, 2.5, 2.5, 2.5, 1.9, 2.0, 2.2, 2.4, 1.0]
    ours.learning_rate(30)
    rates = []
    for step in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        assert ours.learning_rate(step) == rates[-1], step
        optimizer.step()
        if not hasattr(theirs, "lr_lambdas"):
            if step % 4 == 3:
                theirs.step(losses[step // 4])
                ours.observe(losses[step // 4])
        else:
            theirs.step()
            ours.observe(losses[step // 4])
    assert len(set(rates)) > 1 or name == "constant" or (name, warmup) == ("constant_with_warmup", 0)


@pytest.mark.parametrize(
    "name, keywords", [("cosine", {"cycles": 2}), ("cosine_with_min_lr", {}), ("polynomial", {"lr_end": 1.0}),
                       ("warmup_stable_decay", None), ("polynomial", {"power": "x"})],
)  # fmt: skip
def test_schedule_refuses_wrong_keywords_in_one_line(name, keywords):
    with pytest.raises(UserError, match=f"lr_scheduler_type {name} with lr_scheduler_kwargs") as refused:
        schedule_of(name, 0, keywords)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedule_that_follows_the_evaluations_resumes_to_the_bit(name, run_train, tmp_path):
    """The rates are those of the library's scheduler, stepped with the run's own held-out losses."""
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5}, "eval_steps": 2}
    run_train(**options, run_name="whole", output_dir=str(tmp_path / "whole"))
    stop_after(7, lambda: run_train(**options))
    run_train(**options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "brain")
    lines = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/loss" in line}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, optimizer, scheduler_specific_kwargs=options["lr_scheduler_kwargs"])
    for step in range(1, 13):
        assert rates[step] == optimizer.param_groups[0]["lr"]
        if step in losses:
            theirs.step(losses[step])
    assert len(set(rates.values())) > 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bloom", "phi", "gemma2", "olmo2", "mixtral", "qwen3"])
def test_parameter_groups_decay_the_same_weights_as_trainer(family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    decay, no_decay = optim.parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == theirs & set(names.values())
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_parameter_groups_leave_out_frozen_parameters():
    model = nn.Linear(2, 2)
    model.bias.requires_grad = False
    assert [len(group["params"]) for group in optim.parameter_groups(model, 0.1)] == [1, 0]


NAMES = [*optim.OPTIMIZERS, "bfloat16"]


class Model(nn.Sequential):
    """An embedding, a hidden matrix with a bias, and a head."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Embedding(90, 96), nn.Linear(96, 96), nn.Linear(96, 90, bias=False))

    def get_output_embeddings(self):
        return self[2]


def build_optimizer(model: nn.Module, name: str, **changed) -> torch.optim.Optimizer:
    """The optimizer that a run has under this name, or with weights in this type."""
    if "bit" in name:
        pytest.importorskip("bitsandbytes")
    if name == "bfloat16":
        store_in_bfloat16(model)
    options = {"learning_rate": 0.1, "weight_decay": 0.1, **changed}
    return optim.build_optimizer(
        model, TrainConfig(optim="adamw_torch_fused" if name == "bfloat16" else name, **options)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_step_if_finite_skips_a_step_that_is_not_finite(bad, name):
    """The model with a bad step in between ends like the one without it."""
    model, reference = Model(), Model()
    optimizers = [build_optimizer(m, name) for m in (model, reference)]
    for value in (1.0, bad, 2.0):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            if m is reference and value is bad:
                continue
            for parameter in m.parameters():
                parameter.grad = torch.full_like(parameter, value)
            norm = nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            assert optim.step_if_finite(optimizer, norm).item() == (value is bad)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    for a, b in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_resumes_from_its_checkpoint_to_the_bit(name, tmp_path):
    models = [Model(), Model()]
    optimizers = [build_optimizer(model, name) for model in models]

    def step(model, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optim.set_learning_rate(optimizer, 0.1 / number)
        optim.step_if_finite(optimizer, torch.tensor(1.0))

    for number in range(1, 4):
        step(models[0], optimizers[0], number)
    folder = writing.save(tmp_path, 3, model=models[0], optimizer=optimizers[0], state={})
    checkpoints.load_tensors(folder, models[1], optimizers[1])
    for number in range(4, 7):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, number)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_run_killed_with_any_optimizer_resumes_to_the_same_weights(
    name, run_train, model_with_unused_parameters, tmp_path
):
    """Also where some parameters never have a gradient, and so have no moments."""
    if "bit" in name:
        pytest.importorskip("bitsandbytes")
    options = {"optim": name, "model": str(model_with_unused_parameters), "weight_decay": 0.1}
    run_train(run_name="whole", output_dir=str(tmp_path / "whole"), **options)
    stop_after(7, lambda: run_train(run_name="cut", output_dir=str(tmp_path / "cut"), **options))
    run_train(run_name="cut", output_dir=str(tmp_path / "cut"), **options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "cut")


def test_muon_updates_hidden_matrices_as_pytorch_does_and_the_rest_by_adamw():
    model, reference = Model(), Model()
    optimizer = build_optimizer(model, "muon")
    options = {"lr": 0.1, "weight_decay": 0.1}
    parts = [
        torch.optim.Muon([reference[1].weight], adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW([reference[0].weight, reference[2].weight], fused=True, **options),
        torch.optim.AdamW([reference[1].bias], lr=0.1, weight_decay=0.0, fused=True),
    ]
    for number in range(3):
        for m in (model, reference):
            generator = torch.Generator().manual_seed(number)
            for parameter in m.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        for part in parts:
            part.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_new_optimizer_and_schedule_are_found_by_name_in_a_run(run_train, settings, tmp_path, monkeypatch):
    """One entry each in a table, and the name among the choices."""
    monkeypatch.setitem(
        optim.OPTIMIZERS, "asgd", lambda model, config: torch.optim.ASGD(model.parameters(), config.learning_rate)
    )
    monkeypatch.setitem(optim.SCHEDULES, "halves", lambda optimizer, **_: LambdaLR(optimizer, lambda step: 0.5**step))
    choices = {name: TrainConfig.__dataclass_fields__[name] for name in ("optim", "lr_scheduler_type")}
    for field, name in zip(choices.values(), ("asgd", "halves"), strict=True):
        rules = {**field.metadata, "choices": (*field.metadata["choices"], name)}
        monkeypatch.setattr(field, "metadata", rules)
    run_train(optim="asgd", lr_scheduler_type="halves")
    lines = read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl")
    rates = [line["train/learning_rate"] for line in lines if "train/loss" in line]
    assert rates == [settings["learning_rate"] * 0.5**step for step in range(12)]


def test_choices_of_the_config_are_the_registered_names():
    fields = TrainConfig.__dataclass_fields__
    assert set(fields["optim"].metadata["choices"]) == set(optim.OPTIMIZERS)
    assert set(fields["lr_scheduler_type"].metadata["choices"]) == set(optim.SCHEDULES)


@pytest.mark.parametrize("slice_size", [1, 50, 1 << 22])
def test_rounding_adamw_in_fp32_equals_pytorch(slice_size, monkeypatch):
    monkeypatch.setattr(optim, "_SLICE", slice_size)
    torch.manual_seed(0)
    values = (torch.randn(30, 20), torch.randn(30), torch.tensor(0.5), torch.randn(3, 4, 5).transpose(0, 2))
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [
        optim.RoundingAdamW([{"params": ours, "weight_decay": 0.1}], options),
        torch.optim.AdamW(theirs, weight_decay=0.1, **options),
    ]
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_round_stochastically_keeps_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator) * 10 ** torch.linspace(-20, 20, 50)
    drawn = torch.stack([optim.round_stochastically(values, generator) for _ in range(20_000)])
    assert drawn.dtype == torch.bfloat16
    below = (values.view(torch.int32) & -65536).view(torch.float32)  # toward zero
    above = (below.view(torch.int32) + 65536).view(torch.float32)
    assert ((drawn.float() == below) | (drawn.float() == above)).all()
    gap = (above - below).abs()
    assert ((drawn.double().mean(0) - values.double()).abs() < 5 * 0.5 * gap / 20_000**0.5).all()
    exact = values.bfloat16()
    assert torch.equal(optim.round_stochastically(exact.float(), generator), exact)


def test_rounding_adamw_keeps_small_updates_in_bf16():
    """A thousand steps of 1e-4 from 1.0, where the last bit of bf16 is 2 ** -8 below and 2 ** -7 above."""
    layer = nn.Linear(64, 64, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(layer, "bfloat16", learning_rate=1e-4, weight_decay=0.0)
    for _ in range(1000):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.float().mean().item() == pytest.approx(0.9, abs=2e-3)
    plain = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    rounding = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(1000):
        plain.grad = torch.ones_like(plain)
        rounding.step()
    assert (plain == 1).all()  # AdamW without stochastic rounding loses them


def test_adamw_8bit_keeps_32_bits_for_embeddings_and_small_tensors():
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=2, vocab_size=320)
    )
    optimizer = build_optimizer(model, "adamw_bnb_8bit")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    types = {name: optimizer.state[parameter]["state1"].dtype for name, parameter in model.named_parameters()}
    small = {name for name, parameter in model.named_parameters() if parameter.numel() < 4096}
    assert {n for n, t in types.items() if t == torch.float32} == small | {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert set(types.values()) == {torch.float32, torch.uint8}


def test_update_ratio_of_a_large_model_is_estimated_from_an_even_sample():
    """Against the lengths over all weights; the parts of the sample are spread evenly over parameters of every size."""
    torch.manual_seed(0)
    sizes = [(300, 768), (768,), (7,), (1000, 512), (3, 5), (200_000,)]
    parameters = [nn.Parameter(torch.randn(size) * 10.0**-i) for i, size in enumerate(sizes)]
    before, whole = optim.sampled_weights(parameters), torch.cat([p.detach().flatten() for p in parameters])
    assert 1 << 14 < len(before) <= 1 << 17
    stride = -(-len(whole) // len(before))
    assert torch.equal(before, whole[::stride])
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1e-3 * torch.randn_like(parameter)
    change = torch.cat([p.detach().flatten() for p in parameters]) - whole
    assert optim.update_ratio(before, parameters).item() == pytest.approx(
        (change.norm() / whole.norm()).item(), rel=0.05
    )
    assert optim.update_ratio(optim.sampled_weights(parameters), parameters).item() == 0.0
