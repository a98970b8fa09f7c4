"""Words for the log of a training job: on standard output, where Megatron prints its own."""

from __future__ import annotations

import sys

import torch.distributed as dist


def say(text: str, *, rank: int = 0) -> None:
    """Write a line from one rank (-1: the last)."""
    active = dist.is_available() and dist.is_initialized()
    mine, size = (dist.get_rank(), dist.get_world_size()) if active else (0, 1)
    if mine == rank % size:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
