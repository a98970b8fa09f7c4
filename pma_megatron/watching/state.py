"""What lies there: which checkpoints the average takes now, and whether it has been made of them.

Nothing is remembered but what was seen: a watch that starts anew finds the average by its
`pma.json`, compares it with the plan of the moment, and its age with that of its sources.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.once import once_each
from pma_megatron.errors import CheckpointError, PmaError, PublishError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.output import Folder
from pma_megatron.formats.source import Source, versions_of
from pma_megatron.merging.leftovers import Target, unfinished
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.rolling import ROLLING, Member, is_update_of, read
from pma_megatron.merging.saved_over import saved_over
from pma_megatron.merging.targets import is_of, targets
from pma_megatron.runs.discover import choose, list_checkpoints, pointers_of
from pma_megatron.runs.marks import Mark, mark, unchanged
from pma_megatron.runs.refs import CheckpointRef, iteration_of
from pma_megatron.runs.trackers import read_pointers
from pma_megatron.runs.trainer_retention import trainer_retention
from pma_megatron.storage.paths import absolute, in_store, path_of
from pma_megatron.storage.spool import listing_once
from pma_megatron.watching.own import replaces


@dataclass(frozen=True, slots=True)
class Seen:
    """A run at one moment.

    Attributes:
        refs: the sources of the average, oldest first; () if it cannot be made.
        waiting: why it cannot.
        sources: what tells them from those of another moment.
        run: the same of all checkpoints of the run.
    """

    refs: tuple[CheckpointRef, ...]
    waiting: str | None
    sources: tuple[tuple[str, Mark], ...]
    run: tuple[tuple[str, str, Mark], ...]

    @property
    def end(self) -> int:
        """Iteration of the average."""
        return iteration_of(self.refs[-1])


class Looks:
    """Looks at one run; what has not changed is not opened again."""

    def __init__(self, request: MergeRequest) -> None:
        self._request = request
        self._refs: list[CheckpointRef] = []
        self._marks: dict[str, Mark] = {}

    @listing_once()
    @once_each()
    def look(self) -> Seen:
        """Which checkpoints the average takes now; what lies where it goes is listed too."""
        try:
            root = path_of(self._request.load)
            known = unchanged(root, self._refs, self._marks)
            refs = list_checkpoints(root, known=known)
            self._refs, self._marks = refs, {ref.path: mark(root, ref) for ref in refs}
            chosen = self._chosen(root, refs)
            for place in filter(None, (self._request.save, self._request.export)):
                path_of(place)
            waiting = None
        except (PmaError, OSError) as error:
            chosen, waiting = (), str(error)
            whole = [ref for ref in self._refs if ref.complete]
            deletes = trainer_retention(whole[-1]) if whole else None
            waiting += f". And {deletes}" if deletes is not None else ""
        return Seen(
            refs=chosen,
            waiting=waiting,
            sources=tuple((ref.path, self._marks[ref.path]) for ref in chosen),
            run=tuple((ref.path, ref.state, self._marks[ref.path]) for ref in self._refs),
        )

    def _chosen(self, root: Path, refs: list[CheckpointRef]) -> tuple[CheckpointRef, ...]:
        found = pointers_of(root)
        for pointer in (found or {}).values():
            if pointer.problem is not None and not pointer.missing:
                # Training may be writing it: what it said before, or will say, decides the end.
                raise SelectionError(f"{root} {pointer.problem}")
        selection = choose(refs, self._request.widest(), root, found)
        if any(ref.iteration is None for ref in selection.refs):
            raise SelectionError(f"{selection.refs[-1].path} has no iteration to follow")
        return selection.refs


def pinned(request: MergeRequest, seen: Seen) -> MergeRequest:
    """The merge of what was seen, wherever the run has gone meanwhile; it replaces nothing."""
    selection = replace(request.selection, end_iteration=seen.end)
    return replace(request, selection=selection, overwrite=False)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to become of one merge.

    Attributes:
        folders: that it makes.
        current: whether all of them are there as it would make them.
        unsafe: why it would replace what this watch did not make; None if it would not.
        replaces: whether an average of this watch is to be replaced.
        plan: of the merge of all checkpoints.
    """

    folders: tuple[str, ...]
    current: bool
    unsafe: PublishError | None
    replaces: bool
    plan: MergePlan


@once_each()
def wanted_of(request: MergeRequest, *, rolling: bool = False) -> Wanted:
    """What lies where this merge would publish; whether there is room is another question.

    Args:
        request: it.
        rolling: whether an average of the same checkpoints that was made by updates will do.

    Raises:
        PmaError: no plan of it can be made.
    """
    made = make_plan(request, Comm())
    wanted = targets(made, "plan")
    folders = tuple(str(each.final) for each in wanted)
    current = all(_is_current(each, made, rolling) for each in wanted)
    try:
        return Wanted(folders, current, None, replaces(wanted, made.request), made)
    except PublishError as error:
        return Wanted(folders, current, error, False, made)


def _is_current(target: Target, made: MergePlan, rolling: bool) -> bool:
    same = is_of(target, made) or (rolling and _is_update(target, made))
    if not same or unfinished(target) or saved_over(target.final, quick=True):
        return False
    if not _is_named(target, made):
        return False
    said = read_json(target.final / MARKER_FILE)
    versions, began_ns = _versions(said), begun_ns(said)
    return all(_is_as_it_was(source, versions, began_ns) for source in made.sources)


def _is_as_it_was(source: Source, versions: Mapping[str, str], began_ns: int) -> bool:
    """In a store versions tell, if they were noted; clocks of it and of this machine may differ."""
    noted = versions.get(absolute(source.path))
    if noted and in_store(path_of(source.path)):
        return versions_of(source.path, source.stamps) == noted
    return is_older(path_of(source.path), source.stamps, began_ns)


def _versions(said: Mapping[str, Any]) -> dict[str, str]:
    """path -> what tells the objects that an average is of, of those in stores."""
    found: dict[str, str] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        rolled = read(said[ROLLING]) if ROLLING in said else None
        of_plan = (Member.read(each) for each in said["plan"]["sources"])
        for each in of_plan if rolled is None else rolled.members:
            found[each.path] = each.versions
    return found


def _is_update(target: Target, made: MergePlan) -> bool:
    """Whether it is the rolling average of the same checkpoints."""
    try:
        return is_update_of(read_json(target.final / MARKER_FILE), made.digest)
    except CheckpointError:
        return False


def _is_named(target: Target, made: MergePlan) -> bool:
    """Whether the tracker beside a checkpoint, if its trainer has one, names it."""
    if target.folder is not Folder.CHECKPOINT or made.save.inside:
        return True
    newest = made.sources[-1]
    tracker = registry.get(newest.format, newest.path).tracker
    if tracker.file is None or tracker.content_of(target.final.name) is None:
        return True
    pointer = read_pointers(target.root).get(newest.format)
    return pointer is not None and pointer.folder == target.final.name


def begun_ns(said: Mapping[str, Any]) -> int:
    """When the merge began, or a little before; sources that are newer were not what it read."""
    created = datetime.fromisoformat(str(said["created"])).timestamp()
    return int((created - sum(said["seconds"].values()) - 1) * 10**9)


def is_older(folder: Path, names: Iterable[str], began_ns: int) -> bool:
    """Whether no file of a source was written since; a copy with old times was written anew too."""
    for name in names:
        stat = (folder / name).stat()
        changed_ns = 0 if in_store(folder) else stat.st_ctime_ns  # there it is of this machine
        if max(stat.st_mtime_ns, changed_ns) >= began_ns:
            return False
    return True
