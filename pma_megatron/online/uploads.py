"""Checkpoints that go on to an object store: made whole on a disk, then put there behind training.

Rank 0 puts one after the other there, in a thread: under the sign of an upload, and what makes it
whole last. Nothing is removed from the disk before it has got there. A failure is told, stops
nobody, and leaves the files on the disk: they are tried again with the next one, and by the next
job there, unless the store has something newer by their name then.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import secrets
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pma_megatron.base.faults import point
from pma_megatron.base.spelling import first_few
from pma_megatron.errors import PublishError
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE, UPLOADING_FILE
from pma_megatron.online.remote_folder import (
    KNOWN,
    OWN,
    held_back,
    is_newer,
    is_same,
    newer_before,
    objects_in,
    said_in,
    said_on_disk,
)
from pma_megatron.online.removal import UPLOADED, hide, hold, is_still, move_aside
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import Claim, ClaimedError, claim, renewing
from pma_megatron.storage.paths import stored
from pma_megatron.storage.protocol import Object, Store

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
        self._lock, self._again, self._busy = threading.RLock(), False, False
        self._news = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._given_up: set[str] = set()
        self._made: set[str] = set()
        self._stuck: set[str] = set()
        """Given up, and still on the disk, where they cannot be removed."""
        self._cut_off: dict[str, Claim] = {}
        """What was begun in the store, and has not ended."""

    def made(self, name: str) -> None:
        """This job has made that one: it replaces what the store has by its name, whatever that
        is."""
        with self._lock:
            self._made.add(name)
            self._stuck.discard(name)

    def begin(self) -> None:
        """Put there what is whole on the disk; returns at once."""
        with self._lock:
            self._again = True
            self._news.notify_all()
            if self._thread is not None and self._thread.is_alive():
                return
            # It stays: a process that ends begins no thread any more (Python 3.12), and an upload
            # that nobody waits for without limit is still to be made then.
            self._thread = threading.Thread(target=self._work, name="pma-upload", daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError:
                self._thread = None
        self._run()

    def wait(self, timeout_s: float | None, moved: Callable[[], None] = lambda: None) -> None:
        """Until nothing is under way; what is not there by then stays on the disk, and is told.

        Args:
            timeout_s: None for as long as it takes.
            moved: is called now and then.
        """
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if self._waiting():
            self.begin()  # what failed is tried once more
        while (left_s := until_s - time.monotonic()) > 0 and self._goes_on(min(left_s, _LOOKED_S)):
            moved()
        left = [folder.name for folder in self._waiting()]
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
        anew. Returns at once, however long a request takes: one that is on its way loses its files
        and with them what makes it whole, and what had got there is deleted after it."""
        for name in names:
            self._let_go(self.folder / name)
        with self._lock:  # only now: nothing of them can be begun again behind the deletion
            self._given_up |= {*names}
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
    def _is_there(self, folder: Path, held: Path) -> None:
        """All of it is in the store: remove it from the disk, where it is held open as `held`."""

    def _remove_old(self) -> None:
        """Delete in the store what is not needed any more."""
        return

    def _may_go(self, folder: Path) -> bool:
        """Whether a folder on the disk is one of those, and not what somebody else put there."""
        return (folder / UPLOADED).exists() or self._is_ours(said_on_disk(folder))

    def _let_go(self, folder: Path) -> OSError | None:
        """Remove one from the disk; harmless if there is none.

        Returns:
            why it is still there, which is told: a disk that fails ends no training.
        """
        try:
            with self._lock:  # whoever removes what got there looks first whether it still is that
                if not folder.is_dir():
                    return None
                if not self._may_go(folder):
                    self._stuck.add(folder.name)
                    _log.warning(
                        "%s is given up, and stays: nothing in it can be read now that says that "
                        "it is one of the %s. Look at it, and delete it if it is",
                        folder,
                        self.what,
                    )
                    return None
                hidden = hide(folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._stuck.add(folder.name)
            _log.warning("%s is given up, and cannot be removed: %s", folder, error)
            return error
        shutil.rmtree(hidden, ignore_errors=True)
        return None

    def _waiting(self) -> list[Path]:
        found = self._told(f"the look for {self.what} to be put", self._whole) or []
        return [folder for folder in found if folder.name not in self._stuck]

    def _goes_on(self, within_s: float) -> bool:
        """Whether something is under way still, after that time at the latest."""
        with self._news:
            return not self._news.wait_for(self._rests, within_s)

    def _rests(self) -> bool:
        at_work = self._thread is not None and self._thread.is_alive()
        return not (at_work and (self._again or self._busy))

    def _work(self) -> None:
        while True:
            self._run()
            with self._news:
                self._news.wait_for(lambda: self._again)

    def _run(self) -> None:
        while True:
            with self._news:
                self._busy, self._again = self._again, False
                if not self._busy:
                    self._news.notify_all()
                    return
            self._told(f"the deletion of {self.what} that were given up", self._delete_given_up)
            for folder in self._waiting():
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
        self._put(folder)

    def _put(self, folder: Path) -> None:
        """Put one there. It is held open: where another one gets its name meanwhile, because the
        run has come by again, what was held loses its files, and what is there is not whole."""
        with hold(folder) as held:
            if held is None:  # it was given up this very moment
                return
            try:
                self._put_held(held, folder)
            except OSError:
                if is_still(folder, held):
                    raise
                _log.info("%s was replaced while it was put there: the new one is next", folder)

    def _put_held(self, held: Path, folder: Path) -> None:
        store, root = self._place()
        key = below(root, folder.name)
        files = (path for path in sorted(held.rglob("*")) if path.is_file())
        sizes = {path.relative_to(held).as_posix(): path.stat().st_size for path in files}
        here, there = said_on_disk(held), objects_in(store, key)
        said = self._said_of_whole(store, key, there, held_back(sizes))
        is_that = said == here and "created" in here
        if not is_that and folder.name not in self._made:
            since = newer_before(store, root, folder.name, here, self._is_ours)
            older_than = folder.name if said and not is_newer(here, said) else since
            if older_than is not None and older_than not in self._made:
                self._set_aside(held, folder, older_than)
                return
        if not is_that or {name: each.nbytes for name, each in there.items()} != sizes:
            self._put_files(store, key, held, folder, sizes)
        point("snapshot-put", 0)
        self._is_there(folder, held)

    def _said_of_whole(
        self, store: Store, key: str, there: Mapping[str, Object], last: Collection[str]
    ) -> Mapping[str, Any]:
        """What the `pma.json` says of one that is there, whole; {} if none is."""
        if UPLOADING_FILE in there or not {MARKER_FILE, *last} - {SEAL_FILE} <= there.keys():
            return {}
        said = said_in(store, key)
        return said if self._is_ours(said) else {}

    def _set_aside(self, held: Path, folder: Path, older_than: str) -> None:
        with self._lock:
            if not is_still(folder, held):
                return
            aside = move_aside(folder)
        _log.warning(
            "%s, left on this disk by an earlier job, is not uploaded: as far as can be told, "
            "%s/%s was made since. It was moved to %s: delete it if you do not need it",
            folder,
            self.address,
            older_than,
            aside,
        )

    def _put_files(
        self, store: Store, key: str, held: Path, folder: Path, sizes: Mapping[str, int]
    ) -> None:
        last = held_back(sizes)
        with self._signed(store, key, sorted(sizes)) as made:
            before = objects_in(store, key)
            # What makes it whole goes first: of a format without such files, one of its shards.
            first = [*(name for name in last if name not in KNOWN), *reversed(KNOWN)]
            store.delete(f"{key}/{name}" for name in first if name in before)
            store.delete(
                f"{key}/{name}"
                for name in before
                if name not in sizes and name not in (*KNOWN, UPLOADING_FILE)
            )
            versions = {}
            for name in [*(name for name in sizes if name not in last), *last]:
                if name in last:
                    made.check(store)
                made.renew(store)
                versions[name] = store.put_file(f"{key}/{name}", held / name)
                point("snapshot-part", 0)
            there = objects_in(store, key)
            wrong = [n for n, size in sizes.items() if not is_same(there.get(n), size, versions[n])]
            if wrong:
                raise PublishError(
                    f"{self.address}/{folder.name} does not hold what was put there: "
                    f"{first_few(wrong, _SHOWN)}. Another job may be at work there"
                )
            if not is_still(folder, held):
                raise FileNotFoundError(errno.ENOENT, "it was replaced meanwhile", str(folder))

    @contextlib.contextmanager
    def _signed(self, store: Store, key: str, names: list[str]) -> Iterator[Claim]:
        """Sign a folder for the block; what ends it before its end leaves the sign, and no whole
        one.

        Raises:
            PublishError: another job is at work there, or it holds what is not ours.
            OSError: the store refuses.
        """
        sign, name = f"{key}/{UPLOADING_FILE}", key.rpartition("/")[2]
        try:
            made = claim(store, sign, f"{self.what} {secrets.token_hex(8)}", {"files": names})
            strange = sorted({*objects_in(store, key)} - {UPLOADING_FILE}) if made.new else []
            if strange and not self._is_ours(said_in(store, key)):
                store.delete([sign])
                raise PublishError(
                    f"{key} holds {first_few(strange, _SHOWN)}, and nothing there says that it is "
                    f"one of the {self.what}, so it is neither deleted nor mixed with one: move it "
                    "elsewhere"
                )
            self._cut_off[name] = made
            with renewing(made, store):  # a file may take longer than a claim counts
                yield made
            made.check(store)
        except ClaimedError as other:
            raise PublishError(f"another job is at work at {key} ({other})") from None
        store.delete([sign])
        self._cut_off.pop(name, None)

    def _delete_given_up(self) -> None:
        with self._lock:
            names = sorted(self._given_up)
        if not names:
            return
        store, root = self._place()
        for name in names:
            key = below(root, name)
            if self._is_ours(said_in(store, key)) or self._was_cut_off(store, name):
                self._delete(store, key)
            self._cut_off.pop(name, None)
            self._given_up.discard(name)

    def _was_cut_off(self, store: Store, name: str) -> bool:
        """Whether what lies there is a part of what this job has put there, and nobody else's."""
        try:
            if name not in self._cut_off:
                return False
            self._cut_off[name].check(store)
            return True
        except ClaimedError:
            return False

    def _delete(self, store: Store, key: str) -> None:
        """Delete one in the store, what makes it whole first, and what says whose it is last."""
        there = objects_in(store, key)
        store.delete(f"{key}/{name}" for name in reversed(KNOWN) if name in {*there} - {*OWN})
        point("snapshot-old", 0)
        store.delete(f"{key}/{name}" for name in there if name not in KNOWN)
        store.delete(f"{key}/{name}" for name in OWN if name in there)
