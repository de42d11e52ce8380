"""Everything that only a GPU can show, in one command of nine minutes: correctness, then speed. README.md says how to run it."""
