#!/usr/bin/env python
"""Do the same training run with mori and with transformers.Trainer, and report where they differ and what they cost."""

from mori.config import CompareConfig, parse, run_door
from mori.speed.startup import imports


def main():
    config = parse(CompareConfig, __doc__)
    from mori.data.files import find_files

    find_files(config.corpus)  # a missing file is told before torch is imported, which takes seconds
    with imports():
        from mori.bench.compare import compare

    compare(config)


if __name__ == "__main__":
    run_door("compare.py", main)
