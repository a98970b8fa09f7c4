"""Bytes between the files of checkpoints and buffers in memory."""
