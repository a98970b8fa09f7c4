"""Real Megatron runs on the CPU, for tests and for the quickstart.

Importing this imports neither megatron-core nor torch and changes nothing; `cpu.install()` and
`TinyTrainer` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pma_megatron.testing.config import TinyConfig
from pma_megatron.testing.faults import FAULT_ENV, Fault, inject
from pma_megatron.testing.ranks import Outcome, RankFailure, RankTimeout, rank_outcomes, run_ranks

if TYPE_CHECKING:
    from pma_megatron.testing.tiny import TinyTrainer

__all__ = [
    "FAULT_ENV",
    "Fault",
    "Outcome",
    "RankFailure",
    "RankTimeout",
    "TinyConfig",
    "TinyTrainer",
    "inject",
    "rank_outcomes",
    "run_ranks",
]


def __getattr__(name: str) -> Any:
    if name == "TinyTrainer":
        from pma_megatron.testing.tiny import TinyTrainer

        return TinyTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
