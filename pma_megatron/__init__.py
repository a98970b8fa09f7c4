"""Average the checkpoints of one pre-training run, shard by shard, into one that resumes.

The verbs of the command line as functions; importing the package loads neither torch nor Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pma_megatron.version import __version__

if TYPE_CHECKING:
    from pma_megatron.coefficients import Coefficients
    from pma_megatron.errors import PmaError
    from pma_megatron.inspection import Inspection, inspect
    from pma_megatron.job import merge, plan
    from pma_megatron.planning import MergePlan
    from pma_megatron.policy import Policy
    from pma_megatron.published import verify
    from pma_megatron.recovery import RecoveryRequest, recover
    from pma_megatron.report import MergeReport
    from pma_megatron.request import MergeRequest, Method
    from pma_megatron.runs.discover import list_checkpoints
    from pma_megatron.runs.refs import CheckpointRef
    from pma_megatron.runs.selection import SelectionRequest

_HOMES = {
    "CheckpointRef": ("runs.refs", "CheckpointRef"),
    "Coefficients": ("coefficients", "Coefficients"),
    "Inspection": ("inspection", "Inspection"),
    "MergePlan": ("planning", "MergePlan"),
    "MergeReport": ("report", "MergeReport"),
    "MergeRequest": ("request", "MergeRequest"),
    "Method": ("request", "Method"),
    "PmaError": ("errors", "PmaError"),
    "Policy": ("policy", "Policy"),
    "RecoveryRequest": ("recovery", "RecoveryRequest"),
    "SelectionRequest": ("runs.selection", "SelectionRequest"),
    "inspect": ("inspection", "inspect"),
    "list_checkpoints": ("runs.discover", "list_checkpoints"),
    "merge": ("job", "merge"),
    "plan": ("job", "plan"),
    "recover": ("recovery", "recover"),
    "verify": ("published", "verify"),
}

__all__ = [
    "CheckpointRef",
    "Coefficients",
    "Inspection",
    "MergePlan",
    "MergeReport",
    "MergeRequest",
    "Method",
    "PmaError",
    "Policy",
    "RecoveryRequest",
    "SelectionRequest",
    "__version__",
    "inspect",
    "list_checkpoints",
    "merge",
    "plan",
    "recover",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "deepspeed":
        return importlib.import_module(f"{__name__}.deepspeed")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
