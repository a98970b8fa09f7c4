"""Bytes that are on the disk when the call returns."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

_DRAFT = ".draft-"
_STREAMS = ("/dev/std", "/dev/fd/", "/proc/")


def write_small(path: Path, data: bytes) -> None:
    """Write a whole file, its folder too if need be, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file, flushed to the disk: after a crash, or on a full disk, what was there
    before is there as it was.

    A link stays one: what it names is replaced. A stream is written into.

    Raises:
        OSError: it cannot be written, and nothing has changed.
    """
    if is_stream(path):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), "wb") as stream:
            stream.write(data)
        return
    target = Path(os.path.realpath(path))
    draft = target.parent / f"{_DRAFT}{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            with contextlib.suppress(OSError):  # it is new, or its owner is somebody else
                os.fchmod(stream.fileno(), stat.S_IMODE(target.stat().st_mode))
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def is_stream(path: Path) -> bool:
    """Whether a path names no file that could be replaced, but a terminal, a pipe, a device.

    >>> is_stream(Path("/dev/null")), is_stream(Path("/dev/stdout")), is_stream(Path("new.json"))
    (True, True, False)
    """
    if os.path.normpath(path.absolute()).startswith(_STREAMS):
        return True  # even where it leads to a file: who opened that goes on writing into it
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
