"""Thin snapshots, and the entries of a window, on their way to an object store.

What is there is removed from the disk, but for its empty folder, by which other ranks may still
look whether it was published: nothing is removed that does not bear the mark of having got there,
or that nobody needs any more.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import folders_in
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats.marker import SNAPSHOT, SNAPSHOT_VERSION, read_snapshot_marker
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.online.uploads import Uploads, remove_marks
from pma_megatron.runs.describe import iteration_of
from pma_megatron.runs.discover import TRACKER_FILE, list_checkpoints
from pma_megatron.storage.paths import path_of

_THERE = ".pma-uploaded"
"""In a folder on the disk: nothing of it is to be put any more."""


class SnapshotUploads(Uploads):
    """The uploads of one run's snapshots (rank 0 alone)."""

    what = "snapshots"

    def __init__(self, address: Path, folder: Path, keep: int | None) -> None:
        """
        Args:
            address: a folder in a store.
            folder: on a disk.
            keep: how many of the newest stay in the store; None for all.
        """
        super().__init__(address, folder)
        self._keep = keep
        self._needed: frozenset[int] | None = None

    def there(self) -> frozenset[int]:
        """Iterations that are in the store, whole.

        Raises:
            PublishError: the store refuses, or it is a folder that training saves to.
        """
        try:
            store, key = self._place()
            if any(each.key == f"{key}/{TRACKER_FILE}" for each in store.beside(f"{key}/")):
                raise PublishError(
                    f"{self.address} holds {TRACKER_FILE}: it is a trainer's own folder. Snapshots "
                    "need one of their own"
                )
            root = path_of(str(self.address), again=True)
            refs = list_checkpoints(root) if root.is_dir() else []
        except (OSError, SelectionError) as error:
            raise PublishError(f"snapshots cannot go to {self.address}: {error}") from error
        return frozenset(r.iteration for r in refs if r.complete and r.iteration is not None)

    def expect(self, needed: Collection[int]) -> None:
        """These iterations are about to be written, or stay."""
        if self._needed is not None:
            self._needed |= frozenset(needed)

    def retain(self, needed: Collection[int]) -> None:
        """From now on these iterations alone stay in the store, once all of them are there."""
        self._needed = frozenset(needed)
        self.begin()

    def published(self, name: str) -> None:
        """Every rank has written its part of `name`, so nobody looks for an earlier one."""
        self._told("the removal of what was put", functools.partial(self.remove_empty, name))
        self.begin()

    def left(self) -> frozenset[int]:
        """Iterations that are on the disk, whole, and not in the store yet."""
        return frozenset(iteration_of(folder) or 0 for folder in self._whole())

    def remove_empty(self, but: str = "") -> None:
        """Remove the folders of what is in the store; not one of this name."""
        for folder in folders_in(self.folder) if self.folder.is_dir() else ():
            if folder.name != but and iteration_of(folder) is not None:
                if (folder / _THERE).exists():
                    _empty(folder)
                    (folder / _THERE).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what is not empty stays
                    folder.rmdir()

    def _whole(self) -> list[Path]:
        found = folders_in(self.folder) if self.folder.is_dir() else []
        return sorted(filter(self._is_due, found), key=lambda each: iteration_of(each) or 0)

    def _is_due(self, folder: Path) -> bool:
        iteration = iteration_of(folder)
        wanted = self._needed is None or iteration in self._needed
        if iteration is None or not wanted or (folder / _THERE).exists():
            return False
        return _is_snapshot(folder) and completeness(folder) is None

    def _is_ours(self, said: Mapping[str, Any]) -> bool:
        return {"kind": SNAPSHOT, "snapshot_version": SNAPSHOT_VERSION}.items() <= said.items()

    def _is_there(self, folder: Path) -> None:
        mark = os.open(folder / _THERE, os.O_WRONLY | os.O_CREAT, 0o666)
        os.fsync(mark)
        os.close(mark)
        _empty(folder)

    def _remove(self, folder: Path) -> None:
        if folder.is_dir() and ((folder / _THERE).exists() or _is_snapshot(folder)):
            self._is_there(folder)
            (folder / _THERE).unlink()
            folder.rmdir()

    def _remove_old(self) -> None:
        """Delete old snapshots in the store; only what is marked as one, its mark last."""
        if self._needed is not None:
            self._remove_unneeded()
            if self._whole():
                return  # some are not there yet: until then older ones are better than none
        elif self._keep is None:
            return
        store, root = self._place()
        own = sorted((iteration_of(Path(name)) or 0, name) for name in self._own_in(store, root))
        numbered = [(number, name) for number, name in own if number]
        for number, name in numbered[: max(len(numbered) - (self._keep or 0), 0)]:
            if number not in (self._needed or ()):
                self._delete(store, f"{root}/{name}")

    def _remove_unneeded(self) -> None:
        """Let go of what is on the disk, did not get to the store, and is not needed any more."""
        for folder in folders_in(self.folder) if self.folder.is_dir() else ():
            iteration = iteration_of(folder)
            if iteration is not None and iteration not in (self._needed or ()):
                self._remove(folder)


def _empty(folder: Path) -> None:
    """Remove the files of what is in the store, its marks first; `_THERE` stays."""
    remove_marks(folder)
    for path in folder.iterdir():
        if path.name != _THERE:
            path.unlink(missing_ok=True)


def _is_snapshot(folder: Path) -> bool:
    try:
        return read_snapshot_marker(folder) is not None
    except CheckpointError:
        return False  # of a later release: not ours to judge
