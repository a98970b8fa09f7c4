"""What a job makes of a file is made once, as long as the file stays as it is.

Within `once_each` a value is kept by the path of its file and by what the file system says of it:
device, inode, length, times of content and of attributes. A file that was written a moment ago is
not trusted to show the next change in its times, so nothing is kept of it. Outside of `once_each`,
and in threads that have another context, everything is made anew.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pma_megatron.storage.spool import listing_once

T = TypeVar("T")
LIMIT_BYTES = 256 << 20
"""Bytes of files of which values are kept; those that were used longest ago go first."""
SETTLED_NS = 2_000_000_000
"""Age from which a file's times tell its next change: some file systems count in seconds."""

_Mark = tuple[int, ...]


@dataclass(slots=True)
class _Kept:
    """Values by what they are and the path of their file, the last used at the end."""

    values: OrderedDict[tuple[str, str], tuple[_Mark, int, Any]] = field(
        default_factory=OrderedDict
    )
    nbytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: tuple[str, str], mark: _Mark) -> tuple[Any] | None:
        with self.lock:
            found = self.values.get(key)
            if found is None or found[0] != mark:
                return None
            self.values.move_to_end(key)
            return (found[2],)

    def put(self, key: tuple[str, str], mark: _Mark, cost_bytes: int, value: Any) -> None:
        if cost_bytes > LIMIT_BYTES:
            return
        with self.lock:
            if key in self.values:
                self.nbytes -= self.values.pop(key)[1]
            self.values[key] = (mark, cost_bytes, value)
            self.nbytes += cost_bytes
            while self.nbytes > LIMIT_BYTES:
                _, (_, freed_bytes, _) = self.values.popitem(last=False)
                self.nbytes -= freed_bytes


_KEPT: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def once_each() -> Iterator[None]:
    """Keep values in the block, which may lie within another one; a decorator too."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set(_Kept())
    try:
        with listing_once():
            yield
    finally:
        _KEPT.reset(token)


def once(
    what: str,
    path: Path,
    make: Callable[[], T],
    *,
    part: float = 1.0,
    cost_bytes: Callable[[T], int] | None = None,
) -> T:
    """`make()`, or what it returned before for this very file.

    Args:
        what: names the kind of value.
        path: the file that it is made of, and of nothing else.
        make: makes a value that nobody changes.
        part: of the file's bytes that the value stands for, where others stand for the rest.
        cost_bytes: of a value, where that has little to do with the file's length.
    """
    kept = _KEPT.get()
    before = None if kept is None else _mark(path)
    if kept is None or before is None:
        return make()
    key = what, os.fspath(path)
    found = kept.get(key, before)
    if found is not None:
        made: T = found[0]
        return made
    value = make()
    if _mark(path) == before and time.time_ns() - max(before[3:]) > SETTLED_NS:
        cost = int(before[2] * part) if cost_bytes is None else cost_bytes(value)
        kept.put(key, before, cost, value)
    return value


def _mark(path: Path) -> _Mark | None:
    """What tells one content of a file from the next: device, inode, bytes, times in ns."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
