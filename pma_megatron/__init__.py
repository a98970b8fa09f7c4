"""Average the checkpoints of one pre-training run, shard by shard, into one that resumes.

The verbs of the command line as functions; importing the package loads neither torch nor Megatron.
"""

from __future__ import annotations

from pma_megatron.version import __version__

TYPE_CHECKING = False  # that of `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from pma_megatron.comparison.compare import compare
    from pma_megatron.comparison.differences import Comparison
    from pma_megatron.errors import PmaError
    from pma_megatron.merging.coefficients import Coefficients
    from pma_megatron.merging.export_job import export_model
    from pma_megatron.merging.inspection import Inspection, inspect
    from pma_megatron.merging.job import merge, plan
    from pma_megatron.merging.planning import MergePlan
    from pma_megatron.merging.policy import Policy
    from pma_megatron.merging.published import verify
    from pma_megatron.merging.report import MergeReport
    from pma_megatron.merging.request import MergeRequest, Method
    from pma_megatron.retention.pruning import PruneReport, prune
    from pma_megatron.retention.request import PruneRequest
    from pma_megatron.runs.discover import list_checkpoints
    from pma_megatron.runs.refs import CheckpointRef
    from pma_megatron.runs.selection_request import SelectionRequest
    from pma_megatron.spikes.recovery import recover
    from pma_megatron.spikes.request import RecoveryRequest
    from pma_megatron.watching.follow import watch
    from pma_megatron.watching.request import WatchRequest

_HOMES = {
    "CheckpointRef": "runs.refs",
    "Coefficients": "merging.coefficients",
    "Comparison": "comparison.differences",
    "Inspection": "merging.inspection",
    "MergePlan": "merging.planning",
    "MergeReport": "merging.report",
    "MergeRequest": "merging.request",
    "Method": "merging.request",
    "PmaError": "errors",
    "Policy": "merging.policy",
    "PruneReport": "retention.pruning",
    "PruneRequest": "retention.request",
    "RecoveryRequest": "spikes.request",
    "SelectionRequest": "runs.selection_request",
    "WatchRequest": "watching.request",
    "compare": "comparison.compare",
    "export_model": "merging.export_job",
    "inspect": "merging.inspection",
    "list_checkpoints": "runs.discover",
    "merge": "merging.job",
    "plan": "merging.job",
    "prune": "retention.pruning",
    "recover": "spikes.recovery",
    "verify": "merging.published",
    "watch": "watching.follow",
}

__all__ = [
    "CheckpointRef",
    "Coefficients",
    "Comparison",
    "Inspection",
    "MergePlan",
    "MergeReport",
    "MergeRequest",
    "Method",
    "PmaError",
    "Policy",
    "PruneReport",
    "PruneRequest",
    "RecoveryRequest",
    "SelectionRequest",
    "WatchRequest",
    "__version__",
    "compare",
    "export_model",
    "inspect",
    "list_checkpoints",
    "merge",
    "plan",
    "prune",
    "recover",
    "verify",
    "watch",
]


_GLUE = ("deepspeed", "fsdp")
"""Folders that are imported when they are named."""


def __getattr__(name: str) -> Any:
    import importlib

    if name in _GLUE:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion: not what this module imports for itself."""
    return sorted([*__all__, *_GLUE])
