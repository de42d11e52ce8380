#!/usr/bin/env python
"""Benchmarks: scripts/bench.py train | decode | tokenize | startup | memory. Each arm runs in new processes, in turn."""

from mori.bench.options import COMMANDS
from mori.cli import parse, run_script, take_command


def main():
    command, arguments = take_command(COMMANDS)
    config = parse(COMMANDS[command], __doc__, arguments)
    if command == "decode":
        from mori.bench.decode import decode as benchmark
    elif command == "tokenize":
        from mori.bench.tokenize import tokenize as benchmark
    else:
        from mori.bench import train as benchmarks

        benchmark = getattr(benchmarks, command)
    benchmark(config)


if __name__ == "__main__":
    run_script("bench.py", main)
