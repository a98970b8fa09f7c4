"""Who writes to a target, and what jobs that were cut off have left beside it.

A job holds a lock file per target for as long as it lives. What lies in the root under one of the
names below belongs to the holder of that name's lock; where nobody holds it, that job is gone, and
the next one here puts right what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.spelling import named, typed
from pma_megatron.base.stopping import shielded
from pma_megatron.errors import PublishError
from pma_megatron.formats import registry
from pma_megatron.formats.output import Folder

STAGING = ".pma-staging-"
_REPLACED = ".pma-replaced-"
_LOCK = ".pma-lock-"
_TRACKER = ".pma-tracker-"
_WRITING, _CLEANING = "writing", "cleaning"
_AGAIN_S = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """One folder that is written: the one that will be loaded, and the one in which it is made.

    Attributes:
        root: what both lie in; of a checkpoint, its tracker too.
        final: the published folder.
        staging: where it is made.
        folder: which of the folders of an output it is.
        output: number of the output in the plan.
    """

    root: Path
    final: Path
    staging: Path
    folder: Folder = Folder.CHECKPOINT
    output: int = 0

    @property
    def setting(self) -> str:
        """The setting that says where it goes."""
        return str(self.folder.value)

    @property
    def replaced(self) -> Path:
        """Where the checkpoint that is replaced lies meanwhile, if folders cannot be exchanged."""
        return self.root / f"{_REPLACED}{self.final.name}"

    @property
    def tracker(self) -> Path:
        """What the run's tracker will be, until the checkpoint bears its name."""
        return self.root / f"{_TRACKER}{self.final.name}"


class _HeldError(Exception):
    """Another job holds the lock; the text says which."""


@contextlib.contextmanager
def locked(wanted: Sequence[Target]) -> Iterator[None]:
    """Hold the targets for one job (rank 0 only); a killed job lets go by itself.

    Raises:
        PublishError: another job is writing there, or the folder cannot be made.
    """
    with contextlib.ExitStack() as stack:
        for target in wanted:
            name = target.final.name
            try:
                stack.callback(_remove_empty, _made(target.root))
                sure = stack.enter_context(_held(target.root, name, _WRITING))
            except _HeldError as holder:
                raise PublishError(
                    f"another merge is writing {target.final}{holder}: wait for it, or choose "
                    f"another {named(target.setting)}"
                ) from None
            except OSError as error:
                raise PublishError(
                    f"cannot write to {target.root}: {error.strerror}. Choose another "
                    f"{named(target.setting)}"
                ) from error
            _collect(target.root, name, sure=sure)
        yield


def unfinished(target: Target) -> bool:
    """True if a merge was killed after it named its checkpoint, before the tracker named it too.

    It never reported, so the same command may run again without `overwrite`.
    """
    return target.tracker.is_file() and not _staged(target.root, target.final.name)


def restored(target: Target) -> bool:
    """Give a checkpoint that was being replaced its name back, if nothing else has it."""
    if not target.replaced.exists() or target.final.exists():
        return False
    target.replaced.rename(target.final)
    return True


def _made(root: Path) -> list[Path]:
    """Make a folder; returns those that were not there, the deepest first."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: Sequence[Path]) -> None:
    with shielded(), contextlib.suppress(OSError):  # the first that holds something ends it
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def _held(root: Path, name: str, purpose: str) -> Iterator[bool]:
    """Hold one lock; yields False where the file system has none.

    Raises:
        _HeldError: another job does.
    """
    path = root / f"{_LOCK}{name}"
    descriptor, sure = _locked_file(path, wait=purpose == _WRITING)
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
            if not wait or (holder == before and purpose != _CLEANING):
                raise _HeldError(f" ({who})" if who else "") from None
            before = holder
            time.sleep(_AGAIN_S)
            continue
        except OSError as error:
            _log.warning("%s cannot be locked (%s): run one merge at a time", path, error)
            sure = False
        # Its last holder may have removed the file after it was opened here: that lock is no one's.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, sure
        os.close(descriptor)


def _collect(root: Path, own: str, *, sure: bool) -> None:
    """Put right what jobs that are gone left in `root`, whatever target they were at."""
    for name in sorted({own, *_names(root)}):
        if name == own and sure:
            _remove_stale(root, name, own=True)
        elif not sure:
            left = [path.name for path in _debris(root, name)]
            if left:
                _log.warning(
                    "%s holds %s: left alone, because nothing tells here whether a job still uses "
                    "it; remove it when no merge is running",
                    root,
                    ", ".join(left),
                )
        else:
            # The lock of a job that lives, and files that vanish or cannot be touched, stay.
            with contextlib.suppress(_HeldError, OSError), _held(root, name, _CLEANING):
                _remove_stale(root, name, own=False)


def _names(root: Path) -> set[str]:
    found = set()
    with os.scandir(root) as entries:
        for entry in entries:
            for prefix in (_REPLACED, _LOCK, _TRACKER):
                if entry.name.startswith(prefix):
                    found.add(entry.name.removeprefix(prefix))
            if entry.name.startswith(STAGING):
                found.add(entry.name.removeprefix(STAGING).rpartition("-")[0])
    return found - {""}


def _staged(root: Path, name: str) -> list[Path]:
    return [
        path
        for path in root.glob(f"{STAGING}*")
        if path.name.removeprefix(STAGING).rpartition("-")[0] == name
    ]


def _debris(root: Path, name: str) -> list[Path]:
    found = [*_staged(root, name), root / f"{_REPLACED}{name}", root / f"{_TRACKER}{name}"]
    return [path for path in found if path.exists()]


def removed(folder: Path) -> bool:
    """Remove a folder that no checkpoint is in any more; what cannot be removed is said.

    Returns:
        whether it was there and is gone.
    """
    problems: list[tuple[str, OSError]] = []

    def failed(_: object, path: str, raised: tuple[type, BaseException, object]) -> None:
        if isinstance(raised[1], OSError) and not isinstance(raised[1], FileNotFoundError):
            problems.append((path, raised[1]))

    there = os.path.lexists(folder)
    shutil.rmtree(folder, onerror=failed)
    if not problems:
        return there
    name = typed(folder)
    path, error = problems[0]
    _log.warning(
        "%s could not be removed (%s: %s) and takes space: type chmod -R u+rwX %s && rm -r %s",
        folder,
        path,
        error.strerror,
        name,
        name,
    )
    return False


def _remove_stale(root: Path, name: str, *, own: bool) -> None:
    target = Target(root, root / name, root)
    for folder in _staged(root, name):
        if removed(folder):
            _log.warning("removed %s, left by a merge that was cut off", folder)
        target.tracker.unlink(missing_ok=True)
    if restored(target):
        _log.warning("restored %s, which a cut-off merge was replacing", target.final)
    removed(target.replaced)
    # Of the own target it stays: it says that the checkpoint may be made again.
    if not own and target.tracker.is_file():
        _finish(target)


def _finish(target: Target) -> None:
    """The last step of a publication that was cut off right before it: the tracker."""
    if target.final.is_dir():
        known = registry.get(registry.detect(target.final), str(target.final))
        target.tracker.replace(target.root / known.tracker.file)
        _log.warning(
            "%s now names %s, which a merge that was cut off had published",
            target.root / known.tracker.file,
            target.final.name,
        )
    else:
        target.tracker.unlink()
