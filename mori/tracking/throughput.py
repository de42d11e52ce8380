"""Tokens per second of training, and the time that a run still takes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class Throughput:
    """Tokens per second of training alone: the clock stops during evaluation and saving.

    Args:
        tokens, seconds: the totals of the run so far, from its checkpoint.
    """

    def __init__(self, tokens: int = 0, seconds: float = 0.0):
        self.tokens, self.seconds, self.waited = tokens, seconds, 0.0
        self._last_totals = self._first_totals = tokens, seconds, 0.0
        self._started = None
        self._seconds_apart: dict[str, list[float]] = defaultdict(list)

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

    @contextlib.contextmanager
    def apart(self, work: str) -> Iterator[None]:
        """Measure work beside the training, such as an evaluation, for `seconds_left`."""
        began = time.perf_counter()
        yield
        self._seconds_apart[work].append(time.perf_counter() - began)

    def seconds_left(self, tokens: int, **apart: int) -> float | None:
        """The time to train on `tokens` more, and to do other work as often as `apart` says (`evaluations=3, saves=2`).

        It is reckoned from the means of this process; work that it has not done yet counts as 0. None before the first step.
        """
        done, seconds = (
            total - first for total, first in zip((self.tokens, self.seconds), self._first_totals[:2], strict=True)
        )
        if not done:
            return None
        means = {work: sum(times) / len(times) for work, times in self._seconds_apart.items()}
        return tokens * seconds / done + sum(count * means.get(work, 0.0) for work, count in apart.items())

    def since_last(self) -> tuple[float, float]:
        """Tokens per second since the last call, and the share of that time spent `waiting`."""
        if self._started is not None:
            self.stop()
            self.start()
        totals = self.tokens, self.seconds, self.waited
        tokens, seconds, waited = (total - last for total, last in zip(totals, self._last_totals, strict=True))
        self._last_totals = totals
        return (tokens / seconds, waited / seconds) if seconds else (0.0, 0.0)
