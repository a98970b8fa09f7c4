"""Which checkpoints and trackers the ranks see, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.errors import SelectionError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.describe import describe
from pma_megatron.runs.discover import list_checkpoints, looked_at, pointers_of
from pma_megatron.runs.notices import changed_settings_notes, settings_of, too_early_notes
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection
from pma_megatron.runs.trackers import Pointer


def all_refs(
    request: MergeRequest, comm: Comm, everywhere: bool
) -> tuple[dict[str, CheckpointRef], dict[str, Any]]:
    """Checkpoints seen by any rank."""
    paths = request.selection.paths
    roots = [request.load] if paths is None else list(paths)

    known = {} if everywhere else _described(roots, comm)

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

    def look() -> dict[str, CheckpointRef]:
        every = [(folder, history) for folders, history in found for folder in folders]
        refs = {
            str(folder): describe(folder, history)
            for number, (folder, history) in enumerate(every)
            if (number - len(every)) % comm.size == comm.rank
        }
        return {folder: ref for folder, ref in refs.items() if ref.complete}

    shares = comm.collect(comm.agree("discover", look))
    return {folder: ref for share in shares for folder, ref in share.items()}


def owners_of(visible: Sequence[Sequence[int]]) -> list[int]:
    """Per source, the rank that opens it; counted from the newest, as `_described` counts, so that
    who has described one need not parse it again.

    Args:
        visible: per source, oldest first, the ranks that can read it.
    """
    return [ranks[(n - len(visible)) % len(ranks)] for n, ranks in enumerate(visible)]


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
