"""Any optimizer survives a save and a resume to the bit, or is refused before anything is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mori import optim
from mori.checkpoint import checkpoints as checkpoint
from mori.checkpoint import writing
from mori.checkpoint.files import describe
from mori.checkpoint.optimizer_state import pack, unpack
from mori.cli import UserError
from mori.config import TrainConfig


class Uneven(torch.optim.Optimizer):
    """A made-up optimizer with other state for matrices than for vectors, plain values of every type, and group counters."""

    def __init__(self, params, lr: float = 0.01, scale: float = 1.0):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "scale": scale, "k": 0, "mode": None, "best": -1.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["mode"] = "odd" if group["k"] % 2 else None
            group["best"] = max(group["best"], 0.1 * group["k"])
            group.setdefault("history", []).append(group["k"] / 3)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"calls": 0, "seen": [], "label": f"of {parameter.dim()}", "nested": {"pair": (1, None)}}
                    state["sum"] = torch.zeros(parameter.shape, dtype=torch.float64)
                    state["count"] = torch.tensor(0)
                    if parameter.dim() > 1:
                        state["factors"] = [torch.zeros(parameter.size(0), 1), torch.zeros(1, parameter.size(1))]
                assert state["label"] == f"of {parameter.dim()}" and state["nested"]["pair"] == (1, None)
                assert state["sum"].dtype == torch.float64 and state["count"].dtype == torch.int64
                state["calls"] += 1
                state["seen"].append(parameter.grad.float().sum().item())
                state["sum"] += parameter.grad.double() / 3
                state["count"] += 1
                update = state["sum"] * (
                    state["calls"] + 0.1 * state["seen"][-1] + group["best"] + group["history"][-1]
                )
                for dim, factor in enumerate(state.get("factors", ())):
                    factor += parameter.grad.float().mean(1 - dim, keepdim=True)
                    update = update + factor
                parameter.sub_(
                    group["lr"] * group["scale"] * (2.0 if group["mode"] else 1.0) * update.to(parameter.dtype)
                )


class Counter(torch.optim.Optimizer):
    """An optimizer whose state is what the test puts in."""

    def __init__(self, params, state: dict):
        super().__init__(params, {"lr": 0.1})
        self.state[self.param_groups[0]["params"][0]] = state


OPTIMIZERS = {
    "made-up": lambda model: Uneven(model.parameters(), scale=0.1),
    "made-up, two groups": lambda model: Uneven(
        [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrix], "weight_decay": 0.1} for matrix in (True, False)]
    ),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "asgd": lambda model: torch.optim.ASGD(model.parameters()),
    "rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "nadam": lambda model: torch.optim.NAdam(model.parameters()),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True, lr=0.01),
    "rounding": lambda model: optim.RoundingAdamW(optim.parameter_groups(model, 0.1), {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}),
}  # fmt: skip


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model.unused = nn.Parameter(torch.ones(2))  # never has a gradient, so never has state
    return model.to(dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step whose data and learning rate depend on `number` alone."""
    optim.set_learning_rate(optimizer, 0.01 / (number + 1))
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number)).to(model[0].weight.dtype)
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(value, expected) -> None:
    """Equal in type, dtype and value, at any depth."""
    assert type(value) is type(expected)
    if isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype and value.device == expected.device and torch.equal(value, expected)
    elif isinstance(value, dict):
        assert value.keys() == expected.keys()
        for key in value:
            assert_same(value[key], expected[key])
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(expected)
        for pair in zip(value, expected, strict=True):
            assert_same(*pair)
    else:
        assert value == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_resumes_to_the_bit(name, dtype, tmp_path):
    model, resumed = two_layers(dtype), two_layers(dtype)
    optimizer, resumed_optimizer = OPTIMIZERS[name](model), OPTIMIZERS[name](resumed)
    for number in range(3):
        step(model, optimizer, number)
    folder = writing.save(tmp_path, 3, model=model, optimizer=optimizer, state={})
    checkpoint.verify(folder)
    checkpoint.load_tensors(folder, resumed, resumed_optimizer)
    assert_same(resumed_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    for number in range(3, 7):
        step(model, optimizer, number)
        step(resumed, resumed_optimizer, number)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_group_values_are_restored_but_for_those_the_config_sets(tmp_path):
    model = two_layers()
    optimizer = Uneven(model.parameters(), lr=0.5)
    step(model, optimizer, 0)
    optimizer.param_groups[0]["mode"] = (
        None  # the default again, though the resumed optimizer begins with another value
    )
    folder = writing.save(tmp_path, 1, model=model, optimizer=optimizer, state={})
    resumed = Uneven(model.parameters(), lr=0.25)
    resumed.param_groups[0] |= {"mode": "even", "weight_decay": 0.3}
    checkpoint.load_tensors(folder, model, resumed)
    [group] = resumed.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.3)
    assert (group["k"], group["mode"], group["best"], group["history"]) == (1, None, 0.1, [1 / 3])


def test_unpack_puts_tensors_on_their_devices():
    """The device `meta` stands for a GPU: its tensors come from a file, so they are on the CPU before `unpack`."""
    with torch.device("meta"):
        model, on_device = nn.Linear(2, 2), torch.ones(2)
    state = {"sum": on_device, "count": torch.tensor(1), "pair": [on_device.double(), torch.tensor(1)]}
    optimizer, resumed = Counter(model.parameters(), state), Counter(model.parameters(), {})
    optimizer.param_groups[0] |= {"total": on_device, "calls": torch.tensor(1)}
    tensors, plain = pack(optimizer)
    from_file = {
        name: tensor if tensor.device.type == "cpu" else torch.ones(2).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    unpack(resumed, from_file, json.loads(json.dumps(plain)))
    [loaded, *_], group = resumed.state.values(), resumed.param_groups[0]
    placed = [loaded["sum"], loaded["count"], *loaded["pair"], group["total"], group["calls"]]
    assert [tensor.device.type for tensor in placed] == ["meta", "cpu", "meta", "cpu", "meta", "cpu"]
    assert loaded["count"].dtype == torch.int64 and loaded["pair"][0].dtype == torch.float64


def test_optimizer_without_state_is_saved_and_loaded(tmp_path):
    model = two_layers()
    folder = writing.save(tmp_path, 1, model=model, optimizer=torch.optim.AdamW(model.parameters()), state={})
    resumed = torch.optim.AdamW(model.parameters())
    checkpoint.load_tensors(folder, model, resumed)
    assert not resumed.state_dict()["state"]


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_bnb_8bit", "bfloat16"])
def test_checkpoint_from_before_plain_values_were_saved_is_loaded(name, tmp_path):
    """Such a checkpoint has no `optimizer` in state.json; its optimizers kept tensors only."""
    if name == "adamw_bnb_8bit":
        pytest.importorskip("bitsandbytes")

    optimizer_name = "adamw_torch_fused" if name == "bfloat16" else name
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, optim=optimizer_name)

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(
            nn.Sequential(nn.Embedding(90, 96), nn.Linear(96, 96)).to(
                torch.bfloat16 if name == "bfloat16" else torch.float32
            )
        )
    optimizers = [optim.OPTIMIZERS[optimizer_name](model, config) for model in models]

    def advance(model, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()

    advance(models[0], optimizers[0], 0)
    folder = writing.save(tmp_path, 1, model=models[0], optimizer=optimizers[0], state={})
    tensors = load_file(folder / "optimizer.safetensors")
    for index, values in json.loads((folder / "state.json").read_text())["optimizer"].get("state", {}).items():
        tensors |= {f"{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    save_file(tensors, folder / "optimizer.safetensors")
    change_state(folder, lambda state: state.pop("optimizer"))
    checkpoint.load_tensors(folder, models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        advance(model, optimizer, 1)
    assert_same(models[1].state_dict(), models[0].state_dict())


def change_state(folder, change) -> None:
    """Change a checkpoint's state.json, with a manifest that matches."""
    path = folder / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    checkpoint.write_manifest(folder, state["step"], {name: describe(folder / name) for name in names})
    checkpoint.verify(folder)


@pytest.mark.parametrize(
    "state, reason",
    [
        ({"plan": object()}, "0.plan .* a object"),
        ({"function": print}, "0.function .* builtin_function_or_method"),
        ({"list": [1, {2}]}, "0.list.1 .* a set"),
        ({"dict": {"a": {None: 1}}}, "0.dict.a .* a dict"),
        ({7: torch.zeros(2)}, "0.7 .* no name"),
        ({"wave": torch.zeros(2, dtype=torch.complex128)}, "0.wave .*complex128"),
        ({"sparse": torch.eye(2).to_sparse()}, "0.sparse .*sparse"),
    ],
)
def test_save_refuses_values_that_cannot_be_stored_before_it_writes(state, reason, tmp_path):
    model = two_layers()
    with pytest.raises(TypeError, match=reason) as refused:
        writing.save(tmp_path / "root", 1, model=model, optimizer=Counter(model.parameters(), state), state={})
    assert "\n" not in str(refused.value) and not (tmp_path / "root").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_save_refuses_state_that_is_not_finite(value, tmp_path):
    model = two_layers()
    optimizer = Counter(model.parameters(), {"factors": [torch.zeros(2), torch.full((2,), value)]})
    with pytest.raises(FloatingPointError, match="0.factors.1 is not finite"):
        writing.save(tmp_path / "root", 1, model=model, optimizer=optimizer, state={})
    assert not (tmp_path / "root").exists()


def test_load_refuses_another_optimizer(tmp_path):
    model = two_layers()
    optimizer = OPTIMIZERS["sgd"](model)
    step(model, optimizer, 0)
    folder = writing.save(tmp_path, 1, model=model, optimizer=optimizer, state={})
    with pytest.raises(UserError, match="another optimizer.* of SGD, this is AdamW"):
        checkpoint.load_tensors(folder, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    "groups", [lambda model: list(model.parameters())[1:], lambda model: optim.parameter_groups(model, 0)]
)
def test_load_refuses_an_optimizer_of_other_parameters(groups, tmp_path):
    model = two_layers()
    optimizer = OPTIMIZERS["adafactor"](model)
    step(model, optimizer, 0)
    folder = writing.save(tmp_path, 1, model=model, optimizer=optimizer, state={})
    with pytest.raises(UserError, match="another optimizer.* parameters"):
        checkpoint.load_tensors(folder, model, torch.optim.Adafactor(groups(model)))


DAMAGES = [
    lambda state: state.update(optimizer=None),
    lambda state: state.update(optimizer=[1]),
    lambda state: state.update(optimizer="x"),
    lambda state: state["optimizer"].pop("class"),
    lambda state: state["optimizer"].update(parameters=[3]),
    lambda state: state["optimizer"].update(state=[]),
    lambda state: state["optimizer"]["state"].update({"99": {"calls": 1}}),
    lambda state: state["optimizer"]["state"].update({"x": {"calls": 1}}),
    lambda state: state["optimizer"]["state"].update({"0": 3}),
    lambda state: state["optimizer"]["state"]["1"].update(nested={"dict": 3}),
    lambda state: state["optimizer"]["state"]["1"].update(nested={"set": []}),
    lambda state: state["optimizer"]["state"]["1"].update(nested={}),
    lambda state: state["optimizer"]["state"]["1"].update(factors=[{"tensor": "0.none"}]),
    lambda state: state["optimizer"]["state"]["1"].pop("factors"),
    lambda state: state["optimizer"]["groups"].append({}),
    lambda state: state["optimizer"].update(groups=[3]),
    lambda state: state["optimizer"].update(other=3),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_refuses_damaged_values(damage, tmp_path):
    model = two_layers()
    optimizer = OPTIMIZERS["made-up"](model)
    step(model, optimizer, 0)
    folder = writing.save(tmp_path, 1, model=model, optimizer=optimizer, state={})
    change_state(folder, damage)
    with pytest.raises(UserError, match="another optimizer, or its state is damaged"):
        checkpoint.load_tensors(folder, model, OPTIMIZERS["made-up"](model))


def test_state_outside_the_parameters_is_saved_and_loaded(tmp_path):
    """Some optimizers add entries of their own to the state_dict."""

    class Wrapper(torch.optim.SGD):
        def state_dict(self):
            return super().state_dict() | {"slow": {"weights": [torch.arange(3.0)], "every": 5}}

        def load_state_dict(self, state_dict):
            self.slow = state_dict["slow"]
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "slow"})

    model = two_layers()
    folder = writing.save(tmp_path, 1, model=model, optimizer=Wrapper(model.parameters()), state={})
    resumed = Wrapper(model.parameters())
    checkpoint.load_tensors(folder, model, resumed)
    assert_same(resumed.slow, {"weights": [torch.arange(3.0)], "every": 5})
