"""A flat map compared with what names and shapes alone say: nothing here looks at a value.

Given which parameters a buffer holds, the order in which Megatron registers parameters says how
they follow each other, its arithmetic where each starts, and its model chunks which layers are
whole.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pma_megatron.formats.flat import FlatMap, FlatRange
from pma_megatron.formats.torch_dist.registration import (
    ALIGNMENT_ELEMENTS,
    Rule,
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


def recompute(ranges: FlatMap) -> Recomputed:
    """Compare a map with the order and the arithmetic of the rule that fits it best."""
    buffers: dict[str, dict[int | None, Sequence[FlatRange]]] = defaultdict(dict)
    for (group, space), found in ranges.items():
        buffer, bucket = split_name(space)
        buffers[f"{group}.{buffer}"][bucket] = sorted(found, key=lambda one: one.start)
    experts = any(is_expert(one.key) for found in ranges.values() for one in found)
    layers = _split_layers(buffers)
    said = []
    for rule in rules(with_experts=experts):
        parts = [_order(rule, name, buckets) for name, buckets in buffers.items()]
        against = [clause for part in parts for clause in part.against] + layers
        unknown = [clause for part in parts for clause in part.open]
        said.append(Recomputed(tuple(against), tuple(unknown)))
    return min(said, key=lambda one: (len(one.against), len(one.open)))


def _order(rule: Rule, name: str, buckets: _Buckets) -> Recomputed:
    numbered = sorted(buckets.items(), key=lambda item: item[0] or 0)
    found = [(bucket, one) for bucket, ranges in numbered for one in ranges]
    ranks = buffer_ranks(rule, [(one.key, one.box) for _, one in found])
    against, unknown = [], []
    if found and found[0][1].start:
        against.append(f"{name} does not begin with {found[0][1].key}")
    pairs = zip(itertools.pairwise(found), itertools.pairwise(ranks), strict=True)
    for ((bucket, one), (next_bucket, other)), (rank, next_rank) in pairs:
        what = f"{other.key} at {other.box.offsets} after {one.key} at {one.box.offsets} in {name}"
        order = compare(rank, next_rank)
        if order == 0:
            unknown.append(f"the order of {what}")
        elif order < 0:
            against.append(what)
        if bucket != next_bucket:
            allowed = {0}
        else:
            end = one.start + one.box.numel
            allowed = {end + -end % ALIGNMENT_ELEMENTS}
            if bucket is None or one.key == other.key:
                allowed |= {end, end + (one.start - end) % ALIGNMENT_ELEMENTS}
        if other.start not in allowed:
            against.append(f"{what}, at element {other.start}")
    return Recomputed(tuple(against), tuple(unknown))


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
