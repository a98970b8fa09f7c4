"""Open files of one folder: kept open while they are in use, and never too many of them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OPEN_FILES = 32
"""Files of one folder that are kept open; a merge has a few tens of folders."""


class Files:
    """File descriptors of one folder, kept open and shared by threads, but never many of them.

    A Universal checkpoint has several files per parameter, and a process may open 1024.
    """

    def __init__(self, folder: Path, flags: int) -> None:
        self._folder, self._flags = folder, flags
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """The descriptor of `name`, which stays open within the block."""
        with self._lock:
            found = self._open.get(name)
            if found is None:
                self._make_room()
                found = self._open[name] = _Opened(os.open(self._folder / name, self._flags))
            self._open.move_to_end(name)
            found.users += 1
        try:
            yield found.descriptor
        finally:
            with self._lock:
                found.users -= 1

    def _make_room(self) -> None:
        """Close the file that was used longest ago, flushed if it was written."""
        if len(self._open) < OPEN_FILES:
            return
        idle = next((name for name, found in self._open.items() if not found.users), None)
        if idle is not None:
            descriptor = self._open.pop(idle).descriptor
            try:
                if self._flags & os.O_RDWR:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync(self, moved: Callable[[], None] = lambda: None) -> None:
        """Flush what was written to stable storage; `moved` is called after each file."""
        for found in self._open.values():
            os.fsync(found.descriptor)
            moved()

    def close(self) -> None:
        """Close all; harmless if called twice."""
        while self._open:
            _, found = self._open.popitem()
            os.close(found.descriptor)


@dataclass(slots=True)
class _Opened:
    descriptor: int
    users: int = 0
