"""Checkpoints in object stores: what is listed, read by ranges, and put there, by name."""
