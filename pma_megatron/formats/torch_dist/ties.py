"""Weights that values alone do not place in a flat buffer: what each gap may be filled with.

Where a weight lies that equals no other is plain. What lies between two of those is a gap, and is
filled with weights that each equal the rounded main params at its place, without holes but those of
alignment. A gap that can be filled in one way only is proved; one that cannot is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from pma_megatron.formats.flat import FlatSpace
from pma_megatron.formats.torch_dist.registration import Rank, aligned, compare

_STEPS = 200_000  # of a search that may be exponential where no order is known
MayLie = Callable[[int, FlatSpace, int], bool]
"""(number of a weight, space, first element) -> whether it can lie there."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Weight `number` starts at element `start` of a space."""

    number: int
    space: FlatSpace
    start: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements `[start, stop)` of a space; parameters start at `phase` modulo the alignment."""

    space: FlatSpace
    start: int
    stop: int
    phase: int


@dataclass(slots=True)
class Gap:
    """Segments, of one buffer and in its order, between weights that are known (None: an end)."""

    before: Placed | None
    after: Placed | None = None
    segments: list[Segment] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What is known of the weights, by number.

    Attributes:
        numel: elements.
        parameter: what says of which parameter each is a part; parts follow without alignment.
        ranks: in the order of registration; None where no order is known.
    """

    numel: Sequence[int]
    parameter: Sequence[object]
    ranks: Mapping[int, Rank] | None = None

    def in_order(self, earlier: int, later: int) -> bool:
        """False if a buffer cannot hold `earlier` before `later`: it is in reverse order."""
        return self.ranks is None or compare(self.ranks[earlier], self.ranks[later]) >= 0


class SearchError(Exception):
    """There are too many ways to try."""


def starts_after(space: FlatSpace, element: int, phase: int) -> list[int]:
    """Where a parameter may start if the one before it ends before `element`.

    Buckets that are stored as one (`dp_zero_gather_scatter`) follow each other without alignment.
    """
    return sorted({aligned(element, phase)} | (set() if space.exact else {element}))


def fillings(
    gap: Gap, pool: AbstractSet[int], may_lie: MayLie, weights: Weights
) -> list[tuple[Placed, ...]]:
    """The ways in which weights of `pool` fill a gap, but no more than two of them.

    Raises:
        SearchError: this takes too long.
    """
    fits = [
        number
        for number in sorted(pool)
        if (gap.before is None or weights.in_order(gap.before.number, number))
        and (gap.after is None or weights.in_order(number, gap.after.number))
    ]
    found: list[tuple[Placed, ...]] = []
    path: list[Placed] = []
    steps, stack = 0, [_choices(gap, fits, may_lie, weights, path)]
    while stack:
        steps += 1
        if steps > _STEPS:
            raise SearchError
        choice = next(stack[-1], None)
        if choice is None:
            stack.pop()
            if path:
                path.pop()
            continue
        if choice == "full":
            found.append(tuple(path))
            if len(found) == 2:
                return found
            continue
        assert isinstance(choice, Placed)
        path.append(choice)
        stack.append(_choices(gap, fits, may_lie, weights, path))
    return found


def _choices(
    gap: Gap, fits: Sequence[int], may_lie: MayLie, weights: Weights, path: list[Placed]
) -> Iterator[Placed | str]:
    """What may come after `path`; `full` if nothing is left to be filled."""
    segment, at, phase = _next(gap, path, weights)
    if segment is None:
        yield "full"
        return
    used = {placed.number for placed in path}
    last = path[-1] if path and path[-1].space is segment.space else gap.before
    for number in fits:
        if number in used:
            continue
        goes_on = (
            last is not None
            and last.space is segment.space
            and last.start + weights.numel[last.number] == at
            and weights.parameter[last.number] == weights.parameter[number]
        )
        for start in [at] if goes_on else starts_after(segment.space, at, phase):
            if (
                start + weights.numel[number] <= segment.stop
                and all(weights.in_order(placed.number, number) for placed in path)
                and may_lie(number, segment.space, start)
            ):
                yield Placed(number, segment.space, start)


def _next(gap: Gap, path: Sequence[Placed], weights: Weights) -> tuple[Segment | None, int, int]:
    """The segment to be filled next, from which element on, at which phase."""
    filled = iter(path)
    placed = next(filled, None)
    for segment in gap.segments:
        at, phase, parameter = segment.start, segment.phase, None
        while placed is not None and placed.space is segment.space:
            if not segment.space.exact and weights.parameter[placed.number] != parameter:
                phase = placed.start
            parameter = weights.parameter[placed.number]
            at = placed.start + weights.numel[placed.number]
            placed = next(filled, None)
        if segment.stop not in (at, aligned(at, phase)):
            return segment, at, phase
    return None, 0, 0
