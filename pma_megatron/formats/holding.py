"""Who reads a checkpoint holds a lock on it, so that nothing of ours deletes it meanwhile.

The lock is a shared one (flock) on a file that the checkpoint has anyway, opened for reading alone:
a source may lie where its reader cannot write. Who deletes takes the same lock for itself first
(`alone_with`). On Linux a shared lock of NFS is seen by all of its clients. Where a file system has
no locks, a reader goes without, and who deletes is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from pma_megatron.base.openfiles import open_source, unread
from pma_megatron.errors import CheckpointError

MARKERS = (".metadata", "metadata.json")
"""Files without which no checkpoint of torch.distributed.checkpoint is whole, if it has them."""
_LIKE = ("*model_states.pt", "*.safetensors", "*.pt", "*.json")
_PATIENCE_S = 5.0
_AGAIN_S = 0.05


class BeingReadError(Exception):
    """Somebody reads the checkpoint."""


_HELD: ContextVar[dict[str, int] | None] = ContextVar("held", default=None)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """What `hold` is told in the block is held to its end; a decorator too.

    A block may lie in another one, and then holds as long as that one does.
    """
    if _HELD.get() is not None:
        yield
        return
    held: dict[str, int] = {}
    token = _HELD.set(held)
    try:
        yield
    finally:
        _HELD.reset(token)
        for descriptor in held.values():
            os.close(descriptor)


def hold(checkpoint: str | Path) -> None:
    """Keep a checkpoint from being deleted by `pma prune` until the block of `holding` ends.

    Outside of such a block this does nothing. One process of a job is enough: the others do not
    outlive it.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: it is being deleted, or is gone.
    """
    held, path = _HELD.get(), str(checkpoint)
    if held is None or path in held:
        return
    file = lock_file(Path(path))
    until_s = time.monotonic() + _PATIENCE_S
    while file is not None:
        try:
            descriptor = open_source(file)
        except OSError as error:
            raise unread(file, error) from error
        if _locked(descriptor, fcntl.LOCK_SH) is not False:
            if not _is_still(descriptor, file):
                os.close(descriptor)
                raise _gone(path)
            held[path] = descriptor
            return
        os.close(descriptor)
        if time.monotonic() > until_s:
            raise _gone(path)
        time.sleep(_AGAIN_S)  # it may only be looked at


@contextlib.contextmanager
def alone_with(checkpoint: Path) -> Iterator[bool]:
    """Nobody begins to read a checkpoint inside the block; yields False where nothing can tell.

    Raises:
        BeingReadError: somebody reads it.
        OSError: it cannot be opened.
    """
    file = lock_file(checkpoint)
    if file is None:
        yield True  # nothing is there that a reader could open
        return
    descriptor = _opened(file)
    try:
        sure = _locked(descriptor, fcntl.LOCK_EX)
        if sure is False:
            raise BeingReadError(str(checkpoint))
        yield sure is not None
    finally:
        os.close(descriptor)


def lock_file(checkpoint: Path) -> Path | None:
    """The file of a checkpoint that is locked; None where it has none that readers need."""
    for name in MARKERS:
        if (checkpoint / name).is_file():
            return checkpoint / name
    for pattern in _LIKE:
        found = sorted(path for path in checkpoint.glob(pattern) if path.is_file())
        if found:
            return found[0]
    return None


def _opened(file: Path) -> int:
    """NFS locks a file for one alone only where it is open for writing."""
    try:
        return os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return open_source(file)


def _locked(descriptor: int, kind: int) -> bool | None:
    """Whether it is locked now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(descriptor: int, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _gone(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is being deleted, by pma prune or by its run: start again, with what is left"
    )
