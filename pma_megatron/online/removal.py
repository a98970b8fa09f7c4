"""Folders that go from their place on a disk: under another name at once, so that no reader, and
nobody who makes one anew, ever meets a part of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

REMOVED = ".pma-removed-"
UPLOADED = ".pma-uploaded"
"""In a folder on the disk: all of it is in the store."""
ASIDE = ".pma-older"
"""Holds what is not uploaded because the store has something newer by that name."""


def hide(folder: Path) -> Path:
    """Take a folder from its name, to be deleted; returns where it is now.

    Raises:
        OSError: it cannot be renamed, or is gone.
    """
    return folder.rename(folder.parent / f"{REMOVED}{folder.name}-{os.getpid()}-{time.time_ns()}")


def remove(folder: Path) -> None:
    """Delete a published folder so that no reader ever sees a part of it.

    Raises:
        OSError: it cannot be renamed, or is gone; what cannot be deleted then is left hidden.
    """
    shutil.rmtree(hide(folder), ignore_errors=True)


def remove_hidden(root: Path) -> None:
    """Delete what a deletion that was cut off has left; what cannot be deleted stays."""
    for rest in root.glob(f"{REMOVED}*"):
        shutil.rmtree(rest, ignore_errors=True)


def move_aside(folder: Path) -> Path:
    """Keep a folder where nobody takes it for one that is to be uploaded; returns where.

    Raises:
        OSError: it cannot be moved, or is gone.
    """
    kept = folder.parent / ASIDE
    kept.mkdir(exist_ok=True)
    return folder.rename(kept / f"{folder.name}-{time.time_ns()}")


def is_still(folder: Path, held: Path) -> bool:
    """Whether a folder still is the one that is held open as `held`."""
    try:
        return folder.samefile(held)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Path | None]:
    """This very folder for the block, whatever has its name by then; None if there is none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
