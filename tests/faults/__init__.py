"""What a run must survive: faults made on purpose, each replayed by its seed."""
