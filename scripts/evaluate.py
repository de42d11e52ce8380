#!/usr/bin/env python
"""How well a model predicts a text: loss, perplexity, bits per byte."""

from mori.cli import parse, run_script
from mori.config import EvaluateConfig
from mori.speed.startup import imports


def main():
    config = parse(EvaluateConfig, __doc__)
    from mori.data.files import find_files

    find_files(config.corpus)  # reports a missing file before the import of torch, which takes seconds
    with imports():
        from mori.evaluate import evaluate_text

    evaluate_text(config)


if __name__ == "__main__":
    run_script("evaluate.py", main)
