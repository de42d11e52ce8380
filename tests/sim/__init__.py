"""A simulated CUDA device, for the tests that need a GPU."""
