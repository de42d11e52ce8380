#!/usr/bin/env python
"""Continue a prompt with a trained model."""

from mori.cli import parse, run_script
from mori.config import GenerateConfig
from mori.speed.startup import imports


def main():
    config = parse(GenerateConfig, __doc__)
    with imports():
        from mori.distributed import start
        from mori.generation.chat import answer

    answer(config, start(config.device).device)


if __name__ == "__main__":
    run_script("generate.py", main)
