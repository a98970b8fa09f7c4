"""From a staging folder to a published checkpoint: nothing half-done ever bears the final name.

Order: refuse what cannot work, lock, stage beside the target, fill, flush, verify, rename, tracker.
A kill at any moment leaves a staging folder (removed by the next run) or a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from pma_megatron.base.durable import sync, write_small
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import create_inside
from pma_megatron.base.spelling import given, named, switch
from pma_megatron.base.stopping import shielded
from pma_megatron.errors import CheckpointError, PublishError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE, SNAPSHOTS, read_snapshot_marker
from pma_megatron.merging.intact import listing
from pma_megatron.merging.leftovers import STAGING, Target, locked, removed, restored, unfinished
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.request import Output
from pma_megatron.runs.folders import holds_checkpoint, is_checkpoint

__all__ = ["Target", "locked"]

PROVENANCE_FILE = MARKER_FILE
_log = logging.getLogger(__name__)


def targets(plan: MergePlan, save: str, token: str) -> tuple[Target, ...]:
    """Where the outputs of `plan` go; `token` keeps the staging folders of two jobs apart."""
    newest = plan.sources[-1]
    name = registry.get(newest.format, newest.path).folder_name(newest.path, plan.iteration)
    found = []
    for output in plan.outputs:
        root = Path(save) / output.name if output.name else Path(save)
        found.append(Target(root, root / name, root / f"{STAGING}{name}-{token}"))
    return tuple(found)


def new_token() -> str:
    """A name for one job's staging folders."""
    return secrets.token_hex(4)


def refuse(plan: MergePlan, wanted: Sequence[Target]) -> None:
    """Check everything that can be known before the first byte is written.

    Raises:
        PublishError: the output would touch a source, a live run or a foreign checkpoint, exists
            already, does not fit on the disk, or lies where nothing can be looked at.
    """
    try:
        _refuse(plan, wanted)
    except OSError as error:
        raise PublishError(
            f"{given('save', wanted[0].root)} cannot be used: {error.filename or 'it'} cannot be "
            f"looked at ({error.strerror}). {_INSTEAD.get(error.errno or 0, 'Choose another')} "
            f"{named('save')}"
        ) from error


_INSTEAD = {
    errno.EACCES: "Ask its owner for the right to read, write and enter it (chmod u+rwx), or "
    "choose another",
    errno.ENAMETOOLONG: "Choose a shorter",
    errno.ELOOP: "Its links lead back to themselves: choose another",
}


def _refuse(plan: MergePlan, wanted: Sequence[Target]) -> None:
    sources = [_real(Path(source.path)) for source in plan.sources]
    for target in wanted:
        root, final = _real(target.root), _real(target.final)
        for source in sources:
            if final == source or source in final.parents or final in source.parents:
                raise PublishError(
                    f"the output {final} is or contains the source {source}: refused, sources are "
                    f"never written to. Choose another {named('save')}"
                )
            thin = source.parent.name == SNAPSHOTS and root == source.parent.parent
            if root == source.parent or thin:
                raise PublishError(
                    f"{given('save', root)} is the run's own folder: its tracker and retention "
                    "would take the merge for a checkpoint of the run. Use "
                    f"{given('save', f'{root}-pma')} or {root}/pma"
                )
        _refuse_long(plan, target)
        _refuse_odd(plan, target)
        _refuse_inside(root)
        _refuse_foreign(target)
        _refuse_loss(target)
    there = already(plan, wanted)
    for target, same in zip(wanted, there, strict=True):
        free = same and not all(there)
        if target.final.exists() and not (plan.request.overwrite or free or unfinished(target)):
            raise PublishError(
                f"{target.final} exists. Use {switch('overwrite')} to replace it (it is kept until "
                f"the new one is complete), or another {named('save')}"
            )
    _refuse_full(plan.layout.nbytes * there.count(False), wanted[0].root)


def already(plan: MergePlan, wanted: Sequence[Target]) -> tuple[bool, ...]:
    """Per output of a sweep, whether this very request has published it before.

    A sweep that was killed between two outputs is finished by the same command.
    """
    if len(wanted) == 1 or plan.request.overwrite:
        return (False,) * len(wanted)
    return tuple(
        _is_of(target.final, plan, output) and not unfinished(target)
        for target, output in zip(wanted, plan.outputs, strict=True)
    )


def _is_of(folder: Path, plan: MergePlan, output: Output) -> bool:
    try:
        made = json.loads((folder / PROVENANCE_FILE).read_text())
        digest, values = made["plan"]["digest"], made["output"]["coefficients"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(digest == plan.digest and values == list(output.values))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `resolve` raises for names that cannot be looked at


def _refuse_long(plan: MergePlan, target: Target) -> None:
    """Names that the file system cannot hold, those of the files in the output included."""
    names = (*plan.layout.files, SEAL_FILE)
    longest = target.staging / max(names, key=len)
    part = max((os.fsencode(each) for each in longest.absolute().parts), key=len)
    if len(part) > _NAME_BYTES:
        raise PublishError(
            f"a folder of the output would have a name of {len(part)} bytes "
            f"({os.fsdecode(part[:20])}...), and a file system holds {_NAME_BYTES}: choose a "
            f"shorter {named('save')}"
        )
    if len(os.fsencode(longest.absolute())) >= _PATH_BYTES:
        raise PublishError(
            f"files of the output would have paths of {len(os.fsencode(longest.absolute()))} "
            f"bytes, and the system takes {_PATH_BYTES - 1}: choose a shorter {named('save')}"
        )


_NAME_BYTES, _PATH_BYTES = 255, 4096  # NAME_MAX and PATH_MAX of Linux


def _refuse_inside(root: Path) -> None:
    """A checkpoint is not a place to put others: its owner deletes, copies and lists it whole."""
    for folder in (root, *root.parents):
        if holds_checkpoint(folder):
            below = f"lies in {folder}, a checkpoint"
            below = "is a checkpoint itself" if folder == root else below
            raise PublishError(
                f"{given('save', root)} {below}: what is kept in it goes when it is deleted, and "
                f"counts as its own. Give merges a folder beside the run's, such as "
                f"{folder.parent}-pma"
            )


def _refuse_loss(target: Target) -> None:
    """An output that is replaced may hold what somebody else put there: that is not deleted."""
    if not target.final.is_dir():
        return
    try:
        sums = read_marker(target.final).sums
        strangers = sorted(set(listing(target.final)) - set(sums)) if sums is not None else []
    except (CheckpointError, VerifyError):
        return  # nothing says what was written with it
    if strangers:
        more = f" and {len(strangers) - _SHOWN} more" if strangers[_SHOWN:] else ""
        raise PublishError(
            f"{target.final} would be replaced, and holds {', '.join(strangers[:_SHOWN])}{more}, "
            f"which was not written with it and would be lost. Move what is yours elsewhere, or "
            f"choose another {named('save')}"
        )


_SHOWN = 4  # files that one message names


def _refuse_odd(plan: MergePlan, target: Target) -> None:
    """Names that are taken by something that a merge can neither replace nor stand beside."""
    final, elsewhere = target.final, f"Choose another {named('save')}"
    if os.path.lexists(target.root) and not target.root.is_dir():
        raise PublishError(
            f"{given('save', target.root)} is {_kind(target.root)}, no folder. {elsewhere}"
        )
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
        raise PublishError(
            f"{final}, the name of the output, is {_kind(final)}. Remove it, or choose another "
            f"{named('save')}"
        )
    if os.path.ismount(final):
        raise PublishError(
            f"{final}, the name of the output, is a mount point, which cannot be renamed over. "
            f"{elsewhere}"
        )
    newest = plan.sources[-1]
    tracker = target.root / registry.get(newest.format, newest.path).tracker.file
    if os.path.lexists(tracker) and not tracker.is_file():
        raise PublishError(
            f"{tracker} is {_kind(tracker)}, and must become the file that names the newest "
            f"checkpoint. Remove it, or choose another {named('save')}"
        )


def _kind(path: Path) -> str:
    if path.is_symlink():
        return f"a symbolic link (to {path.readlink()})"
    mode = path.stat().st_mode
    return "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "no file"


def _refuse_foreign(target: Target) -> None:
    if not target.root.is_dir():
        return
    if target.final.is_dir() and not (target.final / PROVENANCE_FILE).is_file():
        raise PublishError(
            f"{given('save', target.root)} holds {target.final.name}, a folder by the name of the "
            "output which this tool did not write. Give merges a folder of their own"
        )
    for folder in target.root.iterdir():
        if not folder.is_dir() or not (folder.name.startswith("iter_") or is_checkpoint(folder)):
            continue
        merged = (folder / PROVENANCE_FILE).is_file() and read_snapshot_marker(folder) is None
        if not merged:
            raise PublishError(
                f"{given('save', target.root)} holds {folder.name}, which this tool did not write: "
                "it is a training run's folder. Give merges a folder of their own"
            )


def _refuse_full(needed: int, root: Path) -> None:
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise PublishError(
            f"{existing} has {free / 2**30:.2f} GiB free, the output needs "
            f"{needed / 2**30:.2f} GiB. Free space or choose another {named('save')}"
        )
    if not os.access(existing, os.W_OK):
        raise PublishError(f"{existing} is not writable: choose another {named('save')}")


def stage(plan: MergePlan, wanted: Sequence[Target]) -> None:
    """Make the staging folders with every shard file at its full length (rank 0 only).

    Raises:
        PublishError: the folder cannot be written.
    """
    try:
        for target in wanted:
            for name, nbytes in plan.layout.files.items():
                create_inside(target.staging, name, nbytes)
    except OSError as error:
        raise cannot_write(wanted[0], error) from error


def cannot_write(target: Target, error: OSError) -> PublishError:
    """What to say when the storage refuses."""
    return PublishError(
        f"cannot write to {target.staging}: {error.strerror}. Nothing was published; free space or "
        f"choose another {named('save')}, then run again"
    )


def publish(plan: MergePlan, target: Target) -> None:
    """Give the staged checkpoint its name, then point the tracker at it (rank 0 only).

    Raises:
        PublishError: a rename failed; a checkpoint that was to be replaced is still there.
    """
    known = registry.get(plan.sources[-1].format, plan.sources[-1].path).tracker
    try:
        with shielded():
            _publish(target, known.content_of(target.final.name).encode(), known.file)
    except OSError as error:
        raise PublishError(
            f"cannot publish {target.final}: {error.strerror}. Free space or choose another "
            f"{named('save')}, then run again"
        ) from error
    finally:
        restored(target)
    if not removed(target.staging):  # after an exchange it is the old one
        _kept.add(target.staging)
    removed(target.replaced)


_kept: set[Path] = set()
"""Staging folders, each of one job's own name, that need no second try at the end of that job."""


def _publish(target: Target, content: bytes, tracker: str) -> None:
    # Written first: a disk that is full by now must not leave a checkpoint without a tracker.
    write_small(target.tracker, content)
    if target.final.exists():
        if not _exchange(target.staging, target.final):
            target.final.rename(target.replaced)
            point("replace", 0)
            target.staging.rename(target.final)
    else:
        target.staging.rename(target.final)
    sync(target.root)
    point("tracker", 0)
    target.tracker.replace(target.root / tracker)
    sync(target.root)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux renameat2), so that no moment is without a checkpoint."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at, os.fsencode(one), at, os.fsencode(other), exchange) == 0)
    return False


def discard(wanted: Sequence[Target]) -> None:
    """Remove what a failure left (rank 0 only); harmless after a success."""
    with shielded():
        for target in wanted:
            if target.staging not in _kept and target.staging.exists():
                target.tracker.unlink(missing_ok=True)
                removed(target.staging)


Stamp = tuple[int, int]
"""Tells one checkpoint of a name from another."""


def stamps(wanted: Sequence[Target]) -> tuple[Stamp | None, ...]:
    """What bears the names of the targets now; None where nothing does."""
    found: list[Stamp | None] = []
    for target in wanted:
        try:
            status = (target.final / PROVENANCE_FILE).stat()
            found.append((status.st_ino, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)
