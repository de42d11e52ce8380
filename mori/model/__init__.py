"""Load and save a model; the model with its loss."""
