"""The prompt line, used in a terminal: keys are sent, the screen is read."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT


class Terminal:
    """`scripts/generate.py --interactive` in a pseudo-terminal."""

    def __init__(self, *flags: str):
        self.keys, screen = pty.openpty()
        command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--interactive", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
            preexec_fn=lambda: _own_terminal(),
        )
        os.close(screen)
        self.shown = ""

    def send(self, keys: str) -> None:
        """Press keys."""
        self.shown = ""
        os.write(self.keys, keys.encode())

    def until(self, text: str, seconds: float = 120) -> str:
        """All that is shown until `text` comes."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} never came: {self.shown[-500:]!r}"
            self._read()
        return self.shown

    def press_until(self, key: str, text: str) -> None:
        """Press a key until `text` comes: input() does not see a Ctrl-C of the moment before it waits for keys."""
        for _ in range(60):
            self.send(key)
            try:
                self.until(text, seconds=2)
                return
            except AssertionError:
                pass
        raise AssertionError(f"{text!r} never came: {self.shown!r}")

    def characters(self, count: int) -> None:
        """Wait until so many are shown."""
        end = time.monotonic() + 120
        while len(self.shown) < count:
            assert time.monotonic() < end, self.shown
            self._read()

    def _read(self) -> None:
        if select.select([self.keys], [], [], 0.2)[0]:
            self.shown += os.read(self.keys, 4096).decode(errors="replace")

    def answer(self, line: str) -> str:
        """Type a line; what is shown after its echo until the next prompt."""
        self.send(line + "\r")
        self.until("\n")
        shown = self.until("\n> ")
        return shown.replace("\r", "").partition("\n")[2].rpartition("\n> ")[0]


def _own_terminal():
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as from a script's `&`: Ctrl-C must work all the same
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to this program


@pytest.fixture
def terminal(small_model):
    opened = Terminal("--model", str(small_model), "--max_new_tokens", "6", "--on_full_context", "slide")
    opened.until("> ")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.keys)


def test_a_talk(terminal):
    first = terminal.answer("Halo semua")
    assert first.startswith("Halo semua") and len(first) > len("Halo semua")
    assert terminal.answer("Halo semua") == first
    assert terminal.answer("/temperature 0.7") == "temperature 0.7"
    assert terminal.answer("/temperature") == "temperature 0.7"
    assert "temperature 0.7" in terminal.answer("/settings")
    other = terminal.answer("/again")  # the next seed
    assert other.startswith("Halo semua") and other != first
    assert terminal.answer("/seed 0") == "seed 0"
    assert terminal.answer("/temperature 1") == "temperature 1.0"
    terminal.send("\x1b[A" * 3)  # three lines up in the history
    terminal.until("again")
    terminal.send("\x1b[A" * 4 + "\r")
    assert first.split("\n")[0] in terminal.until("\n> ").replace("\r", "")
    assert "/foo is no command; /help" in terminal.answer("/foo 3")
    assert "top_p is 7.0" in terminal.answer("/top_p 7")
    assert "invalid" in terminal.answer("/top_k many")
    assert "/again" in terminal.answer("/help")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    terminal.answer("/max_new_tokens 1000000")
    terminal.answer("/suppress_tokens 0")  # the end of the text
    terminal.send("Halo\r")
    terminal.characters(100)
    terminal.send("\x03")
    terminal.until("(stopped)\r\n> ")
    terminal.send("half a line")
    terminal.until("half a line")
    terminal.press_until("\x03", "(stopped)\r\n> ")  # at the prompt it clears the line
    assert terminal.answer("/max_new_tokens 3") == "max_new_tokens 3"
    assert terminal.answer("Apa").startswith("Apa")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0
