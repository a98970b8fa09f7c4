"""From a staging folder to a published checkpoint: nothing half-done ever bears the final name.

Order: refuse what cannot work, lock, stage beside the target, fill, flush, verify, rename, tracker.
A kill at any moment leaves a staging folder (removed by the next run) or a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.blocks import crc_of, joined_crc
from pma_megatron.durable import sync, write_small
from pma_megatron.errors import PublishError
from pma_megatron.faultpoints import point
from pma_megatron.folders import is_checkpoint
from pma_megatron.formats import registry
from pma_megatron.formats.marker import MARKER_FILE, SNAPSHOTS, read_snapshot_marker
from pma_megatron.openfiles import Files, create_inside, write_inside
from pma_megatron.planning import MergePlan

PROVENANCE_FILE = MARKER_FILE
_STAGING = ".pma-staging-"
_REPLACED = ".pma-replaced-"
_LOCK = ".pma-lock-"
_TRACKER = ".pma-tracker-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """One output: the folder that Megatron will load and the one in which it is made."""

    root: Path
    final: Path
    staging: Path


def targets(plan: MergePlan, save: str, token: str) -> tuple[Target, ...]:
    """Where the outputs of `plan` go; `token` keeps the staging folders of two jobs apart."""
    newest = plan.sources[-1]
    name = registry.get(newest.format, newest.path).folder_name(newest.path, plan.iteration)
    found = []
    for output in plan.outputs:
        root = Path(save) / output.name if output.name else Path(save)
        found.append(Target(root, root / name, root / f"{_STAGING}{name}-{token}"))
    return tuple(found)


def new_token() -> str:
    """A name for one job's staging folders."""
    return secrets.token_hex(4)


def refuse(plan: MergePlan, wanted: Sequence[Target]) -> None:
    """Check everything that can be known before the first byte is written.

    Raises:
        PublishError: the output would touch a source, a live run or a foreign checkpoint, exists
            already, or does not fit on the disk.
    """
    sources = [Path(source.path).resolve() for source in plan.sources]
    for target in wanted:
        root, final = target.root.resolve(), target.final.resolve()
        for source in sources:
            if final == source or source in final.parents or final in source.parents:
                raise PublishError(
                    f"the output {final} is or contains the source {source}: refused, sources are "
                    "never written to. Choose another --save"
                )
            thin = source.parent.name == SNAPSHOTS and root == source.parent.parent
            if root == source.parent or thin:
                raise PublishError(
                    f"--save {root} is the run's own folder: its tracker and retention would take "
                    f"the merge for a checkpoint of the run. Use --save {root}-pma or {root}/pma"
                )
        _refuse_foreign(target)
        if target.final.exists() and not plan.request.overwrite and not _unfinished(target):
            raise PublishError(
                f"{target.final} exists. Use --overwrite to replace it (it is kept until the new "
                "one is complete), or another --save"
            )
    _refuse_full(plan, wanted[0].root)


def _refuse_foreign(target: Target) -> None:
    if not target.root.is_dir():
        return
    for folder in target.root.iterdir():
        if not folder.is_dir() or not (folder.name.startswith("iter_") or is_checkpoint(folder)):
            continue
        merged = (folder / PROVENANCE_FILE).is_file() and read_snapshot_marker(folder) is None
        if not merged:
            raise PublishError(
                f"--save {target.root} holds {folder.name}, which this tool did not write: it is a "
                "training run's folder. Give merges a folder of their own"
            )


def _refuse_full(plan: MergePlan, root: Path) -> None:
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.written_bytes:
        raise PublishError(
            f"{existing} has {free / 2**30:.2f} GiB free, the output needs "
            f"{plan.written_bytes / 2**30:.2f} GiB. Free space or choose another --save"
        )
    if not os.access(existing, os.W_OK):
        raise PublishError(f"{existing} is not writable: choose another --save")


@contextlib.contextmanager
def locked(wanted: Sequence[Target]) -> Iterator[None]:
    """Hold the targets for one job (rank 0 only); a killed job lets go by itself.

    Raises:
        PublishError: another job is writing there, or the folder cannot be made.
    """
    handles = []
    try:
        for target in wanted:
            try:
                target.root.mkdir(parents=True, exist_ok=True)
                handles.append(_lock(target))
            except OSError as error:
                raise PublishError(
                    f"cannot write to {target.root}: {error.strerror}. Choose another --save"
                ) from error
            _remove_stale(target)
        yield
    finally:
        for descriptor, path in handles:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(target: Target) -> tuple[int, Path]:
    path = target.root / f"{_LOCK}{target.final.name}"
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise PublishError(
                f"another merge is writing {target.final}: wait for it, or use another --save"
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): run one merge at a time", path, error)
        # Its last holder may have removed the file after it was opened here: that lock is no one's.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, path
        os.close(descriptor)


def _staged(target: Target) -> list[Path]:
    return list(target.root.glob(f"{_STAGING}{target.final.name}-*"))


def _unfinished(target: Target) -> bool:
    """True if a merge was killed after it named its checkpoint, before the tracker named it too.

    It never reported, so the same command may run again without --overwrite.
    """
    return (target.root / f"{_TRACKER}{target.final.name}").is_file() and not _staged(target)


def _remove_stale(target: Target) -> None:
    for folder in _staged(target):
        _log.warning("removing %s, left by a merge that was cut off", folder)
        shutil.rmtree(folder, ignore_errors=True)
        (target.root / f"{_TRACKER}{target.final.name}").unlink(missing_ok=True)
    if _restored(target):
        _log.warning("restored %s, which a cut-off merge was replacing", target.final)
    shutil.rmtree(target.root / f"{_REPLACED}{target.final.name}", ignore_errors=True)


def _restored(target: Target) -> bool:
    """Give a checkpoint that was being replaced its name back, if nothing else has it."""
    kept = target.root / f"{_REPLACED}{target.final.name}"
    if not kept.exists() or target.final.exists():
        return False
    kept.rename(target.final)
    return True


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
        raise _cannot_write(wanted[0], error) from error


def finish(plan: MergePlan, target: Target, writer_parts: Sequence[dict[tuple[int, str], list[
           tuple[int, int, int]]]], provenance: bytes) -> None:  # fmt: skip
    """Write what surrounds the payloads, then the small files, the marker last (rank 0 only).

    Args:
        plan: the plan.
        target: the output.
        writer_parts: per rank, the checksums of what it wrote into this output.
        provenance: content of `pma.json`.

    Raises:
        PublishError: bytes of a payload are unaccounted for, or the folder cannot be written.
    """
    parts: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
    for rank_parts in writer_parts:
        for where, ranges in rank_parts.items():
            parts.setdefault(where, []).extend(ranges)
    try:
        _write_structure(plan, target, parts)
        small = dict(plan.layout.small_files)
        last = plan.layout.last_file
        marker = small.pop(last) if last is not None else b""
        for name, data in (*small.items(), (PROVENANCE_FILE, provenance)):
            write_inside(target.staging, name, data)
        point("marker", 0)
        if last is not None:
            write_inside(target.staging, last, marker)
        for name in plan.layout.files:
            sync(target.staging / name)
        for folder in sorted({(target.staging / name).parent for name in plan.layout.files}):
            sync(folder)
        sync(target.staging)
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: Target, error: OSError) -> PublishError:
    return PublishError(
        f"cannot write to {target.staging}: {error.strerror}. Nothing was published; free space or "
        "choose another --save, then run again"
    )


def _write_structure(plan: MergePlan, target: Target,
                     parts: dict[tuple[int, str], list[tuple[int, int, int]]]) -> None:  # fmt: skip
    files = Files(target.staging, os.O_RDWR)
    try:
        for number, item in enumerate(plan.layout.items):
            if item.skeleton is None:
                continue
            crcs = {record: crc for record, (_, crc) in item.kept.items() if crc is not None}
            with files.opened(item.placed.file) as descriptor:
                for record, (start, nbytes) in item.skeleton.payloads.items():
                    if record in item.kept and record not in crcs:  # saved without checksums
                        crcs[record] = crc_of(descriptor, item.placed.offset + start, nbytes)
                    elif record not in crcs:
                        crcs[record] = joined_crc(parts.get((number, record), []), nbytes)
                for offset, data in item.skeleton.structure(crcs):
                    os.pwrite(descriptor, data, item.placed.offset + offset)
    finally:
        files.close()


def publish(plan: MergePlan, target: Target) -> None:
    """Give the staged checkpoint its name, then point the tracker at it (rank 0 only).

    Raises:
        PublishError: a rename failed; a checkpoint that was to be replaced is still there.
    """
    kept = target.root / f"{_REPLACED}{target.final.name}"
    tracker = target.root / f"{_TRACKER}{target.final.name}"
    known = registry.get(plan.sources[-1].format, plan.sources[-1].path).tracker
    try:
        # Written first: a disk that is full by now must not leave a checkpoint without a tracker.
        write_small(tracker, known.content_of(target.final.name).encode())
        if target.final.exists():
            if not _exchange(target.staging, target.final):
                target.final.rename(kept)
                point("replace", 0)
                target.staging.rename(target.final)
        else:
            target.staging.rename(target.final)
        sync(target.root)
        point("tracker", 0)
        tracker.replace(target.root / known.file)
        sync(target.root)
    except OSError as error:
        raise PublishError(
            f"cannot publish {target.final}: {error.strerror}. Free space or choose another "
            "--save, then run again"
        ) from error
    finally:
        _restored(target)
    shutil.rmtree(target.staging, ignore_errors=True)  # after an exchange it is the old one
    shutil.rmtree(kept, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux renameat2), so that no moment is without a checkpoint."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(at, os.fsencode(one), at, os.fsencode(other), exchange) == 0
    return False


def discard(wanted: Sequence[Target]) -> None:
    """Remove what a failure left (rank 0 only); harmless after a success."""
    for target in wanted:
        if target.staging.exists():
            (target.root / f"{_TRACKER}{target.final.name}").unlink(missing_ok=True)
            shutil.rmtree(target.staging, ignore_errors=True)
