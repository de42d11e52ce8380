#!/usr/bin/env python
"""Fine-tune a causal language model on your own text."""

from mori.config import TrainConfig, parse, run_door


def main():
    config = parse(TrainConfig, __doc__)
    from mori.train import train  # torch is imported only once the flags are right

    train(config)


if __name__ == "__main__":
    run_door("train.py", main)
