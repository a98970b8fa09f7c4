"""Which snapshots are deleted on a disk so that few stay."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.spelling import named
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.marker import read_snapshot_marker
from pma_megatron.online.branch import outdated
from pma_megatron.online.removal import remove, remove_hidden
from pma_megatron.runs.branches import branch_of, given_up
from pma_megatron.runs.describe import iteration_of

_log = logging.getLogger(__name__)


def prune(
    root: str | Path,
    keep: int,
    needed: Collection[int],
    abandoned: Collection[int] = (),
    newest: int | None = None,
) -> list[Path]:
    """Delete old snapshots below `root`, oldest first (rank 0 only).

    Only folders `iter_*` that are marked as snapshots are ever deleted; Megatron's checkpoints,
    merges and links are not looked at. What cannot be deleted is logged and left.

    Args:
        root: the folder of snapshots.
        keep: how many of the newest stay in any case.
        needed: iterations that a window still needs.
        abandoned: iterations of branches that were given up, beside those that say so: they do not
            count as newest.
        newest: the iteration that training has come to; None for that of the newest snapshot. What
            was given up of later ones stays: a person may want that branch back.

    Returns:
        The folders that are gone.

    Raises:
        UsageError: `keep` is negative.
    """
    if keep < 0:
        raise UsageError(f"{named('keep')} must be 0 or more, got {keep}")
    root = Path(root)
    if not is_folder(root):
        return []
    remove_hidden(root)
    found = {iteration_of(f) or 0: f for f in root.iterdir() if is_snapshot(f)}
    said = {iteration: (iteration, branch_of(folder)) for iteration, folder in found.items()}
    other = {*given_up(said), *abandoned}
    come_to = max({*found} - other, default=0) if newest is None else newest
    gone = []
    for iteration in outdated(found, keep, other, come_to):
        if iteration in needed:
            continue
        folder = found[iteration]
        try:
            remove(folder)
        except OSError as error:
            _log.warning("snapshot %s could not be deleted: %s", folder, error)
        else:
            gone.append(folder)
    return gone


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a thin snapshot, as its mark says; links are not followed."""
    if folder.is_symlink() or not is_folder(folder) or iteration_of(folder) is None:
        return False
    try:
        return read_snapshot_marker(folder) is not None
    except CheckpointError:
        return False  # of a later release: not ours to judge
