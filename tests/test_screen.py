"""What a run shows while it trains: a bar on a terminal or in a notebook, lines of text elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import unicodedata

import pytest
from conftest import ROOT

import mori.output
import mori.train
from mori import optim
from mori.cli import clock, plural, printable
from mori.tracking import throughput
from mori.tracking.loggers import read_metrics
from mori.tracking.progress import figures

VALUES = {
    "train/loss": 3.2096, "train/learning_rate": 4.1e-05, "train/grad_norm": 0.9312, "train/epoch": 0.8, "train/skipped_steps": 0,
    "perf/tokens_per_second": 1234.4,
}  # fmt: skip
# Some steps of a progress without torch; between its two logs a line of standard input is awaited.
PROGRAM = f"""
from mori.tracking.progress import Progress
progress = Progress(0, 200, lambda: 200.0)
for step in range(1, 41):
    if step % 20 == 0 and (line := progress.log(step, {VALUES!r})):
        print(line)
    progress.move(step)
    if step == 20:
        with progress.interrupted():
            print("a text")
        input()
progress.close()
"""
LINE = "(epoch 0.8): loss 3.2096, lr 4.1e-05, grad norm 0.931, 1,234 tokens/s, 3:20 left"


def test_plural_and_clock():
    assert [plural(n, "document") for n in (0, 1, 2, 1234)] == [
        "0 documents", "1 document", "2 documents", "1,234 documents",
    ]  # fmt: skip
    assert plural(2, "batch", "batches") == "2 batches" and plural(1, "batch", "batches") == "1 batch"
    assert [clock(s) for s in (0.4, 7, 200, 3600, 183_799.6)] == ["0:00", "0:07", "3:20", "1:00:00", "51:03:20"]


def test_messages_leave_no_plural_open():
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "mori").rglob("*.py")}
    assert not [str(path) for path, text in texts.items() if re.search(r"\w\(e?s\)", text)]


def test_printable_shows_a_terminal_no_control_characters():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    controls = "".join(map(chr, range(0x110000))).translate(dict.fromkeys(range(0xD800, 0xE000)))
    shown = printable(controls, Terminal())
    assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\t", "\n"}
    assert printable("a\x1b[2J\rHalo \u2014 日\x7f\x9b", Terminal()) == r"a\x1b[2J\rHalo — 日\x7f\x9b"
    assert printable(controls, io.StringIO()) == controls


def test_figures_are_those_that_there_are():
    assert figures({}) == []
    assert figures({"train/loss": float("nan"), "perf/mfu": 0.314, "train/skipped_steps": 1}) == [
        "loss nan", "MFU 31%", "1 step skipped",
    ]  # fmt: skip


def in_terminal(columns: int, later: int | None = None, **environment: str) -> str:
    """What `PROGRAM` draws on a terminal of this width, which is `later` columns wide after its first log."""
    keys, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(terminal)
    shown = ""
    while "a text" not in shown:
        shown += os.read(keys, 4096).decode()
    fcntl.ioctl(keys, termios.TIOCSWINSZ, struct.pack("HHHH", 24, later or columns, 0, 0))
    process.stdin.write(b"\n")
    process.stdin.close()
    try:
        while part := os.read(keys, 4096):
            shown += part.decode()
    except OSError:  # Linux ends a terminal without programs so
        pass
    os.close(keys)
    assert process.wait(60) == 0
    return shown


@pytest.mark.parametrize(
    "columns, shown",
    [
        (40, ["3:20 left"]),
        (60, ["3:20 left", "loss 3.2096", "lr 4.1e-05"]),
        (80, ["3:20 left", "loss 3.2096", "lr 4.1e-05", "grad norm 0.931"]),
        (200, ["3:20 left", "loss 3.2096", "lr 4.1e-05", "grad norm 0.931", "1,234 tokens/s"]),
    ],
)
def test_progress_draws_a_bar_that_fits_the_terminal(columns, shown):
    drawn = in_terminal(columns)
    bars = [line for line in re.split(r"[\r\n]", drawn) if line.startswith("step ")]
    assert max(map(len, bars)) <= columns - len("^C")
    assert bars[0].startswith("step 0/200 |")
    assert any(re.fullmatch(r"step \d+/200 \|[^|]+\| " + re.escape(", ".join(shown)), bar) for bar in bars)
    assert "left" not in bars[-1] and bars[-1].startswith("step 40/200 |")  # the closed bar
    assert "\na text" in drawn.replace("\r", "\n") and LINE not in drawn


def test_progress_follows_a_terminal_that_is_resized():
    drawn = in_terminal(100, later=40).partition("a text")[2]
    bars = [line.rstrip() for line in re.split(r"[\r\n]", drawn) if line.startswith("step 4")]
    assert bars and max(map(len, bars)) <= 40


def test_progress_on_a_dumb_terminal_and_in_a_pipe_is_lines():
    piped = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, input="\n", capture_output=True, text=True)
    assert piped.stderr == ""
    assert piped.stdout == f"step 20/200 {LINE}\na text\nstep 40/200 {LINE}\n"
    assert in_terminal(80, TERM="dumb").replace("\r\n", "\n") == piped.stdout
    # With `| tee`, standard error alone is the terminal.
    keys, terminal = pty.openpty()
    teed = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, input=b"\n", stdout=subprocess.PIPE, stderr=terminal
    )
    os.close(terminal)
    assert teed.stdout.decode() == piped.stdout
    with pytest.raises(OSError):
        os.read(keys, 1)
    os.close(keys)


@pytest.mark.parametrize("ipywidgets", [True, False])
def test_progress_in_a_notebook_is_a_widget_or_lines(ipywidgets):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipywidgets" if ipywidgets else "ipykernel")
    hide = "" if ipywidgets else "import sys; sys.modules['ipywidgets'] = None\n"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(hide + PROGRAM.replace("input()", "")) for _ in range(2)]
    )
    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        texts = "".join(output.get("text", "") for output in cell.outputs)
        widgets = [
            output for output in cell.outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
        ]
        assert "\r" not in texts and "a text\n" in texts
        assert (len(widgets), LINE in texts) == ((1, False) if ipywidgets else (0, True))


def test_throughput_reckons_the_time_left_from_the_means_of_this_process(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    speed = throughput.Throughput(tokens=1000, seconds=1.0)  # of an earlier process

    def spend(seconds: float) -> None:
        now[0] += seconds

    with speed.apart("evaluations"):
        spend(8.0)
    assert speed.seconds_left(100, evaluations=1) is None
    for tokens, seconds in ((40, 10.0), (20, 5.0)):
        speed.start()
        spend(seconds)
        speed.tokens += tokens
        speed.stop()
    with speed.apart("evaluations"):
        spend(4.0)
    assert speed.seconds_left(100, evaluations=3, saves=2) == pytest.approx(100 * 15 / 60 + 3 * (8 + 4) / 2)


def test_train_shows_each_log_and_counts_evaluations_and_saves_in_the_time_left(
    run_train, tmp_path, monkeypatch, capsys
):
    now = [0.0]

    def tick() -> float:
        now[0] += 1e-6  # the measure of the processor's speed divides by a duration
        return now[0]

    monkeypatch.setattr(time, "perf_counter", tick)

    def takes(module, name: str, seconds: float) -> None:
        real = getattr(module, name)

        def slow(*arguments, **keywords):
            now[0] += seconds
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, name, slow)

    takes(optim, "set_learning_rate", 20.0)
    takes(mori.train, "evaluate", 400.0)
    takes(mori.train, "generate", 10.0)
    takes(mori.output, "save", 3000.0)
    run_train(max_steps=10, eval_steps=4, save_steps=3, logging_steps=2)  # evaluates at 4, 8, 10; saves at 3, 6, 9, 10
    output = capsys.readouterr()
    assert "\r" not in output.out + output.err and not output.err
    expected = []
    for values in read_metrics(tmp_path / "runs/run/metrics.jsonl"):
        if "train/loss" in values:
            step = values["step"]
            evaluations, saves = (len([s for s in at if s >= step]) for at in ((4, 8, 10), (3, 6, 9, 10)))
            seconds = (
                (10 - step) * 20 + evaluations * 410 + saves * 3000 * (step > 3)
            )  # the first is still unknown at 2
            figures_ = (
                f"loss {values['train/loss']:.4f}, lr {values['train/learning_rate']:.3g}, "
                f"grad norm {values['train/grad_norm']:.3g}, {values['perf/tokens_per_second']:,.0f} tokens/s"
            )
            mfu = f", MFU {values['perf/mfu']:.0%}" if "perf/mfu" in values else ""
            left = (
                time.strftime("%-H:%M:%S", time.gmtime(seconds))
                if seconds >= 3600
                else time.strftime("%-M:%S", time.gmtime(seconds))
            )
            expected.append(f"step {step}/10 (epoch {values['train/epoch']:.3g}): {figures_}{mfu}, {left} left")
    assert [line for line in output.out.splitlines() if line.startswith("step ") and " (epoch" in line] == expected
    assert len(expected) == 5
