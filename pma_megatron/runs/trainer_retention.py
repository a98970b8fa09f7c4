"""What a run's own trainer deletes of its checkpoints, as far as the newest one says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.schema import is_count
from pma_megatron.formats.trainers.nvidia import RUN_CONFIG
from pma_megatron.runs.describe import args_of
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of

_MAX_BYTES = 16 << 20
_OF_BRIDGE = re.compile(r"^checkpoint:\n(?:[ #].*\n|\n)*? +most_recent_k: *(\d{1,9}) *$", re.M)
"""In `run_config.yaml`, as PyYAML writes it; -1 keeps all."""


def trainer_retention(newest: CheckpointRef) -> str | None:
    """A sentence on checkpoints that the trainer deletes; None if it says nothing of any.

    Megatron-LM keeps its arguments in each checkpoint (`save_retain_interval`), Megatron-Bridge its
    configuration beside it (`checkpoint.most_recent_k`). Where they cannot be read, it says so.
    """
    try:
        args = args_of(path_of(newest.path))
        every = args.get("save_retain_interval")
        if is_count(every) and every > 0:
            return (
                f"training deletes checkpoints by itself: save_retain_interval = {every} leaves "
                "multiples of it, and the newest"
            )
        most = _most_recent(path_of(newest.folder) / RUN_CONFIG, args)
    except CheckpointError as error:
        return f"whether training deletes checkpoints by itself is not known ({error})"
    if most is not None:
        return (
            f"training deletes checkpoints by itself: most_recent_k = {most} leaves so many of "
            "the newest"
        )
    return None


def recovers_by_itself(newest: CheckpointRef) -> bool:
    """Whether the run goes back to its own checkpoints after a loss spike (`pma_recover`).

    Raises:
        CheckpointError: it cannot be read, so nothing is known of that.
    """
    return args_of(path_of(newest.path)).get("pma_recover") is True


def _most_recent(path: Path, args: dict[str, Any]) -> int | None:
    said = args.get("most_recent_k")
    if is_count(said):
        return int(said)
    try:
        found = _OF_BRIDGE.search(read_source_file(path, _MAX_BYTES).decode())
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text") from error
    return None if found is None else int(found[1])
