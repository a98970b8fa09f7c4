"""What training resumes from: what a tracker names; without one, what numbers and times tell.

Where no file says it, trainers take the highest number, unless they are told otherwise: a run that
went back was. What it has saved since then was written later than others of higher numbers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.spelling import given
from pma_megatron.errors import SelectionError
from pma_megatron.formats.trainers.saves import checkpoint_in, holds_the_last, save_of
from pma_megatron.retention.request import PruneRequest
from pma_megatron.retention.surroundings import real
from pma_megatron.runs.describe import describe
from pma_megatron.runs.discover import choose, pointers_of
from pma_megatron.runs.refs import CheckpointRef, iteration_of, nearest
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.runs.trackers import Pointer, read_pointers
from pma_megatron.storage.paths import path_of

_NEWEST = SelectionRequest(last=1, allow_gaps=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """What training resumes from, as far as that is known.

    Attributes:
        ends: the checkpoint; two where nothing tells which of them it is, the higher number last.
        trackers: folder -> the file that names it.
        since: iteration from which all stays, for it is not clear where training goes on; or None.
        last_written: path of the one with the newest file, where no tracker counts; or None.
        written_ns: path -> when its newest file was written, of those that were looked at for that.
        notes: sentences for the user.
    """

    ends: tuple[CheckpointRef, ...]
    trackers: Mapping[Path, str]
    since: int | None = None
    last_written: str | None = None
    written_ns: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def end(self) -> CheckpointRef:
        """The one of the highest number."""
        return self.ends[-1]

    def why_kept(self, ref: CheckpointRef) -> list[str]:
        """Why one stays for the sake of where training goes on, a clause each."""
        first, sure = iteration_of(self.ends[0]), len(self.ends) == 1
        why = []
        if ref.path in {end.path for end in self.ends}:
            why.append("what training resumes from" if sure else "training may resume from it")
        elif ref.path == self.last_written and ref.path != self.end.path:
            why.append("the newest file lies in it")
        if ref.iteration is not None and ref.iteration > first:
            resumes = "training resumes from" if sure else "training may resume from"
            why.append(f"newer than iteration {first}, which {resumes}")
        elif not why and self.since is not None and (ref.iteration or 0) >= self.since:
            why.append(f"not older than iteration {self.since}, in which the newest file lies")
        return why


def resumption(
    refs: list[CheckpointRef], root: Path, request: PruneRequest, known: Mapping[str, int]
) -> Resumption:
    """Find out what training resumes from.

    Args:
        refs: all checkpoints of the run.
        root: its folder.
        request: may say it.
        known: path -> when the newest file of a checkpoint was written that has not changed since.

    Raises:
        SelectionError: formats are mixed, or nothing has a number; the tracker cannot be used, or
            says otherwise than the request.
    """
    pointers = pointers_of(root) or {}
    trackers = _named({path_of(ref.folder).parent for ref in refs})
    end = _newest(refs, root, pointers)
    told = _told(refs, pointers)
    if told is not None:
        _refuse_other(request, told)
        return Resumption(ends=(end,), trackers=trackers)
    own = [r for r in refs if r.iteration is not None and not r.snapshot]
    own = [r for r in own if r.format in (end.format, "unknown")]
    written = {r.path: known.get(r.path) or _written_ns(path_of(r.folder)) for r in own}
    last_written = max(own, key=lambda ref: (written[ref.path], iteration_of(ref)), default=end)
    top, since = iteration_of(end), None
    latest = _latest([(iteration_of(ref), written[ref.path]) for ref in own], top)
    if lasts := _lasts(root, refs):
        top = max(lasts)[0]
        latest = min(latest, _latest(lasts, top))
        up_to_last = _up_to(top, refs, root)
        since, end = (top, end) if up_to_last is None else (None, up_to_last)
        if latest >= top:
            _refuse_other(request, top)
    notes: tuple[str, ...] = ()
    ends: tuple[CheckpointRef, ...] = (end,)
    if request.resume_iteration is not None:
        ends = (_asked(refs, root, request.resume_iteration),)
    elif latest < top:
        lower, since = _up_to(latest, refs, root), latest
        ends = (end,) if lower is None else (lower, end)
        notes = (_unclear(top, latest),)
    return Resumption(
        ends=ends,
        trackers=trackers,
        since=since,
        last_written=last_written.path,
        written_ns=written,
        notes=notes,
    )


def _latest(saves: Sequence[tuple[int, int]], otherwise: int) -> int:
    """Of saves, each an iteration and when it was written, the iteration of the latest."""
    return max(saves, key=lambda each: (each[1], each[0]), default=(otherwise, 0))[0]


def _unclear(top: int, latest: int) -> str:
    return (
        f"nothing says whether training resumes from iteration {top} or from {latest}, in which "
        "the newest file lies (the run went back, a copy gave files new times, or something was "
        f"put there): everything from iteration {latest} on stays. If it is {top}, add "
        f"{given('resume_iteration', top)}; if the run went back, move elsewhere what it has given "
        "up"
    )


def best_of(resumed: Resumption, refs: Sequence[CheckpointRef]) -> dict[str, str]:
    """Name of a folder -> the clause that the trainer itself calls it the best.

    Its newest word counts: of the newest whole checkpoint, and of those that training may resume
    from.

    Raises:
        CheckpointError: what says so cannot be read.
    """
    whole = [ref for ref in refs if ref.complete and ref.iteration is not None]
    newest = max(whole, key=iteration_of, default=resumed.end)
    found: dict[str, str] = {}
    for ref in dict.fromkeys((newest, *resumed.ends)):
        save = save_of(path_of(ref.path), ref.format)
        if save.trainer is not None:
            for name in save.trainer.best(save.folder):
                found.setdefault(
                    name, f"{save.folder.name}/{save.trainer.leaves} calls it the best"
                )
    return found


def _newest(
    refs: list[CheckpointRef], root: Path, pointers: Mapping[str, Pointer]
) -> CheckpointRef:
    """The newest that training can resume from, up to what a tracker names.

    Raises:
        SelectionError: it is not clear which one that is.
    """
    end = choose(refs, _NEWEST, root, pointers).refs[-1]
    named = {pointer.named for pointer in pointers.values()}
    if (end.snapshot or end.weights_only) and path_of(end.path).name not in named:
        full = [r for r in refs if r.complete and not r.snapshot and not r.weights_only]
        full = [r for r in full if r.iteration is not None and r.unusable_because is None]
        if full:
            end = choose(full, _NEWEST, root, pointers).refs[-1]
    if end.iteration is None:
        raise SelectionError(f"{end.path} has no iteration: nothing tells which is the newest")
    return end


def _up_to(iteration: int, refs: list[CheckpointRef], root: Path) -> CheckpointRef | None:
    """The newest up to an iteration that training can resume from; None if there is none."""
    older = [ref for ref in refs if ref.iteration is not None and ref.iteration <= iteration]
    with contextlib.suppress(SelectionError):
        return _newest(older, root, {})
    return None


def _asked(refs: list[CheckpointRef], root: Path, iteration: int) -> CheckpointRef:
    found = _up_to(iteration, refs, root)
    if found is None or found.iteration != iteration:
        numbered = sorted((ref for ref in refs if ref.iteration is not None), key=iteration_of)
        raise SelectionError(
            f"{given('resume_iteration', iteration)}: no whole checkpoint of that iteration is "
            f"there; {nearest(numbered, iteration)}"
        )
    return found


def _refuse_other(request: PruneRequest, told: int) -> None:
    if request.resume_iteration not in (None, told):
        raise SelectionError(
            f"{given('resume_iteration', request.resume_iteration)}, and the run itself says "
            f"that training resumes from iteration {told}: leave it out, or correct that"
        )


def _told(refs: Iterable[CheckpointRef], pointers: Mapping[str, Pointer]) -> int | None:
    """The iteration that a tracker names; None where none does."""
    named = {pointer.folder for pointer in pointers.values()} - {None}
    told = (r.iteration for r in refs if path_of(r.path).name in named and r.iteration is not None)
    return next(iter(told), None)


def _lasts(root: Path, refs: Sequence[CheckpointRef]) -> list[tuple[int, int]]:
    """Iteration of each save that its trainer resumes from by its name (`...-last`), and when it
    was written. Such a save may be a copy of, or a link to, one that is listed instead of it."""
    at = {real(ref.folder): ref.iteration for ref in refs}
    found = []
    for folder in sorted(root.iterdir()):
        if holds_the_last(folder.name) and is_folder(folder):
            iteration = at.get(real(folder))
            inside = checkpoint_in(folder) if iteration is None else None
            if inside is not None:
                iteration = describe(inside).iteration
            if iteration is not None:
                found.append((iteration, _written_ns(folder)))
    return found


def _written_ns(folder: Path) -> int:
    """When the newest file in a folder was written, in ns since 1970; 0 if nothing tells."""
    newest = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                newest = max(newest, (path_of(here) / name).lstat().st_mtime_ns)
    return newest


def _named(parents: Iterable[Path]) -> dict[Path, str]:
    """Folder -> the tracker that names it.

    Raises:
        SelectionError: a tracker cannot be read, or names what is not there.
    """
    found = {}
    for parent in parents:
        for pointer in read_pointers(parent).values():
            if pointer.problem is not None and not pointer.missing:
                raise SelectionError(
                    f"{parent} {pointer.problem}: it may be written at this moment. Try again, or "
                    "correct it"
                )
            if pointer.folder is not None:
                found[parent / pointer.folder] = pointer.file
    return found
