#!/usr/bin/env python
"""Write the report of a run, or compare all runs of a folder: `mori report`."""

from mori.__main__ import run_command

if __name__ == "__main__":
    run_command("report", "report.py")
