#!/usr/bin/env python
"""Run the same training with mori and with transformers.Trainer; report their differences, speed and memory."""

from mori.bench.options import CompareConfig
from mori.cli import parse, run_script
from mori.speed.startup import imports


def main():
    config = parse(CompareConfig, __doc__)
    from mori.data.files import find_files

    find_files(config.corpus)  # report a missing file before importing torch, which takes seconds
    with imports():
        from mori.bench.compare import compare

    compare(config)


if __name__ == "__main__":
    run_script("compare.py", main)
