"""Logits -> token -> text."""
