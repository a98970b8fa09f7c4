"""Shares of parameters that are worked out, against a partition that is carried out."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.shares import Holders, RankItems, SharedPieces, SharedRanges, gaps

shapes = st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=5)


def partitioned(every: Sequence[tuple[int, ...]], ranks: int, before: int) -> list[np.ndarray]:
    """What each rank's flat buffer holds: the elements of parameter n are n * 10,000 + 0, 1, ...

    As deepspeed/utils/zero_to_fp32.py (`_zero3_merge_trainable_params`) takes it apart: a rank has
    ceil(numel / ranks) elements of each parameter, one parameter after the other.
    """
    buffers = [[np.full(before + rank, -1)] for rank in range(ranks)]
    for number, shape in enumerate(every):
        values = number * 10_000 + np.arange(math.prod(shape))
        padding_numel = -len(values) % ranks
        padded = np.concatenate([values, np.full(padding_numel, -1)])
        for buffer, part in zip(buffers, np.split(padded, ranks), strict=True):
            buffer.append(part)
    return [np.concatenate(buffer) for buffer in buffers]


def held(
    every: Sequence[tuple[int, ...]], ranks: int, before: int
) -> tuple[list[np.ndarray], list[SharedPieces]]:
    """Buffers, and the parameters in them; each rank's begin a little later than the last one's."""
    buffers = partitioned(every, ranks, before)
    payloads = [
        Payload(Item(f"rank_{rank}", 0, 99), torch.float32, len(buffer), "data/3")
        for rank, buffer in enumerate(buffers)
    ]
    items = RankItems.of([payload.item for payload in payloads])
    holders = Holders.of(items, payloads, [before + rank for rank in range(ranks)])
    found, at = [], 0
    for shape in every:
        found.append(SharedPieces(holders, shape, at))
        at += -(-math.prod(shape) // ranks)
    return buffers, found


def read(
    pieces: Sequence[Piece[Payload]], buffers: list[np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """A parameter put together from pieces; what no piece holds is -2."""
    whole = np.full(shape, -2)
    for piece in pieces:
        rank = int(piece.payload.item.file.removeprefix("rank_"))
        values = buffers[rank][piece.start : piece.start + piece.box.numel]
        inside = tuple(
            slice(low, low + size)
            for low, size in zip(piece.box.offsets, piece.box.sizes, strict=True)
        )
        assert (whole[inside] == -2).all()  # no element twice
        whole[inside] = values.reshape(piece.box.sizes)
    return whole


@settings(deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 3))
def test_pieces_hold_what_the_ranks_were_given(
    every: list[tuple[int, ...]], ranks: int, before: int
) -> None:
    buffers, found = held(every, ranks, before)
    for number, (shape, pieces) in enumerate(zip(every, found, strict=True)):
        expected = number * 10_000 + np.arange(math.prod(shape)).reshape(shape)
        for each in (pieces, tuple(pieces), pickle.loads(pickle.dumps(pieces))):
            assert np.array_equal(read(each, buffers, shape), expected)
        assert [pieces[n] for n in range(len(pieces))] == [*pieces] == [*pieces[:]]
        assert {*pieces.payloads()} == {piece.payload for piece in pieces}
        offsets = [piece.box.offsets for piece in pieces]
        assert offsets == sorted(offsets)
        said = pieces.columns()
        assert said.ordered
        for n, piece in enumerate(pieces):
            assert said.files[said.file[n]] == piece.payload.item.file
            assert (said.items[n], said.element[n]) == (piece.payload.item.offset, piece.start)
            box = tuple(said.offsets[n].tolist()), tuple(said.sizes[n].tolist())
            assert box == (piece.box.offsets, piece.box.sizes)


@settings(deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=3), st.integers(1, 80), st.data())
def test_pieces_that_touch_a_box_are_found_without_looking_at_all(
    extents: list[int], ranks: int, data: st.DataObject
) -> None:
    shape = tuple(extents)
    _, (pieces,) = held([shape], ranks, 0)
    low = [data.draw(st.integers(0, extent - 1)) for extent in shape]
    sizes = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, low, strict=True)]
    box = Box(tuple(low), tuple(sizes))
    plain = PieceIndex(tuple(pieces))
    assert pieces.touching(box) == plain.touching(box)
    assert pieces.covers(box) and plain.covers(box)
    beyond = Box(tuple(low), (*sizes[:-1], shape[-1] - low[-1] + 1))
    assert not pieces.covers(beyond)
    assert pieces.covers(pieces.extent) and pieces.extent == Box.whole(shape)


@settings(deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 3), st.data())
def test_what_no_parameter_fills_is_found(
    every: list[tuple[int, ...]], ranks: int, before: int, data: st.DataObject
) -> None:
    """With and without one of the parameters, or an element that something else fills."""
    buffers, found = held(every, ranks, before)
    without = data.draw(st.sampled_from([None, *range(len(every))]))
    left = [pieces for number, pieces in enumerate(found) if number != without]
    if without is not None:
        for buffer in buffers:
            buffer[buffer // 10_000 == without] = -1
    payloads = [found[0].holders.payload(rank) for rank in range(ranks)]
    covered: dict[Payload, list[tuple[int, int]]] = {}
    if before:
        covered[payloads[0]] = [(0, 1)]
        buffers[0][0] = 0
    between = dict(gaps(left, covered))
    for payload, buffer in zip(payloads, buffers, strict=True):
        free = np.zeros(len(buffer), dtype=bool)
        for start, count in between.get(payload, ()):
            assert not free[start : start + count].any() and count
            free[start : start + count] = True
        if payload in covered:
            assert payload not in between
            free[:] = True
            for start, count in covered[payload]:
                free[start : start + count] = False
        if (buffer >= 0).any():  # of what holds nothing that is written, nothing is said
            assert (free == (buffer < 0)).all()


def test_the_map_of_a_rank_says_where_its_shares_lie() -> None:
    every = {"a": (3, 5), "empty": (0, 2), "b": (4,), "c": ()}
    names = [("group", f"rank {n}") for n in range(3)]
    _, found = held([*every.values()], 3, 0)
    for rank, (_, ranges) in enumerate(SharedRanges.of_ranks(every, names).items()):
        assert ranges.keys == {"a", "b", "c"} and len(ranges) == len([*ranges])
        said = {(each.key, each.box): each.start + rank for each in ranges}
        of_pieces = {
            (key, piece.box): piece.start
            for key, pieces in zip(every, found, strict=True)
            for piece in (pieces if len(pieces) else ())
            if piece.payload.item.file == f"rank_{rank}"
        }
        assert said == of_pieces
