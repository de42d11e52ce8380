#!/usr/bin/env python
"""Fine-tune a causal language model on your own text: `mori train`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("train", "train.py")
