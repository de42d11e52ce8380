"""mori: fine-tune a causal language model on your own text, with a training loop you can read."""

__version__ = "0.1.0"
