"""Tokens per second of training."""

import contextlib
import time
from collections.abc import Iterator


class Throughput:
    """Tokens per second of training alone: the clock stops during evaluation and saving.

    Args:
        tokens, seconds: the totals of the run so far, from its checkpoint.
    """

    def __init__(self, tokens: int = 0, seconds: float = 0.0):
        self.tokens, self.seconds, self.waited = tokens, seconds, 0.0
        self._last_totals = tokens, seconds, 0.0
        self._started = None

    @property
    def average(self) -> float:
        """Tokens per second since the start."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._started
        self._started = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time to prepare a batch, during which the device may be idle."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def since_last(self) -> tuple[float, float]:
        """Tokens per second since the last call, and the share of that time spent `waiting`."""
        if self._started is not None:
            self.stop()
            self.start()
        totals = self.tokens, self.seconds, self.waited
        tokens, seconds, waited = (total - last for total, last in zip(totals, self._last_totals, strict=True))
        self._last_totals = totals
        return (tokens / seconds, waited / seconds) if seconds else (0.0, 0.0)
