"""The checkpoint that Megatron has resumed from, which its load returns nowhere.

`_load_base_checkpoint` (megatron/training/checkpointing.py) takes the one that --ckpt-step or the
tracker of --load names, unless there is a non-persistent checkpoint of that iteration or a later
one. A global one is named by a tracker of its own, so the iteration that was resumed tells which of
the two it was. A local one lies on the nodes, in files that only its manager reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import as_flag
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats import registry
from pma_megatron.runs.describe import common_at
from pma_megatron.runs.trackers import read_pointers
from pma_megatron.storage.paths import path_of

_SUBFOLDER = "non_persistent"
_TYPE = "non_persistent_ckpt_type"


def refuse_unknown(args: Any, ours: str) -> None:
    """Refuse a job of which nobody could tell what it has resumed.

    Args:
        args: Megatron's arguments.
        ours: flag of what must know it.

    Raises:
        UsageError: saying what to leave out.
    """
    kind = getattr(args, _TYPE, None)
    if kind not in (None, "global"):
        raise UsageError(
            f"{ours} cannot be used with {as_flag(_TYPE)} {kind}: Megatron then resumes from what "
            "lies on the nodes, where nothing tells whether it was saved in a loss spike, or "
            f"descends from an average. Take {as_flag(_TYPE)} global, or leave out one of the two"
        )
    other = getattr(args, "override_ckpt_iteration", None)
    if other is not None:
        raise UsageError(
            f"{ours} cannot be used with {as_flag('override_ckpt_iteration')} {other}: the run's "
            "iterations would no more be those of its checkpoints and of its log of recoveries. "
            "Leave out one of the two"
        )


def resumed_folder(args: Any, iteration: int) -> Path:
    """The folder that Megatron has resumed from, asked before this job has saved anything.

    Args:
        args: Megatron's arguments.
        iteration: that it has resumed; not 0.

    Raises:
        CheckpointError: that cannot be told.
    """
    load, name = path_of(args.load), f"iter_{iteration:07d}"
    kind = getattr(args, _TYPE, None)
    if kind is None:
        return load / name
    if kind != "global":
        raise CheckpointError(
            f"whether Megatron has resumed iteration {iteration} from {load} or from a checkpoint "
            f"on the nodes ({as_flag(_TYPE)} {kind}) is not known"
        )
    passing = getattr(args, "non_persistent_global_ckpt_dir", None)
    other = load / _SUBFOLDER if passing is None else path_of(passing)
    pointer = read_pointers(other)[registry.TORCH_DIST]
    if pointer.named is None and not pointer.missing:
        raise CheckpointError(
            f"{other} {pointer.problem}: whether Megatron has resumed iteration {iteration} from "
            f"there or from {load} is not known"
        )
    return (other if pointer.named == name else load) / name


def resumed_args(folder: Path, iteration: int) -> dict[str, Any]:
    """The arguments in what Megatron has resumed from.

    Args:
        folder: as `resumed_folder`.
        iteration: that was resumed.

    Raises:
        CheckpointError: it cannot be read, or is of another iteration.
    """
    common = common_at(folder)
    found = common["iteration"]
    if found is not None and int(found) != iteration:
        raise CheckpointError(
            f"{folder} holds iteration {found}, and Megatron has resumed {iteration}"
        )
    return dict(common["args"])
