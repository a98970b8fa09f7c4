"""Which snapshots are deleted on a disk so that few stay."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from stat import S_ISDIR

from pma_megatron.base.openfiles import is_folder, is_unreadable, unread
from pma_megatron.base.spelling import named
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.marker import BRANCHES_FILE, Branch, read_snapshot_marker
from pma_megatron.online.branch import outdated
from pma_megatron.online.removal import remove, remove_hidden
from pma_megatron.runs.branches import begun_in, branch_of, given_up
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
    merges and links are not looked at. What cannot be deleted is logged and left; all is where the
    mark of one cannot be read, for what it says decides over the others.

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
    found, said = {}, {}
    begun: Collection[Branch] | None = ()
    try:
        remove_hidden(root)
        folders = [*root.iterdir()]
    except OSError as error:
        _log.warning("no snapshot in %s is deleted: it cannot be listed (%s)", root, error)
        return []
    for folder in folders:
        iteration = iteration_of(folder) or 0
        try:
            if folder.name == BRANCHES_FILE:
                begun = begun_in(root)
            elif is_snapshot(folder):
                found[iteration], said[iteration] = folder, (iteration, branch_of(folder))
        except CheckpointError as error:
            _log.warning("no snapshot that it may speak of is deleted: %s", error)
            if keep or newest is not None:
                return []
    other = {*given_up(said, begun or ()), *abandoned}
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
    """Whether a folder is a thin snapshot, as its mark says; links are not followed.

    Raises:
        CheckpointError: it, or its mark, cannot be read now.
    """
    if iteration_of(folder) is None:
        return False
    try:
        return S_ISDIR(folder.lstat().st_mode) and read_snapshot_marker(folder) is not None
    except (CheckpointError, OSError) as error:
        if not is_unreadable(error):
            return False  # of a later release: not ours to judge
        if isinstance(error, OSError):
            raise unread(folder, error) from error
        raise
