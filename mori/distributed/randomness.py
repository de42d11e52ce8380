"""The state of every random generator that a model may use."""

import random

import numpy
import torch


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device."""
    seed %= 2**32  # NumPy's limit
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple:
    """The state of every random generator that a model may use; cheap enough for every step."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Restore the result of `random_state`."""
    python, legacy, cpu, cuda = state
    random.setstate(python)
    numpy.random.set_state(legacy)
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)


def rng_state() -> dict:
    """The result of `random_state` as JSON values."""
    (version, python, gauss), (_, keys, position, has_gauss, cached), cpu, cuda = random_state()
    state = {
        "python": [version, list(python), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
        "torch": cpu.numpy().tobytes().hex(),
    }
    return state if cuda is None else state | {"cuda": cuda.numpy().tobytes().hex()}


def set_rng_state(state: dict) -> None:
    """Restore the result of `rng_state`."""
    version, python, gauss = state["python"]
    keys, position, has_gauss, cached = state["numpy"]
    legacy = ("MT19937", keys, position, has_gauss, cached)
    cuda = _bytes(state["cuda"]) if "cuda" in state else None
    set_random_state(((version, tuple(python), gauss), legacy, _bytes(state["torch"]), cuda))


def _bytes(hexadecimal: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.uint8)
