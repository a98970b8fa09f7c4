"""Distances and angles between checkpoints (arXiv 2505.12082, section 4.6)."""
