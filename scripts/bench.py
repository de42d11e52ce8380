#!/usr/bin/env python
"""Measure arms side by side, in fresh processes and in turn: scripts/bench.py decode. The figures go to runs/bench/."""

from mori.config import DecodeBenchConfig, parse, run_door, take_command

COMMANDS = {"decode": DecodeBenchConfig}


def main():
    command, rest = take_command(COMMANDS)
    config = parse(COMMANDS[command], __doc__, rest)
    from mori import bench

    getattr(bench, command)(config)


if __name__ == "__main__":
    run_door("bench.py", main)
