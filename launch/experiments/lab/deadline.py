"""When work has to stop, so that a lent machine can be given back: known to every process of it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

_EVERY = 10  # steps between two looks: each is a message between the ranks
_until_s: float | None = None


def stop_at(until_s: float | None) -> None:
    """Stop at this time of `time.monotonic`, which all processes share; None: never."""
    global _until_s
    _until_s = until_s


def is_over(iteration: int = 0) -> bool:
    """Whether to stop after a step or job. All ranks make this call, and get the same answer."""
    if _until_s is None or iteration % _EVERY:
        return False
    over = torch.tensor(float(time.monotonic() >= _until_s))
    dist.all_reduce(over, op=dist.ReduceOp.MAX)
    return bool(over)
