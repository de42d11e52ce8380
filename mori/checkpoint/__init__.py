"""State <-> disk: durable files, checkpoints, the state of any optimizer."""
