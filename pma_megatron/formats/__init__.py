"""Checkpoint formats: where the bytes are, and nothing else."""
