"""Several ranks under torchrun, of which one is killed, stopped, broken or told to leave."""

import os
import subprocess
import time
from pathlib import Path

from mori.checkpoint import checkpoints as checkpoint

from .common import Case, Lab, end, row, torchrun, workers

TIMEOUT = 10  # seconds; `--ddp_timeout`


def one_of_many(lab: Lab, full: bool, seed: int) -> list[dict]:
    """Something happens to one rank: the others notice, all are started again, and the end is bit-identical."""
    cases, started = [], time.perf_counter()
    kinds = ("SIGKILL", "SIGSTOP", "exception", "SIGTERM") if full else ("SIGKILL",)
    for ranks in (2, 4) if full else (2,):
        whole = lab.whole(ranks, ddp_timeout=TIMEOUT)
        for kind in kinds:
            for place in ("step", "save") if full else ("save",):
                for rank in (0, ranks - 1) if full else (0,):
                    problem, noticed = _struck(lab, ranks, kind, rank, place, whole)
                    cases.append(
                        Case(
                            f"{kind} to rank {rank} of {ranks} in a {place}, noticed in {noticed:.1f} s", seed, problem
                        )
                    )
                    lab.drop("struck")
    title = f"one of 2 or 4 ranks killed, stopped, broken, told to leave; torchrun --max-restarts goes on (--ddp_timeout {TIMEOUT})"
    return [row(title, seed, cases, started)]


def _struck(lab: Lab, ranks: int, kind: str, rank: int, place: str, whole: dict) -> tuple[str, float]:
    config, at = lab.config("struck", ddp_timeout=TIMEOUT), lab.folder / "struck-at"
    at.unlink(missing_ok=True)
    os.environ |= {"FAULT": f"{kind}:{rank}:{place}", "FAULT_AT": str(at)}
    with (lab.folder / "struck.out").open("w") as output:
        process = torchrun(
            config, ranks, "--max-restarts=2", script="tests/faults/rank_worker.py", stdout=output, stderr=output
        )
        try:
            noticed = _until_noticed(process, at)
            code = process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            code, noticed = None, 0.0
        finally:
            end(process)
    text = (lab.folder / "struck.out").read_text(errors="replace")
    if code != 0 or not at.exists():
        return f"code {code}: {text[:6000]}", noticed
    allowed = {"SIGKILL": 5, "exception": 5, "SIGTERM": 10, "SIGSTOP": TIMEOUT + 5}[kind]
    if noticed > allowed:
        return f"noticed after {noticed:.1f} s", noticed
    for folder in checkpoint.published(lab.checkpoints("struck")):
        checkpoint.verify(folder)
    return lab.differs("struck", whole), noticed


def _until_noticed(process: subprocess.Popen, at: Path) -> float:
    """Seconds from the fault until another rank has left."""
    while not at.exists() or not at.read_text():
        if process.poll() is not None:
            return 0.0
        first = workers(process)
        time.sleep(0.02)
    when, struck = at.read_text().split()
    others = [pid for pid in first if pid != int(struck)]
    while all(_alive(pid) for pid in others) and process.poll() is None and time.time() - float(when) < 120:
        time.sleep(0.02)
    return time.time() - float(when)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


CAMPAIGNS = [one_of_many]
