#!/usr/bin/env python
"""Let a model go on from a prompt."""

from mori.cli import parse, run_script
from mori.config import GenerateConfig
from mori.speed.startup import imports


def main():
    config = parse(GenerateConfig, __doc__)
    with imports():
        from mori.generation.chat import speak

    speak(config)


if __name__ == "__main__":
    run_script("generate.py", main)
