"""Checkpoints that go on to an object store: made whole on a disk, then put there behind training.

Rank 0 puts one after the other there, in a thread: under the sign of an upload, and what makes it
whole last. Nothing is removed from the disk before it has got there. A failure is told, stops
nobody, and leaves the files on the disk: they are tried again with the next one, and by the next
job there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pma_megatron.base.comm import Comm
from pma_megatron.base.faults import point
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import PublishError
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE, UPLOADING_FILE
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import Claim, ClaimedError, claim, renewing
from pma_megatron.storage.paths import stored
from pma_megatron.storage.protocol import Store

_OWN = (SEAL_FILE, MARKER_FILE)
_KNOWN = (*_OWN, METADATA_FILE, CONFIG_FILE)
_LOOKED_S = 10.0
_SHOWN = 3
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Uploads(ABC):
    """The uploads of the checkpoints of one folder (rank 0 alone).

    Attributes:
        address: where they go.
        folder: the folder on a disk in which they are made.
        what: what they are, in messages.
    """

    what: ClassVar[str]

    def __init__(self, address: Path, folder: Path) -> None:
        """
        Args:
            address: a folder in a store.
            folder: on a disk.
        """
        self.address, self.folder = address, folder
        self._lock, self._again = threading.Condition(), False
        self._thread: threading.Thread | None = None
        self._under_way: str | None = None
        self._given_up: set[str] = set()

    def begin(self) -> None:
        """Put there what is whole on the disk; returns at once."""
        with self._lock:
            self._again = True
            if self._thread is not None and self._thread.is_alive():
                return
            self._thread = threading.Thread(target=self._run, name="pma-upload", daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError:  # the interpreter is about to end, and begins no thread any more
                self._thread = None
        self._run()

    def wait(self, timeout_s: float | None, moved: Callable[[], None] = lambda: None) -> None:
        """Until nothing is under way; what is not there by then stays on the disk, and is told.

        Args:
            timeout_s: None for as long as it takes.
            moved: is called now and then.
        """
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if self._whole():
            self.begin()  # what failed is tried once more
        while (thread := self._thread) is not None and thread.is_alive():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            thread.join(min(left_s, _LOOKED_S))
            moved()
        left = [folder.name for folder in self._whole()]
        if left:
            _log.warning(
                "%s of %s did not get to %s: the next job that writes %s there uploads what it "
                "finds there, or copy it yourself",
                ", ".join(left),
                self.folder,
                self.address,
                self.what,
            )

    def give_up(self, names: Collection[str]) -> None:
        """These are not wanted any more, on the disk and in the store, or are about to be made
        anew; waits for one of them that is on its way."""
        with self._lock:
            self._given_up |= {*names}
            self._lock.wait_for(lambda: self._under_way not in names)
            for name in names:
                self._remove(self.folder / name)
        self.begin()

    @abstractmethod
    def _whole(self) -> list[Path]:
        """What is on the disk, whole, and not in the store yet, oldest first."""

    @abstractmethod
    def _is_due(self, folder: Path) -> bool:
        """Whether it still is one of those."""

    @abstractmethod
    def _is_ours(self, said: Mapping[str, Any]) -> bool:
        """Whether that is what a `pma.json` of one says."""

    @abstractmethod
    def _remove(self, folder: Path) -> None:
        """Remove one from the disk, what makes it whole first; harmless if there is none."""

    @abstractmethod
    def _is_there(self, folder: Path, held: Path) -> None:
        """All of it is in the store: remove it from the disk, where it is held open as `held`."""

    def _remove_old(self) -> None:
        """Delete in the store what is not needed any more."""
        return

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            self._told(f"the deletion of {self.what} that were given up", self._delete_given_up)
            for folder in self._told(f"the look for {self.what} to be put", self._whole) or []:
                self._told(f"the upload of {folder.name}", functools.partial(self._put_due, folder))
            self._told(f"the deletion of old {self.what}", self._remove_old)

    def _place(self) -> tuple[Store, str]:
        """The store, and the key of the folder in it; that of a whole bucket is empty.

        Raises:
            OSError: the store cannot be opened.
        """
        return stored(self.address)

    def _told(self, what: str, work: Callable[[], T]) -> T | None:
        """Do something; training goes on whatever happens, and it is told."""
        try:
            return work()
        except Exception as error:
            _log.warning(
                "%s at %s failed (%s: %s): %s that did not get there stay in %s, and are tried "
                "again with the next one",
                what,
                self.address,
                type(error).__name__,
                error,
                self.what,
                self.folder,
            )
            return None

    def _put_due(self, folder: Path) -> None:
        with self._lock:
            if not self._is_due(folder):
                return
            # What was given up by this name is replaced now, and nothing is to delete that.
            self._given_up.discard(folder.name)
            self._under_way = folder.name
        try:
            self._put(folder)
        finally:
            with self._lock:
                self._under_way = None
                self._lock.notify_all()

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
        store, root = self._place()
        key = below(root, folder.name)
        files = (path for path in sorted(held.rglob("*")) if path.is_file())
        sizes = {path.relative_to(held).as_posix(): path.stat().st_size for path in files}
        last = held_back(sizes)
        with self._signed(store, key, sorted(sizes)) as made:
            before = _names(store, key)
            store.delete(f"{key}/{name}" for name in reversed(_KNOWN) if name in before)
            store.delete(
                f"{key}/{name}"
                for name in before
                if name not in sizes and name not in (*_KNOWN, UPLOADING_FILE)
            )
            for name in [*(name for name in sizes if name not in last), *last]:
                made.renew(store)
                store.put_file(f"{key}/{name}", held / name)
                point("snapshot-part", 0)
            there = _names(store, key)
            if any(there.get(name) != size for name, size in sizes.items()):
                raise PublishError(f"{self.address}/{folder.name} does not hold what was put there")
            if not _is(folder, held):
                raise FileNotFoundError(errno.ENOENT, "it was replaced meanwhile", str(folder))
        point("snapshot-put", 0)
        self._is_there(folder, held)

    @contextlib.contextmanager
    def _signed(self, store: Store, key: str, names: list[str]) -> Iterator[Claim]:
        """Sign a folder for the block; what ends it before its end leaves the sign, and no whole
        one.

        Raises:
            PublishError: another job is at work there, or it holds what is not ours.
            OSError: the store refuses.
        """
        sign = f"{key}/{UPLOADING_FILE}"
        try:
            made = claim(store, sign, f"{self.what} {secrets.token_hex(8)}", {"files": names})
            strange = sorted(set(_names(store, key)) - {UPLOADING_FILE}) if made.new else []
            if strange and not self._is_ours(_said(store, key)):
                store.delete([sign])
                raise PublishError(
                    f"{key} holds {first_few(strange, _SHOWN)}, and nothing there says that it is "
                    f"one of the {self.what}, so it is neither deleted nor mixed with one: move it "
                    "elsewhere"
                )
            with renewing(made, store):  # a file may take longer than a claim counts
                yield made
            made.check(store)
        except ClaimedError as other:
            raise PublishError(f"another job is at work at {key} ({other})") from None
        store.delete([sign])

    def _delete_given_up(self) -> None:
        with self._lock:
            names = sorted(self._given_up)
        if not names:
            return
        store, root = self._place()
        for name in names:
            if self._is_ours(_said(store, below(root, name))):
                self._delete(store, below(root, name))
            self._given_up.discard(name)

    def _own_in(self, store: Store, root: str) -> Iterator[str]:
        """Names of those in the store."""
        for name in store.folders(below(root)):
            name = name.rstrip("/").rpartition("/")[2]
            if self._is_ours(_said(store, below(root, name))):
                yield name

    def _delete(self, store: Store, key: str) -> None:
        """Delete one in the store, what makes it whole first, and what says whose it is last."""
        there = _names(store, key)
        store.delete(f"{key}/{name}" for name in reversed(_KNOWN) if name in {*there} - {*_OWN})
        point("snapshot-old", 0)
        store.delete(f"{key}/{name}" for name in there if name not in _KNOWN)
        store.delete(f"{key}/{name}" for name in _OWN if name in there)


def refuse_unseen(folder: Path, what: str, comm: Comm) -> None:
    """A folder that rank 0 has made must be one and the same for all ranks. Collective.

    Args:
        folder: which.
        what: is made there.
        comm: the ranks.

    Raises:
        PublishError: another rank sees another folder, or nothing can be made there.
    """
    seen = folder / f".pma-seen-{comm.broadcast(secrets.token_hex(4))}"

    def touch() -> None:
        try:
            seen.touch()
        except OSError as error:
            raise PublishError(f"cannot write into {folder}: {error.strerror}") from error

    def look() -> None:
        if not seen.exists():
            raise PublishError(
                f"{folder}, made by rank 0, is not there on rank {comm.rank}: {what} need a folder "
                "that all ranks share (PMA_MEGATRON_SPOOL says which, where they go to a store)"
            )

    comm.on_main(f"folder of {what}", touch)
    try:
        comm.agree(f"folder of {what}", look)
    finally:
        if comm.is_main:
            seen.unlink(missing_ok=True)


def held_back(sizes: Mapping[str, int]) -> list[str]:
    """Files without which nobody takes a folder for a whole checkpoint, in their order.

    Args:
        sizes: of all its files, by name.

    >>> held_back({"metadata.json": 9, "__0_0.distcp": 99, ".metadata": 9, "pma.json": 5})
    ['pma.json', '.metadata', 'metadata.json']
    >>> held_back({"bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": 99, "model_states.pt": 9})
    ['model_states.pt']
    """
    known = [name for name in _KNOWN if name in sizes]
    rest = [name for name in sizes if name not in _KNOWN]
    if CONFIG_FILE in sizes or not rest:
        return known
    # All files together make it whole.
    return [*known, min(rest, key=lambda name: (sizes[name], name))]


def remove_marks(folder: Path) -> None:
    """Remove from a disk what makes a checkpoint whole: no reader takes the rest for one."""
    for name in reversed(_KNOWN):
        (folder / name).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint from a disk: what makes it whole first, and what says whose it is last,
    so that whoever looks meanwhile takes the rest for nobody else's."""
    for name in reversed(_KNOWN):
        if name not in _OWN:
            (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder before it
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.relative_to(folder).as_posix() not in _OWN:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder)


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


def _names(store: Store, key: str) -> dict[str, int]:
    """What lies in a folder of a store: bytes by name."""
    return {each.key.removeprefix(f"{key}/"): each.nbytes for each in store.listed(f"{key}/")}


def _said(store: Store, key: str) -> Mapping[str, Any]:
    """What the `pma.json` of a folder in a store says; {} without one. Asked without the pool of
    this process, which has ended before the last upload of a job has."""
    try:
        said = json.loads(store.got(f"{key}/{MARKER_FILE}")[1])
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
