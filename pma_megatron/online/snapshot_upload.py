"""Snapshots that go on to an object store: made whole on a disk, then put there behind training.

Rank 0 puts one after the other there, in a thread: under the sign of an upload, and what makes it
whole last. What is there is removed from the disk, but for its empty folder, by which other ranks
may still look whether it was published: nothing is removed that does not bear the mark of having
got there. A failure is told, stops nobody, and leaves the files on the disk: they are tried again
with the next snapshot, and by the next job there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import folders_in
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.marker import (
    MARKER_FILE,
    SEAL_FILE,
    SNAPSHOT,
    SNAPSHOT_VERSION,
    UPLOADING_FILE,
    read_snapshot_marker,
)
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.runs.describe import iteration_of
from pma_megatron.runs.discover import TRACKER_FILE, list_checkpoints
from pma_megatron.storage.claims import Claim, ClaimedError, claim
from pma_megatron.storage.paths import path_of, stored
from pma_megatron.storage.protocol import Store

_THERE = ".pma-uploaded"
"""In a folder on the disk: all of it is in the store."""
_LAST = (SEAL_FILE, MARKER_FILE, METADATA_FILE, CONFIG_FILE)
_log = logging.getLogger(__name__)
T = TypeVar("T")


class SnapshotUploads:
    """The uploads of one run's snapshots (rank 0 alone).

    Attributes:
        address: where they go.
        folder: the folder on a disk in which they are made.
    """

    def __init__(self, address: Path, folder: Path, keep: int | None) -> None:
        """
        Args:
            address: a folder in a store.
            folder: on a disk.
            keep: how many of the newest stay in the store; None for all.
        """
        self.address, self.folder, self._keep = address, folder, keep
        self._lock, self._again = threading.Lock(), False
        self._thread: threading.Thread | None = None

    def there(self) -> frozenset[int]:
        """Iterations that are in the store, whole.

        Raises:
            PublishError: the store refuses, or it is a folder that training saves to.
        """
        try:
            store, key = stored(self.address)
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

    def begin(self) -> None:
        """Put there what is whole on the disk; returns at once."""
        with self._lock:
            self._again = True
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="pma-upload", daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError:  # the interpreter is about to end, and begins no thread any more
                self._thread = None
        self._run()

    def published(self, name: str) -> None:
        """Every rank has written its part of `name`, so nobody looks for an earlier one."""
        self._told("the removal of what was put", functools.partial(self.remove_empty, name))
        self.begin()

    def wait(self, timeout_s: float) -> None:
        """Until nothing is under way; what is not there by then stays on the disk, and is told."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        left = [folder.name for folder in self._whole()]
        if left:
            _log.warning(
                "%s of %s did not get to %s: the next job that writes snapshots there uploads "
                "what it finds there, or copy it yourself",
                ", ".join(left),
                self.folder,
                self.address,
            )

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

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            whole = self._told("the look for snapshots to be put", self._whole) or []
            for folder in whole:
                self._told(f"the upload of {folder.name}", functools.partial(self._put, folder))
            self._told("the deletion of old snapshots", self._remove_old)

    def _told(self, what: str, work: Callable[[], T]) -> T | None:
        """Do something; training goes on whatever happens, and it is told."""
        try:
            return work()
        except Exception as error:
            _log.warning(
                "%s at %s failed (%s: %s): snapshots that did not get there stay in %s, and are "
                "tried again with the next one",
                what,
                self.address,
                type(error).__name__,
                error,
                self.folder,
            )
            return None

    def _whole(self) -> list[Path]:
        """Snapshots on the disk, oldest first."""
        found = folders_in(self.folder) if self.folder.is_dir() else []
        own = [each for each in found if iteration_of(each) is not None and _is_snapshot(each)]
        new = [each for each in own if not (each / _THERE).exists()]
        whole = [each for each in new if completeness(each) is None]
        return sorted(whole, key=lambda each: iteration_of(each) or 0)

    def _put(self, folder: Path) -> None:
        store, root = stored(self.address)
        key = f"{root}/{folder.name}"
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        with _signed(store, key, sorted(sizes)) as made:
            before = {each.key.removeprefix(f"{key}/") for each in store.listed(f"{key}/")}
            store.delete(f"{key}/{name}" for name in reversed(_LAST) if name in before)
            early = [name for name in sorted(sizes) if name not in _LAST]
            for name in [*early, *(name for name in _LAST if name in sizes)]:
                made.renew(store)
                store.put_file(f"{key}/{name}", folder / name)
                point("snapshot-part", 0)
            there = {
                each.key.removeprefix(f"{key}/"): each.nbytes for each in store.listed(f"{key}/")
            }
            if any(there.get(name) != size for name, size in sizes.items()):
                raise PublishError(f"{self.address}/{folder.name} does not hold what was put there")
        point("snapshot-put", 0)
        mark = os.open(folder / _THERE, os.O_WRONLY | os.O_CREAT, 0o666)
        os.fsync(mark)
        os.close(mark)
        _empty(folder)

    def _remove_old(self) -> None:
        """Delete old snapshots in the store; only what is marked as one, its mark last."""
        if self._keep is None:
            return
        store, root = stored(self.address)
        folders = (Path(name.rstrip("/").rpartition("/")[2]) for name in store.folders(f"{root}/"))
        numbered = sorted((iteration_of(each) or 0, each.name) for each in folders)
        own = [name for number, name in numbered if number and _marked(store, root, name)]
        found = [f"{root}/{name}" for name in own]
        for key in found[: max(len(found) - self._keep, 0)]:
            names = [each.key.removeprefix(f"{key}/") for each in store.listed(f"{key}/")]
            store.delete(f"{key}/{name}" for name in reversed(_LAST[2:]) if name in names)
            store.delete(f"{key}/{name}" for name in names if name not in _LAST)
            store.delete(f"{key}/{name}" for name in _LAST[:2] if name in names)


def _marked(store: Store, root: str, name: str) -> bool:
    """Whether a folder in the store is a snapshot, asked without the pool of this process, which
    has ended before the last snapshot of a job has."""
    try:
        said = json.loads(store.got(f"{root}/{name}/{MARKER_FILE}")[1])
    except (FileNotFoundError, ValueError):
        return False
    known = {"kind": SNAPSHOT, "snapshot_version": SNAPSHOT_VERSION}
    return isinstance(said, dict) and known.items() <= said.items()


def _empty(folder: Path) -> None:
    """Remove the files of what is in the store, its marks first; `_THERE` stays."""
    names = [path.name for path in folder.iterdir() if path.name not in (*_LAST, _THERE)]
    for name in (*reversed(_LAST), *names):
        (folder / name).unlink(missing_ok=True)


def _is_snapshot(folder: Path) -> bool:
    try:
        return read_snapshot_marker(folder) is not None
    except CheckpointError:
        return False  # of a later release: not ours to judge


@contextlib.contextmanager
def _signed(store: Store, key: str, names: list[str]) -> Iterator[Claim]:
    """Sign a folder for the block; what ends it before its end leaves the sign, and no whole one.

    Raises:
        PublishError: another job is at work there.
        OSError: the store refuses.
    """
    sign = f"{key}/{UPLOADING_FILE}"
    try:
        made = claim(store, sign, f"snapshot {secrets.token_hex(8)}", {"files": names})
        yield made
        made.check(store)
    except ClaimedError as other:
        raise PublishError(f"another job is at work at {key} ({other})") from None
    store.delete([sign])
