"""One job at a time works on a name in a folder: a lock file there, held while the job lives."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pma_megatron.base.stopping import shielded
from pma_megatron.formats.holding import seen_by_all

LOCK = ".pma-lock-"
"""What a lock file is called before the name that it is for."""
WRITING, CLEANING = "writing", "cleaning"
_AGAIN_S = 0.1
_log = logging.getLogger(__name__)


class HeldError(Exception):
    """Another job holds the lock; the text says which."""


@contextlib.contextmanager
def held(root: Path, name: str, purpose: str) -> Iterator[bool]:
    """Hold one lock; yields False where the file system has none, or says that no other machine
    sees it.

    Raises:
        HeldError: another job does.
    """
    path = root / f"{LOCK}{name}"
    descriptor, sure = _locked_file(path, wait=purpose == WRITING)
    try:
        text = f"process {os.getpid()} on {socket.gethostname()} {purpose}".encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
        yield sure
    finally:
        with shielded():
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


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


def _locked_file(path: Path, *, wait: bool) -> tuple[int, bool]:
    """Open and lock; `wait` for a job that only cleans up, which takes moments."""
    before = None
    while True:
        descriptor, sure = os.open(path, os.O_CREAT | os.O_RDWR, 0o644), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            who, _, purpose = holder.rpartition(" ")
            # It may hold the lock and not have said so yet: what is read twice is true.
            if not wait or (holder == before and purpose != CLEANING):
                raise HeldError(f" ({who})" if who else "") from None
            before = holder
            time.sleep(_AGAIN_S)
            continue
        except OSError as error:
            _log.warning("%s cannot be locked (%s): run one merge at a time", path, error)
            sure = False
        # Its last holder may have removed the file after it was opened here: nobody sees that lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, sure and seen_by_all(descriptor, untold=True)
        os.close(descriptor)
