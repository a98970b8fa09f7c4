"""From a staging folder to a published one: nothing half-done ever bears the final name.

Order: refuse what cannot work (`targets`), lock, stage beside the target, fill, flush, verify,
rename, tracker. A kill at any moment leaves a staging folder or a whole checkpoint or exported
model. The same command goes on with that staging folder (`journal`); another merge removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pma_megatron.base.durable import sync, write_small
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import create_inside
from pma_megatron.base.spelling import named
from pma_megatron.base.stopping import Stopped, shielded
from pma_megatron.errors import PmaError, PublishError
from pma_megatron.formats import registry
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.output import Folder
from pma_megatron.merging.leftovers import Target, locked, point_to, removed, restored, unfinished
from pma_megatron.merging.planning import MergePlan
from pma_megatron.storage.paths import in_store

__all__ = ["Target", "locked"]

PROVENANCE_FILE = MARKER_FILE
_log = logging.getLogger(__name__)


def new_token() -> str:
    """A name for one job's staging folders."""
    return secrets.token_hex(4)


def stage(plan: MergePlan, wanted: Sequence[Target]) -> None:
    """Make the staging folders with every shard file at its full length (rank 0 only).

    Of a folder that is there, files of the right length stay, and no others.

    Raises:
        PublishError: the folder cannot be written.
    """
    for target in wanted:
        with writing(target):
            files = plan.layouts[target.folder].files
            there = _only(target.staging, files)
            for name, nbytes in files.items():
                if name not in there:
                    create_inside(target.staging, name, nbytes)


def _only(folder: Path, files: Mapping[str, int]) -> set[str]:
    """Remove what is not one of these files at its length; returns the names that are left."""
    left = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_dir():
            status = path.lstat()
            alone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if alone and status.st_size == files.get(name):
                left.add(name)
            else:
                path.unlink()
    return left


@contextlib.contextmanager
def writing(target: Target) -> Iterator[None]:
    """What is written into a staged folder.

    Raises:
        PublishError: the storage refuses.
    """
    try:
        yield
    except OSError as error:
        raise PublishError(
            f"cannot write to {target.staging}: {error.strerror}. Nothing was published; free "
            f"space or choose another {named(target.setting)}, then run again"
        ) from error


def publish(plan: MergePlan, target: Target, before: Stamp | None) -> None:
    """Give the staged folder its name, then point a checkpoint's tracker at it (rank 0 only).

    Args:
        plan: the merge.
        target: where to.
        before: what has the name, and is replaced; nothing else is.

    Raises:
        PublishError: a rename failed, or something else has got the name meanwhile; a checkpoint
            that was to be replaced is still there.
    """
    known = registry.get(plan.sources[-1].format, plan.sources[-1].path).tracker
    tracked = target.folder is Folder.CHECKPOINT and not plan.save.inside
    file = known.file if tracked else None
    content = None if file is None else known.content_of(target.final.name)
    try:
        with shielded():
            if file is not None and content is not None:
                # Written first: a disk that is full by now must not leave a checkpoint without a
                # tracker.
                write_small(target.tracker, content.encode())
            _rename(target, before)
            if file is not None and content is not None:
                point("tracker", 0)
                point_to(target, file)
    except OSError as error:
        raise PublishError(
            f"cannot publish {target.final}: {error.strerror}. Free space or choose another "
            f"{named(target.setting)}, then run again"
        ) from error
    finally:
        restored(target)
    if not removed(target.staging):  # after an exchange it is the old one
        _kept.add(target.staging)
    removed(target.replaced)


_kept: set[Path] = set()
"""Staging folders, each of one job's own name, that need no second try at the end of that job."""
_named: set[Path] = set()
"""Staging folders, likewise, of which what was in them bears its final name."""


def _rename(target: Target, before: Stamp | None) -> None:
    if before is None:
        target.staging.rename(target.final)  # refused where a folder that holds something is there
    elif _exchange(target.staging, target.final):
        if _stamp(target.staging) != before and _exchange(target.staging, target.final):
            raise OSError(errno.EEXIST, "something else was written there at this moment")
    else:
        target.final.rename(target.replaced)
        point("replace", 0)
        target.staging.rename(target.final)
    _named.add(target.staging)
    sync(target.root)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux renameat2), so that no moment is without a checkpoint."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at, os.fsencode(one), at, os.fsencode(other), exchange) == 0)
    return False


def discard(wanted: Sequence[Target]) -> None:
    """Remove what a failure left (rank 0 only); harmless after a success."""
    with shielded():
        for target in wanted:
            if target.staging not in _kept and target.staging.exists():
                if not unfinished(target):
                    target.tracker.unlink(missing_ok=True)
                removed(target.staging)


Stamp = tuple[int, int]
"""Tells one checkpoint of a name from another."""


def stamps(wanted: Sequence[Target]) -> tuple[Stamp | None, ...]:
    """What bears the names of the targets now; None where nothing does."""
    return tuple(_stamp(target.final) for target in wanted)


def _stamp(folder: Path) -> Stamp | None:
    try:
        status = (folder / PROVENANCE_FILE).stat()
        return status.st_ino, status.st_mtime_ns
    except OSError:
        return None


@contextlib.contextmanager
def telling(wanted: Sequence[Target]) -> Iterator[None]:
    """An error says what this job had published before it."""
    before = stamps(wanted)
    try:
        yield
    except (PmaError, Stopped) as error:
        now = stamps(wanted)
        both = zip(wanted, before, now, strict=True)
        names = {str(t.final): is_published(t, old, new) for t, old, new in both}
        error.published = tuple(name for name, is_new in names.items() if is_new)
        error.unpublished = tuple(name for name, is_new in names.items() if not is_new)
        raise


def is_published(target: Target, old: Stamp | None, new: Stamp | None) -> bool:
    """Whether this job did; one in a store that bears the sign of an upload is not there yet."""
    if in_store(target.final):
        return old != new and not unfinished(target)
    return target.staging in _named
