"""Which checkpoints and trackers the ranks see, put together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.errors import SelectionError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.describe import describe
from pma_megatron.runs.discover import choose, list_checkpoints, looked_at, pointers_of
from pma_megatron.runs.notices import changed_settings_notes, settings_of, too_early_notes
from pma_megatron.runs.recovery_log import History
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection
from pma_megatron.runs.trackers import Pointer


def chosen(
    request: MergeRequest, refs: list[CheckpointRef], found: Mapping[str, Pointer] | None
) -> Selection:
    """The checkpoints that a merge takes of those that were found.

    Of an update of a rolling average nothing is noted: its sources are no window of the run, and of
    the window that the average is of, the plan from all its checkpoints says what there is to say.
    """
    selection = choose(refs, request.widest(), request.load, found, request.resumed)
    return selection if request.rolling is None else replace(selection, notes=())


def all_refs(
    request: MergeRequest, comm: Comm, everywhere: bool
) -> tuple[dict[str, CheckpointRef], dict[str, Any]]:
    """Checkpoints seen by any rank."""
    paths = request.selection.paths
    roots = [request.load] if paths is None else list(paths)

    known = _described_by_view(roots, comm) if everywhere else _described(roots, comm)

    def look() -> list[CheckpointRef]:
        try:
            return [ref for root in roots for ref in list_checkpoints(root, known=known)]
        except SelectionError:
            if everywhere and not comm.is_main:
                return []
            raise

    found = comm.agree("discover", look if everywhere or comm.is_main else list)
    refs: dict[str, CheckpointRef] = {}
    seen: dict[str, tuple[int, ...]] = {}
    for rank, theirs in enumerate(comm.gather(found)):
        for ref in theirs:
            if ref.path not in refs or (ref.complete and not refs[ref.path].complete):
                refs[ref.path] = ref
            if ref.complete:
                seen[ref.path] = (*seen.get(ref.path, ()), rank)
    if not everywhere:
        seen = {path: tuple(range(comm.size)) for path in refs}
    ordered = sorted(refs.values(), key=lambda ref: (ref.iteration or 0, ref.path))
    return {ref.path: ref for ref in ordered}, seen


def _described(roots: Sequence[str], comm: Comm) -> dict[str, CheckpointRef]:
    """Whole checkpoints by folder, on rank 0: the ranks share the looking, as all of them see one
    storage. What is not whole for one of them, rank 0 looks at itself."""
    if comm.size == 1:
        return {}
    found = comm.on_main("discover", lambda: [looked_at(root) for root in roots])

    shares = comm.collect(comm.agree("discover", lambda: _share(found, comm.rank, comm.size)))
    return {folder: ref for share in shares for folder, ref in share.items()}


def _described_by_view(roots: Sequence[str], comm: Comm) -> dict[str, CheckpointRef]:
    """The same where roots may be disks of single nodes: ranks that see the same folders, by their
    inodes and times, share the looking; each rank gets what it would see itself."""
    if comm.size == 1:
        return {}
    found = comm.agree("discover", lambda: [looked_at(root) for root in roots])
    view = _view(folder for folders, _ in found for folder in folders)
    views = comm.gather(view)
    like = [rank for rank, other in enumerate(views) if other == view]
    place = like.index(comm.rank)
    mine = comm.agree("discover", lambda: _share(found, place, len(like)))
    shares = comm.gather(mine)
    return {folder: ref for rank in like for folder, ref in shares[rank].items()}


def _share(
    found: Sequence[tuple[Sequence[Path], History]], rank: int, size: int
) -> dict[str, CheckpointRef]:
    """Whole checkpoints of those whose turn it is; folder -> what it is."""
    every = [(folder, history) for folders, history in found for folder in folders]
    refs = {
        str(folder): describe(folder, history)
        for number, (folder, history) in enumerate(every)
        if _turn(len(every) - 1 - number, size) == rank
    }
    return {folder: ref for folder, ref in refs.items() if ref.complete}


def _view(folders: Iterable[Path]) -> str:
    """What tells these very folders from others of the same names, on another disk."""
    digest = hashlib.sha256()
    for folder in folders:
        try:
            stat = folder.stat()
            said = stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
        except OSError as error:
            said = (error.errno or 0, 0, 0)
        digest.update(repr((str(folder), said)).encode())
    return digest.hexdigest()


def owners_of(visible: Sequence[Sequence[int]]) -> list[int]:
    """Per source, the rank that opens it: taken in turns as `_described` takes them, so that who
    has described one need not parse it again.

    Args:
        visible: per source, oldest first, the ranks that can read it.
    """
    last = len(visible) - 1
    return [ranks[_turn(last - n, len(ranks))] for n, ranks in enumerate(visible)]


def _turn(number: int, ranks: int) -> int:
    """Whose turn it is with the checkpoint that comes `number` before the newest: down from the
    last rank, which lays out the output after the newest, then up again from rank 0.

    >>> [_turn(number, 4) for number in range(10)]
    [3, 2, 1, 0, 0, 1, 2, 3, 3, 2]
    """
    rounds, place = divmod(number, ranks)
    return place if rounds % 2 else ranks - 1 - place


def schedule_notes(selection: Selection, visible: Sequence[Sequence[int]], comm: Comm) -> list[str]:
    """What is said of the window, on every rank; who opens a source looks at it."""
    owners = owners_of(visible)

    def look() -> tuple[list[str], dict[str, dict[str, Any]]]:
        mine = [ref for ref, n in zip(selection.refs, owners, strict=True) if n == comm.rank]
        early = too_early_notes(selection) if owners[0] == comm.rank else []
        return early, {ref.path: settings_of(ref) for ref in mine}

    shares = comm.collect(comm.agree("schedule", look))

    def notes() -> list[str]:
        early = [note for each, _ in shares for note in each]
        settings = {path: said for _, part in shares for path, said in part.items()}
        return [*early, *changed_settings_notes(selection, settings)]

    return comm.on_main("schedule", notes)


def pointers(request: MergeRequest, comm: Comm, everywhere: bool) -> dict[str, Pointer] | None:
    """What the trackers say, of the first rank that sees a root; one answer for all ranks."""

    def look() -> dict[str, Pointer] | None:
        return pointers_of(request.load) if request.selection.paths is None else None

    mine = comm.agree("trackers", lambda: look() if everywhere or comm.is_main else None)
    found: dict[str, Pointer] = {}
    for theirs in comm.gather(mine):
        for name, pointer in (theirs or {}).items():
            known = found.get(name)
            if known is None or (known.problem is not None and pointer.problem is None):
                found[name] = pointer
    return found or None
