"""A trained model for other programs: GGUF files, the hub."""
