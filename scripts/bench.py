#!/usr/bin/env python
"""Measure arms side by side: scripts/bench.py train | decode | tokenize | startup | memory. Fresh processes, in turn."""

from mori.config import (
    DecodeBenchConfig,
    MemoryBenchConfig,
    StartupBenchConfig,
    TokenizeBenchConfig,
    TrainBenchConfig,
    parse,
    run_door,
    take_command,
)

COMMANDS = {
    "train": TrainBenchConfig,
    "decode": DecodeBenchConfig,
    "tokenize": TokenizeBenchConfig,
    "startup": StartupBenchConfig,
    "memory": MemoryBenchConfig,
}


def main():
    command, rest = take_command(COMMANDS)
    config = parse(COMMANDS[command], __doc__, rest)
    if command == "decode":
        from mori.bench import decode as room
    elif command == "tokenize":
        from mori.bench import tokenize as room
    else:
        from mori.bench import train as room
    getattr(room, command)(config)


if __name__ == "__main__":
    run_door("bench.py", main)
