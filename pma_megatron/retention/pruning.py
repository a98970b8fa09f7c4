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
from pma_megatron.base.sizes import sized
from pma_megatron.base.spelling import speaking, switch
from pma_megatron.base.stopping import shielded
from pma_megatron.formats.holding import MARKERS, BeingReadError, alone_with, lock_file
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.merging.leftovers import removed
from pma_megatron.merging.locks import CLEANING, LOCK, HeldError, held
from pma_megatron.online.snapshot_job import REMOVED
from pma_megatron.retention.decision import Decision, decide
from pma_megatron.retention.freed import freed_bytes
from pma_megatron.retention.request import KEYWORDS, PruneRequest
from pma_megatron.runs.refs import CheckpointRef

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
    root = Path(request.root)
    left = _leftovers(root)
    decision = decide(request)
    rows = [
        Row(ref=each.ref, kept=each.kept, bytes=freed_bytes([Path(each.ref.folder)])[0])
        for each in decision.verdicts
    ]
    rows = [row if only(row.ref) else replace(row, kept=(*row.kept, _NOT_MEANT)) for row in rows]
    rows = [_if_alone(row, request) if row.may_go else row for row in rows]
    sizes = iter(freed_bytes(Path(row.ref.folder) for row in rows if row.may_go))
    rows = [replace(row, bytes=next(sizes)) if row.may_go else row for row in rows]
    if delete:
        left = _cleared(left, root)
        for number, row in enumerate(rows):
            if row.may_go:
                rows[number], decision = _deleted(row, request, decision, only)
    return PruneReport(
        root=request.root, rows=tuple(rows), notes=decision.notes, leftovers=tuple(map(str, left))
    )


def _places(root: Path) -> Iterator[Path]:
    """Where checkpoints are deleted: what lies behind a link is of another run."""
    yield root
    if not (root / SNAPSHOTS).is_symlink():
        yield root / SNAPSHOTS


def _leftovers(root: Path) -> list[Path]:
    found = (path for place in _places(root) for path in place.glob(f"{REMOVED}*"))
    return [path for path in found if not path.is_symlink()]


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
        with alone_with(Path(row.ref.path)) as sure:
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
    ref, folder = row.ref, Path(row.ref.folder)
    try:
        with held(folder.parent, folder.name, CLEANING), alone_with(Path(ref.path)) as sure:
            now = decide(request, before, ref.path)
            verdict = now.of(ref.path)
            if verdict is None:
                return replace(row, kept=("somebody else has moved or deleted it",)), now
            if not only(ref):
                return replace(row, kept=(_NOT_MEANT,)), now
            if verdict.kept or not (sure or request.without_locks):
                why = verdict.kept or ("the file system has lost its locks",)
                _log.warning("%s stays after all: %s", folder, "; ".join(why))
                return replace(row, kept=why), now
            point("prune", 0)
            hidden = _hidden(folder, Path(ref.path))
    except BeingReadError:
        return replace(row, kept=("it is being read",)), before
    except HeldError as holder:
        return replace(row, kept=(f"another job is writing it{holder}",)), before
    except OSError as error:
        if not os.path.lexists(folder):
            return replace(row, kept=("somebody else has moved or deleted it",)), before
        problem = f"{error.filename or folder}: {error.strerror}"
        _log.warning("%s could not be deleted (%s)", folder, problem)
        return replace(row, problem=problem), before
    point("pruned", 0)
    if not _gone(hidden):
        freed = max(0, row.bytes - freed_bytes([hidden])[0])
        problem = f"{hidden} is not removed altogether"
        return replace(row, deleted=True, bytes=freed, problem=problem), now
    _log.info("deleted %s, %s", folder, sized(row.bytes))
    return replace(row, deleted=True), now


def _hidden(folder: Path, checkpoint: Path) -> Path:
    """Take a checkpoint out of sight, and what makes it look whole out of it."""
    hidden = folder.parent / f"{REMOVED}{folder.name}-{os.getpid()}-{time.time_ns()}"
    inside = hidden / checkpoint.relative_to(folder)
    with shielded():
        folder.rename(hidden)
        sync(folder.parent)
        point("hidden", 0)
        whole = [
            Path(here, name)
            for here, _, names in os.walk(hidden)
            for name in names
            if name in MARKERS
        ]
        for marker in filter(None, (*whole, lock_file(inside))):
            with contextlib.suppress(OSError):  # said where the rest is removed
                marker.unlink()
    return hidden
