"""One job at a time works on a name in a folder: a lock file there, held while the job lives."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.stopping import shielded
from pma_megatron.formats.holding import seen_by_all

LOCK = ".pma-lock-"
"""What a lock file is called before the name that it is for."""
WRITING, CLEANING = "writing", "cleaning"
_AGAIN_S, _CLEANING_S = 0.1, 60.0
"""Cleaning is over by then: the text is of a job before, and the holder could not replace it."""
_log = logging.getLogger(__name__)


class HeldError(Exception):
    """Another job holds the lock; the text says which."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that this process holds.

    Attributes:
        path: of its file.
        descriptor: of the same.
        sure: False where the file system has no locks, or says that no other machine sees it.
    """

    path: Path
    descriptor: int
    sure: bool

    @property
    def is_there(self) -> bool:
        """Whether others still see it: somebody may have removed its file."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        return False

    def release(self) -> None:
        """Let go of it, its file too."""
        with shielded():
            if self.is_there:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self.descriptor)


def take(root: Path, name: str, purpose: str) -> Lock:
    """Take one lock, which is held until it is released or this process ends.

    Raises:
        HeldError: another job holds it.
        OSError: its file cannot be made, opened or written.
    """
    lock = _locked_file(root / f"{LOCK}{name}", wait=purpose == WRITING)
    try:
        text = f"process {os.getpid()} on {socket.gethostname()} {purpose}".encode()
        if fcntl.fcntl(lock.descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.ftruncate(lock.descriptor, 0)
            os.pwrite(lock.descriptor, text, 0)
    except BaseException:
        lock.release()
        raise
    return lock


@contextlib.contextmanager
def held(root: Path, name: str, purpose: str) -> Iterator[bool]:
    """Hold one lock for the block; yields False where the file system has none, or says that no
    other machine sees it.

    Raises:
        HeldError: another job does.
    """
    lock = take(root, name, purpose)
    try:
        yield lock.sure
    finally:
        lock.release()


def is_held(root: Path, name: str) -> bool:
    """Whether a job holds the lock of `name`; nothing is written to find out."""
    try:
        descriptor = os.open(root / f"{LOCK}{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _locked_file(path: Path, *, wait: bool) -> Lock:
    """Open and lock; `wait` for a job that only cleans up, which takes moments."""
    before, until_s = None, time.monotonic() + _CLEANING_S
    while True:
        descriptor, sure = _opened(path), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            who, _, purpose = holder.rpartition(" ")
            # It may hold the lock and not have said so yet: what is read twice is true.
            is_brief = purpose == CLEANING and time.monotonic() < until_s
            if not wait or (holder == before and not is_brief):
                raise HeldError(f" ({who})" if who else "") from None
            before = holder
            time.sleep(_AGAIN_S)
            continue
        except OSError as error:
            _log.warning("%s cannot be locked (%s): run one job at a time there", path, error)
            sure = False
        # Its last holder may have removed the file after it was opened here: nobody sees that lock.
        lock = Lock(path, descriptor, sure and seen_by_all(descriptor, untold=True))
        if lock.is_there:
            return lock
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except PermissionError:
        # What another user's job has left can be locked as long as it can be read. Its text stays.
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise
