"""Signals that end a run after the step in progress."""

import contextlib
import os
import signal
import threading
import time

_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")  # Windows has the first two and the last


class StopSignals:
    """Records SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 instead of dying of them; `received` is the name of the first.

    Until `defer` is called there is nothing to save, and a signal raises KeyboardInterrupt. Afterwards a second Ctrl-C does so.
    `torchrun` forwards a signal to workers that have it from the terminal already, so a second one within a second counts as
    the same. A SIGHUP that `nohup` ignores stays ignored. Outside the main thread Python allows no handlers, and none are
    installed.
    """

    def __init__(self):
        self.received, self._at, self._before, self._deferred = "", 0.0, {}, False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _STOP_SIGNALS if hasattr(signal, name)):
                if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def defer(self, deferred: bool = True) -> None:
        """From now on the caller reads `received`, and stops when its step is saved; or a signal raises KeyboardInterrupt again."""
        self._deferred = deferred

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
            if not self._deferred:
                raise KeyboardInterrupt
            text = f"\n{self.received}: finishing and saving this step first (Ctrl-C again exits at once)\n"
            with contextlib.suppress(OSError):  # `| tee` may have died of the same Ctrl-C
                os.write(
                    2, text.encode()
                )  # print() is not reentrant; a notebook shows this file, but has no sys.stderr.fileno()
        elif number == signal.SIGINT and time.monotonic() - self._at > 1:
            raise KeyboardInterrupt
