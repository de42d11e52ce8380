#!/usr/bin/env python
"""Continue a prompt with a trained model: `mori generate`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("generate", "generate.py")
