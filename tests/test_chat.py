"""Answers on standard output, and the prompt line in a pseudo-terminal."""

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, STORIES, needs_stories, run_script

from mori.cli import UserError, parse
from mori.config import GenerateConfig
from mori.generation.chat import answer

PUBLISHED = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


@pytest.fixture
def run(capsys):
    """What `scripts/generate.py` does with these flags; returns its standard output and standard error."""

    def run_answer(*flags) -> tuple[str, str]:
        answer(parse(GenerateConfig, "", list(map(str, flags))), torch.device("cpu"))
        return capsys.readouterr()

    return run_answer


@needs_stories
def test_answer_greedy_gives_the_published_text(run):
    out, _ = run("--model", STORIES, "--prompt", "", "--temperature", "0", "--max_new_tokens", "200", "--json")
    [completion] = json.loads(out)
    assert completion["text"].startswith(PUBLISHED) and completion["prompt"] == ""


def test_script_json_is_the_whole_standard_output(small_model, run):
    words = ("--prompt", "Halo", "Apa", "--num_return_sequences", "2", "--max_new_tokens", "3", "--seed", "5", "--json")
    result = run_script("generate.py", "--model", small_model, *words)
    completions = json.loads(result.stdout)
    assert [completion["prompt"] for completion in completions] == ["Halo", "Halo", "Apa", "Apa"]
    assert all(set(entry) == {"prompt", "text", "new_token_ids", "finish_reason"} for entry in completions)
    assert run("--model", small_model, *words)[0] == result.stdout
    shown, _ = run("--model", small_model, *words[:-1])
    assert shown == f"\n{'-' * 40}\n".join(entry["prompt"] + entry["text"] for entry in completions) + "\n"


def test_answer_streams_a_single_text(small_model, run):
    words = ["--model", small_model, "--max_new_tokens", "8", "--seed", "3", "--prompt", "Halo"]
    [completion] = json.loads(run(*words, "--json")[0])
    assert run(*words)[0] == "Halo" + completion["text"] + "\n"


def test_answer_reads_prompt_file(small_model, tmp_path, run):
    words = ["--model", small_model, "--max_new_tokens", "8", "--json"]
    path = tmp_path / "prompts.txt"
    path.write_text("Halo\n\nApa kabar\n", encoding="utf-8")
    completions = json.loads(run(*words, "--prompt_file", path)[0])
    assert [completion["prompt"] for completion in completions] == ["Halo", "Apa kabar"]
    assert completions[0] == json.loads(run(*words, "--prompt", "Halo")[0])[0]
    path.write_text("\n", encoding="utf-8")
    for missing in (path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=missing.name):
            run(*words, "--prompt_file", missing)


def test_answer_splits_a_prompt_file_at_line_breaks_only(small_model, tmp_path, run):
    path = tmp_path / "prompts.txt"
    lines = ["--- Judul  ", "a\x0cb\x0bc", "d\x85e\u2028f\x1cg", "h"]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines[:2]).encode() + b"\r\n\n" + "\n".join(lines[2:]).encode())
    out, _ = run("--model", small_model, "--max_new_tokens", 2, "--json", "--prompt_file", path)
    assert [completion["prompt"] for completion in json.loads(out)] == lines


def test_answer_advises_to_crop_a_long_prompt(small_model, run):
    with pytest.raises(UserError, match="context is 64; shorten the prompt, or drop its beginning with --crop_prompt"):
        run("--model", small_model, "--prompt", "halo semua " * 90)


def test_script_json_escapes_what_the_terminal_cannot_show(small_model):
    words = ("--model", small_model, "--prompt", "Héé ★", "--json", "--max_new_tokens", "1")
    result = run_script("generate.py", *words, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.stdout.isascii() and json.loads(result.stdout)[0]["prompt"] == "Héé ★"


def test_prompt_line_refuses_bytes_that_are_no_text_and_goes_on(small_model):
    script = str(ROOT / "scripts" / "generate.py")
    command = [sys.executable, script, "--interactive", "--model", str(small_model), "--max_new_tokens", "3"]
    lines = b"caf\xe9\n/stop_strings \\n 'a b'\nHalo\n"
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=lines, capture_output=True, env=env)
    shown = done.stdout.decode()
    assert done.returncode == 0 and "error: the line is not utf-8 text" in shown
    assert "stop_strings ['\\n', 'a b']" in shown and "\nHalo" in shown and ">" not in shown


def test_answer_shows_the_settings_of_the_model(small_model, tmp_path, run):
    shutil.copytree(small_model, tmp_path / "brain")
    path = tmp_path / "brain" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 0.6, "top_k": 40}))
    _, err = run("--model", tmp_path / "brain", "--prompt", "Halo", "--top_k", "3", "--max_new_tokens", "3")
    assert "generation_config.json: temperature 0.6 (flags take precedence)" in err


@pytest.mark.parametrize(
    "model, message",
    [
        ("mini", "to be trained"),
        ("./none", "does not exist"),
        ("mori_brain_final", "mori_brain_final does not exist in .*; mori train writes it"),
    ],
)
def test_answer_model_that_cannot_answer_is_one_line(model, message, run):
    with pytest.raises(UserError, match=message) as error:
        run("--model", model)
    assert "\n" not in str(error.value)


def test_answer_names_a_checkpoint_of_a_run_folder(run_train, run, tmp_path):
    run_train(max_steps=2)
    folder = tmp_path / "runs" / "run"
    with pytest.raises(
        UserError, match=f"{folder} is the folder of a run; .*such as {folder}/checkpoints/step-00000002$"
    ):
        run("--model", folder, "--prompt", "Halo")
    assert "\nHalo" in run("--model", folder / "checkpoints" / "step-00000002", "--prompt", "Halo")[0]


def test_script_says_that_it_waits_for_prompts_on_an_open_pipe(small_model):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "generate.py"),
        "--model",
        str(small_model),
        "--max_new_tokens",
        "2",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline().startswith(b"waiting for prompts on standard input")
        out, _ = process.communicate(b"Halo\n")
    assert process.returncode == 0 and out.startswith(b"Halo")


def test_script_mistake_is_one_line():
    result = run_script("generate.py", "--model", "mini")
    assert result.returncode == 2 and "to be trained" in result.stderr
    assert result.stderr.count("\n") == 2 and result.stderr.startswith("mori ") and not result.stdout


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
            preexec_fn=_open_terminal,
        )
        os.close(screen)
        self.shown = ""

    def send(self, keys: str) -> None:
        """Press keys."""
        self.shown = ""
        os.write(self.keys, keys.encode())

    def until(self, text: str, seconds: float = 120) -> str:
        """Wait for `text`; returns all that was shown since the last keys."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} was not shown: {self.shown[-500:]!r}"
            self._read()
        return self.shown

    def press_until(self, key: str, text: str) -> None:
        """Press a key until `text` is shown: a Ctrl-C is lost if input() does not wait for keys yet."""
        for _ in range(60):
            self.send(key)
            with contextlib.suppress(AssertionError):
                self.until(text, seconds=2)
                return
        raise AssertionError(f"{text!r} was not shown: {self.shown!r}")

    def wait_for_characters(self, count: int) -> None:
        """Wait until `count` characters are shown."""
        end = time.monotonic() + 120
        while len(self.shown) < count:
            assert time.monotonic() < end, self.shown
            self._read()

    def _read(self) -> None:
        if select.select([self.keys], [], [], 0.2)[0]:
            self.shown += os.read(self.keys, 4096).decode(errors="replace")

    def reply(self, line: str) -> str:
        """Type a line; returns the text between its echo and the next prompt."""
        self.send(line + "\r")
        self.until("\n")
        shown = self.until("\n> ")
        return shown.replace("\r", "").partition("\n")[2].rpartition("\n> ")[0]


def _open_terminal():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a child of a shell script's `&`: Ctrl-C must work there too
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C becomes a signal to this program


@pytest.fixture
def terminal(small_model):
    opened = Terminal("--model", str(small_model), "--max_new_tokens", "6", "--on_full_context", "slide")
    opened.until("> ")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.keys)


def test_prompt_line_commands_and_history(terminal):
    first = terminal.reply("Halo semua")
    assert first.startswith("Halo semua") and len(first) > len("Halo semua")
    assert terminal.reply("Halo semua") == first
    assert terminal.reply("/temperature 0.7") == "temperature 0.7"
    assert terminal.reply("/temperature") == "temperature 0.7"
    assert "temperature 0.7" in terminal.reply("/settings")
    again = terminal.reply("/again")  # the next seed
    assert again.startswith("Halo semua") and again != first
    assert terminal.reply("/seed 0") == "seed 0"
    assert terminal.reply("/temperature 1") == "temperature 1.0"
    terminal.send("\x1b[A" * 3)  # three lines up in the history
    terminal.until("again")
    terminal.send("\x1b[A" * 4 + "\r")
    assert first.split("\n")[0] in terminal.until("\n> ").replace("\r", "")
    assert "/foo is no command; /help" in terminal.reply("/foo 3")
    assert "did you mean /temperature?" in terminal.reply("/temprature 3")
    assert terminal.reply("/stop_strings a") == "stop_strings ['a']"
    assert terminal.reply("/stop_strings") == "stop_strings []"
    terminal.reply("/top_k 3")
    assert "top_k" not in terminal.reply("/reset") and "top_k" not in terminal.reply("/settings")
    assert "top_p is 7.0" in terminal.reply("/top_p 7")
    assert "must be a whole number" in terminal.reply("/top_k many")
    assert "/again" in terminal.reply("/help")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0


def test_prompt_line_ctrl_c_stops_the_answer_only(terminal):
    terminal.reply("/max_new_tokens 1000000")
    terminal.reply("/suppress_tokens 0")  # the end of the text
    terminal.send("Halo\r")
    terminal.wait_for_characters(100)
    terminal.send("\x03")
    terminal.until("(stopped)\r\n> ")
    terminal.send("half a line")
    terminal.until("half a line")
    terminal.press_until("\x03", "(stopped)\r\n> ")  # at the prompt it clears the line
    assert terminal.reply("/max_new_tokens 3") == "max_new_tokens 3"
    assert terminal.reply("Apa").startswith("Apa")
    terminal.send("\x04")
    assert terminal.process.wait(30) == 0


def test_script_answers_each_line_of_a_pipe(small_model):
    words = ("--model", str(small_model), "--max_new_tokens", "3")
    asked = run_script("generate.py", *words, "--prompt", "Halo", "Apa")
    assert run_script("generate.py", *words, input="Halo\n\nApa\n").stdout == asked.stdout
    chat = run_script("generate.py", *words, "--interactive", input="Halo\nApa\n")
    assert chat.returncode == 0 and chat.stdout == asked.stdout.replace(f"\n{'-' * 40}\n", "\n")
    assert run_script("generate.py", *words, "--interactive", input="/exit\nHalo\n").stdout == ""
