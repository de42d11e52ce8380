"""State <-> disk."""
