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
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.storage.protocol import IN_FLIGHT, PART_BYTES, Store

PAGE_BYTES = 128 << 10
"""What is fetched at least: records of a zip are described next to each other."""
KEPT_BYTES = 256 << 20
"""Of a process, beside what is being read at the moment."""
_FIRST_PAGES = 4
_LATELY = 64  # reads that tell how many files are read at once
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
        self._lately: deque[int] = deque(maxlen=_LATELY)
        self._begun: set[int] = set()
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
        pages = _pages(start, min(end, content.nbytes))
        for page in pages:
            key = content.number, page
            if pinned:
                self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._coming:
                awaited.add(self._coming[key])
            elif not self._is_here(key):
                missing.append(page)
        further = self._further(content, pages, pinned=pinned) if pages else []
        if missing and further and missing[-1] + 1 == further[0]:  # one request for both
            for future in self._ask(content, missing + further):
                awaited.add(future)
            return awaited
        awaited |= self._ask(content, missing)
        self._ask(content, further)
        return awaited

    def _ask(self, content: Content, pages: list[int]) -> set[Future[None]]:
        asked = set()
        for first, last in _runs(pages, PART_BYTES // PAGE_BYTES):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pma-store")
            future = self._pool.submit(self._fetched, content, first, last)
            self._coming.update({(content.number, p): future for p in range(first, last + 1)})
            asked.add(future)
        return asked

    def _is_here(self, key: _Key) -> bool:
        return key in self._read or key in self._unread or key in self._coming

    def _further(self, content: Content, pages: range, *, pinned: bool) -> list[int]:
        """What is probably needed next: more than lies before it, where all of that was read.

        So one who reads all of a file in small steps has large requests under way before they are
        needed, and one who reads here and there gets no more than what was asked for.
        """
        self._lately.append(content.number)
        most = min(
            PART_BYTES // PAGE_BYTES, KEPT_BYTES // PAGE_BYTES // (4 * len(set(self._lately)))
        )
        before = len(pages)
        while before < most and self._is_here((content.number, pages[-1] - before)):
            before += 1
        if before == len(pages) and (pinned or content.number in self._begun):
            return []
        self._begun.add(content.number)
        before = max(before, _FIRST_PAGES)
        end = min(pages[-1] + 1 + min(4 * before, most), -(-content.nbytes // PAGE_BYTES))
        first = pages[-1] + 1
        while first < end and self._is_here((content.number, first)):
            first += 1
        enough = min(before, most // 2)  # not a request per step
        wanted = [p for p in range(first, end) if not self._is_here((content.number, p))]
        if len(wanted) < enough and end * PAGE_BYTES < content.nbytes:
            return []
        return wanted if wanted and self._make_room(len(wanted) * PAGE_BYTES) else []

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
