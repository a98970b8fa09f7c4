"""Which pieces of a source are looked at: the largest of every file, by a plain sort."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest
import torch

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.formats.base import MAIN_PARAM, Item, ModelSpace, Payload, Tensor
from pma_megatron.formats.pieces import StoredPieces
from pma_megatron.formats.source import Source
from pma_megatron.identity.samples import WEIGHT, Inventory, runs


def source_of(files: int, tensors: int = 12) -> Source:
    """A source whose pieces lie in many files; every other tensor keeps its pieces as a tuple."""
    draw = random.Random(files)
    states: dict[str, dict[str, Tensor]] = {WEIGHT: {}, MAIN_PARAM: {}, "exp_avg": {}}
    for number, state in itertools.product(range(tensors), states):
        rows, columns = draw.choice(((8, 3), (16, 5), (32, 3)))
        dtype = torch.bfloat16 if state == WEIGHT else torch.float32
        offsets = [(row, 0) for row in range(0, rows, 2)]
        file = [draw.randrange(files) for _ in offsets]
        pieces = StoredPieces(
            dtype,
            np.array(offsets),
            np.full((len(offsets), 2), (2, columns)),
            tuple(f"__{n}_0.distcp" for n in range(files)),
            np.array(file),
            np.arange(len(file)) * 500,
            np.full(len(file), 500),
        )
        stored = pieces if number % 2 else tuple(pieces)
        states[state][str(number)] = Tensor(str(number), dtype, (rows, columns), stored)
    weights = states.pop(WEIGHT)
    return Source(
        path="",
        format="torch_dist",
        space=ModelSpace(weights, states, "named"),
        objects=(),
        optimizer_keys=frozenset(),
        metadata_digest="",
        ranges={},
        topology="",
    )


@pytest.mark.parametrize(("files", "per_file"), [(1, 3), (7, 3), (256, 3), (1000, 3), (3000, 1)])
def test_every_file_is_looked_at_the_largest_pieces_first(files: int, per_file: int) -> None:
    source = source_of(files, tensors=12 if files < 100 else 400)
    inventory = Inventory(source)
    found = inventory.largest(lambda state, *_: state != WEIGHT)
    expected: dict[str, list[tuple[int, str, str, tuple[int, ...]]]] = defaultdict(list)
    for state, tensors in source.space.states.items():
        for key, tensor in tensors.items():
            for piece in tensor.pieces:
                order = -4 * piece.box.numel, state, key, piece.box.offsets
                expected[piece.payload.item.file].append(order)
    assert found.keys() == expected.keys()
    for file, pieces in found.items():
        order = [(-4 * s.piece.box.numel, s.state, s.key, s.piece.box.offsets) for s in pieces]
        assert order == sorted(expected[file])[:per_file]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "numel"),
    [
        ((), 1),
        ((9,), 9),
        ((5000,), 64),
        ((40, 9), 72),
        ((6, 9), 54),
        ((70, 65), 64),
        ((7, 1000), 64),
        ((7, 1, 1000), 64),
        ((3, 50, 40), 80),
        ((3, 1, 40), 80),
        ((0, 7), 0),
    ],
)
def test_a_run_has_no_gaps_and_lies_in_its_piece(
    sizes: tuple[int, ...], numel: int, count: int
) -> None:
    """One read each, of as many elements as are asked for, and everywhere in the end."""
    elements = np.arange(math.prod(sizes)).reshape(sizes)
    first = tuple(range(5, 5 + len(sizes)))
    piece = Piece(Box(first, sizes), Payload(Item("a", 0, 9), torch.float32, 1))
    seen: set[int] = set()
    for seed in range(600 if numel else 0):
        found = [*runs(piece, str(seed), 64, count)]
        assert found == [*runs(piece, str(seed), 64, count)]
        assert 1 <= len(found) <= count and (count == 1 or found[0].offsets == first)
        for box in found:
            low = tuple(at - start for at, start in zip(box.offsets, first, strict=True))
            inside = elements[
                tuple(slice(at, at + n) for at, n in zip(low, box.sizes, strict=True))
            ]
            run = inside.reshape(-1)
            assert run.shape == (numel,)
            assert (np.diff(run) == 1).all()
            seen |= {*run.tolist()}
    assert len(seen) > 0.9 * elements.size or not numel
    assert numel or not [*runs(piece, "", 64, count)]


def test_every_tensor_is_looked_at() -> None:
    chosen = Inventory(source_of(2)).chosen(lambda state, *_: state == WEIGHT)
    assert {each.key for each in chosen} == {str(number) for number in range(12)}
    assert len({(each.key, each.piece.box.offsets) for each in chosen}) == len(chosen)


def test_short_pieces_and_others_are_left_out() -> None:
    source = source_of(3)
    inventory = Inventory(source)
    assert inventory.largest(lambda *_: True, least_bytes=1 << 20) == {}
    found = inventory.first(lambda *_: True, 5, least_bytes=32)
    sizes = [4 * p.box.numel for t in source.space.states[MAIN_PARAM].values() for p in t.pieces]
    assert [s.piece.box.numel * 4 for s in found] == [max(sizes)] * 5
    assert not inventory.holds_only(torch.float32, least_bytes=1)
    piece = Piece(Box((), ()), Payload(Item("a", 0, 9), torch.float32, 1))
    alone = Tensor("a", torch.float32, (), (piece,))
    space = ModelSpace({"a": alone}, {}, "none")
    assert Inventory(
        Source(
            path="",
            format="torch_dist",
            space=space,
            objects=(),
            optimizer_keys=frozenset(),
            metadata_digest="",
            ranges={},
            topology="",
        )
    ).holds_only(torch.float32, least_bytes=1)
