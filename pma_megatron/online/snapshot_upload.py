"""Snapshots that go on to an object store: made whole on a disk, then put there behind training.

Rank 0 puts one after the other there, in a thread: under the sign of an upload, and what makes it
whole last. What is there is removed from the disk, but for its empty folder, by which other ranks
may still look whether it was published: nothing is removed that does not bear the mark of having
got there. A failure is told, stops nobody, and leaves the files on the disk: they are tried again
with the next snapshot, and by the next job there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import folders_in
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.marker import (
    MARKER_FILE,
    SEAL_FILE,
    SNAPSHOT,
    SNAPSHOT_VERSION,
    UPLOADING_FILE,
    Branch,
    read_snapshot_marker,
)
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.online.branch import outdated
from pma_megatron.online.snapshot_job import UPLOADED as _THERE
from pma_megatron.runs.describe import iteration_of
from pma_megatron.runs.discover import TRACKER_FILE, list_checkpoints
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import Claim, ClaimedError, claim
from pma_megatron.storage.paths import path_of, stored
from pma_megatron.storage.protocol import Store

_FREE_SHARE = 0.1
"""Of a disk on which snapshots wait for a store."""
_SHOWN = 4
_LAST = (SEAL_FILE, MARKER_FILE, METADATA_FILE, CONFIG_FILE)
_log = logging.getLogger(__name__)
T = TypeVar("T")


class SnapshotUploads:
    """The uploads of one run's snapshots (rank 0 alone).

    Attributes:
        address: where they go.
        folder: the folder on a disk in which they are made.
        branches: iteration -> branch of the run, of what is there, whole.
    """

    def __init__(
        self,
        address: Path,
        folder: Path,
        keep: int | None,
        passed_by: Callable[[], tuple[Collection[int], int]] = lambda: ((), 0),
    ) -> None:
        """
        Args:
            address: a folder in a store.
            folder: on a disk.
            keep: how many of the newest stay in the store; None for all.
            passed_by: iterations of branches that were given up, and the newest one trained.
        """
        self._passed_by, self.branches = passed_by, dict[int, Branch | None]()
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
            if any(each.key == below(key, TRACKER_FILE) for each in store.beside(below(key))):
                raise PublishError(
                    f"{self.address} holds {TRACKER_FILE}: it is a trainer's own folder. Snapshots "
                    "need one of their own"
                )
            root = path_of(str(self.address), again=True)
            refs = list_checkpoints(root) if root.is_dir() else []
        except (OSError, SelectionError) as error:
            raise PublishError(f"snapshots cannot go to {self.address}: {error}") from error
        whole = {r.iteration: r for r in refs if r.complete and r.iteration is not None}
        self.branches = {each: ref.branch for each, ref in whole.items() if ref.snapshot}
        return frozenset(whole)

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
            for folder in (each for each in whole if each.exists()):
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
        """Put one there. It is held open: where another one gets its name meanwhile, because the
        run has come by again, what was held loses its files, and what is there is not whole."""
        with _held(folder) as held:
            try:
                self._put_held(held, folder)
            except OSError:
                if _is(folder, held):
                    raise
                _log.info("%s was replaced while it was put there: the new one is next", folder)

    def _put_held(self, held: Path, folder: Path) -> None:
        store, root = stored(self.address)
        key = below(root, folder.name)
        sizes = {path.name: path.stat().st_size for path in held.iterdir() if path.is_file()}
        with _signed(store, key, sorted(sizes)) as made:
            before = {each.key.removeprefix(f"{key}/") for each in store.listed(f"{key}/")}
            store.delete(f"{key}/{name}" for name in reversed(_LAST) if name in before)
            store.delete(
                f"{key}/{name}"
                for name in before
                if name not in sizes and name not in (*_LAST, UPLOADING_FILE)
            )
            early = [name for name in sorted(sizes) if name not in _LAST]
            for name in [*early, *(name for name in _LAST if name in sizes)]:
                made.renew(store)
                store.put_file(f"{key}/{name}", held / name)
                point("snapshot-part", 0)
            there = {
                each.key.removeprefix(f"{key}/"): each.nbytes for each in store.listed(f"{key}/")
            }
            if any(there.get(name) != size for name, size in sizes.items()):
                raise PublishError(f"{self.address}/{folder.name} does not hold what was put there")
            if not _is(folder, held):
                raise FileNotFoundError(errno.ENOENT, "it was replaced meanwhile", str(folder))
        point("snapshot-put", 0)
        mark = os.open(held / _THERE, os.O_WRONLY | os.O_CREAT, 0o666)
        os.fsync(mark)
        os.close(mark)
        _empty(held)

    def _remove_old(self) -> None:
        """Delete old snapshots in the store; only what is marked as one, its mark last."""
        if self._keep is None:
            return
        store, root = stored(self.address)
        folders = (Path(name.rstrip("/").rpartition("/")[2]) for name in store.folders(below(root)))
        numbered = {iteration_of(each) or 0: each.name for each in folders}
        own = {n: name for n, name in numbered.items() if n and _marked(store, root, name)}
        for number in outdated(own, self._keep, *self._passed_by()):
            key = below(root, own[number])
            names = [each.key.removeprefix(f"{key}/") for each in store.listed(f"{key}/")]
            store.delete(f"{key}/{name}" for name in reversed(_LAST[2:]) if name in names)
            store.delete(f"{key}/{name}" for name in names if name not in _LAST)
            store.delete(f"{key}/{name}" for name in _LAST[:2] if name in names)


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
    if waiting and disk.free - nbytes < _FREE_SHARE * disk.total:
        raise PublishError(
            f"{len(waiting)} snapshots wait in {folder} to be put into the store "
            f"({first_few(sorted(waiting), _SHOWN)}), and with another one of "
            f"{nbytes / 2**30:.2f} GiB less than {_FREE_SHARE:.0%} of that disk would be free"
        )


def _marked(store: Store, root: str, name: str) -> bool:
    """Whether a folder in the store is a snapshot, asked without the pool of this process, which
    has ended before the last snapshot of a job has."""
    try:
        said = json.loads(store.got(below(root, f"{name}/{MARKER_FILE}"))[1])
    except (FileNotFoundError, ValueError):
        return False
    known = {"kind": SNAPSHOT, "snapshot_version": SNAPSHOT_VERSION}
    return isinstance(said, dict) and known.items() <= said.items()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """This very folder for the block, whatever has its name by then."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _is(folder: Path, held: Path) -> bool:
    """Whether a folder still is the one that is held."""
    try:
        return folder.samefile(held)
    except FileNotFoundError:
        return False


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
        if made.new and not _marked(store, "", key) and len(store.listed(f"{key}/")) > 1:
            store.delete([sign])
            raise PublishError(f"{key} holds what is no snapshot: move it elsewhere")
        yield made
        made.check(store)
    except ClaimedError as other:
        raise PublishError(f"another job is at work at {key} ({other})") from None
    store.delete([sign])
