"""Which checkpoints and trackers the ranks see, put together."""

from __future__ import annotations

from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.errors import SelectionError
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.discover import list_checkpoints, pointers_of
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.trackers import Pointer


def all_refs(
    request: MergeRequest, comm: Comm, everywhere: bool
) -> tuple[dict[str, CheckpointRef], dict[str, Any]]:
    """Checkpoints seen by any rank."""
    paths = request.selection.paths
    roots = [request.load] if paths is None else list(paths)

    def look() -> list[CheckpointRef]:
        try:
            return [ref for root in roots for ref in list_checkpoints(root)]
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
