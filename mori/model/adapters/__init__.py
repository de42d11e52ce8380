"""Adapters beside frozen weights: LoRA, and its files."""
