"""Elements of a flat buffer that is stored in many chunks."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.formats import flat
from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.flat import FlatRange, FlatSpace, read_flat, states_from_flat
from pma_megatron.formats.flat_pieces import FlatPieces
from pma_megatron.formats.items import ItemFiles

SIZES = (5, 1, 8, 3, 7, 2)
GAP = 4  # elements after the third chunk that nothing stores


class _Chunks(tuple[Piece[Payload], ...]):
    """As a 671B model has them by the thousand: nobody walks over all of them for one."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all chunks were looked at")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ItemFiles, _Chunks, torch.Tensor]:
    """Files, the chunks in them, and what the buffer holds."""
    values = torch.arange(1.0, sum(SIZES) + GAP + 1)
    pieces, start, at = [], 0, 0
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        for number, size in enumerate(SIZES):
            torch.save(values[start : start + size].clone(), file)
            item = Item("__0_0.distcp", at, file.tell() - at)
            pieces.append(Piece(Box((start,), (size,)), Payload(item, torch.float32, size)))
            start, at = start + size, file.tell()
            if number == 2:
                values[start : start + GAP] = 0
                start += GAP
    return ItemFiles(tmp_path), _Chunks(pieces), values


def test_a_window_is_read_from_the_chunks_under_it_alone(
    stored: tuple[ItemFiles, _Chunks, torch.Tensor],
) -> None:
    files, chunks, values = stored
    for start in range(len(values)):
        for count in range(1, len(values) - start + 1):
            found = read_flat(files, chunks, start, count)
            assert torch.equal(found, values[start : start + count]), (start, count)


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[FlatSpace], dict[Any, list[FlatRange]], Tensor]:
    """A tensor whose chunks lie in two buffers, some in both, between what belongs to others."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    size = [draw(st.integers(1, n)) for n in shape]
    steps = [range(0, n, s) for n, s in zip(shape, size, strict=True)]
    boxes = [
        Box(at, tuple(min(s, n - o) for o, s, n in zip(at, size, shape, strict=True)))
        for at in itertools.product(*steps)
    ]
    spaces, ranges, items = [], {}, itertools.count()
    mine = [draw(st.permutations(boxes)), draw(st.permutations(boxes))[: draw(st.integers(0, 2))]]
    for number, own in enumerate(mine):
        at, lying = 0, []
        for box in own:
            at += draw(st.sampled_from((0, 0, 3)))
            lying.append(FlatRange(at, "key", box))
            at += box.numel
        numel = at + draw(st.integers(1, 3))
        space = FlatSpace("group", f"space {number}", numel, exact=True)
        for state in ("param", "exp_avg"):
            if state == "param" or draw(st.booleans()):
                inner = draw(st.sets(st.integers(1, numel - 1))) if numel > 1 else set()
                edges = sorted({0, numel, *inner})
            chunks = []
            for low, high in itertools.pairwise(edges):
                item = Item(f"file {next(items) % 3}", 100 * next(items), 90)
                payload = Payload(item, torch.float32, high - low)
                chunks.append(Piece(Box((low,), (high - low,)), payload))
            space.states[state] = tuple(chunks)
        spaces.append(space)
        ranges["group", space.name] = lying
    pieces = tuple(Piece(box, Payload(Item("w", 0, 9), torch.bfloat16, box.numel)) for box in boxes)
    return spaces, ranges, Tensor("key", torch.bfloat16, shape, pieces)


@given(made=cut(), data=st.data())
def test_pieces_in_columns_are_those_of_chunks_that_are_looked_at_one_by_one(
    made: tuple[list[FlatSpace], dict[Any, list[FlatRange]], Tensor], data: st.DataObject
) -> None:
    spaces, ranges, weight = made
    with pytest.MonkeyPatch.context() as patched:
        expected = states_from_flat(spaces, ranges, {"key": weight})
        patched.setattr(flat, "MANY", 0)
        found = states_from_flat(spaces, ranges, {"key": weight})
    assert found == expected
    for state, tensors in pickle.loads(pickle.dumps(found)).items():
        pieces, one_by_one = tensors["key"].pieces, expected[state]["key"].pieces
        assert isinstance(pieces, FlatPieces) and isinstance(one_by_one, tuple)
        assert pieces == one_by_one and len(pieces) == len(one_by_one)
        assert pieces[1:] == one_by_one[1:] and pieces[-1] == one_by_one[-1]
        assert {*pieces.payloads()} == {piece.payload for piece in one_by_one}
        low = [data.draw(st.integers(0, n - 1)) for n in weight.shape]
        high = [
            data.draw(st.integers(at + 1, n + 1)) for at, n in zip(low, weight.shape, strict=True)
        ]
        box = Box(tuple(low), tuple(h - at for at, h in zip(low, high, strict=True)))
        near = [piece for piece in one_by_one if piece.box.intersect(box) is not None]
        assert sorted(PieceIndex(pieces).touching(box), key=repr) == sorted(near, key=repr)
        assert PieceIndex(pieces).covers(box) == PieceIndex(one_by_one).covers(box)
        held = Counter[Payload]()
        for piece in one_by_one:
            held[piece.payload] += piece.box.numel
        partly = {(p.payload, p.start, p.box.numel) for p in one_by_one}
        partly = {each for each in partly if held[each[0]] != each[0].numel}
        assert {*pieces.partly()} >= partly
        assert {payload for payload, _, _ in pieces.partly()} == {each[0] for each in partly}
        said = pieces.columns()
        assert said.element.tolist() == [piece.start for piece in one_by_one]
        assert [said.files[n] for n in said.file] == [p.payload.item.file for p in one_by_one]
