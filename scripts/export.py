#!/usr/bin/env python
"""Write a trained model as a file for other programs: `mori export`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("export", "export.py")
