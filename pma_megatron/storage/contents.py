"""What has been fetched of objects: ranges in sparse files, let go again when there are many.

Whoever reads says which range it needs (`present`), and it is there for as long as the block lasts.
Whoever knows what is needed next says so too (`ahead`): then it is under way before it is waited
for. Ranges that nobody needs now are given back (a hole in the file) once there are more than
`KEPT_BYTES` of them, those that were read longest ago first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.storage.protocol import IN_FLIGHT, PART_BYTES, Store

PAGE_BYTES = 128 << 10
"""What is fetched at least: records of a zip are described next to each other."""
KEPT_BYTES = 256 << 20
"""Of a process, beside what is being read at the moment."""
_PUNCH = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_LIBC = ctypes.CDLL(None, use_errno=True)

_Key = tuple[int, int]
"""Number of the file, and of the page in it."""


@dataclass(frozen=True, slots=True)
class Content:
    """The sparse file for one object.

    Attributes:
        number: tells it from the others of this process.
        store, key, version: the object.
        nbytes: its length.
        path: the sparse file.
    """

    number: int
    store: Store
    key: str
    version: str
    nbytes: int
    path: Path

    def fetch(self, first: int, last: int) -> None:
        """Bring the pages from `first` to `last` here."""
        start = first * PAGE_BYTES
        end = min((last + 1) * PAGE_BYTES, self.nbytes)
        data = self.store.read(self.key, start, end - start, self.version)
        if len(data) != end - start:
            raise OSError(errno.EIO, f"the store gave {len(data)} of {end - start} bytes")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], start + done)
        finally:
            os.close(descriptor)

    def give_back(self, first: int, last: int) -> None:
        """Free the disk under some pages; a file system that cannot keeps them."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            start, nbytes = first * PAGE_BYTES, (last + 1 - first) * PAGE_BYTES
            _LIBC.fallocate(descriptor, _PUNCH, ctypes.c_longlong(start), ctypes.c_longlong(nbytes))
        finally:
            os.close(descriptor)


Range = tuple[Content, int, int]
"""A file, and the bytes of it from one to another."""


class Contents:
    """The pages of all sparse files of a process. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: OrderedDict[_Key, Content] = OrderedDict()
        self._unread: OrderedDict[_Key, Content] = OrderedDict()
        self._coming: dict[_Key, Future[None]] = {}
        self._pins: dict[_Key, int] = {}
        self._pool: ThreadPoolExecutor | None = None

    @property
    def kept_bytes(self) -> int:
        """Of the disk, at most, and what is under way."""
        return (len(self._read) + len(self._unread) + len(self._coming)) * PAGE_BYTES

    @contextlib.contextmanager
    def present(self, ranges: Iterable[Range]) -> Iterator[None]:
        """Some ranges are there within the block; those that are not are fetched together.

        Raises:
            OSError: the store does not give them.
        """
        wanted = list(ranges)
        with self._lock:
            awaited = {f for each in wanted for f in self._begin(*each, pinned=True)}
        try:
            for future in awaited:
                future.result()
            yield
        finally:
            with self._lock:
                for content, start, end in wanted:
                    self._let_go(content, start, end)
                self._make_room(0)

    def keep(self, content: Content) -> None:
        """The whole of a file is there until `let_go` of it.

        Raises:
            OSError: the store does not give it.
        """
        with self._lock:
            awaited = self._begin(content, 0, content.nbytes, pinned=True)
        try:
            for future in awaited:
                future.result()
        except BaseException:
            self.let_go(content)
            raise

    def let_go(self, content: Content) -> None:
        """End what `keep` began."""
        with self._lock:
            self._let_go(content, 0, content.nbytes)
            self._make_room(0)

    def ahead(self, content: Content, start: int, end: int) -> None:
        """A range is needed soon; nothing happens where there is no room for it."""
        with self._lock:
            if self._make_room(end - start):
                self._begin(content, start, end, pinned=False)

    def _begin(self, content: Content, start: int, end: int, *, pinned: bool) -> set[Future[None]]:
        """Ask for what is not there; returns what has to be waited for."""
        awaited, missing = set(), list[int]()
        for page in _pages(start, min(end, content.nbytes)):
            key = content.number, page
            if pinned:
                self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._coming:
                awaited.add(self._coming[key])
            elif key not in self._read and key not in self._unread:
                missing.append(page)
        for first, last in _runs(missing, PART_BYTES // PAGE_BYTES):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pma-store")
            future = self._pool.submit(self._fetched, content, first, last)
            self._coming.update({(content.number, p): future for p in range(first, last + 1)})
            awaited.add(future)
        return awaited

    def _fetched(self, content: Content, first: int, last: int) -> None:
        keys = [(content.number, page) for page in range(first, last + 1)]
        try:
            content.fetch(first, last)
        except BaseException:
            with self._lock:
                for key in keys:
                    del self._coming[key]
            raise
        with self._lock:
            for key in keys:
                del self._coming[key]
                self._unread[key] = content

    def _let_go(self, content: Content, start: int, end: int) -> None:
        for page in _pages(start, min(end, content.nbytes)):
            key = content.number, page
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
            if self._unread.pop(key, None) is not None:
                self._read[key] = content
            elif key in self._read:
                self._read.move_to_end(key)

    def _make_room(self, nbytes: int) -> bool:
        """Give pages back until there are `nbytes` of room; whether there are."""
        over = self.kept_bytes + nbytes - KEPT_BYTES
        if over <= 0:
            return True
        gone: dict[int, tuple[Content, list[int]]] = {}
        # What was fetched ahead goes only where even that is too much.
        for pages in (self._read, *((self._unread,) if not nbytes else ())):
            for key in [key for key in pages if key not in self._pins]:
                if over <= 0:
                    break
                content = pages.pop(key)
                gone.setdefault(content.number, (content, []))[1].append(key[1])
                over -= PAGE_BYTES
        for content, found in gone.values():
            for first, last in _runs(sorted(found), len(found)):
                content.give_back(first, last)
        return over <= 0

    def close(self) -> None:
        """Wait for what is under way; nothing more is fetched."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _pages(start: int, end: int) -> range:
    return range(start // PAGE_BYTES, -(-end // PAGE_BYTES))


def _runs(pages: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, last) of pages that follow each other, no run longer than `most`."""
    first = 0
    for at in range(1, len(pages) + 1):
        ends = at == len(pages) or pages[at] != pages[at - 1] + 1 or at - first == most
        if ends:
            yield pages[first], pages[at - 1]
            first = at
