import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, get_scheduler

from mori import optim
from mori.loss import count_targets, cross_entropy_sum


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    torch.manual_seed(0)
    model, untouched = nn.Linear(4, 4), nn.Linear(4, 4)
    untouched.load_state_dict(model.state_dict())
    optimizers = [optim.adamw(m, lr=0.1, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8) for m in (model, untouched)]
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
        assert all(torch.equal(a[k], b[k]) for k in a)
