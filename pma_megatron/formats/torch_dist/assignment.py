"""Which of several bit-identical weights lies where: proved from all there is to know, or refused.

Known for certain are: what each source with the same buffers holds there, that a weight lies in a
model-parallel rank's buffers once, that a layer lies in one model chunk, and the order in which
Megatron registers parameters, if all weights that are known by value follow it.
"""

from __future__ import annotations

import itertools
from collections import ChainMap, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pma_megatron.base.boxes import Piece
from pma_megatron.errors import PlanError
from pma_megatron.formats.base import Payload
from pma_megatron.formats.torch_dist.registration import (
    Rank,
    Registration,
    buffer_ranks,
    contradicts,
    is_expert,
    layer_of,
    rules,
)
from pma_megatron.formats.torch_dist.ties import Gap, MayLie, Placed, SearchError, Weights, fillings


@dataclass(frozen=True, slots=True)
class WeightChunk:
    """One stored chunk of a weight."""

    key: str
    piece: Piece[Payload]

    @property
    def parameter(self) -> tuple[object, ...]:
        """Equal for parts of one parameter."""
        stacked = itertools.takewhile(lambda size: size == 1, self.piece.box.sizes)
        return (self.key, *self.piece.box.offsets[: len(list(stacked))])


@dataclass(slots=True)
class Buffer:
    """A flat buffer of a model chunk: what is known by value, and the gaps between, in its order.

    Attributes:
        group: the optimizer that it belongs to; a weight is in one of its buffers.
        name: without the bucket.
        parts: weights and gaps.
        candidates: numbers of the weights that may lie somewhere in its gaps.
    """

    group: str
    name: str
    parts: list[Placed | Gap] = field(default_factory=list)
    candidates: set[int] = field(default_factory=set)

    @property
    def gaps(self) -> list[Gap]:
        """Those parts that are not known by value."""
        return [part for part in self.parts if isinstance(part, Gap)]

    def numbers(self, filled: Mapping[int, Sequence[Placed]]) -> list[int]:
        """Weights in order; `filled` says what is in a gap, by its id."""
        return [placed.number for placed in self.sequence(filled)]

    def sequence(self, filled: Mapping[int, Sequence[Placed]]) -> list[Placed]:
        """The same with their places."""
        placed: list[Placed] = []
        for part in self.parts:
            placed += filled.get(id(part), ()) if isinstance(part, Gap) else (part,)
        return placed


@dataclass(frozen=True, slots=True)
class _State:
    """Gaps that are filled, and those that may be filled in several ways."""

    filled: dict[int, tuple[Placed, ...]]
    several: list[tuple[Buffer, Gap]]


class Assignment:
    """The unique way to fill all gaps of a checkpoint's buffers.

    Attributes:
        by_order: the gaps that values alone did not fill.
    """

    def __init__(
        self, chunks: Sequence[WeightChunk], buffers: Sequence[Buffer], may_lie: MayLie
    ) -> None:
        self._chunks = chunks
        self._buffers = buffers
        self._may_lie = may_lie
        self._numel = [chunk.piece.box.numel for chunk in chunks]
        self._parameters = [chunk.parameter for chunk in chunks]
        self._home_of = [self._home(number) for number in range(len(chunks))]
        self._homes: dict[object, set[int]] = defaultdict(set)
        self.by_order: list[Gap] = []
        for buffer in buffers:
            for number in buffer.numbers({}):
                self._homes[self._home_of[number]].add(id(buffer))

    def fill(self, others: Callable[[], Iterable[MayLie]]) -> Mapping[int, Sequence[Placed]]:
        """What is in each gap, by its id.

        Args:
            others: what other sources with the same buffers say; asked only if needed.

        Raises:
            PlanError: there is no way, or more than one.
        """
        everything = [(buffer, gap) for buffer in self._buffers for gap in buffer.gaps]
        state = self._solve(_State({}, everything), self._may_lie, None)
        if state is not None and state.several:
            says = [self._may_lie, *others()]
            state = self._solve(
                state, lambda *place: all(may_lie(*place) for may_lie in says), None
            )
        if state is None:
            raise PlanError("its buffers cannot be made up of its weights")
        self.by_order = [gap for _, gap in state.several]
        return state.filled if not state.several else self._by_order(state)

    def _by_order(self, state: _State) -> Mapping[int, Sequence[Placed]]:
        """Fill what is left by every order of registration that fits; they must agree."""
        results: list[Mapping[int, Sequence[Placed]]] = []
        candidates = set().union(*(self._pool(buffer) for buffer, _ in state.several))
        experts = any(is_expert(self._chunks[number].key) for number in candidates)
        followed = False
        for rule in rules(with_experts=experts):
            ranks = {n: rule.rank(c.key, c.piece.box) for n, c in enumerate(self._chunks)}
            by_buffer = {
                id(buffer): self._ranks(rule, ranks, buffer, state) for buffer in self._buffers
            }
            if any(
                contradicts([by_buffer[id(b)][n] for n in b.numbers(state.filled)])
                for b in self._buffers
            ):
                continue
            followed = True
            solved = self._solve(state, self._may_lie, by_buffer)
            if solved is not None and solved.several:
                self._refuse(solved)
            if solved is not None:
                results.append(solved.filled)
        if not results or any(result != results[0] for result in results):
            self._refuse(state, followed=followed)
        return results[0]

    def _ranks(
        self, rule: Registration, ranks: dict[int, Rank], buffer: Buffer, state: _State
    ) -> Mapping[int, Rank]:
        numbers = buffer.numbers(state.filled)
        chunks = [(self._chunks[n].key, self._chunks[n].piece.box) for n in numbers]
        own = dict(zip(numbers, buffer_ranks(rule, chunks), strict=True))
        return ChainMap(own, ranks)

    def _solve(
        self, state: _State, may_lie: MayLie, ranks: Mapping[int, Mapping[int, Rank]] | None
    ) -> _State | None:
        """Fill each gap that can be filled in one way, until no more follow; None if one cannot."""
        filled, waiting = dict(state.filled), state.several
        taken = self._taken(filled)
        while True:
            several = []
            for buffer, gap in waiting:
                order = None if ranks is None else ranks[id(buffer)]
                weights = Weights(numel=self._numel, parameter=self._parameters, ranks=order)
                pool = self._pool(buffer) - taken[buffer.group]
                try:
                    ways = fillings(gap, pool, may_lie, weights)
                except SearchError:
                    several.append((buffer, gap))
                    continue
                if not ways:
                    return None
                if len(ways) == 1:
                    filled[id(gap)] = ways[0]
                    taken[buffer.group].update(placed.number for placed in ways[0])
                else:
                    several.append((buffer, gap))
            if not several or len(several) == len(waiting):
                return _State(filled, several)
            waiting = several

    def _taken(self, filled: Mapping[int, Sequence[Placed]]) -> dict[str, set[int]]:
        """Weights whose place in a group is known."""
        taken: dict[str, set[int]] = defaultdict(set)
        for buffer in self._buffers:
            taken[buffer.group].update(buffer.numbers(filled))
        return taken

    def _pool(self, buffer: Buffer) -> set[int]:
        """Weights that may lie in the gaps of a buffer: not those whose layer lies elsewhere."""
        return {
            number
            for number in buffer.candidates
            if (homes := self._homes.get(self._home_of[number])) is None or id(buffer) in homes
        }

    def _home(self, number: int) -> object:
        """What lies in one buffer per model-parallel rank: one dtype of one layer."""
        chunk = self._chunks[number]
        layer = layer_of(chunk.key, chunk.piece.box)
        return (layer, chunk.piece.payload.dtype) if layer else number

    def _refuse(self, state: _State, *, followed: bool = True) -> None:
        buffer, gap = state.several[0]
        tied = sorted(
            number
            for number in self._pool(buffer) - self._taken(state.filled)[buffer.group]
            if any(self._may_lie(number, s.space, s.start) for s in gap.segments)
        )
        names = [f"{self._chunks[n].key} at {self._chunks[n].piece.box.offsets}" for n in tied]
        why = (
            "and the order in which Megatron registers parameters does not tell them apart"
            if followed
            else "and the other parameters do not lie in the order in which Megatron registers them"
        )
        raise PlanError(
            f"{buffer.group}.{buffer.name} holds main parameters of {', '.join(names[:3])} "
            f"({len(tied)} in all). They cannot be told apart: as weights they are bit-identical "
            f"in every source with these buffers, {why}"
        )
