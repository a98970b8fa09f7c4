"""Open the sources of a merge, each on one rank, and let every one prove what it is."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.once import once_each
from pma_megatron.formats import registry
from pma_megatron.formats.source import Source
from pma_megatron.identity.proof import Evidence, Strangers, prove, unconfirmed
from pma_megatron.merging.finding import owners_of
from pma_megatron.merging.policy import MAIN
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.refs import CheckpointRef

_log = logging.getLogger(__name__)


@once_each()
def open_sources(
    request: MergeRequest,
    refs: Sequence[CheckpointRef],
    visible: Sequence[tuple[int, ...]],
    comm: Comm,
    ends: Collection[int] = (),
) -> tuple[Source, ...]:
    """Open each source on one rank that sees it, the newest first: its map serves the others.

    Every source proves that it is what its folder says, alone and beside the others (`identity`).

    Args:
        request: says what is read of them.
        refs: which, oldest first.
        visible: per source, the ranks that can read it.
        comm: the ranks; every one makes this call.
        ends: numbers of older sources that are the newest of an average too.

    Raises:
        CheckpointError, PlanError: on every rank.
    """
    main_params = request.policy.average == "main-params"
    last = len(refs) - 1
    owners = owners_of(visible)
    proved: dict[int, Evidence] = {}

    def read(number: int, ranges: Mapping[tuple[str, str], Any]) -> Source:
        ref = refs[number]
        peers = [r.path for n, r in enumerate(refs) if n != number and comm.rank in visible[n]]
        known = registry.get(ref.format, ref.path)
        source = known.read_source(ref.path, ranges, main_params, peers)
        proved[number] = prove(source, proved.get(last), main_params=main_params)
        doubt = None
        if not main_params and known.weights_alone:
            doubt = unconfirmed(source, lambda: known.read_source(ref.path, {}, True, peers))
        source = replace(source, unnamed={}, notes=(*source.notes, *filter(None, [doubt])))
        return source if number == last else _trimmed(source, request, end=number in ends)

    newest = comm.on(owners[last], "open", lambda: read(last, {}))
    own = {n: evidence.of_places() for n, evidence in proved.items()}
    proved = {**comm.broadcast(own, owners[last]), **proved}
    others = comm.agree(
        "open", lambda: {n: read(n, newest.ranges) for n in range(last) if owners[n] == comm.rank}
    )
    opened: dict[int, Source] = {last: newest}
    for number, owner in enumerate(owners[:last]):
        opened[number] = comm.broadcast(others.get(number, newest), owner)
    strangers = Strangers(refs)
    for number, owner in enumerate(owners):
        evidence = comm.told_main(proved.pop(number, None), owner)
        if evidence is not None:
            strangers.add(evidence)
    said = comm.on_main("compare sources", strangers.refuse)
    for number, sentence in said.items():
        opened[number] = replace(opened[number], notes=(*opened[number].notes, sentence))
    for sentence in (note for n in sorted(opened) for note in opened[n].notes if comm.is_main):
        _log.warning(sentence)
    return tuple(opened[number] for number in range(len(refs)))


def _trimmed(source: Source, request: MergeRequest, *, end: bool) -> Source:
    """An older source without what the merge does not read of it: every rank keeps all sources.

    Of the newest in an average, weights and the flat map are needed to prove that map.
    """
    policy, space = request.policy, source.space
    source = replace(source, objects=())
    if policy.average == "weights":
        return replace(source, space=replace(space, states={}), ranges={})
    everything = policy.optimizer_state == "average" or bool(policy.overrides)
    states = space.states if everything else {MAIN: space.states.get(MAIN, {})}
    if end:
        return replace(source, space=replace(space, states=states))
    main = states.get(MAIN, {})
    weights = {
        key: replace(tensor, pieces=()) if key in main else tensor
        for key, tensor in space.weights.items()
    }
    return replace(source, space=replace(space, weights=weights, states=states), ranges={})
