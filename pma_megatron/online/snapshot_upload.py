"""Thin snapshots, and the entries of a window, on their way to an object store.

What is there is removed from the disk, but for the empty folder of the last one, by which other
ranks may still look whether it was published, however late they come: the next one, or the next
job, removes it. Nothing is removed that does not bear the mark of having got there, or that nobody
needs any more.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import folders_in
from pma_megatron.base.sizes import sized
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.marker import (
    BRANCHES_FILE,
    SNAPSHOT,
    SNAPSHOT_VERSION,
    Branch,
    branch_in,
    read_snapshot_marker,
)
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.online.branch import outdated
from pma_megatron.online.remote_folder import said_in, unmake
from pma_megatron.online.snapshot_branches import SnapshotBranches
from pma_megatron.online.snapshot_job import UPLOADED as _THERE
from pma_megatron.online.uploads import Uploads
from pma_megatron.runs.branches import begun_by, given_up, text_of
from pma_megatron.runs.describe import iteration_of
from pma_megatron.runs.discover import TRACKER_FILE, list_checkpoints
from pma_megatron.storage.addresses import below
from pma_megatron.storage.paths import path_of
from pma_megatron.storage.protocol import Store

_FREE_SHARE = 0.1
"""Of a disk on which snapshots wait for a store..."""
_FREE_SNAPSHOTS = 10
"""...or room for as many of them, on a large disk that is shared and nearly full as always: what
training itself saves, with its optimizer, takes seven to nine times the bytes of its weights."""
_SHOWN = 4
_log = logging.getLogger(__name__)


class SnapshotUploads(Uploads):
    """The uploads of one run's snapshots (rank 0 alone)."""

    what = "snapshots"

    def __init__(
        self,
        address: Path,
        folder: Path,
        keep: int | None,
        branches: SnapshotBranches | None = None,
    ) -> None:
        """
        Args:
            address: a folder in a store.
            folder: on a disk.
            keep: how many of the newest stay in the store; None for all.
            branches: of the run, for what goes before others; None where none is given up.
        """
        super().__init__(address, folder)
        self._keep, self._branches = keep, branches
        self._needed: frozenset[int] | None = None
        self._begun: frozenset[Branch] = frozenset()

    def there(self) -> frozenset[int]:
        """Iterations that are in the store, whole.

        Raises:
            PublishError: the store refuses, or it is a folder that training saves to.
        """
        try:
            store, key = self._place()
            if any(each.key == below(key, TRACKER_FILE) for each in store.beside(below(key))):
                raise PublishError(
                    f"{self.address} holds {TRACKER_FILE}: it is a trainer's own folder. Snapshots "
                    "need one of their own"
                )
            root = path_of(str(self.address), again=True)
            refs = list_checkpoints(root) if root.is_dir() else []
        except (OSError, SelectionError) as error:
            raise PublishError(f"snapshots cannot go to {self.address}: {error}") from error
        return frozenset(r.iteration for r in refs if r.complete and r.iteration is not None)

    def note_branches(self, begun: frozenset[Branch]) -> None:
        """Have the store say which branches of the run began, from the next `begin` on."""
        self._begun = begun

    def wait(self, timeout_s: float | None, moved: Callable[[], None] = lambda: None) -> None:
        """See `Uploads.wait`; a note that did not get there is tried once more too."""
        if self._begun:
            self.begin()
        super().wait(timeout_s, moved)

    def _put_note(self) -> bool:
        """Whether the store says which branches began, as far as it must."""
        begun = self._begun
        if not begun:
            return True
        try:
            store, root = self._place()
            store.put(below(root, BRANCHES_FILE), text_of(begun))
        except OSError as error:
            _log.warning(
                "%s, which says that snapshots after iteration %d are given up, did not get to %s "
                "(%s): it is tried again with the next one and as this job ends, and the next "
                "snapshot says so too. Until then they count",
                BRANCHES_FILE,
                max(begun, key=lambda each: each.number).after,
                self.address,
                error,
            )
            return False
        if self._begun == begun:  # else more began meanwhile
            self._begun = frozenset()
        return True

    def branches(self) -> tuple[dict[int, Branch | None], frozenset[Branch]]:
        """Iteration -> branch of the run, of what is in the store, as its marks say; and the
        branches that began beside these.

        Raises:
            PublishError: a mark cannot be read.
        """
        try:
            store, root = self._place()
            found = self._marked(store, root)
            begun = _begun_in(store, below(root, BRANCHES_FILE))
        except (OSError, CheckpointError) as error:
            raise PublishError(
                f"which branch of the run the snapshots in {self.address} are of is not known: "
                f"{error}. Start again once the store answers"
            ) from error
        return {iteration: branch for iteration, (_, branch) in found.items()}, begun

    def _marked(self, store: Store, root: str) -> dict[int, tuple[str, Branch | None]]:
        """Iteration -> name and branch of each in the store, whether its content can be read or
        not.

        Raises:
            OSError: the store does not tell.
            CheckpointError: a mark says no branch.
        """
        found = {}
        for name in store.folders(below(root)):
            iteration, said = iteration_of(Path(name)), said_in(store, below(root, name))
            if iteration and self._is_ours(said):
                found[iteration] = name, branch_in(said, below(root, name))
        return found

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
        """Remove what is left on the disk of what is in the store; the folder of this name stays,
        empty."""
        for folder in folders_in(self.folder) if self.folder.is_dir() else ():
            if iteration_of(folder) is None:
                continue
            with contextlib.suppress(OSError):  # another thread removes it, or it is not empty
                if (folder / _THERE).exists():
                    _empty(folder)
                    (folder / _THERE).unlink(missing_ok=True)
                if folder.name != but:
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

    def _is_there(self, folder: Path, held: Path) -> None:
        mark = os.open(held / _THERE, os.O_WRONLY | os.O_CREAT, 0o666)
        os.fsync(mark)
        os.close(mark)
        _empty(held)

    def _remove(self, folder: Path) -> None:
        if folder.is_dir() and ((folder / _THERE).exists() or _is_snapshot(folder)):
            self._is_there(folder, folder)
            (folder / _THERE).unlink()
            folder.rmdir()

    def _remove_old(self) -> None:
        """Delete old snapshots in the store; only what is marked as one, its mark last. What says
        which branch they are of is there before that."""
        is_told = self._put_note()
        if self._needed is not None:
            self._remove_unneeded()
            if self._whole():
                return  # some are not there yet: until then older ones are better than none
        elif self._keep is None:
            return
        if not is_told:
            return
        store, root = self._place()
        own = self._marked(store, root)
        gone, newest = {*given_up({i: (i, branch) for i, (_, branch) in own.items()})}, 0
        stay = {*(self._needed or ())}
        if self._branches is not None:
            gone |= self._branches.given_up
            stay |= self._branches.spared
            newest = self._branches.newest
        for number in outdated(own, self._keep or 0, gone, newest):
            if number not in stay:
                self._delete(store, below(root, own[number][0]))

    def _remove_unneeded(self) -> None:
        """Let go of what is on the disk, did not get to the store, and is not needed any more."""
        for folder in folders_in(self.folder) if self.folder.is_dir() else ():
            iteration = iteration_of(folder)
            if iteration is not None and iteration not in (self._needed or ()):
                self._remove(folder)


def refuse_full(folder: Path, nbytes: int) -> None:
    """Make no further snapshot where some wait for a store on a disk that they would fill: what
    training itself saves may lie there too. Any rank asks.

    Args:
        folder: on the disk.
        nbytes: of a snapshot.

    Raises:
        PublishError: too little of the disk would be left.
    """
    waiting = [
        each.name
        for each in (folders_in(folder) if folder.is_dir() else ())
        if (each / METADATA_FILE).exists() and not (each / _THERE).exists()
    ]
    disk = shutil.disk_usage(folder)
    left, least = disk.free - nbytes, min(_FREE_SHARE * disk.total, _FREE_SNAPSHOTS * nbytes)
    if waiting and disk.total and left < least:  # some tell nothing
        raise PublishError(
            f"{len(waiting)} snapshots wait in {folder} to be put into the store "
            f"({first_few(sorted(waiting), _SHOWN)}), and with another one of {sized(nbytes)} "
            f"{sized(max(left, 0))} would be free on that disk. What training saves itself may lie "
            f"there too: {sized(least)} are left for it"
        )


def _empty(folder: Path) -> None:
    """Remove the files of what is in the store, its marks first; `_THERE` stays."""
    unmake(folder)
    for path in folder.iterdir():
        if path.name != _THERE:
            path.unlink(missing_ok=True)


def _begun_in(store: Store, key: str) -> frozenset[Branch]:
    try:
        return begun_by(json.loads(store.got(key)[1]), key)
    except FileNotFoundError:
        return frozenset()
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{key} is damaged ({error})") from error


def _is_snapshot(folder: Path) -> bool:
    try:
        return read_snapshot_marker(folder) is not None
    except CheckpointError:
        return False  # of a later release: not ours to judge
