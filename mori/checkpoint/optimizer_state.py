"""The state of any optimizer as tensors and JSON, and back.

One rule for parameter groups: values that the config sets (`SET_BY_CONFIG`) come from the config, every other group value
is state. So a schedule-free optimizer's step counter survives a resume, and the config keeps the say over its own fields.
"""

from collections.abc import Callable

import torch

# From the number of a parameter, and a tensor of its state, to that tensor as checkpoints hold it: a DTensor for a rank's part.
AsSaved = Callable[[int, torch.Tensor], torch.Tensor]

SET_BY_CONFIG = frozenset({"params", "param_names", "lr", "initial_lr", "weight_decay", "betas", "eps"})


def as_it_is(number: int, tensor: torch.Tensor) -> torch.Tensor:
    """`AsSaved` of an optimizer that has whole parameters."""
    return tensor


def whole_shapes(optimizer: torch.optim.Optimizer, as_saved: AsSaved) -> dict[str, torch.Tensor]:
    """The parameters as checkpoints would hold them, by the part of the names of `pack` before the first dot."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {str(number): as_saved(number, parameter.detach()) for number, parameter in enumerate(parameters)}


def pack(optimizer: torch.optim.Optimizer, as_saved: AsSaved = as_it_is) -> tuple[dict[str, torch.Tensor], dict]:
    """Split `optimizer.state_dict()` into tensors, named `<parameter index>.<name>`, and a JSON value for the rest.

    The JSON value holds the optimizer's class, the number of parameters in each group, and where not empty: `state`, the
    values by parameter index that are not tensors; `groups`, the group values that differ from `optimizer.defaults`;
    `other`, further entries of the state_dict; `on_cpu`, the names of tensors that are on the CPU though parameters are not.

    Raises TypeError, which names the value, if it is neither a tensor, a bool, int, float, str or None, nor a list, tuple
    or dict of these.
    """
    saved, tensors = optimizer.state_dict(), {}
    state: dict[str, dict] = {}
    for index, values in saved["state"].items():
        if type(index) is not int or not isinstance(values, dict):
            raise TypeError(f"the optimizer's state {index!r} cannot be saved: it belongs to no parameter")
        for name, value in values.items():
            path = f"{index}.{name}"
            if type(name) is not str:
                raise TypeError(f"the optimizer's state {path} cannot be saved: {name!r} is no name")
            encoded = _encode(value, path, tensors)
            if encoded != {"tensor": path} or "." in name:
                state.setdefault(str(index), {})[name] = encoded
    groups = [
        {
            name: _encode(value, f"group {number}.{name}", tensors)
            for name, value in group.items()
            if name not in SET_BY_CONFIG and not _is_default(value, optimizer, name)
        }
        for number, group in enumerate(saved["param_groups"])
    ]
    other = {
        name: _encode(value, name, tensors) for name, value in saved.items() if name not in ("state", "param_groups")
    }
    on_gpu = any(parameter.device.type != "cpu" for group in optimizer.param_groups for parameter in group["params"])
    on_cpu = [name for name, tensor in tensors.items() if on_gpu and tensor.device.type == "cpu"]
    plain = {"class": type(optimizer).__name__, "parameters": [len(group["params"]) for group in saved["param_groups"]]}
    for path, tensor in tensors.items():
        if (index := path.partition(".")[0]).isdecimal():
            tensors[path] = as_saved(int(index), tensor)
    optional = {"state": state, "groups": groups if any(groups) else [], "other": other, "on_cpu": on_cpu}
    return tensors, plain | {name: value for name, value in optional.items() if value}


def unpack(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict) -> None:
    """Load into `optimizer` what `pack` returned; `plain` is {} for checkpoints from before it was saved.

    The optimizer's own `load_state_dict` runs; types and values are those that were saved. Tensors go to the device that
    `load_state_dict` chooses, or that of the parameters if it chooses none, but stay on the CPU if they were there.

    Raises ValueError if the state belongs to another optimizer or to other parameters, and ValueError, KeyError, TypeError
    or AttributeError if it is not what `pack` returns.
    """
    saved_groups = optimizer.state_dict()["param_groups"]
    sizes = [len(group["params"]) for group in saved_groups]
    if plain and plain["class"] != type(optimizer).__name__:
        raise ValueError(f"it is the state of {plain['class']}, this is {type(optimizer).__name__}")
    if plain and plain["parameters"] != sizes:
        raise ValueError(f"its groups have {plain['parameters']} parameters, those of this optimizer {sizes}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    remaining = dict(tensors)  # without those that an encoded value refers to
    on_cpu = {id(tensors[name]) for name in plain.get("on_cpu", [])}

    def placed(name: str) -> torch.Tensor:
        tensor = remaining.pop(name)
        return tensor if id(tensor) in on_cpu else tensor.to(parameters[0].device)

    groups = [{name: _decode(value, placed) for name, value in group.items()} for group in plain.get("groups", [])]
    other = {name: _decode(value, placed) for name, value in plain.get("other", {}).items()}
    state: dict[int, dict] = {}
    for index, values in plain.get("state", {}).items():
        state[int(index)] = {name: _decode(value, remaining.pop) for name, value in values.items()}
    for path, tensor in remaining.items():
        index, _, name = path.partition(".")
        if not index.isdecimal() or not name or "." in name:
            raise ValueError(f"it has no place for the tensor {path}")
        state.setdefault(int(index), {})[name] = tensor
    state = dict(sorted(state.items()))  # the files of several ranks have another order
    outside = [index for index in state if not 0 <= index < sum(sizes)]
    if outside:
        raise ValueError(f"it has state of parameter {outside[0]}, this optimizer has {sum(sizes)} parameters")
    defaults = {name: value for name, value in optimizer.defaults.items() if name not in SET_BY_CONFIG}
    for group, values in zip(saved_groups, groups or [{}] * len(sizes), strict=True):
        group |= defaults | {name: value for name, value in values.items() if name not in SET_BY_CONFIG}
    optimizer.load_state_dict({**other, "state": state, "param_groups": saved_groups})
    # PyTorch casts floating-point state to the type of its parameter, and corrupts a str.
    for index, values in state.items():
        loaded = optimizer.state[parameters[index]]
        for name, value in values.items():
            if name in loaded:
                loaded[name] = _exact(loaded[name], value, on_cpu)


def _is_default(value, optimizer: torch.optim.Optimizer, name: str) -> bool:
    """Whether a group value is still as the optimizer was built. False for types that may have changed in place."""
    if name not in optimizer.defaults or isinstance(value, (torch.Tensor, list, dict)):
        return False
    default = optimizer.defaults[name]
    return value is default or type(value) is type(default) and value == default


def _encode(value, path: str, tensors: dict[str, torch.Tensor]):
    """`value` as JSON; its tensors go into `tensors`, and the JSON refers to them by name."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor) and path not in tensors:
        tensors[path] = value
        return {"tensor": path}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    raise TypeError(f"the optimizer's state {path} cannot be saved: it is a {type(value).__name__}")


def _decode(value, take: Callable[[str], torch.Tensor]):
    """Undo `_encode`; `take` returns the tensor of a name."""
    if isinstance(value, list):
        return [_decode(item, take) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return take(content)
    if kind == "tuple":
        return tuple(_decode(item, take) for item in content)
    if kind == "dict":
        return {key: _decode(item, take) for key, item in content}
    raise ValueError(f"{kind!r} is no kind of value")


def _exact(loaded, saved, on_cpu: set[int]):
    """`loaded` with the type and value of `saved`, unless the optimizer itself turned it into another kind of value.

    `on_cpu` are the ids of saved tensors that stay on the CPU.
    """
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor):
        if id(saved) in on_cpu:
            return saved
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if type(loaded) is not type(saved):
        return loaded
    if isinstance(saved, (list, tuple)):
        return type(saved)(_exact(*pair, on_cpu) for pair in zip(loaded, saved, strict=True))
    if isinstance(saved, dict):
        return {key: _exact(loaded[key], value, on_cpu) for key, value in saved.items()}
    return saved
