"""Who reads a checkpoint holds a lock on it, so that nothing of ours deletes it meanwhile.

The lock is a shared one (flock) on a file that the checkpoint has anyway, opened for reading alone:
a source may lie where its reader cannot write. Who deletes takes the same lock for itself first
(`alone_with`). On Linux a shared lock of NFS is seen by all of its clients. Where a file system has
no locks, or only those of this machine, a reader goes without, and who deletes is told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from pma_megatron.base.openfiles import open_source, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.storage.spool import listing_once

MARKERS = (".metadata", "metadata.json")
"""Files without which no checkpoint of torch.distributed.checkpoint is whole, if it has them."""
_LIKE = ("*model_states.pt", "*.safetensors", "*.pt", "*.json")
_PATIENCE_S = 60.0
"""How long a reader waits for one who may delete: that one looks at the whole run meanwhile."""
_AGAIN_S = 0.05
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = {
    "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
    "lustre": {"localflock"},
    "cifs": {"nobrl", "nolock"},
    "smb3": {"nobrl", "nolock"},
}
"""Mount options with which flock(2) works, and other machines see nothing of it: nfs(5),
mount.lustre(8), mount.cifs(8)."""
_UNTOLD = ("fuse", "beegfs", "virtiofs")
"""Shared file systems of which no mount option says whether other machines see flock(2)."""
_log = logging.getLogger(__name__)
_TOLD: list[bool] = []
"""Whether this process has said that locks fail."""

_Held = dict[str, tuple[int, int]]
"""Path -> descriptor, and the process that locked it."""


class BeingReadError(Exception):
    """Somebody reads the checkpoint."""


_HELD: ContextVar[_Held | None] = ContextVar("held", default=None)
_BLOCKS: list[object] = []
"""One for each open block of `holding` in this process."""
_OF_THREADS: _Held = {}
"""What threads hold that have no block of their own, until no block is open any more."""


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """What `hold` is told in the block is held to its end; a decorator too.

    A block may lie in another one, and then holds as long as that one does. What a thread without a
    block of its own holds, it holds until all blocks of the process have ended.
    """
    if _HELD.get() is not None:
        yield
        return
    held: _Held = {}
    token = _HELD.set(held)
    _BLOCKS.append(token)
    try:
        with listing_once():
            yield
    finally:
        _HELD.reset(token)
        _BLOCKS.remove(token)
        _release(held)
        if not _BLOCKS:
            _release(_OF_THREADS)


def _release(held: _Held) -> None:
    """Let go, in a child that has inherited a descriptor too; a child lets go of its own alone."""
    while held:
        _, (descriptor, process) = held.popitem()
        if process == os.getpid():
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def hold(checkpoint: str | Path) -> None:
    """Keep a checkpoint from being deleted by `pma prune` until the block of `holding` ends.

    Where no such block is open in the process, this does nothing. One process of a job is enough:
    the others do not outlive it.

    Args:
        checkpoint: its folder.

    Raises:
        CheckpointError: it is being deleted, or is gone.
    """
    held, path = _HELD.get(), str(checkpoint)
    if in_store(path):  # no store has locks
        return
    if held is None and _BLOCKS:
        held = _OF_THREADS
    if held is None or path in held:
        return
    file = lock_file(path_of(path))
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
            _put(held, path, descriptor)
            return
        os.close(descriptor)
        if time.monotonic() > until_s:
            raise _gone(path)
        time.sleep(_AGAIN_S)  # it may only be looked at


def _put(held: _Held, path: str, descriptor: int) -> None:
    """Threads may hold one checkpoint at once, and the last block may end meanwhile."""
    mine = (descriptor, os.getpid())
    if held.setdefault(path, mine) is not mine:
        os.close(descriptor)
    if held is _OF_THREADS and not _BLOCKS:
        _release(held)


@contextlib.contextmanager
def alone_with(checkpoint: Path) -> Iterator[bool]:
    """Nobody begins to read a checkpoint inside the block; yields False where nothing can tell.

    Nothing can tell where the file system has no locks, or other machines do not see them, nor of a
    checkpoint that holds something and no file that a reader would lock.

    Raises:
        BeingReadError: somebody reads it.
        OSError: it cannot be opened.
    """
    file = lock_file(checkpoint)
    if file is None:
        yield _holds_nothing(checkpoint)
        return
    descriptor = _opened(file)
    try:
        locked = _locked(descriptor, fcntl.LOCK_EX)
        if locked is False:
            raise BeingReadError(str(checkpoint))
        yield locked is not None and _is_still(descriptor, file) and seen_by_all(descriptor)
    finally:
        _release({"": (descriptor, os.getpid())})


def lock_file(checkpoint: Path) -> Path | None:
    """The file of a checkpoint that is locked; None where there is no plain file in it.

    It never lies behind a link to a folder; it may be a link itself.
    """
    for name in MARKERS:
        if (checkpoint / name).is_file():
            return checkpoint / name
    parts = (path for path in checkpoint.glob(f"*/{MARKERS[0]}") if not path.parent.is_symlink())
    liked = (checkpoint.glob(pattern) for pattern in _LIKE)
    for found in (parts, *liked, checkpoint.rglob("*")):
        files = sorted(path for path in found if path.is_file())
        if files:
            return files[0]
    return None


def _holds_nothing(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is None
    except FileNotFoundError:
        return True


def seen_by_all(descriptor: int, *, untold: bool = False) -> bool:
    """Whether other machines that have the file system mounted see a lock of this one.

    Args:
        descriptor: of a file there.
        untold: the answer for file systems that do not say.
    """
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
        number = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
        mounts = (line.split(" ") for line in _MOUNTS.read_text().splitlines())
        mount = next(words for words in mounts if words[0] == number)
        # proc(5): ... root, mount point, options, optional fields, "-", type, source, options
        kind, _, of_all = mount[mount.index("-") + 1 :][:3]
    except (OSError, StopIteration, IndexError, ValueError):
        return untold
    if kind.startswith(_UNTOLD) and kind != "fuseblk":
        return untold
    options = {*mount[5].split(","), *of_all.split(",")}
    return not options & _LOCAL.get("nfs" if kind.startswith("nfs") else kind, set())


def _opened(file: Path) -> int:
    """NFS locks a file for one alone only where it is open for writing."""
    try:
        return os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return open_source(file)


def _locked(descriptor: int, kind: int) -> bool | None:
    """Whether it is locked now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.ENOLCK and not _TOLD:
            _TOLD.append(True)
            _log.warning(
                "locks fail now (%s): other machines are not told what is read here, so run "
                "nothing that deletes checkpoints meanwhile, and look at the lock service",
                error.strerror,
            )
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
