"""What has been fetched of objects: ranges in sparse files, let go again when there are many.

Whoever reads says which range it needs (`present`), and it is there for as long as the block lasts.
Whoever knows what is needed next says so too (`ahead`): then it is under way before it is waited
for. Ranges that nobody needs now are given back (a hole in the file) once there are more than
`KEPT_BYTES` of them, those that were read longest ago first.

Where a request takes its time, whatever its length, few are better: a small object comes whole, and
so do larger ones that are read whole anyway (`expect`), if all of them can be kept. Of others come
the pages that are asked for, and more ahead of who reads on and on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pma_megatron.storage.protocol import PART_BYTES, Store
from pma_megatron.storage.requests import Requests, When

PAGE_BYTES = 128 << 10
"""What is fetched at least: records of a zip are described next to each other."""
WHOLE_BYTES = 1 << 20
"""An object that is no longer is fetched whole."""
KEPT_BYTES = 1 << 30
"""Of a process, beside what is being read at the moment, where the disk has four times as much."""
_LEAST_KEPT_BYTES = 256 << 20
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

    def __init__(self, share_bytes: int = KEPT_BYTES) -> None:
        """Nothing is there yet.

        Args:
            share_bytes: of the disk, what is this process's to use.
        """
        self._share_bytes = max(share_bytes, _LEAST_KEPT_BYTES)
        self._lock = threading.Lock()
        self._read: OrderedDict[_Key, Content] = OrderedDict()
        self._unread: OrderedDict[_Key, Content] = OrderedDict()
        self._coming: dict[_Key, Future[None]] = {}
        self._pins: dict[_Key, int] = {}
        self._lately: deque[int] = deque(maxlen=_LATELY)
        self._begun: set[int] = set()
        self._expected: set[int] = set()
        self._requests = Requests()

    @property
    def kept_bytes(self) -> int:
        """Of the disk, at most, and what is under way."""
        return (len(self._read) + len(self._unread) + len(self._coming)) * PAGE_BYTES

    @property
    def most_bytes(self) -> int:
        """What is kept at most, beside what is being read."""
        return min(KEPT_BYTES, self._share_bytes)

    def expect(self, contents: Sequence[Content], *, soon: bool) -> None:
        """All of some files will be read: what is asked of one comes in large requests from now on.

        Args:
            contents: the files.
            soon: ask for all of it now.
        """
        with self._lock:
            self._expected |= {each.number for each in contents}
            for each in contents if soon else ():
                pages = [p for p in _pages(0, each.nbytes) if not self._is_here((each.number, p))]
                if self._make_room(len(pages) * PAGE_BYTES):
                    self._ask(each, pages, When.SOON)

    def drop_ahead(self) -> None:
        """Ask no more for what nobody waits for."""
        with self._lock:
            dropped = self._requests.drop_later()
            for key in [key for key, asked in self._coming.items() if asked in dropped]:
                del self._coming[key]
            self._expected.clear()

    def expect_no_more(self) -> None:
        """End what `expect` began; what was asked for comes."""
        with self._lock:
            self._expected.clear()

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
        pages = _pages(start, min(end, content.nbytes))
        if not pages:
            return set()
        keys = [(content.number, page) for page in pages]
        for key in keys if pinned else ():
            self._pins[key] = self._pins.get(key, 0) + 1
        grain, further = self._grain(content), list[int]()
        missing = self._missing(content, pages, grain)
        if grain == 1:
            further = self._further(content, pages, pinned=pinned)
        if missing and further and missing[-1] + 1 == further[0]:  # one request for both
            missing, further = missing + further, []
        when = When.NOW if pinned else When.SOON
        self._ask(content, missing, when)
        self._ask(content, further, When.SOON)
        awaited = {self._coming[key] for key in keys if key in self._coming}
        for asked in awaited if pinned else ():
            self._requests.hurry(asked)
        return awaited

    def _grain(self, content: Content) -> int:
        """In how many pages at once a file comes."""
        if content.nbytes <= WHOLE_BYTES:
            return WHOLE_BYTES // PAGE_BYTES
        return PART_BYTES // PAGE_BYTES if content.number in self._expected else 1

    def _missing(self, content: Content, pages: range, grain: int) -> list[int]:
        """Those of some pages that are not here, with what comes in the same requests."""
        missing = [p for p in pages if not self._is_here((content.number, p))]
        if grain == 1 or not missing:
            return missing
        first = missing[0] // grain * grain
        end = min(-(-content.nbytes // PAGE_BYTES), (missing[-1] // grain + 1) * grain)
        wider = [p for p in range(first, end) if not self._is_here((content.number, p))]
        return wider if self._make_room((len(wider) - len(missing)) * PAGE_BYTES) else missing

    def _ask(self, content: Content, pages: list[int], when: When) -> None:
        for first, last in _runs(pages, PART_BYTES // PAGE_BYTES):
            asked = self._requests.ask(partial(self._fetched, content, first, last), when)
            self._coming.update({(content.number, p): asked for p in range(first, last + 1)})

    def _is_here(self, key: _Key) -> bool:
        return key in self._read or key in self._unread or key in self._coming

    def _further(self, content: Content, pages: range, *, pinned: bool) -> list[int]:
        """What is probably needed next: more than lies before it, where all of that was read.

        So one who reads all of a file in small steps has large requests under way before they are
        needed, and one who reads here and there gets no more than what was asked for.
        """
        self._lately.append(content.number)
        most = min(
            PART_BYTES // PAGE_BYTES, self.most_bytes // PAGE_BYTES // (4 * len(set(self._lately)))
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
        over = self.kept_bytes + nbytes - self.most_bytes
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
        self._requests.close()


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
