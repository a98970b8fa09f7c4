"""Averaging inside a live DeepSpeed engine.

Importing this imports no DeepSpeed; its modules import it only when they are called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pma_megatron.deepspeed.load import load_merged, pma_init
    from pma_megatron.deepspeed.online import OnlineAverage

_HOMES = {"OnlineAverage": "online", "load_merged": "load", "pma_init": "load"}

__all__ = ["OnlineAverage", "load_merged", "pma_init"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
