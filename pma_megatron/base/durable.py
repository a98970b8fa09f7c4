"""Bytes that are on the disk when the call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from pathlib import Path

_DRAFT = ".draft-"
_OPEN = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/[^/]+(/task/[^/]+)?/fd/\d+")
"""Names of what a process has open."""
_READER_S = 10.0
_POLL_S = 0.02


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
        OSError: it cannot be written, or is no plain file, and nothing has changed.
    """
    if is_stream(path):
        with os.fdopen(_opened(path), "wb") as stream:
            stream.write(data)
        return
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
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
    """Whether a path names no file that could be replaced, but a terminal or a pipe, or what a
    process has open.

    >>> is_stream(Path("/dev/null")), is_stream(Path("/dev/stdout")), is_stream(Path("new.json"))
    (True, True, False)
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if _OPEN.fullmatch(os.path.normpath(path.absolute())):
        return True  # even where it leads to a file: who opened that goes on writing into it
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _opened(path: Path) -> int:
    """A descriptor to write into a stream; of a pipe, its reader is waited for, and not for ever.

    Raises:
        OSError: it cannot be opened, or nobody reads.
    """
    flags, since = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, time.monotonic()
    while True:
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():
                raise
            if time.monotonic() - since > _READER_S:
                raise OSError(errno.ENXIO, "nobody reads from that pipe", str(path)) from error
            time.sleep(_POLL_S)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
