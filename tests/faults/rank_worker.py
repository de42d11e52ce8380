"""What torchrun starts instead of `scripts/train.py`, so that something happens to one rank of the first start.

FAULT is "kind:rank:place": SIGKILL, SIGSTOP, SIGTERM or exception; the rank; step or save. FAULT_AT is a file for the time of it.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mori import optim, output  # noqa: E402
from mori.checkpoint import writing  # noqa: E402
from tests.faults.common import patched  # noqa: E402

kind, rank, place = os.environ["FAULT"].split(":")


def strike() -> None:
    """The fault."""
    Path(os.environ["FAULT_AT"]).write_text(f"{time.time()} {os.getpid()}")
    if kind == "exception":
        raise RuntimeError("a fault of this rank alone")
    os.kill(os.getpid(), getattr(signal, kind))


if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    mine = os.environ["RANK"] == rank
    if place == "save":
        # Rank 0 takes its time over the second save, when all is staged and nothing published; another rank is struck meanwhile.
        slowly = (lambda: (time.sleep(1), strike())) if mine and rank == "0" else lambda: time.sleep(3)
        patched(writing, "publish", 3, slowly)()
        if mine and rank != "0":
            patched(output, "complete_save", 4, strike)()  # twice in each save
    elif mine:
        patched(optim, "set_learning_rate", 7, strike)()

runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
