"""Which files are opened while something runs, wherever in Python they are opened."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OF_PYTHON = ("/sys/", "/usr/", sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
"""Where Python's own modules lie, and this package's; what the system says of its processors."""
_watches: list[tuple[tuple[str, ...], list[Opened]]] = []
"""What is watched at the moment: (folders in which anything may be opened, what was elsewhere)."""
_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []


class Opened(NamedTuple):
    """A file that was opened, and whether to be written."""

    path: str
    writes: bool


@contextlib.contextmanager
def watched(allowed: Sequence[Path]) -> Iterator[list[Opened]]:
    """In the block, what is opened outside of `allowed` folders and of Python's own files.

    Names relative to a folder that is open are not looked at: `open_inside` alone opens such.
    """
    if not _hooks:  # an audit hook stays until the process ends
        _hooks.append(_note)
        sys.addaudithook(_note)
    opened: list[Opened] = []
    _watches.append((tuple(map(str, allowed)), opened))
    try:
        yield opened
    finally:
        _watches.pop()


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not _watches or isinstance(args[0], int):
        return
    path, writes = os.path.normpath(os.fsdecode(args[0])), bool(args[2] & _WRITES)
    if not path.startswith("/") or path.startswith("/proc/self/"):
        return
    allowed, opened = _watches[-1]
    inside = any(path == folder or path.startswith(f"{folder}/") for folder in allowed)
    if not inside and (writes or not path.startswith(_OF_PYTHON)):
        opened.append(Opened(path, writes))
