"""From rules to work: the tasks that fill what a merge writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pma_megatron.base.boxes import Piece, PieceIndex
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.flat_pieces import FlatPieces
from pma_megatron.formats.output import Destination, OutputLayout
from pma_megatron.formats.pieces import StoredPieces, payloads_of, together
from pma_megatron.formats.placed import PlacedPieces, Places
from pma_megatron.formats.shares import SharedPieces, gaps
from pma_megatron.formats.source import Source
from pma_megatron.merging.agreement import check_covers, check_same_model, matching
from pma_megatron.merging.bulk import Fills, Zeros, untouched
from pma_megatron.merging.entry_rules import Decisions, gets_new_bytes
from pma_megatron.merging.padding import common_rows, parts
from pma_megatron.merging.policy import MAIN, Action, Rule
from pma_megatron.merging.tasks import Average, Keep, Task, Zero

Further = Mapping[tuple[str, str], Sequence[Piece[Destination]]]
"""(state, model key) -> where its elements go beside the checkpoint, in model space."""


def make_tasks(
    sources: Sequence[Source],
    active: Sequence[int],
    decisions: Decisions,
    layout: OutputLayout | None,
    further: Further,
) -> list[Task | Fills]:
    """The work that fills the output, after a check that every source has what it takes.

    Args:
        sources: oldest first.
        active: numbers of those with a coefficient other than zero.
        decisions: what happens to every entry.
        layout: of the checkpoint that is written; None where none is.
        further: what goes elsewhere too, from the same averages.

    Raises:
        PlanError: a source lacks a tensor, or has it in another shape or dtype.
    """
    check_same_model(sources)
    builder = _Builder(sources, active, decisions, layout, further)
    base = sources[-1]
    frozen = {(state, key) for state, key in further if (state, key) not in decisions.rules}
    for state, key in (*decisions.rules, *sorted(frozen)):
        tensor = base.tensor(state, key)
        if tensor is not None:
            builder.add(state, key, tensor)
    averages = builder.averages
    if layout is None:
        return [*averages]
    return [*averages, *builder.between(), *builder.zeroed(), *untouched(layout)]


_FROZEN = Rule(Action.NEWEST, "it is not trained")
"""Of parameters that no rule is of, because a checkpoint takes them over as they are."""


@dataclass(slots=True)
class _Builder:
    """Tasks of the entries that were added, and what they leave open.

    Attributes:
        covered: payload -> (start, elements) that averages fill, unless it has one tensor alone.
        shared: the same of parameters that every rank has a share of.
        zeros: payload -> its task; one may hold the moments of many parameters.
        zeroed_alike: see `pieces.payloads_of`.
        zero_pieces: pieces that have payloads of their own.
    """

    sources: Sequence[Source]
    active: Sequence[int]
    decisions: Decisions
    layout: OutputLayout | None
    further: Further
    averages: list[Average] = field(default_factory=list)
    covered: dict[Payload, list[tuple[int, int]]] = field(default_factory=dict)
    shared: list[SharedPieces] = field(default_factory=list)
    zeros: dict[Payload, Zero] = field(default_factory=dict)
    zeroed_alike: set[object] = field(default_factory=set)
    zero_pieces: list[StoredPieces] = field(default_factory=list)

    def add(self, state: str, key: str, tensor: Tensor) -> None:
        """The task of one entry; rounded weights are a target of their main params' task."""
        rules, base = self.decisions.rules, self.sources[-1]
        rule = rules.get((state, key), _FROZEN)
        rounded = state == MAIN and self._is_rounded(key)
        written = self.layout is not None and gets_new_bytes(base, state, key, rule)
        further = self.further.get((state, key), ())
        if written and rule.action is Action.ZERO:
            self._zero(tensor)
        elif rule.action is not Action.ROUND and (written or rounded or further):
            self.averages += self._averages(state, key, tensor, written, rounded, further)

    def _zero(self, tensor: Tensor) -> None:
        assert self.layout is not None
        pieces: Sequence[Piece[Payload]] = tensor.replicas
        if isinstance(tensor.pieces, StoredPieces) and isinstance(self.layout.places, Places):
            self.zero_pieces.append(tensor.pieces)
        else:
            pieces = tensor.pieces
            for payload in payloads_of(tensor.replicas):
                self._zero_all(payload)
        for payload in payloads_of(pieces, self.zeroed_alike):
            self._zero_all(payload)

    def _zero_all(self, payload: Payload) -> None:
        assert self.layout is not None
        if payload not in self.zeros:
            self.zeros[payload] = Zero(self.layout.places[payload], 0, payload.numel)

    def _is_rounded(self, key: str) -> bool:
        """Whether the checkpoint that is written stores a weight rounded from its main params."""
        rule = self.decisions.rules.get(("weight", key), _FROZEN)
        return self.layout is not None and rule.action is Action.ROUND

    def _stays(self, state: str, key: str) -> bool:
        """Whether an entry keeps the newest source's values, as its weight does where main params
        are read for that alone."""
        rules = self.decisions.rules
        own = rules.get((state, key), _FROZEN).action
        if own is Action.DROP:
            own = rules.get(("weight", key), _FROZEN).action
        return own is Action.NEWEST

    def _averages(
        self,
        state: str,
        key: str,
        tensor: Tensor,
        written: bool,
        rounded: bool,
        further: Sequence[Piece[Destination]],
    ) -> Iterator[Average]:
        base = self.sources[-1]
        kept = self._stays(state, key)
        targets: list[Sequence[Piece[Destination]]] = []
        target_bytes = 0
        if written:
            targets += self._placed(tensor)
            target_bytes += tensor.dtype.itemsize
        if rounded:
            weight = base.space.weights[key]
            check_covers(base, key, PieceIndex(tensor.pieces), weight.pieces)
            targets += self._placed(weight)
            target_bytes += weight.dtype.itemsize
        if further:
            check_covers(base, key, PieceIndex(tensor.pieces), further)
            targets.append(further)
            target_bytes += further[0].payload.dtype.itemsize
        rows = None if kept else common_rows(self.sources, state, key)
        for part, beyond in parts(tensor, rows):
            stays = kept or beyond
            numbers = (len(self.sources) - 1,) if stays else tuple(self.active)
            found = (
                [tensor]
                if beyond
                else [
                    matching(self.sources[number], base, part, state, key, rows=rows)
                    for number in numbers
                ]
            )
            yield average_task(
                base,
                state,
                key,
                lead=part.pieces,
                numbers=numbers,
                tensors=found,
                targets=targets,
                target_bytes=target_bytes,
                kept=stays,
            )

    def _placed(self, tensor: Tensor) -> Iterator[Sequence[Piece[Destination]]]:
        assert self.layout is not None
        pieces: Sequence[Piece[Payload]] = tensor.replicas
        if isinstance(tensor.pieces, StoredPieces) and isinstance(self.layout.places, Places):
            yield PlacedPieces(tensor.pieces, self.layout.places)  # each is all of its payload
        elif isinstance(tensor.pieces, SharedPieces):
            yield PlacedPieces(tensor.pieces, self.layout.places)
            self.shared.append(tensor.pieces)
        elif isinstance(tensor.pieces, FlatPieces):
            yield PlacedPieces(tensor.pieces, self.layout.places)
            for payload, start, numel in tensor.pieces.partly():
                self.covered.setdefault(payload, []).append((start, numel))
        else:
            pieces = (*tensor.pieces, *tensor.replicas)
        placed = []
        for piece in pieces:
            # A payload of a tensor that is a view of a larger storage is written without the rest.
            placed.append(Piece(piece.box, self.layout.places[piece.payload], piece.start))
            self.covered.setdefault(piece.payload, []).append((piece.start, piece.box.numel))
        if placed:
            yield placed

    def between(self) -> Iterator[Keep | Zero]:
        """What lies between and after the parameters of a payload: as it was, or zero."""
        assert self.layout is not None
        between = gaps(self.shared, self.covered)  # first: it may add to those
        places = self.layout.places
        found = [(p, _gaps(ranges, places[p].numel)) for p, ranges in self.covered.items()]
        for payload, each in [*found, *between]:
            place = self.layout.places[payload]
            for start, count in each:
                if self.layout.keeps_gaps:
                    yield Keep(place, start, count, payload)
                else:
                    yield Zero(place, start, count)

    def zeroed(self) -> Iterator[Zero | Zeros]:
        """What becomes zero."""
        yield from self.zeros.values()
        for pieces in self.zero_pieces:
            assert self.layout is not None and isinstance(self.layout.places, Places)
            yield Zeros(self.layout.places, pieces)


def average_task(
    base: Source,
    state: str,
    key: str,
    *,
    lead: Sequence[Piece[Any]],
    numbers: Sequence[int],
    tensors: Sequence[Tensor],
    targets: Sequence[Sequence[Piece[Any]]] = (),
    target_bytes: int = 0,
    kept: bool = False,
) -> Average:
    """The task of one state of one tensor; see `tasks.Average` for the arguments.

    Args:
        base: the newest source, whose weights prove the map of a flat buffer.
        state: `weight`, `param` or a moment.
        key: of the model tensor.
        tensors: per number, the tensor in that source.
    """
    weight = base.space.weights.get(key)
    proved = state == MAIN and weight is not None and bool(weight.pieces) and key in base.flat_keys
    proof = PieceIndex(weight.pieces) if weight is not None and proved else None
    return Average(
        key=key if state in ("weight", MAIN) else f"optimizer.{state}.{key}",
        kept=kept,
        lead=lead,
        numbers=tuple(numbers),
        sources=tuple(PieceIndex(found.pieces) for found in tensors),
        dtypes=tuple(found.dtype for found in tensors),
        targets=PieceIndex(together(targets), disjoint=False),
        target_bytes=target_bytes,
        proof=proof,
        proof_itemsize=weight.dtype.itemsize if weight is not None and proof else 0,
    )


def _gaps(ranges: Sequence[tuple[int, int]], numel: int) -> list[tuple[int, int]]:
    gaps, at = [], 0
    for start, count in sorted(ranges):
        if start > at:
            gaps.append((at, start - at))
        at = max(at, start + count)
    return [*gaps, (at, numel - at)] if at < numel else gaps
