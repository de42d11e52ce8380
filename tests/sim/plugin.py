"""The pytest plugin that installs the simulated device."""

import torch

from mori.checkpoint import writing
from tests.sim import cuda
from tests.sim.device import SimulatedTensor

cuda.install()


def _check_storable(tensors: dict[str, torch.Tensor]) -> None:
    _real({n: t.on_host if isinstance(t, SimulatedTensor) else t for n, t in tensors.items()})


# Checkpoints store plain tensors only, and a tensor of the simulated device is of another class.
_real, writing.check_storable = writing.check_storable, _check_storable
