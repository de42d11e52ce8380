"""Forward and backward pass of a training micro-batch as one CUDA graph: hundreds of launches become one."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from mori.speed.replay import Graph, on_side_stream

_WARM_UP_CALLS = 3  # libraries initialize, and gradients are allocated, before anything is captured


class StepGraph:
    """Calls functions of tensors; captures one that keeps its shapes, and replays it from then on (torch.cuda.CUDAGraph).

    The function must read the same memory at every call, apart from its arguments, and add to gradients in place: between
    replays gradients are zeroed, never freed. Calls of other shapes run as they are.

    Args:
        enabled: whether to capture at all.
        on_failure: called with the error if the calls cannot be captured; they run as they are from then on.
    """

    def __init__(self, enabled: bool, on_failure: Callable[[RuntimeError], None]):
        self.enabled, self._on_failure, self._captures = enabled, on_failure, True
        self.reset()

    def reset(self) -> None:
        """Forget the graph, and free its memory: gradients have been freed or other code is to run."""
        self._graph, self._captured, self._shapes, self._calls = None, None, None, 0

    @contextlib.contextmanager
    def nothing_captured(self) -> Iterator[None]:
        """The context of steps in which every call runs as it is, though gradients are zeroed and not freed."""
        self._captures = False
        try:
            yield
        finally:
            self._captures = True
            self.reset()

    def __call__(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """The scalar `function(*tensors)`; the next call may overwrite it. Out-of-memory errors pass through."""
        if not self.enabled:
            return function(*tensors)
        shapes = [tensor.shape for tensor in tensors]
        if shapes == self._captured:
            return self._graph(*tensors)
        self._calls = self._calls + 1 if shapes == self._shapes else 1
        self._shapes = shapes
        if self._calls <= _WARM_UP_CALLS or not self._captures:
            return self._warm_up(function, tensors)
        self._graph = self._captured = None  # frees its memory first
        try:
            self._graph, self._captured = self._capture(function, tensors), shapes
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.enabled = False
            self._on_failure(error)
            return function(*tensors)
        return self._graph(*tensors)

    def _warm_up(self, function: Callable[..., torch.Tensor], tensors: tuple) -> torch.Tensor:
        return on_side_stream(function, *tensors)

    def _capture(self, function: Callable[..., torch.Tensor], tensors: tuple) -> Callable[..., torch.Tensor]:
        return Graph(function, tensors, warm_up=False)
