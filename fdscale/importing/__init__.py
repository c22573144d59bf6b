"""Checkpoints of the official implementations as student files."""
