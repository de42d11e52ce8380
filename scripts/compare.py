#!/usr/bin/env python
"""Run the same training with mori and with transformers.Trainer: `mori compare`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("compare", "compare.py")
