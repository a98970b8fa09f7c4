"""Checkpoints of `scale_models`: metadata as Megatron writes it, items with sparse payload.

Every item is a zip that `torch.save` could have written, its payload a hole in the file: zeros, but
for the few values that flat buffers need (`scale_flat`). The shard files of all checkpoints of a
run are hard links to those of one; each has a `.metadata` and a common state of its own.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import scale_flat
import torch
from isal import isal_zlib
from scale_models import Model, Shard, shards, stage_of, tensor_rank_of
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pma_megatron.formats.pickles import dump_inert, new_tensor
from pma_megatron.formats.zips import Skeleton, lay_out
from pma_megatron.identity.copies import _crc_of_zeros

INTERVAL = 100  # iterations between two checkpoints
_SAMPLES = 4096  # a global batch
FILES_PER_RANK = 2
_OBJECT = 1  # bytes that an object counts for where ranks are chosen


@dataclass(slots=True)
class Placed:
    """One item: what it holds, the rank that wrote it, and where it lies."""

    shard: Shard
    rank: int
    file: str = ""
    offset: int = 0
    length: int = 0


@dataclass(slots=True)
class Ranks:
    """Who writes what: the ranks that hold a chunk take turns, the one with the least first."""

    model: Model
    loads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loads = [0] * self.model.ranks

    def writer(self, shard: Shard, nbytes: int, given: int | None) -> int:
        """The rank that writes a chunk: the one that is given, or one of those that hold it."""
        rank = self._least(shard) if given is None else given
        self.loads[rank] += nbytes
        return rank

    def _least(self, shard: Shard) -> int:
        """Of the ranks that hold a chunk, the one with the least (order tp-ep-dp-pp)."""
        model = self.model
        stage_ranks = model.ranks // model.pp
        first = stage_of(model, shard) * stage_ranks
        if ".experts." in shard.key and shard.dtype is not None:
            expert = shard.offsets[-3] if len(shard.offsets) >= 3 else 0
            place, step = expert * model.ep // model.experts, model.ep
        else:
            place, step = tensor_rank_of(model, shard) or 0, model.tp
        able = range(first + place, first + stage_ranks, step)
        return min(able, key=self.loads.__getitem__)


@cache
def shape_of(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Skeleton, tuple[Any, ...]]:
    """The zip of a chunk whose payload is zeros, and all its bytes but those."""
    nbytes = math.prod(sizes) * dtype.itemsize
    skeleton = lay_out(dump_inert(new_tensor(sizes, dtype)), [("0", nbytes)])
    return skeleton, tuple(skeleton.structure({"data/0": _crc_of_zeros(nbytes)}))


def place(model: Model, tiny: Path, layout: str) -> tuple[list[Placed], dict[str, bytes]]:
    """Every item of a large checkpoint, and the bytes of an object by its key's first part."""
    source: Any = pickle.loads((tiny / ".metadata").read_bytes())
    objects = {
        index.fqn.partition("/shard_")[0].rpartition(".")[2]: _item(tiny, info)
        for index, info in source.storage_data.items()
        if not hasattr(source.state_dict_metadata[index.fqn], "chunks")
    }
    ranks = Ranks(model)
    ends: dict[str, int] = {}
    placed = []
    flat = layout == scale_flat.LAYOUT
    plain = ((shard, None) for shard in shards(model, tiny))
    for shard, rank in scale_flat.listed(model, tiny) if flat else plain:
        if shard.dtype is None:
            length = len(objects[_kind(shard.key)])
            each = Placed(shard, ranks.writer(shard, _OBJECT, rank), length=length)
        else:
            length = shape_of(shard.sizes, shard.dtype)[0].length
            each = Placed(shard, ranks.writer(shard, length, rank), length=length)
        names = [f"__{each.rank}_{n}.distcp" for n in range(FILES_PER_RANK)]
        each.file = min(names, key=lambda name: ends.get(name, 0))
        each.offset = ends.get(each.file, 0)
        ends[each.file] = each.offset + length
        placed.append(each)
    return placed, objects


def _kind(key: str) -> str:
    return key.partition("/shard_")[0].rpartition(".")[2]


def _item(folder: Path, info: Any) -> bytes:
    with (folder / info.relative_path).open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.length)


def write_files(folder: Path, placed: list[Placed], objects: dict[str, bytes]) -> None:
    """The shard files, without payload."""
    by_file: dict[str, list[Placed]] = {}
    for each in placed:
        by_file.setdefault(each.file, []).append(each)
    for name, items in by_file.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for each in items:
                for at, data in _content(each, objects):
                    os.pwrite(descriptor, data, each.offset + at)
            os.ftruncate(descriptor, items[-1].offset + items[-1].length)
        finally:
            os.close(descriptor)


def _content(each: Placed, objects: dict[str, bytes]) -> Iterator[tuple[int, bytes]]:
    if each.shard.dtype is None:
        yield 0, objects[_kind(each.shard.key)]
        return
    skeleton, of_zeros = shape_of(each.shard.sizes, each.shard.dtype)
    if not each.shard.heads:
        yield from of_zeros
        return
    start, nbytes = skeleton.payloads["data/0"]
    crc = at = 0
    for first, data in each.shard.heads:
        crc = isal_zlib.crc32(data, _with_zeros(crc, first - at))
        at = first + len(data)
        yield start + first, data
    yield from skeleton.structure({"data/0": _with_zeros(crc, nbytes - at)})


def _with_zeros(crc: int, count: int) -> int:
    return isal_zlib.crc32_combine(crc, _of_zeros(count), count)


_of_zeros = cache(_crc_of_zeros)


def metadata_of(tiny: Path, placed: list[Placed], ranks: int, folder: Path) -> bytes:
    """`.metadata` of all that was placed, with the plans of all ranks where the tiny one has them.

    Every record of it is one of its own, as they are where ranks have sent them to each other.
    """
    metadata: Any = pickle.loads((tiny / ".metadata").read_bytes())
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    plans: list[list[WriteItem]] = [[] for _ in range(ranks)]
    for each in placed:
        shard = each.shard
        if shard.dtype is None:
            entries[_own(shard.key)] = BytesStorageMetadata()
        else:
            known = entries.get(shard.key)
            if known is None:
                entries[_own(shard.key)] = known = TensorStorageMetadata(
                    _properties(shard), torch.Size(shard.shape), []
                )
            known.chunks.append(_chunk(shard))
        storage[_index(shard)] = _StorageInfo(_own(each.file), each.offset, each.length)
        plans[each.rank].append(_write_item(shard))
    metadata.state_dict_metadata, metadata.storage_data = entries, storage
    metadata.storage_meta.checkpoint_id = str(folder)
    if hasattr(metadata, "all_local_plans"):
        plan = metadata.all_local_plans[0]
        metadata.all_local_plans = [replace(plan, items=items) for items in plans]
    if hasattr(metadata, "mcore_data"):
        metadata.mcore_data = {_own(key): {} for key in entries}
    return pickle.dumps(metadata)


def _own(text: str) -> str:
    return text.encode().decode()  # another object: a pickle says it again


def _index(shard: Shard) -> MetadataIndex:
    offsets = None if shard.dtype is None else torch.Size(shard.offsets)
    return MetadataIndex(_own(shard.key), offsets)


def _properties(shard: Shard) -> TensorProperties:
    assert shard.dtype is not None
    return TensorProperties(dtype=shard.dtype)


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes))


def _write_item(shard: Shard) -> WriteItem:
    if shard.dtype is None:
        return WriteItem(_index(shard), WriteItemType.BYTE_IO)
    said = TensorWriteData(_chunk(shard), _properties(shard), torch.Size(shard.shape))
    return WriteItem(_index(shard), WriteItemType.SHARD, tensor_data=said)


def write_run(root: Path, model: Model, tiny: Path, layout: str, count: int) -> int:
    """A run of `count` checkpoints below `root`; returns the chunks of one."""
    placed, objects = place(model, tiny, layout)
    first = root / f"iter_{INTERVAL:07d}"
    first.mkdir(parents=True)
    write_files(first, placed, objects)
    metadata = metadata_of(tiny, placed, model.ranks, first)
    shared = sorted({each.file for each in placed})
    for number in range(1, count + 1):
        folder = root / f"iter_{number * INTERVAL:07d}"
        if number > 1:
            folder.mkdir()
            for name in shared:
                os.link(first / name, folder / name)
        (folder / ".metadata").write_bytes(metadata)
        _common(tiny, folder, number * INTERVAL, model)
        (folder / "metadata.json").write_bytes((tiny / "metadata.json").read_bytes())
    (root / "latest_checkpointed_iteration.txt").write_text(str(count * INTERVAL))
    return sum(each.shard.dtype is not None for each in placed)


def _common(tiny: Path, folder: Path, iteration: int, model: Model) -> None:
    common: Any = torch.load(tiny / "common.pt", weights_only=False)  # of a run just made here
    common["iteration"] = iteration
    args = common["args"]
    for name, value in (
        ("iteration", iteration),
        ("consumed_train_samples", iteration * _SAMPLES),
        ("global_batch_size", _SAMPLES),
        ("seq_length", 4096),
        ("tensor_model_parallel_size", model.tp),
        ("pipeline_model_parallel_size", model.pp),
        ("expert_model_parallel_size", model.ep),
        ("num_experts", model.experts or None),
        ("padded_vocab_size", model.extents[256]),
    ):
        if hasattr(args, name):
            setattr(args, name, value)
    torch.save(common, folder / "common.pt")
