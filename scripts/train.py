#!/usr/bin/env python
"""Fine-tune a causal language model on your own text."""

from mori.cli import parse, run_script
from mori.config import TrainConfig
from mori.speed.startup import imports


def main():
    config = parse(TrainConfig, __doc__)
    from mori.data.files import find_files

    find_files(config.corpus)  # reports a missing file before the import of torch, which takes seconds
    with imports():
        from mori.train import train

    train(config)


if __name__ == "__main__":
    run_script("train.py", main)
