"""Who writes to a target, and what jobs that were cut off have left beside it.

A job holds a lock file per target for as long as it lives. What lies in the root under one of the
names below belongs to the holder of that name's lock; where nobody holds it, that job is gone, and
the next one here puts right what it left, or goes on with it (`journal`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pma_megatron.base.durable import sync, write_small
from pma_megatron.base.openfiles import read_source_file
from pma_megatron.base.spelling import named, typed
from pma_megatron.base.stopping import shielded
from pma_megatron.errors import CheckpointError, PublishError
from pma_megatron.formats import registry
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.formats.output import Folder
from pma_megatron.formats.trainers.saves import save_of
from pma_megatron.merging.locks import CLEANING, LOCK, WRITING, HeldError, held
from pma_megatron.storage.paths import in_store, path_of, place_of, workplace

STAGING = ".pma-staging-"
_REPLACED = ".pma-replaced-"
_TRACKER = ".pma-tracker-"
_COPY = ".pma-copy-"
_SPENT = ".pma-spent-"
_FRESH_S = 86_400.0
JOURNAL = ".pma-journal-"
JOB_FILE = "job.json"
"""In a journal: what its merge makes, of what."""
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
    def work(self) -> Path:
        """Where it is made and locked: the root, or a folder on a disk for one in a store."""
        return workplace(self.root)

    @property
    def replaced(self) -> Path:
        """Where the checkpoint that is replaced lies meanwhile, if folders cannot be exchanged."""
        return self.work / f"{_REPLACED}{self.final.name}"

    @property
    def spent(self) -> Path:
        """What its staging folder is called once all of it is in a store: it is not needed."""
        return self.work / f"{_SPENT}{self.final.name}"

    @property
    def journal(self) -> Path:
        """Where a job whose first target this is notes what it has finished (`journal`)."""
        return self.work / f"{JOURNAL}{self.staging.name.removeprefix(STAGING)}"

    def staged_as(self, token: str) -> Target:
        """The same, made in the folder that `token` tells from those of other jobs."""
        return replace(self, staging=self.work / f"{STAGING}{self.final.name}-{token}")

    @property
    def tracker(self) -> Path:
        """What the run's tracker will be, until the checkpoint bears its name."""
        return self.work / f"{_TRACKER}{self.final.name}"


@contextlib.contextmanager
def locked(
    wanted: Sequence[Target], keep: Callable[[], Collection[Path]] = tuple
) -> Iterator[None]:
    """Hold the targets for one job (rank 0 only); a killed job lets go by itself.

    Args:
        wanted: the targets.
        keep: called once the first of them is held: what is left here, and is to stay. Where the
            file system has no locks, nothing tells whether its owner is gone, and it is not asked.

    Raises:
        PublishError: another job is writing there, or the folder cannot be made.
    """
    kept: Collection[Path] | None = None
    with contextlib.ExitStack() as stack:
        for target in wanted:
            name = target.final.name
            try:
                stack.callback(_remove_empty, _made(target.work))
                sure = stack.enter_context(held(target.work, name, WRITING))
            except HeldError as holder:
                raise PublishError(
                    f"another merge is writing {target.final}{holder}: wait for it, or choose "
                    f"another {named(target.setting)}"
                ) from None
            except OSError as error:
                raise PublishError(
                    f"cannot write to {target.work}: {error.strerror}. Choose another "
                    f"{named(target.setting)}"
                ) from error
            if kept is None:
                kept = keep() if sure else ()
            _collect(target.work, name, kept, sure=sure)
        yield


def unfinished(target: Target) -> bool:
    """True if a merge was killed after it named its checkpoint, before the tracker named it too.

    It never reported, so the same command may run again without `overwrite`.
    """
    if in_store(target.final):
        return (target.final / UPLOADING_FILE).is_file()
    with contextlib.suppress(OSError):
        drafted_ns = target.tracker.stat().st_mtime_ns
        # One that is older has not got its name; what is newer is to be made again.
        staged = _staged(target.work, target.final.name)
        return all(folder.stat().st_mtime_ns > drafted_ns for folder in staged)
    return False


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


def _collect(root: Path, own: str, kept: Collection[Path], *, sure: bool) -> None:
    """Put right what jobs that are gone left in `root`, whatever target they were at."""
    for name in sorted({own, *_names(root)}):
        if name == own and sure:
            _remove_stale(root, name, kept, own=True)
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
            with contextlib.suppress(HeldError, OSError), held(root, name, CLEANING):
                _remove_stale(root, name, kept, own=False)


def _names(root: Path) -> set[str]:
    found = set()
    with os.scandir(root) as entries:
        for entry in entries:
            for prefix in (_REPLACED, LOCK, _TRACKER, _COPY, _SPENT):
                if entry.name.startswith(prefix):
                    found.add(entry.name.removeprefix(prefix))
            for prefix in (STAGING, JOURNAL):
                if entry.name.startswith(prefix):
                    found.add(entry.name.removeprefix(prefix).rpartition("-")[0])
    return found - {""}


def _staged(root: Path, name: str, prefix: str = STAGING) -> list[Path]:
    return [
        path
        for path in root.glob(f"{prefix}*")
        if path.name.removeprefix(prefix).rpartition("-")[0] == name
    ]


def journals(root: Path, name: str) -> list[Path]:
    """The journals of jobs whose first target is `name`."""
    return _staged(root, name, JOURNAL)


def _may_go_on(root: Path) -> list[Path]:
    """What its own command may still go on with: another one leaves it alone for a day.

    All of it, whichever target comes first there: a job may have made this one beside another.
    """
    found = []
    for folder in root.glob(f"{JOURNAL}*"):
        with contextlib.suppress(OSError):
            newest_s = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            staged = _staged_with(folder)
            if staged and time.time() - newest_s < _FRESH_S:
                found += [folder, *staged]
    return found


def _staged_with(journal: Path) -> list[Path]:
    """What is still there of the staging folders that a journal tells of.

    There are none once all is published: then its job was killed while it removed the journal.
    """
    token = journal.name.rpartition("-")[2]
    found = dict.fromkeys(journal.parent.glob(f"{STAGING}*-{token}"))
    with contextlib.suppress(CheckpointError, ValueError, TypeError, KeyError):
        for said, *_ in read_json(journal / JOB_FILE)["targets"]:
            final = place_of(said)
            staging = workplace(final.parent) / f"{STAGING}{final.name}-{token}"
            try:
                is_there = staging.is_dir()
            except OSError:  # it cannot be looked at: it may well be there
                is_there = True
            if is_there:
                found[staging] = None
    return list(found)


def staged_bytes(target: Target) -> int:
    """Bytes of disk that jobs which are gone took for this target: they are freed, or used.

    Nothing is held yet: where the job is not gone after all, it may move them away meanwhile.
    """
    taken = 0
    for staged in _staged(target.work, target.final.name):
        for folder, _, names in os.walk(staged):
            for name in names:
                with contextlib.suppress(OSError):
                    found = (path_of(folder) / name).lstat()
                    taken += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    return taken


def _debris(root: Path, name: str) -> list[Path]:
    beside = (root / f"{prefix}{name}" for prefix in (_REPLACED, _TRACKER, _COPY, _SPENT))
    found = [*_staged(root, name), *journals(root, name), *beside]
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
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
        return not os.path.lexists(folder)
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


def point_to(target: Target, file: str) -> Path:
    """Have the root's tracker, `file`, say to resume from a published checkpoint; returns it.

    Where the trainer has more files in the root, which copy the checkpoint's, they come first: the
    draft of the tracker says until the end that this is still to be done.
    """
    trainer = save_of(target.final, registry.detect(target.final)).trainer
    for name, original in () if trainer is None else trainer.root_copies:
        draft = target.root / f"{_COPY}{target.final.name}"
        write_small(draft, read_source_file(target.final / original))
        draft.replace(target.root / name)
    tracker = target.root / file
    target.tracker.replace(tracker)
    sync(target.root)
    return tracker


def _remove_stale(root: Path, name: str, kept: Collection[Path], *, own: bool) -> None:
    target = Target(root, root / name, root)
    staged = _staged(root, name)
    if staged and not unfinished(target):
        target.tracker.unlink(missing_ok=True)
    if not own:
        kept = {*kept, *_may_go_on(root)}
    for folder in staged:
        if folder not in kept and removed(folder):
            _log.warning("removed %s, left by a merge that was cut off", folder)
    if restored(target):
        _log.warning("restored %s, which a cut-off merge was replacing", target.final)
    removed(target.replaced)
    removed(target.spent)
    for folder in journals(root, name):
        if folder not in kept:
            removed(folder)
    (root / f"{_COPY}{name}").unlink(missing_ok=True)
    # Of the own target it stays: it says that the checkpoint may be made again.
    if not own and target.tracker.is_file():
        _finish(target)


def _finish(target: Target) -> None:
    """The last step of a publication that was cut off right before it: the tracker."""
    file = None
    if target.final.is_dir():
        file = registry.get(registry.detect(target.final), str(target.final)).tracker.file
    if file is not None:
        _log.warning(
            "%s now names %s, which a merge that was cut off had published",
            point_to(target, file),
            target.final.name,
        )
    else:
        target.tracker.unlink()
