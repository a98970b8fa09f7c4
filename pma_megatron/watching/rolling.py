"""An update of the average that is there, in place of a merge of all checkpoints.

Whether it can be made is decided by what lies there alone, like everything in a watch; where it
cannot, or it is time for an exact average, the reason is said and all checkpoints are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.source import Source, versions_of
from pma_megatron.merging.entry_rules import moments_averaged
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.policy import MAIN, Action
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.merging.rewritten import rewritten
from pma_megatron.merging.rolling import (
    LIMIT,
    ROLLING,
    Member,
    Rolling,
    bound_after,
    dumped,
    exact_bound,
    read,
)
from pma_megatron.merging.saved_over import since
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.storage.paths import absolute, in_store, path_of
from pma_megatron.watching.own import is_own
from pma_megatron.watching.state import begun_ns, is_older

_FLOAT32_BYTES = 4


class ExactError(Exception):
    """The average is to be made from all its checkpoints; the text says why."""


@dataclass(frozen=True, slots=True)
class Update:
    """A merge that updates the average before.

    Attributes:
        request: it.
        made: what the result says of itself.
        text: which checkpoints join and leave.
    """

    request: MergeRequest
    made: Rolling
    text: str


def update_of(request: MergeRequest, exact: MergePlan, most: int) -> Update:
    """The update that makes the average of `exact`.

    Args:
        request: of the watch, as `pinned`.
        exact: the plan of the merge of all checkpoints.
        most: updates in a row.

    Raises:
        ExactError: there is none.
        PmaError: it cannot be planned.
    """
    _refuse_no_sum(exact)
    members = tuple(_member(source, ref) for source, ref in _pairs(exact))
    before, ref, began_ns = _before(request, exact.iteration or 0)
    joined = [each for each in members if each not in before.members]
    left = [each for each in before.members if each not in members]
    anew = {each.path for each in joined} & {each.path for each in left}
    if anew:
        raise ExactError(f"{min(anew)} was written since the average that is there")
    count, terms = len(members), 1 + 2 * len(joined)
    if len(before.members) != count or len(joined) != len(left):
        raise ExactError("the average that is there is of another number of checkpoints")
    if terms >= count:
        raise ExactError(f"an update would read {terms} checkpoints, and there are {count}")
    bound = bound_after(before.bound, count, len(joined))
    if before.updates >= most:
        raise ExactError(f"{before.updates} updates are behind the average that is there")
    if bound > LIMIT:
        raise ExactError(f"the drift could reach {bound:.2g}, more than {LIMIT:.2g}")
    made = Rolling(
        members=members,
        updates=before.updates + 1,
        bound=bound,
        exact_digest=exact.digest,
        method=asdict(request.method),
    )
    share = 1 / count
    weighted = [(each.path, each.iteration, -share) for each in left]
    weighted += [(ref.path, ref.iteration or 0, 1.0)]
    weighted += [(each.path, each.iteration, share) for each in joined]
    weighted.sort(key=lambda each: each[1])
    wanted = replace(
        request,
        selection=SelectionRequest(paths=tuple(path for path, _, _ in weighted)),
        method=Method(
            name="custom", values=tuple(value for _, _, value in weighted), allow_any=True
        ),
        rolling=dumped(made),
    )
    stay = {each.path for each in members if each in before.members}
    _refuse_changed((s for s in exact.sources if absolute(s.path) in stay), began_ns)
    _refuse_others(make_plan(wanted, Comm()), left, began_ns)
    text = f"{_named(joined)} added and {_named(left)} taken off"
    return Update(wanted, made, text)


def _before(request: MergeRequest, end: int) -> tuple[Rolling, CheckpointRef, int]:
    """The newest average of this watch before iteration `end`, and when its merge began.

    An exact one comes as one without an update.

    Raises:
        ExactError: there is none, or it does not say what it is of.
    """
    assert request.save is not None
    root = path_of(request.save)
    there = [
        ref
        for ref in (list_checkpoints(root) if root.is_dir() else ())
        if ref.complete and (ref.iteration or end) < end and is_own(path_of(ref.folder), request)
    ]
    if not there:
        raise ExactError("no average of this watch is there yet")
    newest = max(there, key=lambda ref: ref.iteration or 0)
    if changed := rewritten(path_of(newest.folder)):
        raise ExactError(f"{newest.folder} was an average, and {since(changed)}")
    said = read_json(path_of(newest.folder) / MARKER_FILE)
    found = read(said[ROLLING]) if ROLLING in said else _exact(said, request)
    if found is None:
        raise ExactError(f"{newest.folder} does not say what it is of")
    return found, newest, begun_ns(said)


def _exact(said: Mapping[str, Any], request: MergeRequest) -> Rolling | None:
    """What a merge of all its checkpoints says, as if it were an update."""
    try:
        sources, values = said["plan"]["sources"], said["output"]["coefficients"]
        members = tuple(Member.read(each) for each in sources)
        digest = str(said["plan"]["digest"])
    except (KeyError, TypeError, ValueError):
        return None
    if not members or any(value != 1 / len(members) for value in values):
        return None
    return Rolling(
        members=members,
        updates=0,
        bound=exact_bound(len(members)),
        exact_digest=digest,
        method=asdict(request.method),
    )


def _refuse_no_sum(plan: MergePlan) -> None:
    """What is stored in 16 bits alone is no sum that could be gone on with, nor are moments.

    Raises:
        ExactError: something averaged is.
    """
    moments = moments_averaged(plan.rules)
    if moments is not None:
        raise ExactError(f"{moments[0]} is averaged, and could become negative")
    base = plan.sources[-1]
    for (state, key), rule in plan.rules.items():
        name = f"{state} {key}"
        if state == "weight" and rule.action is Action.ROUND:
            kept = plan.rules.get((MAIN, key))
            if kept is None or kept.action is not Action.AVERAGE:
                raise ExactError(f"no float32 average of {name} is written")
        elif rule.action is Action.AVERAGE:
            tensor = base.tensor(state, key)
            dtype = plan.request.torch_dtype if state == "weight" else None
            dtype = dtype or (None if tensor is None else tensor.dtype)
            if dtype is None or dtype.itemsize < _FLOAT32_BYTES:
                raise ExactError(f"{name} is written in fewer bits than float32")


def _refuse_changed(sources: Iterable[Source], began_ns: int) -> None:
    """What counts in the average that is there must be what counted when it was made.

    Raises:
        ExactError: a source was written since.
    """
    for source in sources:
        if not _is_as_old(path_of(source.path), source.stamps, began_ns):
            raise ExactError(f"{source.path} was written since the average that is there")


def _refuse_others(plan: MergePlan, left: Iterable[Member], began_ns: int) -> None:
    """Whether what leaves is what once joined.

    Raises:
        ExactError: it is another checkpoint in the same folder.
    """
    opened = {absolute(source.path): source for source in plan.sources}
    for each in left:
        source = opened[each.path]
        same = source.metadata_digest == each.metadata_digest
        same &= versions_of(source.path, source.stamps) == each.versions
        if not same or not _is_as_old(path_of(source.path), source.stamps, began_ns):
            raise ExactError(f"{each.path} is not what the average that is there is of")


def _is_as_old(folder: Path, names: Iterable[str], began_ns: int) -> bool:
    """`is_older`, on a disk: in a store versions tell, and clocks do not."""
    return in_store(folder) or is_older(folder, names, began_ns)


def _pairs(plan: MergePlan) -> Iterable[tuple[Source, CheckpointRef]]:
    return zip(plan.sources, plan.selection.refs, strict=True)


def _member(source: Source, ref: CheckpointRef) -> Member:
    return Member(
        path=absolute(source.path),
        iteration=ref.iteration or 0,
        metadata_digest=source.metadata_digest,
        versions=versions_of(source.path, source.stamps),
    )


def _named(members: Iterable[Member]) -> str:
    return f"iteration {', '.join(str(each.iteration) for each in members)}"
