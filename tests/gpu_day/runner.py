"""Runs the parts: each in a process with a time limit, its results in `results.jsonl` as soon as it ends."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from tests.gpu_day import table
from tests.gpu_day.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
_MARK = "@@ "  # before a line of results; see common.say
_LOG_BYTES = 12 << 20


def run_part(name: str, task: dict) -> None:
    """In a part's own process: do it."""
    from tests.gpu_day.common import Task

    part = PARTS[name]
    module, function = part.function.split(".")
    task = Task(**{**task, "place": Path(task["place"]), "out": Path(task["out"])})
    getattr(importlib.import_module(f"tests.gpu_day.{module}"), function)(task, **part.arguments)


class Runner:
    """One call: which parts, until when, and what they have given so far.

    Args:
        options: those of the command line, see `__main__`.
        started: when the command began, by `time.monotonic()`.
    """

    def __init__(self, options, started: float):
        self.options, self.started = options, started
        self.out, self.work = Path(options.out).resolve(), Path(tempfile.mkdtemp(prefix="gpu-day-"))
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = _environment(options.dry)
        self.results: dict[str, dict] = {}
        self._running: dict[str, subprocess.Popen] = {}
        self._lock, self._stopped = threading.Lock(), False

    @property
    def left(self) -> float:
        """The seconds until the deadline; 0 after a signal."""
        return 0.0 if self._stopped else self.options.deadline - (time.monotonic() - self.started)

    def run(self, names: list[str]) -> None:
        """Do the parts: those that may share the machine side by side, then the others one by one."""
        signal.signal(signal.SIGTERM, self._stop)
        shared = [name for name in names if not PARTS[name].alone]
        if shared[:1] == ["machine"]:
            self._safely(shared.pop(0))
        threads = [threading.Thread(target=self._work, args=(shared,)) for _ in range(self.options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in names:
            if PARTS[name].alone:
                self._safely(name)
        shutil.rmtree(self.work, ignore_errors=True)

    def _stop(self, *_) -> None:
        """End at once, with the table of what there is."""
        self._stopped = True
        for process in list(self._running.values()):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

    def _work(self, queue: list[str]) -> None:
        while True:
            with self._lock:
                if not queue:
                    return
                name = queue.pop(0)
            self._safely(name)

    def _safely(self, name: str) -> None:
        try:
            status, seconds, printed = self._run(name)
            self._keep(name, result_of(status, seconds, printed), printed)
        except Exception as error:  # one part must not end the others
            self._keep(name, {"status": "not run", "why": repr(error), "trace": traceback.format_exc()[-1500:]}, "")

    def _run(self, name: str) -> tuple[str, float, str]:
        """Run a part in a process of its own; its status, seconds and output."""
        part, left = PARTS[name], self.left
        if left < part.needs:
            return f"skipped: {left:.0f} s left, {part.needs} needed", 0.0, ""
        limit, place = min(part.limit * self.options.patience, left - 2), self.work / name
        place.mkdir()
        task = {
            "place": str(place), "out": str(self.out), "limit": limit, "device": self.options.device,
            "dry": self.options.dry, "stories": self.options.stories, "corpus": self.options.corpus,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.gpu_day", "--part", name, "--task", json.dumps(task)]
        environment = dict(self.environment)
        if not part.alone:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.options.jobs)))
        started = time.monotonic()
        with (place / "printed.txt").open("w+b") as printed:
            process = subprocess.Popen(
                command, stdout=printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            self._running[name] = process
            try:
                code = process.wait(limit)
                status = "ok" if code == 0 else f"exit {code}"
            except subprocess.TimeoutExpired:
                status = "timeout"
            finally:
                self._running.pop(name)
                _end(process)
            printed.seek(0)
            text = printed.read().decode(errors="replace")
        shutil.rmtree(place, ignore_errors=True)
        return status, time.monotonic() - started, text

    def _keep(self, name: str, result: dict, printed: str) -> None:
        """Append the result to `results.jsonl` and the output to `log.txt`, and print a line."""
        now = round(time.monotonic() - self.started, 1)
        with self._lock:
            self.results[name] = result
            with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": name, "at": now, **result}, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
            with (self.out / "log.txt").open("a", encoding="utf-8", errors="replace") as file:
                if printed and file.tell() < _LOG_BYTES:
                    file.write(f"\n===== {name}: {result['status']}, {result.get('seconds')} s\n{printed[-150_000:]}\n")
            figures = {key: value for key, value in result.items() if key not in ("status", "seconds")}
            text = json.dumps(figures, default=str, ensure_ascii=False)
            print(f"[{now:5.0f} s] {name:18} {result['status']:8} {text[:300]}", flush=True)


def result_of(status: str, seconds: float, printed: str) -> dict:
    """The result of a part: everything that it reported, and the end of its output if it failed."""
    values: dict = {}
    for line in printed.splitlines():
        if line.startswith(_MARK):
            with contextlib.suppress(ValueError):  # a line that was cut when the part was killed
                values.update(json.loads(line.removeprefix(_MARK)))
    wrong = [key for key, value in values.items() if isinstance(value, dict) and value.get("ok") is False]
    if wrong and status == "ok":
        status = "WRONG"
    result = {"status": status, "seconds": round(seconds, 1), **({"wrong": wrong} if wrong else {}), **values}
    if status not in ("ok", "WRONG") and printed:
        lines = [line for line in printed.splitlines() if line.strip() and not line.startswith(_MARK)]
        result["last_lines"] = lines[-6:]
    return result


def _end(process: subprocess.Popen) -> None:
    """End a part and all that it has started: its own process group, and nothing else."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        if number == signal.SIGTERM:
            time.sleep(0.1)


def _environment(dry: bool) -> dict[str, str]:
    """The environment of every part: offline, this checkout first, the compiler's caches in a folder that can be written."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    caches = Path(tempfile.gettempdir()) / "gpu-day-caches"
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    environment.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    if dry:
        environment.setdefault("OMP_NUM_THREADS", "1")
        return environment
    listed = subprocess.run("ldconfig -p | grep -c libcuda.so.1", shell=True, capture_output=True, text=True)
    if listed.stdout.strip() in ("", "0"):  # Triton asks ldconfig for libcuda
        folders = ("/usr/local/nvidia/lib64", "/usr/local/cuda/compat", "/usr/lib/x86_64-linux-gnu")
        for folder in folders:
            if Path(folder, "libcuda.so.1").exists():
                environment.setdefault("TRITON_LIBCUDA_PATH", folder)
    return environment


def finish(runner: Runner) -> bool:
    """Print the table and write `gpu-day.json`; returns whether no check failed."""
    report = table.report(table.read_results([runner.out]), runner.options.commit)
    (runner.out / "gpu-day.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + table.text(report), flush=True)
    return not any("wrong" in result for result in runner.results.values())
