#!/usr/bin/env python
"""Score a text with a model by loss, perplexity and bits per byte: `mori evaluate`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("evaluate", "evaluate.py")
