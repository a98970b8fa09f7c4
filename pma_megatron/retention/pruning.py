"""Delete the checkpoints that may go, one by one, each looked at again right before.

A checkpoint is renamed first, so that a kill at any moment leaves either all of it, or what bears
no name that a trainer looks for; then it loses what makes it look whole, then the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron.base.durable import sync
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import folders_in, is_folder
from pma_megatron.base.sizes import sized
from pma_megatron.base.spelling import first_few, speaking, switch
from pma_megatron.base.stopping import shielded
from pma_megatron.errors import SelectionError
from pma_megatron.formats.holding import MARKERS, BeingReadError, alone_with, lock_file
from pma_megatron.formats.marker import SNAPSHOTS, UPLOADING_FILE
from pma_megatron.merging.leftovers import removed
from pma_megatron.merging.locks import CLEANING, LOCK, HeldError, held
from pma_megatron.online.snapshot_job import REMOVED
from pma_megatron.retention.clock import FileClock
from pma_megatron.retention.decision import Decision, decide
from pma_megatron.retention.freed import freed_bytes
from pma_megatron.retention.request import KEYWORDS, PruneRequest
from pma_megatron.retention.signs import ChangedError, Sign, finish, looking, moment_of, signs_below
from pma_megatron.retention.signs import delete as delete_objects
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.trackers import read_pointers
from pma_megatron.storage.claims import ClaimedError
from pma_megatron.storage.paths import in_store, path_of

_SHOWN = 3
_log = logging.getLogger(__name__)
Only = Callable[[CheckpointRef], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One checkpoint.

    Attributes:
        ref: it.
        kept: why it stays, a clause each; () if it may go.
        bytes: that are free once it is deleted.
        deleted: whether it is.
        problem: why it could not be deleted.
    """

    ref: CheckpointRef
    kept: tuple[str, ...]
    bytes: int
    deleted: bool = False
    problem: str | None = None

    @property
    def may_go(self) -> bool:
        """Whether nothing keeps it."""
        return not self.kept and not self.deleted


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneReport:
    """A run.

    Attributes:
        root: its folder.
        rows: its checkpoints, oldest first.
        notes: sentences for the user.
        leftovers: what deletions that were cut off had left, and is still there.
    """

    root: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    leftovers: tuple[str, ...]

    def bytes_of(self, *, deleted: bool) -> int:
        """Bytes that were freed, or that would be."""
        found = (row for row in self.rows if row.deleted or (row.may_go and not deleted))
        return sum(row.bytes for row in found)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {**asdict(each), **asdict(each.ref), "state": each.ref.state, "may_go": each.may_go}
            for each in self.rows
        ]
        for row in rows:
            del row["ref"]
        return {
            "root": self.root,
            "checkpoints": rows,
            "notes": list(self.notes),
            "leftovers": list(self.leftovers),
        }


@speaking(KEYWORDS)
def prune(
    request: PruneRequest, *, delete: bool = False, only: Only = lambda ref: True
) -> PruneReport:
    """Say what of a run may go, and delete it if asked to.

    Never deleted are: the newest checkpoints, what a tracker names, what is newer than that, what
    is being written or read, links and what they lead to, what was saved in another way than the
    newest, and what a merge that was cut off needs.

    Args:
        request: what is to stay.
        delete: True deletes the rest.
        only: of the rest, what may be deleted at all; asked again right before each deletion.

    Raises:
        UsageError: an address, or nothing that is to stay.
        SelectionError: no run, or one of which it is not clear what training resumes from.
        CheckpointError: its log of recoveries is damaged.
    """
    root = path_of(request.root)
    if not in_store(root) and is_folder(root):
        folders_in(root)  # raises where it may not be read
    left = _leftovers(root)
    decision = decide(request, clock=FileClock() if delete else None)
    rows = [
        Row(ref=each.ref, kept=each.kept, bytes=freed_bytes([path_of(each.ref.folder)])[0])
        for each in decision.verdicts
    ]
    rows = [row if only(row.ref) else replace(row, kept=(*row.kept, _NOT_MEANT)) for row in rows]
    alone = (lambda row, _: row) if in_store(root) else _if_alone
    rows = [alone(row, request) if row.may_go else row for row in rows]
    sizes = iter(freed_bytes(path_of(row.ref.folder) for row in rows if row.may_go))
    rows = [replace(row, bytes=next(sizes)) if row.may_go else row for row in rows]
    if delete:
        left = _finished(root) if in_store(root) else _cleared(left, root)
        work = _deleted_in_store if in_store(root) else _deleted
        for number, row in enumerate(rows):
            if row.may_go:
                rows[number], decision = work(row, request, decision, only)
    return PruneReport(
        root=request.root, rows=tuple(rows), notes=decision.notes, leftovers=tuple(map(str, left))
    )


def _places(root: Path) -> Iterator[Path]:
    """Where checkpoints are deleted: what lies behind a link is of another run."""
    yield root
    if not (root / SNAPSHOTS).is_symlink():
        yield root / SNAPSHOTS


def _leftovers(root: Path) -> list[Path]:
    if in_store(root):
        with looking(root):
            signs = [sign for sign in signs_below(root) if sign.deletes]
        return [sign.folder for sign in signs if not _refused(sign)]
    found = (path for place in _places(root) for path in place.glob(f"{REMOVED}*"))
    return [path for path in found if not path.is_symlink()]


def _refused(sign: Sign) -> bool:
    """False for a deletion that can be finished.

    Raises:
        SelectionError: training has gone back to the checkpoint.
    """
    named = {pointer.named for pointer in read_pointers(sign.folder.parent).values()}
    if sign.folder.name not in named:
        return False
    mark = sign.folder / UPLOADING_FILE
    raise SelectionError(
        f"{sign.folder} was being deleted when that was cut off, and is what training resumes from "
        f"by now. If it is whole, delete {mark} alone; if not, resume from another one first"
    )


def _cleared(left: Sequence[Path], root: Path) -> list[Path]:
    """Remove what deletions that were cut off left; returns what is still there."""
    for place in _places(root):
        for lock in place.glob(f"{LOCK}*"):
            name = lock.name.removeprefix(LOCK)
            with contextlib.suppress(HeldError, OSError), held(place, name, CLEANING):
                pass  # it is removed on leaving
    return [folder for folder in left if not _gone(folder)]


def _gone(folder: Path) -> bool:
    """Remove a folder, perhaps together with somebody else; whether nothing is left of it."""
    removed(folder)
    return not os.path.lexists(folder)


def _if_alone(row: Row, request: PruneRequest) -> Row:
    """The same, kept where somebody reads it, or where nothing tells."""
    try:
        with alone_with(path_of(row.ref.path)) as sure:
            if sure or request.without_locks:
                return row
    except BeingReadError:
        return replace(row, kept=("it is being read",))
    except OSError as error:
        return replace(row, kept=(f"it cannot be opened ({error.strerror})",))
    way = switch("without_locks")
    return replace(row, kept=(f"no locks here tell whether it is being read ({way} goes on)",))


_NOT_MEANT = "it is none of those that are to be deleted"


def _deleted(row: Row, request: PruneRequest, before: Decision, only: Only) -> tuple[Row, Decision]:
    """Look at the run again, and delete one checkpoint if it may still go."""
    ref, folder = row.ref, path_of(row.ref.folder)
    try:
        with held(folder.parent, folder.name, CLEANING), alone_with(path_of(ref.path)) as sure:
            now = decide(request, before, ref.path)
            sure = sure or request.without_locks
            stays = _stays(row, now, only, () if sure else ("the file system has lost its locks",))
            if stays is not None:
                return stays, now
            point("prune", 0)
            hidden = _hidden(folder, path_of(ref.path))
    except BeingReadError:
        return replace(row, kept=("it is being read",)), before
    except HeldError as holder:
        return replace(row, kept=(f"another job is writing it{holder}",)), before
    except OSError as error:
        if not os.path.lexists(folder):
            return replace(row, kept=(_GONE,)), before
        return _failed(row, error), before
    point("pruned", 0)
    if not _gone(hidden):
        freed = max(0, row.bytes - freed_bytes([hidden])[0])
        problem = f"{hidden} is not removed altogether"
        return replace(row, deleted=True, bytes=freed, problem=problem), now
    _log.info("deleted %s, %s", folder, sized(row.bytes))
    return replace(row, deleted=True), now


_GONE = "somebody else has moved or deleted it"


def _stays(row: Row, now: Decision, only: Only, why: tuple[str, ...] = ()) -> Row | None:
    """The row of a checkpoint that stays after all, for what the rules say now or for `why`."""
    verdict = now.of(row.ref.path)
    if verdict is None:
        return replace(row, kept=(_GONE,))
    if not only(row.ref):
        return replace(row, kept=(_NOT_MEANT,))
    if verdict.kept or why:
        _log.warning("%s stays after all: %s", row.ref.folder, "; ".join(verdict.kept or why))
        return replace(row, kept=verdict.kept or why)
    return None


def _failed(row: Row, error: OSError) -> Row:
    problem = f"{error.filename or row.ref.folder}: {error.strerror}"
    _log.warning("%s could not be deleted (%s)", row.ref.folder, problem)
    return replace(row, problem=problem)


def _deleted_in_store(
    row: Row, request: PruneRequest, before: Decision, only: Only
) -> tuple[Row, Decision]:
    """The same of objects: what was looked at must still be there once the folder is signed."""
    folder, now = path_of(row.ref.folder), before
    try:
        seen = moment_of(folder)
        now = decide(request, before, row.ref.path)
        stays = _stays(row, now, only)
        if stays is not None:
            return stays, now
        point("prune", 0)
        new = delete_objects(folder, seen)
    except ChangedError:
        why = "it, or what says where training resumes, was written at this moment"
        return replace(row, kept=(why,)), now
    except ClaimedError as other:
        return replace(row, kept=(f"another job is at work there ({other})",)), now
    except OSError as error:
        return _failed(row, error), now
    _log.info("deleted %s, %s", folder, sized(row.bytes))
    problem = f"{first_few(new, _SHOWN)} came into it meanwhile, and stayed" if new else None
    return replace(row, deleted=True, problem=problem), now


def _finished(root: Path) -> list[Path]:
    """Finish deletions in a store that were cut off; returns the folders that stay."""
    stay = []
    for sign in signs_below(root):
        if not sign.deletes:
            continue
        _refused(sign)
        try:
            finish(sign)
        except (ClaimedError, OSError) as error:
            _log.warning("%s is deleted in part, and stays so (%s)", sign.folder, error)
            stay.append(sign.folder)
    return stay


def _hidden(folder: Path, checkpoint: Path) -> Path:
    """Take a checkpoint out of sight, and what makes it look whole out of it."""
    hidden = folder.parent / f"{REMOVED}{folder.name}-{os.getpid()}-{time.time_ns()}"
    inside = hidden / checkpoint.relative_to(folder)
    with shielded():
        folder.rename(hidden)
        sync(folder.parent)
        point("hidden", 0)
        whole = [
            path_of(here) / name
            for here, _, names in os.walk(hidden)
            for name in names
            if name in MARKERS
        ]
        for marker in filter(None, (*whole, lock_file(inside))):
            with contextlib.suppress(OSError):  # said where the rest is removed
                marker.unlink()
    return hidden
