"""A flat map compared with what names and shapes alone say: nothing here looks at a value.

Given which parameters a buffer holds, the order in which Megatron registers parameters says how
they follow each other, its arithmetic where each starts, and its model chunks which layers are
whole.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pma_megatron.formats.flat import FlatMap, FlatRange
from pma_megatron.formats.source import Source
from pma_megatron.formats.torch_dist.registration import (
    ALIGNMENT_ELEMENTS,
    Registration,
    buffer_ranks,
    compare,
    is_expert,
    layer_of,
    rules,
)

_BUCKET = re.compile(r"^(?P<buffer>.*?)(?:\.bucket_idx_(?P<bucket>\d+))?$")
_Buckets = Mapping[int | None, Sequence[FlatRange]]
"""Number of a bucket (None: all buckets are stored as one) -> its parameters."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What names and shapes say of a map.

    Attributes:
        against: where the map differs from it, a clause each.
        open: what they do not say, a clause each.
    """

    against: tuple[str, ...] = ()
    open: tuple[str, ...] = ()


def split_name(space: str) -> tuple[str, int | None]:
    """Buffer of a flat space and the number of its bucket, None if it holds all of them."""
    match = _BUCKET.match(space)
    assert match is not None
    return match["buffer"], None if match["bucket"] is None else int(match["bucket"])


def unchecked_order(source: Source) -> tuple[str, ...]:
    """Where a source's map of flat buffers is not what names and shapes alone say, or more than
    they say; a clause each. Empty without such a map, or if they say the same.
    """
    if not source.ranges:
        return ()
    said = recompute(source.ranges)
    return (*said.against, *said.open)


_LAST: list[tuple[FlatMap, Recomputed]] = []
"""The map that was looked at last: one serves all sources of a merge."""


def recompute(ranges: FlatMap) -> Recomputed:
    """Compare a map with the order and the arithmetic of the rule that fits it best."""
    for known, said in _LAST:
        if known is ranges:
            return said
    said = _recomputed(ranges)
    _LAST[:] = [(ranges, said)]
    return said


def _recomputed(ranges: FlatMap) -> Recomputed:
    buffers: dict[str, dict[int | None, Sequence[FlatRange]]] = defaultdict(dict)
    for (group, space), found in ranges.items():
        buffer, bucket = split_name(space)
        buffers[f"{group}.{buffer}"][bucket] = sorted(found, key=lambda one: one.start)
    experts = any(is_expert(one.key) for found in ranges.values() for one in found)
    layers = tuple(_split_layers(buffers))
    best: Recomputed | None = None
    for rule in rules(with_experts=experts):
        against: list[str] = [*layers]
        unknown: list[str] = []
        for wrong, clause in _order(rule, buffers):
            (against if wrong else unknown).append(clause)
            if best is not None and len(against) > len(best.against):
                break
        else:
            if best is None or (len(against), len(unknown)) < (len(best.against), len(best.open)):
                best = Recomputed(tuple(against), tuple(unknown))
    assert best is not None
    return best


def _order(rule: Registration, buffers: Mapping[str, _Buckets]) -> Iterator[tuple[bool, str]]:
    """Clauses about neighbours in a buffer: (whether the rule speaks against them, clause)."""
    for name, buckets in buffers.items():
        numbered = sorted(buckets.items(), key=lambda item: item[0] or 0)
        found = [(bucket, one) for bucket, ranges in numbered for one in ranges]
        ranks = buffer_ranks(rule, [(one.key, one.box) for _, one in found])
        if found and found[0][1].start:
            yield True, f"{name} does not begin with {found[0][1].key}"
        pairs = zip(itertools.pairwise(found), itertools.pairwise(ranks), strict=True)
        for ((bucket, one), (next_bucket, other)), (rank, next_rank) in pairs:
            order = compare(rank, next_rank)
            fits = other.start == 0 if bucket != next_bucket else _follows(bucket, one, other)
            if order > 0 and fits:
                continue
            what = f"{other.key} at {other.box.offsets} after {one.key} at {one.box.offsets}"
            if order < 0 or not fits:
                yield True, f"{what}, at element {other.start} of {name}"
            else:
                yield False, f"{what} in {name}"


def _follows(bucket: int | None, one: FlatRange, other: FlatRange) -> bool:
    """True if a parameter, or the next part of one, may start where `other` does."""
    end = one.start + one.box.numel
    starts = {end + -end % ALIGNMENT_ELEMENTS}
    if bucket is None or one.key == other.key:
        starts |= {end, end + (one.start - end) % ALIGNMENT_ELEMENTS}
    return other.start in starts


def _split_layers(buffers: Mapping[str, _Buckets]) -> list[str]:
    """Layers of which a buffer holds some parameters and lacks others that its like hold."""
    members: dict[tuple[str, object], set[str]] = defaultdict(set)
    for name, buckets in buffers.items():
        dtype = name.partition(".dtype_")[2]
        for one in itertools.chain(*buckets.values()):
            layer = layer_of(one.key, one.box)
            if layer is not None:
                members[name, (dtype, layer)].add(one.key)
    whole: dict[object, set[str]] = defaultdict(set)
    for (_, kind), keys in members.items():
        whole[kind] |= keys
    return [
        f"{name} without {min(whole[kind] - keys)} of a layer that it holds"
        for (name, kind), keys in members.items()
        if whole[kind] - keys
    ]
