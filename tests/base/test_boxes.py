"""`base.boxes.PieceIndex` against a look at every piece."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma_megatron.base.boxes import Box, Piece, PieceIndex, overlaps


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that cut it along each axis, into single elements or longer parts."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    cuts = []
    for extent in shape:
        inner = draw(st.sets(st.integers(1, max(extent - 1, 1)), max_size=extent))
        if draw(st.booleans()):
            inner = set(range(1, extent))
        cuts.append(
            list(itertools.pairwise(sorted({0, extent, *(n for n in inner if n < extent)})))
        )
    boxes = [
        Box(tuple(low for low, _ in part), tuple(high - low for low, high in part))
        for part in itertools.product(*cuts)
    ]
    return shape, draw(st.permutations(boxes))


@settings(deadline=None)
@given(tilings(), st.data())
def test_an_index_finds_what_a_look_at_every_piece_finds(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    kept = (
        data.draw(st.lists(st.sampled_from(boxes), unique=True))
        if data.draw(st.booleans())
        else boxes
    )
    pieces = [Piece(box, number) for number, box in enumerate(kept)]
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    for box in (Box(offsets, sizes), *boxes):
        wanted = {p.payload for p in pieces if p.box.intersect(box) is not None}
        for disjoint in (True, False):
            index = PieceIndex(pieces, disjoint=disjoint)
            found = index.touching(box)
            assert {piece.payload for piece in found} == wanted and len(found) == len(wanted)
        shared = sum(common.numel for p in pieces if (common := p.box.intersect(box)))
        assert PieceIndex(pieces).covers(box) is (shared == box.numel)


@pytest.mark.parametrize("at", [(0, 1), (0, 30), (4, 5), (7, 11), (12, 9), (29, 1)])
def test_a_row_overlaps_as_the_same_row_of_a_matrix_does(at: tuple[int, int]) -> None:
    offset, size = at
    spans = [(0, 5, 0), (5, 1, 3), (6, 9, 7), (15, 15, 0)]
    row = [Piece(Box((o,), (n,)), str(o), start) for o, n, start in spans]
    matrix = [Piece(Box((0, o), (1, n)), str(o), start) for o, n, start in spans]
    found = overlaps(Box((offset,), (size,)), row)
    wanted = overlaps(Box((0, offset), (1, size)), matrix)
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one.payload, one.unit_start, one.start, one.origin, one.numel, one.is_run) == (
            (other.payload, other.unit_start, other.start, other.origin, other.numel, other.is_run)
        )
        assert one.rows == other.rows
