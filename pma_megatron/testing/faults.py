"""Faults asked for from outside: which stage, on which rank, and what happens there.

A fault travels to child processes in one environment variable, so that it also reaches the ranks of
a `torchrun` job. The code under test reads the variable at its own fault points.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args
from unittest import mock

FAULT_ENV = "PMA_MEGATRON_FAULT"
Action = Literal["raise", "kill", "hang"]


@dataclass(frozen=True)
class Fault:
    """One fault: when `rank` reaches `stage` it raises, kills itself, or hangs.

    Raises ValueError when the stage is empty or holds a colon, the rank is negative, or the action
    is not one of `raise`, `kill`, `hang`.
    """

    stage: str
    rank: int
    action: Action

    def __post_init__(self) -> None:
        if not self.stage or ":" in self.stage:
            raise ValueError(f"fault stage must be a name without ':', not {self.stage!r}")
        if self.rank < 0:
            raise ValueError(f"fault rank must be 0 or more, not {self.rank}")
        if self.action not in get_args(Action):
            raise ValueError(f"fault action must be one of {get_args(Action)}, not {self.action!r}")

    def __str__(self) -> str:
        return f"{self.stage}:{self.rank}:{self.action}"


@contextmanager
def inject(stage: str, *, rank: int, action: Action) -> Iterator[Fault]:
    """Set the fault for processes started inside the block, and restore what was there before."""
    fault = Fault(stage, rank, action)
    with mock.patch.dict(os.environ, {FAULT_ENV: str(fault)}):
        yield fault
