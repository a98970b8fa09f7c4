"""What tells whether a checkpoint has changed since it was described, without opening it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from stat import S_ISDIR

from pma_megatron.formats.holding import MARKERS, lock_file
from pma_megatron.runs import recovery_log
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import in_store, path_of

Mark = tuple[tuple[int, int, int] | None, ...]


def mark(root: Path, ref: CheckpointRef) -> Mark:
    """Its folder and the files that its save writes last, and the log that says whether it is
    healthy: inode, bytes and time in ns of each.

    Args:
        root: the run's folder.
        ref: one of its checkpoints.
    """
    folder = path_of(ref.path)
    last = (*(folder / name for name in MARKERS), _lock_of(folder))
    return tuple(map(_mark, (path_of(ref.folder), folder, *last, root / recovery_log.FILE)))


def unchanged(
    root: Path, refs: Iterable[CheckpointRef], marks: Mapping[str, Mark]
) -> dict[str, CheckpointRef]:
    """Whole checkpoints that are as they were described, by path, for `list_checkpoints`.

    One that is not whole is described anew: what is added to it need not show.
    """
    whole = (ref for ref in refs if ref.complete)
    return {ref.path: ref for ref in whole if mark(root, ref) == marks[ref.path]}


def _lock_of(folder: Path) -> Path | None:
    """None too of a folder that cannot be looked at, whose other marks are None then."""
    try:
        return lock_file(folder)
    except OSError:
        return None


def _mark(path: Path | None) -> tuple[int, int, int] | None:
    try:
        stat = None if path is None else path.stat()
    except OSError:
        return None
    if path is None or stat is None:
        return None
    if in_store(path):  # its time tells its version; a folder there is nothing but its objects
        return (0, 0, 0) if S_ISDIR(stat.st_mode) else (0, stat.st_size, stat.st_mtime_ns)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)
