"""One job at a time puts right what others left in a folder: a lock there, held while it lives.

What lies there without a mark may be what another job is making now: only who holds the lock may
take it for what a job that is gone has left.
"""

from __future__ import annotations

import atexit
import logging
import os
from pathlib import Path

from pma_megatron.merging.locks import LOCK, WRITING, HeldError, Lock, take
from pma_megatron.storage.paths import real

_NAME = "job"
LEFT_ALONE = (
    "%s is left alone, because nothing tells here whether a job on another machine still writes "
    "it: remove it when none does"
)
_HELD: dict[str, Lock] = {}
"""Folder -> its lock, of this process."""
_TOLD: set[str] = set()
"""Folders of which it was said that they cannot be locked."""
_log = logging.getLogger(__name__)


def other_job(folder: Path) -> str | None:
    """Hold the lock of a folder from now until this process ends.

    Args:
        folder: on a disk.

    Returns:
        the other job that holds it, to be put behind "another job"; None where this one does, as
        far as the file system has locks (`is_sure`).

    Raises:
        PermissionError: nothing can be made there.
    """
    known = real(folder)
    lock = _HELD.get(known)
    if lock is not None and lock.is_there:
        return None
    if lock is not None:  # somebody removed its file, and another job may have made one since
        _HELD.pop(known).release()
    try:
        _HELD[known] = take(folder, _NAME, WRITING)
    except HeldError as holder:
        return str(holder)
    except OSError as error:
        path = folder / f"{LOCK}{_NAME}"
        if isinstance(error, PermissionError) and not path.exists():
            raise
        if known not in _TOLD:
            _TOLD.add(known)
            _log.warning(
                "%s cannot be locked (%s): two jobs that save there would not be told. Run one at "
                "a time",
                path,
                error.strerror,
            )
    return None


def is_sure(folder: Path) -> bool:
    """Whether this process holds the lock of a folder, and jobs on other machines would see that:
    only then is what lies there without a mark what a job that is gone has left."""
    lock = _HELD.get(real(folder))
    return lock is not None and lock.sure


def let_go() -> None:
    """Release all, as at the end of this process."""
    while _HELD:
        _HELD.popitem()[1].release()


def _in_child() -> None:
    """A child that outlives this process must not hold what it inherits."""
    while _HELD:
        os.close(_HELD.popitem()[1].descriptor)


# Before anything that is to be done under a lock as the process ends: the first comes last.
atexit.register(let_go)
os.register_at_fork(after_in_child=_in_child)
