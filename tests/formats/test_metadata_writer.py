"""`.metadata` that is written from columns is what torch's own pickle says of the same objects."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.dcp import written
from pma_megatron.formats.dcp.metadata import parse
from pma_megatron.formats.dcp.metadata_writer import Stored, dump_metadata

FILES = ("__0_0.distcp", "__1_0.distcp")


def metadata_of(tensors: dict[str, list[int]], objects: list[str]) -> Metadata:
    """Tensors `[rows, 3]` cut into chunks of so many rows, and objects, one after the other."""
    entries: dict[str, object] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    at = 0
    for key, rows in tensors.items():
        chunks = []
        for number, count in enumerate(rows):
            offset = torch.Size([sum(rows[:number]), 0])
            chunks.append(ChunkStorageMetadata(offset, torch.Size([count, 3])))
            nbytes = count * 12 + 500
            storage[MetadataIndex(key, offset)] = _StorageInfo(FILES[number % 2], at, nbytes)
            at += nbytes
        entries[key] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), torch.Size([sum(rows), 3]), chunks
        )
    for key in objects:
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(FILES[0], at, 77)
        at += 77
    found = Metadata(entries)  # type: ignore[arg-type]
    found.planner_data = {key: (key, 0) for key in entries}
    found.storage_data = storage
    return found


def stored_of(wanted: Metadata) -> dict[str, Stored]:
    """Where it says that its entries are, key by key."""
    found = {}
    for key, entry in wanted.state_dict_metadata.items():
        chunks = getattr(entry, "chunks", None)
        places = [None] if chunks is None else [chunk.offsets for chunk in chunks]
        infos = [wanted.storage_data[MetadataIndex(key, place)] for place in places]
        found[key] = Stored(
            FILES,
            np.array([FILES.index(info.relative_path) for info in infos]),
            np.array([info.offset for info in infos]),
            np.array([info.length for info in infos]),
        )
    return found


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(1, 70_000), min_size=1, max_size=5), max_size=4),
    objects=st.integers(0, 3),
    shift=st.sampled_from([0, 200, 60_000, (1 << 31) - 40, (1 << 40)]),
)
def test_what_is_written_is_what_torch_would_say(
    rows: list[list[int]], objects: int, shift: int
) -> None:
    tensors = {f"layer.{number}.weight": each for number, each in enumerate(rows)}
    wanted = metadata_of(tensors, [f"extra/{number}" for number in range(objects)])
    for info in wanted.storage_data.values():
        info.offset += shift
    data = pickle.dumps(wanted)
    written = dump_metadata(parse(data, "a"), stored_of(wanted), (), {})
    read = pickle.loads(written)  # by torch's own classes
    assert read.state_dict_metadata == wanted.state_dict_metadata
    assert read.storage_data == wanted.storage_data
    assert read.planner_data == wanted.planner_data
    again = parse(written, "b")
    assert (again.tensors, again.objects) == (parse(data, "a").tensors, parse(data, "a").objects)


def test_stand_ins_are_pickled_as_what_they_stand_for() -> None:
    size, offset = torch.Size([4, 3]), torch.Size([2, 0])
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
        theirs = TensorProperties(torch.bfloat16, torch.strided, True, memory_format, False)
        ours = written.TensorProperties(torch.bfloat16, True, memory_format, False)
        assert written.pickled(ours) == by_torch(theirs)
    pairs = [
        (written.TensorStorageMetadata(ours, size, [1]), TensorStorageMetadata(theirs, size, [1])),
        (written.ChunkStorageMetadata(offset, size), ChunkStorageMetadata(offset, size)),
        (written.BytesStorageMetadata(), BytesStorageMetadata()),
        (written.MetadataIndex("a", offset), MetadataIndex("a", offset)),
        (written.MetadataIndex("a"), MetadataIndex("a")),
        (written._StorageInfo("a", 1, 2), _StorageInfo("a", 1, 2)),
        (written.Metadata({"a": 1}, {}), Metadata({"a": 1}, storage_data={})),  # type: ignore
    ]
    for our, their in pairs:
        read = pickle.loads(pickle.PROTO + b"\x03" + written.pickled(our) + pickle.STOP)
        assert type(read) is type(their)
        assert vars(read) == vars(pickle.loads(pickle.dumps(their)))


def by_torch(value: object) -> bytes:
    """The same opcodes of an instance of torch's class."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=3)
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()[2:-1]


def test_dropped_keys_and_other_dtypes_are_said_and_scalars_have_a_chunk() -> None:
    wanted = metadata_of({"kept": [2, 3], "gone": [1]}, ["gone too"])
    wanted.state_dict_metadata["scalar"] = TensorStorageMetadata(
        TensorProperties(dtype=torch.int64),
        torch.Size([]),
        [ChunkStorageMetadata(torch.Size([]), torch.Size([]))],
    )
    index = MetadataIndex("scalar", torch.Size([]))
    wanted.storage_data[index] = _StorageInfo(FILES[1], 1 << 20, 600)
    base, drop = parse(pickle.dumps(wanted), "a"), {"gone", "gone too"}
    stored = {key: where for key, where in stored_of(wanted).items() if key not in drop}
    read = pickle.loads(dump_metadata(base, stored, drop, {"kept": torch.bfloat16}))
    assert [*read.state_dict_metadata] == ["kept", "scalar"]
    assert read.state_dict_metadata["kept"].properties.dtype == torch.bfloat16
    assert read.state_dict_metadata["kept"].chunks == wanted.state_dict_metadata["kept"].chunks
    assert read.state_dict_metadata["scalar"] == wanted.state_dict_metadata["scalar"]
    assert read.storage_data[index] == wanted.storage_data[index]
    assert len(read.storage_data) == 3


def test_a_path_cannot_stand_for_what_is_filled_in() -> None:
    for part in ("\0storage", "\0chunks 00000000"):
        wanted = metadata_of({"a": [2]}, [])
        wanted.planner_data = {"a": ("a", part)}
        with pytest.raises(CheckpointError, match="a path of names"):
            parse(pickle.dumps(wanted), "a")
