"""Every checkpoint of a run with the reasons why it stays, as things stand at this moment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

from pma_megatron.base.openfiles import SourceStream, is_unreadable
from pma_megatron.base.spelling import first_few, named
from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.formats.trainers.saves import checkpoint_in, save_of
from pma_megatron.merging.locks import HeldError
from pma_megatron.retention.clock import FileClock
from pma_megatron.retention.keeping import needed
from pma_megatron.retention.request import PruneRequest
from pma_megatron.retention.resumption import Resumption, best_of, resumption
from pma_megatron.retention.signs import looking
from pma_megatron.retention.surroundings import leading_to, links_between, links_into, real
from pma_megatron.retention.unfinished import unfinished, unseen
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.folders import is_checkpoint, what_is
from pma_megatron.runs.marks import Mark, mark, unchanged
from pma_megatron.runs.refs import CheckpointRef, iteration_of
from pma_megatron.runs.trainer_retention import recovers_by_itself, trainer_retention
from pma_megatron.storage import paths
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.storage.spool import listing_once

SETTLED_S = 3600.0
"""Age from which a damaged checkpoint is not one that a save writes again right now."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One checkpoint.

    Attributes:
        ref: it.
        kept: why it stays, a clause each; () if it may go.
    """

    ref: CheckpointRef
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """A run.

    Attributes:
        verdicts: oldest first.
        notes: sentences for the user.
        marks: path -> what tells whether it has changed since.
        between: links from one checkpoint into another, as they were at the first look.
        written_ns: path -> when its newest file was written, where that was looked at.
        clock: that files are dated by; None where nothing is deleted.
    """

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    marks: Mapping[str, Mark]
    between: Mapping[Path, Path]
    written_ns: Mapping[str, int]
    clock: FileClock | None

    def of(self, path: str) -> Verdict | None:
        """What was found out about one checkpoint; None if it is not there."""
        return next((each for each in self.verdicts if each.ref.path == path), None)


@listing_once()
def decide(
    request: PruneRequest,
    before: Decision | None = None,
    anew: str = "",
    clock: FileClock | None = None,
) -> Decision:
    """Look at a run, and decide.

    Args:
        request: what is to stay.
        before: an earlier look; checkpoints that are as they were are not opened again.
        anew: path of one that is opened in any case.
        clock: tells how long ago files changed, at an earlier look too; without one the machine's
            does, which may be wrong: enough to say what may go, not to delete it.

    Raises:
        SelectionError: no run, or one of which it is not clear what training resumes from.
        CheckpointError: its log of recoveries is damaged.
    """
    root = path_of(request.root)
    if is_checkpoint(root) or checkpoint_in(root) is not None:
        raise SelectionError(f"{root} is one checkpoint: give the folder above it, {root.parent}")
    clock = clock if before is None else before.clock
    known = _unchanged(root, before, anew)
    refs = list_checkpoints(root, known=known)
    if not refs:
        raise SelectionError(what_is(root))
    times = {} if before is None else before.written_ns
    resumed = resumption(refs, root, request, {p: at for p, at in times.items() if p in known})
    rules = [needed(refs, end, request) for end in resumed.ends]
    states = _states(refs, resumed, request, clock)
    with looking(root):
        merges = unfinished(root, request.averages)
    folders = [path_of(ref.folder) for ref in refs]
    between = links_between(folders) if before is None else before.between
    links = {**links_into(root), **between}
    verdicts = []
    for ref in sorted(refs, key=lambda ref: (ref.iteration is None, ref.iteration or 0, ref.path)):
        own = {paths.real(ref.path), paths.real(ref.folder)}
        needs = filter(None, (each.why_kept(own) for each in merges))
        asked = (why for each in rules for why in each.reasons.get(ref.path, ()))
        reasons = [*states[ref.path], *dict.fromkeys(asked), *needs]
        verdicts.append(Verdict(ref, (*reasons, *_by_links(ref, root, links))))
    marks = {ref.path: mark(root, ref) for ref in refs}
    asked_for = dict.fromkeys(note for each in rules for note in each.notes)
    notes = (*resumed.notes, *asked_for, *_further(resumed.end, request))
    if clock is None and any(v.ref.state == "damaged" and not v.kept for v in verdicts):
        notes = (*notes, _BY_THIS_CLOCK)
    notes = (*notes, _UNSEEN) if in_store(root) else notes
    if hidden := unseen(root):
        few = first_few(hidden, _SHOWN)
        notes = (*notes, f"{few} cannot be looked at: a merge that was cut off there may need some")
    return Decision(tuple(verdicts), notes, marks, between, resumed.written_ns, clock)


_SHOWN = 3
_RECOVERY = "keep_recovery_iterations"
_BY_THIS_CLOCK = (
    "whether a damaged one has changed within the last hour is told by the clock of this machine; "
    "a deletion asks the clock that dates the files, and may keep more"
)
_UNSEEN = (
    "no store has locks: a merge, live start or evaluation that reads one of these at this moment "
    "is seen only if it was started on this machine and makes an average"
)


def _further(end: CheckpointRef, request: PruneRequest) -> Iterator[str]:
    """What else is at work on the run's checkpoints."""
    deletes = trainer_retention(end)
    if deletes is not None:
        yield f"{deletes}: what stays here may go there"
    if request.keep_recovery_iterations is None:
        stays = f"nothing says that what it needs for that is to stay: {named(_RECOVERY)}"
        try:
            if recovers_by_itself(end):
                yield f"the run recovers from loss spikes by itself (pma_recover), and {stays}"
        except CheckpointError as error:
            yield (
                "whether the run recovers from loss spikes by itself (pma_recover) is not known "
                f"({error}), and {stays}"
            )


def _by_links(ref: CheckpointRef, root: Path, links: Mapping[Path, Path]) -> list[str]:
    """Why one stays to which links lead, or which lies behind one."""
    folder = path_of(ref.folder)
    if in_store(folder):
        return []
    if folder.is_symlink():
        return ["it is a link"]
    if any(
        real(path) != real(root) / path.relative_to(root) for path in (folder, path_of(ref.path))
    ):
        return ["it lies behind a link, perhaps in another run"]
    link = leading_to(real(folder), links)
    return [] if link is None else [f"{link} leads to it"]


def _unchanged(root: Path, before: Decision | None, anew: str) -> dict[str, CheckpointRef]:
    if before is None:
        return {}
    refs = [each.ref for each in before.verdicts if each.ref.path != anew]
    return unchanged(root, refs, before.marks)


def _states(
    refs: Sequence[CheckpointRef],
    resumed: Resumption,
    request: PruneRequest,
    clock: FileClock | None,
) -> dict[str, list[str]]:
    """Why some stay whatever the rules say."""
    newest = _newest(refs)
    kind, at = _kind(resumed.end), resumed.end.iteration
    best = best_of(resumed, refs)
    found: dict[str, list[str]] = {}
    for ref in refs:
        folder = path_of(ref.folder)
        tracker = resumed.trackers.get(folder)
        why = found[ref.path] = [] if tracker is None else [f"{tracker} names it"]
        if ref.path in newest:
            why.append("the newest")
        why += resumed.why_kept(ref)
        if folder.name in best:
            why.append(best[folder.name])
        if ref.iteration is None:
            why.append("it has no iteration number")
        if not ref.snapshot and ref.format != "unknown" and _kind(ref) != kind:
            why.append(f"saved in another way ({_named_kind(ref)}) than iteration {at}")
        if ref.state == "being written":
            why.append("it is being written")
        elif ref.unreadable:
            why.append(f"it cannot be read now ({ref.incomplete_because})")
        elif ref.branch_unknown:
            why.append(str(ref.unhealthy_because))
        elif ref.state == "not judged":
            why.append("not judged yet after a recovery")
        elif ref.state == "damaged":
            why += _damaged(folder, request, clock)
    return found


def _newest(refs: Sequence[CheckpointRef]) -> set[str]:
    """The newest of each kind, whole or not; the newest whole one, and of those the newest that
    nothing speaks against."""
    kinds: dict[tuple[object, ...], list[CheckpointRef]] = {}
    for ref in refs:
        if ref.iteration is not None:
            kinds.setdefault((ref.snapshot,), []).append(ref)
            if ref.complete:
                whole = (ref.snapshot, ref.weights_only, ref.format)
                kinds.setdefault(whole, []).append(ref)
                if ref.unhealthy_because is None:
                    kinds.setdefault((*whole, "healthy"), []).append(ref)
    found = set()
    for kind in kinds.values():
        top = max(iteration_of(ref) for ref in kind)
        found |= {ref.path for ref in kind if ref.iteration == top}
    return found


def _kind(ref: CheckpointRef) -> tuple[str, str | None]:
    """Format and trainer: an export, or what another program left, is not the run's to delete."""
    return ref.format, save_of(path_of(ref.path), ref.format).by


def _named_kind(ref: CheckpointRef) -> str:
    return " of ".join(filter(None, _kind(ref)))


def _damaged(folder: Path, request: PruneRequest, clock: FileClock | None = None) -> list[str]:
    if not request.damaged:
        return ["damaged: look at it"]
    if not folder.is_dir():
        return ["it is no folder"]
    try:
        stats = [path.lstat() for path in (folder, *folder.rglob("*"))]
    except OSError:
        return ["it changes at this moment"]
    if in_store(folder):  # what stands for its objects is older than they are here
        changed_s = max(stat.st_mtime for stat in stats if not S_ISDIR(stat.st_mode))
    else:
        changed_s = max(max(stat.st_mtime, stat.st_ctime) for stat in stats)
    try:
        now_s = time.time() if clock is None else clock.now_s(folder.parent)
    except (HeldError, OSError) as error:
        return [f"nothing tells what time it is by the clock that dates its files ({error})"]
    if now_s - changed_s < SETTLED_S:
        return ["it changed within the last hour: it may be written again"]
    return _unreadable(folder)


def _unreadable(folder: Path) -> list[str]:
    """Why nothing tells that one is damaged: what was found missing may be what cannot be read."""
    errors: list[OSError] = []
    for here, _, names in os.walk(folder, onerror=errors.append):
        for path in (path_of(here) / name for name in names):
            try:
                with SourceStream(path) as stream:
                    stream.read(1)
            except OSError as error:
                errors.append(error)
    found = next(filter(is_unreadable, errors), None)
    if found is None:
        return []
    return [f"{found.filename or folder} cannot be read now ({found.strerror})"]
