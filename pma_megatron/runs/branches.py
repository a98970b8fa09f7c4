"""Snapshots of a branch that a run gave up: it went back, and another one goes by them.

A snapshot says which branch wrote it (`formats.marker.Branch`). Where a later branch began at an
earlier iteration, it is none of what training goes on from. Full checkpoints say nothing of this:
trainers overwrite their own as they come by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.marker import Branch, read_snapshot_marker
from pma_megatron.runs.refs import CheckpointRef

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
    """The branch that wrote the snapshot in a folder; None where nothing says so."""
    with contextlib.suppress(CheckpointError):
        marker = read_snapshot_marker(folder)
        return None if marker is None else marker.branch
    return None


def marked(
    refs: Sequence[CheckpointRef], others: Iterable[Branch | None] = ()
) -> list[CheckpointRef]:
    """The same, with the reason where one is of a branch that was given up.

    Args:
        refs: of one run.
        others: branches of snapshots in whose place a full checkpoint is listed.
    """
    snapshots = {
        ref.path: (ref.iteration, ref.branch)
        for ref in refs
        if ref.snapshot and ref.complete and ref.iteration is not None
    }
    gone = given_up(snapshots, {branch for branch in others if branch is not None})
    return [
        replace(
            ref,
            given_up=True,
            unhealthy_because=f"a later job went back to iteration {gone[ref.path].after} and "
            "trained on from there: it is of the branch that was given up",
        )
        if ref.path in gone and ref.unhealthy_because is None
        else ref
        for ref in refs
    ]
