"""The weights that train, as loop and optimizer see them: whole on every rank, or sharded over the ranks (`--fsdp`)."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from mori import optim
from mori.cli import UserError
from mori.config import TrainConfig
from mori.distributed import unloaded
from mori.distributed.ranks import Runtime
from mori.model.adapters.trainable import layers
from mori.model.lm import CausalLMLoss

Result = TypeVar("Result")


class Weights:
    """Weights that this rank holds whole.

    Attributes:
        in_model: the model's parameters that train.
        parameters: those that the optimizer has: the same, or this rank's part of each.
    """

    def __init__(self, module: CausalLMLoss):
        self.module = module
        self.in_model = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
        self.parameters = self.in_model

    def build_optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """The optimizer that `config` names, for `parameters`."""
        return optim.build_optimizer(self.module.model, config)

    def take_gradients(self, scaled: bool) -> None:
        """Put the gradients of a step where the optimizer expects them; `scaled` says that they are to be unscaled."""

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients in place; returns their L2 norm before, a scalar on the device."""
        return clip_grad_norm_(self.parameters, max_norm)

    def call(self, action: Callable[[nn.Module], Result]) -> Result:
        """`action(model)`, which may call the model as transformers loaded it. Collective if the weights are sharded."""
        return action(self.module.model)

    def as_saved(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the optimizer's state for parameter number `index`, as checkpoints save and load it."""
        return tensor


class ShardedWeights(Weights):
    """Weights, gradients and optimizer state of which every rank holds its share, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    Sharding follows Rajbhandari et al., 2020, arXiv:1910.02054, and Zhao et al., 2023, arXiv:2304.11277. The model's parameters are
    DTensors: each rank has some rows of each. A layer's weights are gathered while it computes; all others, whenever `module`
    computes. In 16-bit precision they are gathered in that precision, and gradients are summed in fp32.

    The optimizer gets this rank's rows as plain tensors, which share memory with the model's: every elementwise optimizer works
    as on whole weights.

    Args:
        module: the model and its loss, on its device; it is sharded in place, and its forward pass becomes collective.
        kind: the value of `config.fsdp`.
        places: where the weights are stored, if they are still on the meta device: each rank reads its rows.

    Raises UserError if the ranks cannot be divided into nodes of equal size, or a weight cannot be sharded.
    """

    def __init__(self, module: CausalLMLoss, runtime: Runtime, kind: str, places: unloaded.Places | None = None):
        mesh = _mesh(runtime, kind)
        policy = MixedPrecisionPolicy(
            param_dtype=None if runtime.precision == "fp32" else runtime.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        try:
            for layer in layers(module.model)[1]:
                fully_shard(layer, mesh=mesh, reshard_after_forward=kind != "shard_grad_op", mp_policy=policy)
            fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise UserError(f"fsdp: the weights of {type(module.model).__name__} cannot be sharded: {error}") from None
        register_fsdp_forward_method(module, "call")
        module.register_forward_hook(_reshard_without_backward)
        if places:
            unloaded.allocate(module, runtime.device)
            unloaded.read(module.model, places)
        super().__init__(module)
        self.parameters = [nn.Parameter(parameter.detach().to_local()) for parameter in self.in_model]
        self._group = mesh.get_group(mesh.ndim - 1)

    def build_optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """The optimizer that `config` names, for this rank's rows of each weight."""
        optimizer = super().build_optimizer(config)
        local = dict(zip(map(id, self.in_model), self.parameters, strict=True))
        self._in_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for group in optimizer.param_groups:
            group["params"] = [local[id(parameter)] for parameter in group["params"]]
        return optimizer

    def take_gradients(self, scaled: bool) -> None:
        """Hand the summed gradients to the optimizer's tensors. A scaled one that overflows on a rank does so on all."""
        for sharded, local in zip(self.in_model, self.parameters, strict=True):
            local.grad = None if sharded.grad is None else sharded.grad.to_local()
            sharded.grad = None
        if scaled:
            gradients = self._gradients()
            overflow = get_total_norm(gradients) * 0  # 0 or NaN
            dist.all_reduce(overflow, group=self._group)
            torch._foreach_add_(gradients, overflow)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients in place; returns the L2 norm of all ranks' gradients before, a scalar on the device."""
        squares = get_total_norm(self._gradients()).square()
        dist.all_reduce(squares, group=self._group)
        norm = squares.sqrt()
        clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def call(self, action: Callable[[nn.Module], Result]) -> Result:
        """`action(model)`, which may call the model as transformers loaded it. Collective: all ranks must do the same."""
        mistakes: list[UserError] = []

        def attempt(model: nn.Module) -> Result | None:
            try:
                return action(model)
            except UserError as error:  # must not leave a forward pass half done
                mistakes.append(error)
                return None

        result = self.module.call(attempt)
        _reshard(self.module)
        if mistakes:
            raise mistakes[0]
        return result

    def as_saved(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the optimizer's state for parameter number `index`: a DTensor if it has an element for each weight."""
        parameter = self._in_optimizer[index]
        if tensor.shape != parameter.to_local().shape:
            return tensor
        return DTensor.from_local(
            tensor,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def weights_of(module: CausalLMLoss, runtime: Runtime, kind: str, places: unloaded.Places | None) -> Weights:
    """The weights of `module`, sharded if the ranks share them; see `ShardedWeights`."""
    return ShardedWeights(module, runtime, kind, places) if runtime.sharded else Weights(module)


def _reshard_without_backward(module: nn.Module, inputs, output) -> None:
    """A forward hook: weights that stay gathered until the backward pass are given back if there will be none."""
    if not torch.is_grad_enabled():
        _reshard(module)


def _reshard(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _mesh(runtime: Runtime, kind: str) -> DeviceMesh:
    """The ranks that share the weights; in a second dimension the nodes, each of which holds them once, for `hybrid_shard`."""
    world, device = runtime.world_size, runtime.device.type
    if kind != "hybrid_shard":
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % local:
        raise UserError(f"fsdp hybrid_shard: {world} ranks are not nodes of {local} ranks each; take full_shard")
    return init_device_mesh(device, (world // local, local), mesh_dim_names=("replicate", "shard"))
