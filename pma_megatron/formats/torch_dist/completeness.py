"""Whether a `torch_dist` folder is a whole checkpoint, by its content alone."""

from __future__ import annotations

from pathlib import Path

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete
from pma_megatron.formats.dcp.completeness import damaged_files, newer_shard
from pma_megatron.formats.torch_dist.checkpoint import (
    COMMON_FILE,
    CONFIG_FILE,
    TorchDistCheckpoint,
    not_torch_dist,
)


def completeness(path: Path) -> Incomplete | None:
    """Why the checkpoint at `path` is not whole, or None if it is.

    The order of a save is files, `.metadata`, `metadata.json`, tracker. Whole means that both
    metadata files are there, and that in every file the first and the last item lie where
    `.metadata` says: a file that was cut short, is of another save, or whose end never reached the
    disk has something else there. Times are not looked at: see `written_after`.
    """
    reason = not_torch_dist(path)
    if reason:
        return reason
    try:
        checkpoint = TorchDistCheckpoint(path)
        reason = _other_files(checkpoint)
    except CheckpointError as error:
        return Incomplete.of(error)
    if reason is None and not checkpoint.common_is_entry and not (path / COMMON_FILE).is_file():
        return Incomplete(f"{COMMON_FILE} is missing")
    return reason


def _other_files(checkpoint: TorchDistCheckpoint) -> Incomplete | None:
    return damaged_files(checkpoint, checkpoint.tensors.values(), checkpoint.objects.values())


def written_after(path: Path) -> str | None:
    """What the times of a whole checkpoint cannot rule out, for a warning; None if nothing."""
    return newer_shard(path, CONFIG_FILE)
