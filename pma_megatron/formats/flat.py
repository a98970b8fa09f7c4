"""Flat buffers in model space: where the parameters of a buffer without names lie."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pma_megatron.base.boxes import Box, Part, Piece, flat_range, overlaps
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.items import ItemFiles


@dataclass(slots=True)
class FlatSpace:
    """One flat buffer of a model-parallel rank: parameters in reverse order, with gaps.

    `states` gives, per state name, the same flat coordinates stored in another payload. `exact` is
    True where stored chunk boundaries are parameter boundaries (`dp_reshardable`).
    """

    group: str
    name: str
    numel: int
    exact: bool
    states: dict[str, tuple[Piece[Payload], ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Elements `[start, start + box.numel)` of a flat space hold `box` of model tensor `key`."""

    start: int
    key: str
    box: Box


FlatMap = Mapping[tuple[str, str], Sequence[FlatRange]]
"""(group, space name) -> the parameters that lie in it."""


def states_from_flat(
    spaces: Sequence[FlatSpace], ranges: FlatMap, weights: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Express flat buffers in model space, given which parameter lies where."""
    pieces: dict[tuple[str, str], list[Piece[Payload]]] = {}
    replicas: dict[tuple[str, str], list[Piece[Payload]]] = {}
    seen: set[tuple[str, str, Box]] = set()
    for space in spaces:
        lying = ranges[space.group, space.name]
        cuts: dict[_Chunks, list[list[_Cut]]] = {}  # most states are chunked alike
        for state, stored in space.states.items():
            chunks = tuple((each.box.offsets[0], each.box.numel, each.start) for each in stored)
            if chunks not in cuts:
                starts = [start for start, _, _ in chunks]
                cuts[chunks] = [_cut(found, chunks, starts) for found in lying]
            for found, cut in zip(lying, cuts[chunks], strict=True):
                mark = (state, found.key, found.box)
                into = replicas if mark in seen else pieces
                seen.add(mark)
                into.setdefault((state, found.key), []).extend(
                    Piece(box, stored[number].payload, start) for number, box, start in cut
                )
    states: dict[str, dict[str, Tensor]] = {}
    for (state, key), own in pieces.items():
        extra = tuple(replicas.get((state, key), ()))
        states.setdefault(state, {})[key] = Tensor(
            key, own[0].payload.dtype, weights[key].shape, tuple(own), extra
        )
    return states


_Chunks = tuple[tuple[int, int, int], ...]
"""Per chunk: its first element in the space, how many it has, and its first in the payload."""
_Cut = tuple[int, Box, int]
"""Number of a chunk, the box of a model tensor that it holds, and its first in the payload."""


def _cut(found: FlatRange, chunks: _Chunks, starts: Sequence[int]) -> list[_Cut]:
    """The chunks under one parameter, as boxes of its model tensor."""
    result = []
    stop = found.start + found.box.numel
    first = max(bisect_right(starts, found.start) - 1, 0)
    for number in range(first, bisect_left(starts, stop)):
        start, numel, payload_start = chunks[number]
        low, high = max(found.start, start), min(stop, start + numel)
        shift = payload_start - start + found.start
        for box, at in flat_range(found.box, low - found.start, high - found.start):
            result.append((number, box, at + shift))
    return result


def _under(stored: Sequence[Piece[Payload]], start: int, count: int) -> list[Part[Payload]]:
    """Overlaps of elements `[start, start + count)` with stored chunks, which lie in order."""
    first = bisect_right(stored, start, key=_start) - 1
    end = bisect_left(stored, start + count, key=_start)
    return overlaps(Box((start,), (count,)), stored[max(first, 0) : end])


def _start(piece: Piece[Payload]) -> int:
    return piece.box.offsets[0]


def read_elements(files: ItemFiles, piece: Piece[Payload], first: int, count: int) -> torch.Tensor:
    """`count` elements of a piece from its `first`, as a 1-D tensor of the stored dtype."""
    dtype = piece.payload.dtype
    _, start = files.locate(piece.payload)
    offset = start + (piece.start + first) * dtype.itemsize
    data = files.read(piece.payload.item.file, offset, count * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def read_flat(
    files: ItemFiles, stored: Sequence[Piece[Payload]], start: int, count: int
) -> torch.Tensor:
    """Elements `[start, start + count)` of a flat space, zero where nothing is stored."""
    parts = _under(stored, start, count)
    if len(parts) == 1 and parts[0].numel == count:
        piece = Piece(Box((0,), (parts[0].payload.numel,)), parts[0].payload)
        return read_elements(files, piece, parts[0].start, count)
    result = torch.zeros(count, dtype=stored[0].payload.dtype)
    for part in parts:
        piece = Piece(Box((0,), (part.payload.numel,)), part.payload)
        data = read_elements(files, piece, part.start, part.numel)
        result[part.unit_start : part.unit_start + part.numel] = data
    return result


def rounds_to(main: torch.Tensor, stored: torch.Tensor) -> bool:
    """True if main params, rounded once, are the stored weights bit for bit."""
    return torch.equal(main.to(stored.dtype).view(torch.uint8), stored.view(torch.uint8))
