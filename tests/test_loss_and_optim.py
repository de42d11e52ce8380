import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, get_scheduler

from mori import optim
from mori.checkpoint import checkpoints as checkpoint
from mori.model.loading import store_in_bfloat16
from mori.model.loss import count_targets, cross_entropy_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sum_of_token_losses(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11).to(dtype), torch.randint(0, 11, (3, 7))
    labels[1, 2:5] = -100
    exact = -sum(
        F.log_softmax(logits[b, t].double(), -1)[labels[b, t]] for b in range(3) for t in range(7) if labels[b, t] >= 0
    )
    torch.testing.assert_close(cross_entropy_sum(logits, labels).double(), exact, rtol=1e-6, atol=0)
    assert count_targets(labels) == 18


def test_labels_are_not_shifted_again():
    logits = torch.full((1, 4, 5), -1e4)
    labels = torch.tensor([[1, 2, 3, 4]])
    logits.scatter_(2, labels[..., None], 1e4)  # each position is sure of its own label
    assert cross_entropy_sum(logits, labels) == 0


def test_no_label_no_loss_and_no_gradient():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_learning_rate_equals_transformers_to_the_bit(schedule, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        ours = optim.learning_rate(step, peak=3e-4, schedule=schedule, warmup_steps=warmup, total_steps=40)
        assert ours == theirs.get_last_lr()[0], step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bloom", "phi", "gemma2", "olmo2", "mixtral", "qwen3"])
def test_the_same_parameters_decay_as_in_trainer(family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    decay, no_decay = optim.parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == theirs & set(names.values())
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad = False
    assert [len(group["params"]) for group in optim.parameter_groups(model, 0.1)] == [1, 0]


NAMES = ["adamw_torch_fused", "adamw_bnb_8bit", "bfloat16"]


def optimizer_of(model: nn.Module, name: str, **changed) -> torch.optim.Optimizer:
    """The optimizer that a run has under this name, or with weights in this type."""
    if name == "adamw_bnb_8bit":
        pytest.importorskip("bitsandbytes")
    if name == "bfloat16":
        store_in_bfloat16(model)
    how = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8} | changed
    return optim.adamw(model, name="adamw_torch_fused" if name == "bfloat16" else name, **how)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad, name):
    torch.manual_seed(0)
    model, untouched = nn.Linear(96, 96), nn.Linear(96, 96)
    untouched.load_state_dict(model.state_dict())
    optimizers = [optimizer_of(m, name) for m in (model, untouched)]
    for value in (1.0, bad, 2.0):
        for m, optimizer in zip((model, untouched), optimizers, strict=True):
            if m is untouched and value is bad:
                continue  # the other model never sees the bad step
            for parameter in m.parameters():
                parameter.grad = torch.full_like(parameter, value)
            norm = nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            skipped = optim.skip_unless_finite(optimizer, norm)
            assert skipped.item() == (value is bad)
            optimizer.step()
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    for a, b in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_goes_on_from_its_checkpoint_to_the_bit(name, tmp_path):
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(nn.Sequential(nn.Embedding(90, 96), nn.Linear(96, 96)))
    optimizers = [optimizer_of(model, name) for model in made]

    def step(model, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optim.skip_unless_finite(optimizer, torch.tensor(1.0))
        optimizer.step()

    for number in range(3):
        step(made[0], optimizers[0], number)
    folder = checkpoint.save(tmp_path, 3, model=made[0], optimizer=optimizers[0], state={})
    checkpoint.load_tensors(folder, made[1], optimizers[1])
    for number in range(3, 6):
        for model, optimizer in zip(made, optimizers, strict=True):
            step(model, optimizer, number)
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("at_a_time", [1, 50, 1 << 22])
def test_weights_in_fp32_are_those_of_pytorch(at_a_time, monkeypatch):
    monkeypatch.setattr(optim, "_SLICE", at_a_time)
    torch.manual_seed(0)
    values = (torch.randn(30, 20), torch.randn(30), torch.tensor(0.5), torch.randn(3, 4, 5).transpose(0, 2))
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    how = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [
        optim.RoundingAdamW([{"params": ours, "weight_decay": 0.1}], how),
        torch.optim.AdamW(theirs, weight_decay=0.1, **how),
    ]
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_values_are_rounded_to_their_neighbours_and_keep_their_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator) * 10 ** torch.linspace(-20, 20, 50)
    drawn = torch.stack([optim.rounded_at_random(values, generator) for _ in range(20_000)])
    assert drawn.dtype == torch.bfloat16
    below = (values.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    above = (below.view(torch.int32) + 65536).view(torch.float32)
    assert ((drawn.float() == below) | (drawn.float() == above)).all()
    gap = (above - below).abs()
    assert ((drawn.double().mean(0) - values.double()).abs() < 5 * 0.5 * gap / 20_000**0.5).all()
    exact = values.bfloat16()
    assert torch.equal(optim.rounded_at_random(exact.float(), generator), exact)


def test_small_updates_are_not_lost_in_bf16():
    """A thousand steps of 1e-4 from 1.0, where the last bit of bf16 is 2 ** -8 below and 2 ** -7 above."""
    layer = nn.Linear(64, 64, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = optimizer_of(layer, "bfloat16", lr=1e-4, weight_decay=0.0)
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
    assert (plain == 1).all()  # what this is for


def test_moments_of_eight_bits_are_for_all_but_embeddings_and_small_tensors():
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=2, vocab_size=320)
    )
    optimizer = optimizer_of(model, "adamw_bnb_8bit")
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
