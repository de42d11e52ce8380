"""A rank on a host of the network: trains as `scripts/train.py` does, but steps take their time and are recorded.

STEPS_FILE gets a JSON line for each event. STEP_SECONDS is the time of a step. The save of step SLOW_SAVE waits SAVE_SECONDS
before it is published.
"""

import json
import os
import time
from pathlib import Path

from mori import distributed
from mori.checkpoint import writing
from mori.cli import run_script
from mori.config import TrainConfig
from mori.data.windows import Batches
from mori.train import train


def record(event: str, **values) -> None:
    """Add a line to STEPS_FILE."""
    line = {"at": time.time(), "event": event, "rank": int(os.environ["RANK"]), "of": int(os.environ["WORLD_SIZE"])}
    with open(os.environ["STEPS_FILE"], "a") as file:
        file.write(json.dumps({**line, **values}) + "\n")


def launched_at() -> float:
    """When this process was started, by `time.time`."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def work(fields: dict) -> None:
    """Train with these fields of the config; exits with the script's code."""
    record("started", launched=launched_at())
    start, publish, windows_of = distributed.start, writing.publish, Batches.__getitem__
    round_of: list[float] = []  # the same number on all ranks that train together

    def joined(*arguments, **keywords):
        runtime = start(*arguments, **keywords)
        round_of.append(runtime.from_main(time.time()))
        record("joined", round=round_of[0])
        return runtime

    def windows(batches: Batches, step: int) -> list[list[int]]:
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        groups = windows_of(batches, step)
        record("step", round=round_of[0], step=step, windows=[index for group in groups for index in group])
        return groups

    def slow_publish(root: Path, step: int, *arguments, **keywords):
        if step == int(os.environ.get("SLOW_SAVE", -1)):
            record("saving", step=step)
            time.sleep(float(os.environ["SAVE_SECONDS"]))
        folder = publish(root, step, *arguments, **keywords)
        record("saved", step=step)
        return folder

    distributed.start, writing.publish, Batches.__getitem__ = joined, slow_publish, windows
    run_script("train.py", lambda: train(TrainConfig(**fields)) and None)


if __name__ == "__main__":  # of torchrun
    work(json.loads(os.environ["FIELDS"]))
