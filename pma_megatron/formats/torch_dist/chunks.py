"""Lay out tensors that many ranks write, each its own file, without asking each other.

Where every byte goes is known before the first one is written: a rank lays out its file from its
list of chunks, and one rank that was told all lists can write `.metadata` for everyone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.errors import PlanError
from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.dcp.metadata import DcpMetadata, Properties
from pma_megatron.formats.dcp.metadata_writer import dump_metadata, stored_of
from pma_megatron.formats.pickles import dump_inert, new_tensor
from pma_megatron.formats.zips import Skeleton, lay_out

CONFIG = (
    b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    b'"common_backend": "torch", "common_backend_version": 1}'
)
"""Content of `metadata.json`, as Megatron writes it (dist_checkpointing/core.py)."""


@dataclass(frozen=True)
class Chunk:
    """A row-major part of a global tensor that one rank writes.

    Attributes:
        key: the tensor's key in a checkpoint.
        global_shape: its shape there.
        box: which part; over all ranks the chunks cover each tensor once.
        dtype: the dtype to store, None for the writer's (buffers such as `expert_bias` keep theirs,
            float32).
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk and where it goes: `item` is a torch.save zip of the tensor, built by `skeleton`."""

    chunk: Chunk
    dtype: torch.dtype
    item: Item
    skeleton: Skeleton

    @property
    def start(self) -> int:
        """Byte of the file at which the chunk's first element lies."""
        return self.item.offset + self.skeleton.payloads["data/0"][0]


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What other ranks need to know of a placed chunk."""

    key: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    item: Item


def place(chunks: Sequence[Chunk], dtype: torch.dtype, file: str) -> tuple[PlacedChunk, ...]:
    """Lay `chunks` out in `file`, one after the other, in the order given.

    Args:
        chunks: parts with at least one element each.
        dtype: of every chunk that does not name its own.
        file: name of the rank's file.
    """
    placed, at = [], 0
    for chunk in chunks:
        stored = chunk.dtype or dtype
        tensor = dump_inert(new_tensor(chunk.box.sizes, stored))
        skeleton = lay_out(tensor, [("0", chunk.box.numel * stored.itemsize)])
        placed.append(PlacedChunk(chunk, stored, Item(file, at, skeleton.length), skeleton))
        at += skeleton.length
    return tuple(placed)


def stored(placed: Iterable[PlacedChunk]) -> list[StoredChunk]:
    """`placed` as it is told to the rank that writes `.metadata`."""
    return [
        StoredChunk(p.chunk.key, p.chunk.global_shape, p.chunk.box, p.dtype, p.item) for p in placed
    ]


def check_cover(chunks: Iterable[StoredChunk]) -> None:
    """Refuse chunks of all ranks that do not cover every tensor exactly once.

    Raises:
        PlanError: ranks disagree on a shape or dtype, a chunk lies outside its tensor, or elements
            are written twice or never; names the key.
    """
    for key, parts in _by_key(chunks).items():
        shape, dtype = parts[0].shape, parts[0].dtype
        for part in parts:
            if (part.shape, part.dtype) != (shape, dtype):
                raise PlanError(
                    f"snapshot of {key}: {part.item.file} has shape {part.shape} and {part.dtype}, "
                    f"{parts[0].item.file} has {shape} and {dtype}: ranks must agree on both"
                )
            if not part.box.lies_in(shape):
                raise PlanError(
                    f"snapshot of {key}: {part.item.file} has {part.box}, outside shape {shape}"
                )
        index = PieceIndex([Piece(part.box, part) for part in parts], disjoint=False)
        for part in _irregular(parts):
            others = [p.payload for p in index.touching(part.box) if p.payload is not part]
            if others:
                raise PlanError(
                    f"snapshot of {key}: {part.item.file} and {others[0].item.file} both write "
                    f"elements of {part.box}: give each element to one rank"
                )
        covered, total = sum(part.box.numel for part in parts), math.prod(shape)
        if covered != total:
            raise PlanError(
                f"snapshot of {key}: the ranks write {covered} of {total} elements of shape "
                f"{shape}: every element needs a rank that writes it"
            )


def metadata_bytes(chunks: Iterable[StoredChunk], objects: Mapping[str, Item]) -> bytes:
    """`.metadata` of a checkpoint made of these chunks and torch-saved `objects`."""
    tensors, properties = {}, {}
    for key, parts in _by_key(chunks).items():
        dtype = parts[0].dtype
        pieces = (Piece(p.box, Payload(p.item, dtype, p.box.numel)) for p in parts)
        tensors[key] = Tensor(key, dtype, parts[0].shape, tuple(pieces))
        properties[key] = Properties(dtype, False, torch.contiguous_format, False)
    order = (*tensors, *objects)
    # An original shape, though None, marks what Megatron <= 0.14 reshaped.
    metadata = DcpMetadata(tensors, objects, order, properties, None, dict.fromkeys(order))
    return dump_metadata(metadata, stored_of(tensors, objects), (), {})


def _irregular(parts: Sequence[StoredChunk]) -> list[StoredChunk]:
    """Parts that must be compared with the others: all but those that are tiles of one grid.

    Different tiles of a grid do not overlap. A tensor of many experts is little else, and comparing
    each of its chunks with all others would take minutes.
    """
    sizes = Counter(part.box.sizes for part in parts).most_common(1)[0][0]
    tiles: set[Box] = set()
    rest = []
    for part in parts:
        aligned = all(o % n == 0 for o, n in zip(part.box.offsets, sizes, strict=True))
        if part.box.sizes == sizes and aligned and part.box not in tiles:
            tiles.add(part.box)
        else:
            rest.append(part)
    return rest


def _by_key(chunks: Iterable[StoredChunk]) -> dict[str, list[StoredChunk]]:
    groups: dict[str, list[StoredChunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.key, []).append(chunk)
    return groups
