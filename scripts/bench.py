#!/usr/bin/env python
"""Run the benchmarks: `mori bench`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("bench", "bench.py")
