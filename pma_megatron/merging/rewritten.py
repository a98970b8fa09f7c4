"""Whether an average is still what was written: the look before it is replaced or deleted.

A trainer that saves a checkpoint of the same model, or whoever fine-tunes an exported model in
place, may write files of the very sizes that were there. `pma.json` is written after the files that
it lists, all but the smallest: what is as new as it, or newer, is read and compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats.manifest import Sums, read_marker
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.merging.folder_checksums import differing
from pma_megatron.merging.saved_over import is_whole, saved_over
from pma_megatron.storage.paths import in_store, path_of

_MARGIN_NS = 2 * 10**9
"""Stores say whole seconds, and on some file systems each node writes the time of its own clock."""
_FINISHED_S, _UPLOADED_S = 600.0, 86_400.0
"""From what `pma.json` says of its making to the time that it has as a file, or as an object."""


def rewritten(folder: Path) -> tuple[str, ...]:
    """Files that were written over an average since, those of equal sizes too; () if it is as made.

    Times of the file system say which files are read; all are where the folder was copied or
    touched, so that they say nothing. What lies in a store is listed again.

    Args:
        folder: of a checkpoint or an exported model.

    Raises:
        CheckpointError: a file that must be read cannot be.
        OSError: the folder cannot be looked at.
        SelectionError: the store does not tell what lies there.
    """
    if in_store(folder):
        folder = path_of(folder, again=True)
    changed = saved_over(folder)
    if changed:
        return changed
    try:
        marker = read_marker(folder)
    except (CheckpointError, VerifyError):
        return ()
    changed = differing(folder, _maybe_written_since(folder, marker.value, marker.sums or {}))
    return changed if changed and is_whole(folder) else ()


def _maybe_written_since(folder: Path, said: Mapping[str, Any], sums: Sums) -> Sums:
    """Files of the right size that are not known to be older than `pma.json`."""
    made_ns = (folder / MARKER_FILE).stat().st_mtime_ns
    known = _is_as_made(said, made_ns, _UPLOADED_S if in_store(folder) else _FINISHED_S)
    found = {}
    for name, each in sums.items():
        try:
            status = (folder / name).stat()
        except OSError:  # it is gone, which is no loss
            continue
        # Tools that copy set the one time back, but not the other. In a store that is the spool's.
        changed_ns = 0 if in_store(folder) else status.st_ctime_ns
        later = max(status.st_mtime_ns, changed_ns) > made_ns - _MARGIN_NS
        if status.st_size == each.bytes and (later or not known):
            found[name] = each
    return found


def _is_as_made(said: Mapping[str, Any], made_ns: int, within_s: float) -> bool:
    """Whether `pma.json` has the time of its making, and not that of a copy."""
    try:
        created_s = datetime.fromisoformat(str(said["created"])).timestamp()
    except (KeyError, ValueError):
        return False
    return abs(made_ns / 10**9 - created_s) < within_s
