"""A call of `mori report`."""

from dataclasses import dataclass

from mori.cli import Config, flag


@dataclass
class ReportConfig(Config):
    """A call of `mori report`."""

    group = "report"

    folder: list[str] = flag(
        ["runs"],
        "the folder of a run, or a folder of runs, which are compared; a word without a flag is one too",
        path=True,
        loose=True,
    )
