#!/usr/bin/env python
"""Fine-tune a causal language model on your own text."""

from mori.config import TrainConfig, parse, run_door
from mori.speed.startup import imports, training_memory


def main():
    config = parse(TrainConfig, __doc__)
    from mori.data.files import find_files

    find_files(config.corpus)  # a missing file is told before torch is imported, which takes seconds
    with imports(training_memory(config)):
        from mori.train import train

    train(config)


if __name__ == "__main__":
    run_door("train.py", main)
