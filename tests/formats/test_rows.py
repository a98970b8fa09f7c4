"""Records that are alike are read as columns: what comes out is what one by one gives, or torch.

The oracle is Python's own pickle with torch's own classes, and the decoder without patterns.
"""

from __future__ import annotations

import itertools
import math
import pickle
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from hostile import variant_of
from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.alike import Alike, Rows
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.dcp import metadata
from pma_megatron.formats.dcp.metadata import DcpMetadata, parse
from pma_megatron.formats.pieces import StoredPieces

SHAPES = ((), (6,), (60, 6), (12, 4, 40000), (2, 3, 2, 5))
RANKS = 3
OFTEN = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def saved(shared: bool, per_rank: int = 40, seed: int = 0, times: int = 2) -> bytes:
    """A `.metadata` of some hundred chunks, with the plans of the ranks.

    Args:
        shared: whether plans hold the very objects that entries hold, and items of one file its
            very name, as where one process made them all.
        per_rank: objects of a rank.
        seed: of the order of the storage.
        times: tensors of each shape.
    """
    entries: dict[str, Any] = {}
    storage: list[tuple[MetadataIndex, int]] = []
    plans: list[list[WriteItem]] = [[] for _ in range(RANKS)]
    for number, shape in enumerate(SHAPES * times):
        key, dtype = f"decoder.layers.{number}.weight", (torch.bfloat16, torch.float32)[number % 2]
        entries[key] = entry = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(shape), []
        )
        rows = shape[0] if shape else 1
        for row in range(rows):
            offsets = torch.Size((row, *(0,) * (len(shape) - 1)) if shape else ())
            chunk = ChunkStorageMetadata(offsets, torch.Size((1, *shape[1:]) if shape else ()))
            entry.chunks.append(chunk)
            index = MetadataIndex(key if shared else str(bytes(key, "ascii"), "ascii"), offsets)
            storage.append((index, math.prod(chunk.sizes) * dtype.itemsize + 900))
            said = chunk if shared else pickle.loads(pickle.dumps(chunk))
            data = TensorWriteData(said, entry.properties, torch.Size(shape))
            item = WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)
            plans[row % RANKS].append(item)
    for number in range(per_rank):
        key = f"rng_state/shard_{number}_{per_rank}"
        entries[key] = BytesStorageMetadata()
        storage.append((MetadataIndex(key), 70))
        plans[number % RANKS].append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
    Random(seed).shuffle(storage)
    ends = dict.fromkeys((f"__{rank}_0.distcp" for rank in range(RANKS)), 0)
    found = {}
    for number, (index, nbytes) in enumerate(storage):
        name = list(ends)[number % RANKS]
        file = name if shared else str(bytes(name, "ascii"), "ascii")
        found[index] = _StorageInfo(file, ends[name], nbytes)
        ends[name] += nbytes << (30 if number == len(storage) // 2 else 0)
    made = Metadata(entries)
    made.storage_data = found
    made.all_local_plans = [SavePlan(items) for items in plans]  # type: ignore[attr-defined]
    return pickle.dumps(made)


def one_by_one(data: bytes) -> DcpMetadata:
    """What the decoder says that knows no rows."""
    return metadata._checked(metadata._decoded(data, "a file", None), "a file", "")


def told(data: bytes, read: Any) -> Any:
    """What is read, or why not."""
    try:
        found = read(data)
    except CheckpointError as error:
        return str(error)
    tensors = {k: (t.dtype, t.shape, tuple(t.pieces)) for k, t in found.tensors.items()}
    return tensors, found.objects, found.order, found.properties


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_is_what_torch_reads(shared: bool, seed: int) -> None:
    data = saved(shared, seed=seed)
    found, expected = parse(data, "a file"), pickle.loads(data)
    assert list(found.tensors) + list(found.objects) == list(expected.state_dict_metadata)
    for index, info in expected.storage_data.items():
        item = Item(info.relative_path, info.offset, info.length)
        if index.offset is None:
            assert found.objects[index.fqn] == item
        else:
            pieces = {piece.box.offsets: piece for piece in found.tensors[index.fqn].pieces}
            assert pieces[tuple(index.offset)].payload.item == item
    for key, tensor in found.tensors.items():
        entry = expected.state_dict_metadata[key]
        boxes = [Box(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
        assert [piece.box for piece in tensor.pieces] == boxes  # in the order of the file
        assert tensor.dtype == entry.properties.dtype and tensor.shape == tuple(entry.size)


@pytest.mark.parametrize("shared", [False, True])
def test_few_records_are_decoded_one_by_one(shared: bool) -> None:
    decoded = metadata._decoded(
        saved(shared),
        "a file",
        Alike({metadata.CHUNK: None, metadata.INDEX: metadata.INFO}, metadata._PASSED),
    )
    state = decoded.state
    elements = [
        *state["storage_data"],
        *(c for e in state["state_dict_metadata"].values() if e.state for c in e.state["chunks"]),
    ]
    elements += [item for plan in state["all_local_plans"] for item in plan.state["items"]]
    rows = [each for each in elements if type(each) is Rows]
    in_rows = sum(each.count for each in rows)
    alone = len(elements) - len(rows)
    assert alone < in_rows / 4


@OFTEN
@given(random=st.randoms(use_true_random=False), shared=st.booleans())
def test_a_variant_is_read_or_refused_as_one_by_one(random: Random, shared: bool) -> None:
    data = variant_of(VARIED[shared], random)
    assert told(data, lambda each: parse(each, "a file")) == told(data, one_by_one)


VARIED = {shared: saved(shared, per_rank=8, times=1) for shared in (False, True)}


@OFTEN
@given(random=st.randoms(use_true_random=False), shared=st.booleans())
def test_any_byte_that_differs_is_read_or_refused_as_one_by_one(
    random: Random, shared: bool
) -> None:
    data = bytearray(VARIED[shared])
    for _ in range(random.choice((1, 1, 2))):
        data[random.randrange(len(data))] = random.randrange(256)
    assert told(bytes(data), lambda each: parse(each, "a file")) == told(bytes(data), one_by_one)


def test_pieces_are_a_sequence_like_a_tuple() -> None:
    offsets = np.array([[0, 0], [0, 4], [2, 0]])
    sizes = np.array([[2, 4], [2, 3], [1, 7]])
    starts, lengths = np.array([0, 1 << 40, 0]), np.array([64, 48, 1 << 33])
    pieces = StoredPieces(
        torch.bfloat16, offsets, sizes, ("a", "b"), np.array([0, 0, 1]), starts, lengths
    )
    expected = tuple(
        Piece(
            Box(tuple(o), tuple(s)),
            Payload(Item(file, start, length), torch.bfloat16, math.prod(s)),
        )
        for o, s, file, start, length in zip(
            offsets.tolist(), sizes.tolist(), "aab", starts.tolist(), lengths.tolist(), strict=True
        )
    )
    assert pieces == expected and tuple(pieces) == expected and len(pieces) == 3
    assert [pieces[n] for n in range(-3, 3)] == [expected[n] for n in range(-3, 3)]
    assert pieces[1:] == expected[1:] and hash(pieces) == hash(expected)
    with pytest.raises(IndexError):
        pieces[3]
    assert pickle.loads(pickle.dumps(pieces)) == expected
    assert pieces != expected[:2] and pieces != (*expected[:2], expected[0])


@OFTEN
@given(data=st.data())
def test_pieces_that_touch_a_box_are_those_that_overlap_it(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
    size = [data.draw(st.integers(1, n)) for n in shape]
    steps = [range(0, n, s) for n, s in zip(shape, size, strict=True)]
    boxes = [
        Box(at, tuple(min(s, n - o) for o, s, n in zip(at, size, shape, strict=True)))
        for at in itertools.product(*steps)
    ]
    boxes = data.draw(st.permutations(boxes))[: data.draw(st.integers(1, len(boxes)))]
    columns = [
        np.array([getattr(box, name) for box in boxes]).reshape(len(boxes), len(shape))
        for name in ("offsets", "sizes")
    ]
    numbers = np.arange(len(boxes))
    pieces = StoredPieces(torch.float32, *columns, ("a",), 0 * numbers, 64 * numbers, numbers + 64)
    low = [data.draw(st.integers(0, n - 1)) for n in shape]
    wanted = Box(
        tuple(low), tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, low, strict=True))
    )
    expected = [piece for piece in pieces if piece.box.intersect(wanted) is not None]
    found = PieceIndex(pieces).touching(wanted)
    assert sorted(found, key=lambda p: p.box.offsets) == sorted(
        expected, key=lambda p: p.box.offsets
    )
    assert PieceIndex(pieces).covers(wanted) == PieceIndex(tuple(pieces)).covers(wanted)
