"""Snapshots of a branch that a run gave up: it went back, and another one goes by them.

A snapshot says which branch wrote it (`formats.marker.Branch`). Where a later branch began at an
earlier iteration, it is none of what training goes on from. Full checkpoints say nothing of this:
trainers overwrite their own as they come by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pma_megatron.base.openfiles import is_unreadable
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.marker import Branch, read_snapshot_marker
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of

FIRST = Branch(number=0, after=0)
K = TypeVar("K", bound=Hashable)


def given_up(
    found: Mapping[K, tuple[int, Branch | None]], others: Collection[Branch] = ()
) -> dict[K, Branch]:
    """Which snapshots a later branch has gone back behind, and that branch.

    Args:
        found: any name -> iteration of a snapshot, and its branch.
        others: branches that began too.

    >>> back = Branch(number=1, after=40)
    >>> given_up({"a": (20, None), "b": (60, None), "c": (50, back)})
    {'b': Branch(number=1, after=40)}
    """
    begun = {*others, *(branch or FIRST for _, branch in found.values())}
    result = {}
    for name, (iteration, branch) in found.items():
        number = (branch or FIRST).number
        behind = [each for each in begun if each.number > number and each.after < iteration]
        if behind:
            result[name] = max(behind, key=lambda each: each.number)
    return result


def branch_of(folder: Path) -> Branch | None:
    """The branch that wrote the snapshot in a folder; None where nothing says so.

    Raises:
        CheckpointError: what says so cannot be read now.
    """
    try:
        marker = read_snapshot_marker(folder)
    except CheckpointError as error:
        if is_unreadable(error):
            raise
        return None
    return None if marker is None else marker.branch


def marked(
    refs: Sequence[CheckpointRef], others: Iterable[Branch | None] = ()
) -> list[CheckpointRef]:
    """The same, with the reason where one is of a branch that was given up, or where that cannot
    be told.

    Args:
        refs: of one run.
        others: branches of snapshots in whose place a full checkpoint is listed.
    """
    snapshots = {
        ref.path: (ref.iteration, ref.branch)
        for ref in refs
        if ref.snapshot and (ref.complete or ref.unreadable) and ref.iteration is not None
    }
    gone = given_up(snapshots, {branch for branch in others if branch is not None})
    found = [
        replace(
            ref,
            given_up=True,
            unhealthy_because=f"a later job went back to iteration {gone[ref.path].after} and "
            "trained on from there: it is of the branch that was given up",
        )
        if ref.path in gone and ref.complete and ref.unhealthy_because is None
        else ref
        for ref in refs
    ]
    return _doubted(found)


def with_snapshots(
    full: Mapping[str, CheckpointRef],
    folders: Iterable[Path],
    look: Callable[[Path], CheckpointRef],
) -> tuple[dict[str, CheckpointRef], list[Branch | None]]:
    """What is listed of full checkpoints and snapshots, and the branches of snapshots that are not.

    Args:
        full: name -> checkpoint.
        folders: of snapshots. Where one has the name of a full checkpoint, the full one is listed
            unless it alone is not whole; one that cannot be read may be.
        look: describes a snapshot.
    """
    listed, hidden = dict(full), []
    for folder in folders:
        twin = listed.get(folder.name)
        if twin is None or not (twin.complete or twin.unreadable):
            thin = look(folder)
            if twin is None or thin.complete or thin.unreadable:
                listed[folder.name] = thin
            continue
        try:
            hidden.append(branch_of(folder))
        except CheckpointError:
            listed[str(folder)] = look(folder)
    return listed, hidden


def unmarked(ref: CheckpointRef) -> CheckpointRef:
    """What `marked` was given: it depends on the others, which may have changed."""
    if ref.given_up:
        return replace(ref, given_up=False, unhealthy_because=None)
    if ref.complete and ref.branch_unknown:
        return replace(ref, branch_unknown=False, judged=True, unhealthy_because=None)
    return ref


def _doubted(refs: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """The same, not judged where another one in the same folder may be a snapshot of a later
    branch, and cannot be read now."""
    unknown = {path_of(r.path).parent: r for r in refs if r.branch_unknown and not r.complete}
    return [
        replace(
            ref,
            branch_unknown=True,
            judged=False,
            unhealthy_because=f"whether a later job went back behind it is not known while "
            f"{unknown[folder].path} cannot be read: try again, or move that elsewhere",
        )
        if ref.snapshot
        and ref.complete
        and ref.unhealthy_because is None
        and (folder := path_of(ref.path).parent) in unknown
        else ref
        for ref in refs
    ]
