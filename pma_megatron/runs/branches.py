"""Snapshots of a branch that a run gave up: it went back, and another one goes by them.

A snapshot says which branch wrote it (`formats.marker.Branch`). Where a later branch began at an
earlier iteration, it is none of what training goes on from. Full checkpoints say nothing of this:
trainers overwrite their own as they come by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pma_megatron.base.once import once
from pma_megatron.base.openfiles import is_unreadable, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import (
    BRANCHES_FILE,
    MARKER_FILE,
    Branch,
    branch_in,
    read_snapshot_marker,
)
from pma_megatron.formats.schema import wrong
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of
from pma_megatron.storage.together import of_each

FIRST = Branch(number=0, after=0)
_BRANCHES = "branches"
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

    def read() -> Branch | None:
        try:
            marker = read_snapshot_marker(folder)
        except CheckpointError as error:
            if is_unreadable(error):
                raise
            return None
        return None if marker is None else marker.branch

    return once("branch", folder / MARKER_FILE, read)


def branches_of(
    folders: Iterable[Path], look: Callable[[Path], CheckpointRef]
) -> tuple[list[CheckpointRef], list[Branch | None]]:
    """What snapshots say of the branches of their run: those of which it cannot be read now, as
    `look` describes them, and the branches of the others."""
    unread_ones, branches = [], []
    for folder in folders:
        try:
            branches.append(branch_of(folder))
        except CheckpointError:
            unread_ones.append(look(folder))
    return unread_ones, branches


def begun_in(folder: Path) -> frozenset[Branch] | None:
    """The branches that began, as a folder of snapshots says; None where it says nothing of them.

    Raises:
        CheckpointError: what it says cannot be read now, or is damaged.
    """
    path = folder / BRANCHES_FILE
    try:
        path.lstat()
        return begun_by(read_json(path), path)
    except OSError as error:
        if is_unreadable(error):
            raise unread(path, error) from error
        return None


def begun_by(said: Mapping[str, Any], where: object) -> frozenset[Branch]:
    """The branches that a `pma_branches.json` says; raises as `begun_in` does."""
    found = said.get(_BRANCHES)
    if not isinstance(found, list):
        raise wrong(f"{where}: {_BRANCHES}", "a list", found)
    branches = [branch_in({"branch": each}, where) for each in found]
    return frozenset(branch for branch in branches if branch is not None)


def text_of(branches: Iterable[Branch]) -> bytes:
    """What `begun_by` reads.

    >>> sorted(begun_by(json.loads(text_of([Branch(number=1, after=40)])), "it"), key=str)
    [Branch(number=1, after=40)]
    """
    ordered = sorted(branches, key=lambda each: each.number)
    return json.dumps({_BRANCHES: [asdict(each) for each in ordered]}).encode()


def judged(
    refs: Sequence[CheckpointRef], others: Iterable[Branch | None] = ()
) -> list[CheckpointRef]:
    """The same as `marked`, by what the folders of the snapshots say too."""
    found, known = [*refs], {*others}
    folders = {path_of(ref.path).parent for ref in refs if ref.snapshot or ref.branch_unknown}
    for folder in folders:
        inside = [path_of(ref.path).parent == folder for ref in found]
        try:
            begun = begun_in(folder)
        except CheckpointError as error:
            found = [
                _doubted(r, str(error)) if i else r for r, i in zip(found, inside, strict=True)
            ]
            continue
        if begun is not None:  # all of them are known, whatever mark cannot be read
            known |= begun
            found = [
                replace(ref, branch_unknown=ref.branch_unknown and not here)
                for ref, here in zip(found, inside, strict=True)
            ]
    return marked(found, known)


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
    unknown = {path_of(r.path).parent: r for r in refs if r.branch_unknown and not r.complete}
    return [
        _doubted(ref, f"{unknown[folder].path} cannot be read: try again, or move that elsewhere")
        if (folder := path_of(ref.path).parent) in unknown
        else ref
        for ref in found
    ]


def with_snapshots(
    full: Mapping[str, CheckpointRef],
    folders: Sequence[Path],
    look: Callable[[Path], CheckpointRef],
) -> tuple[dict[str, CheckpointRef], list[Branch | None]]:
    """What is listed of full checkpoints and snapshots, and the branches of snapshots that are not.

    Args:
        full: name -> checkpoint.
        folders: of snapshots. Where one has the name of a full checkpoint, the full one is listed
            unless it alone is not whole; one that cannot be read may be.
        look: describes a snapshot.
    """
    stay = {name for name, ref in full.items() if ref.complete or ref.unreadable}
    alone = [folder for folder in folders if folder.name not in stay]
    listed = dict(full)
    for folder, thin in zip(alone, of_each(look, alone), strict=True):
        if folder.name not in full or thin.complete or thin.unreadable:
            listed[folder.name] = thin
    unread_ones, hidden = branches_of((each for each in folders if each.name in stay), look)
    return listed | {ref.path: ref for ref in unread_ones}, hidden


def unmarked(ref: CheckpointRef) -> CheckpointRef:
    """What `marked` was given: it depends on the others, which may have changed."""
    if ref.given_up:
        return replace(ref, given_up=False, unhealthy_because=None)
    if ref.complete and ref.branch_unknown:
        return replace(ref, branch_unknown=False, judged=True, unhealthy_because=None)
    return ref


def _doubted(ref: CheckpointRef, why: str) -> CheckpointRef:
    """The same, not judged if it is a snapshot: a later branch may have begun before it."""
    if not (ref.snapshot and ref.complete and ref.unhealthy_because is None):
        return ref
    because = f"whether a later job went back behind it is not known: {why}"
    return replace(ref, branch_unknown=True, judged=False, unhealthy_because=because)
