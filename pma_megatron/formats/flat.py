"""Flat buffers in model space: where the parameters of a buffer without names lie."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Part, Piece, flat_range, overlaps
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.flat_pieces import FlatCut, FlatPieces
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


MANY = 64
"""Pieces of a tensor from which on columns are smaller than objects, and made as fast."""


def states_from_flat(
    spaces: Sequence[FlatSpace], ranges: FlatMap, weights: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Express flat buffers in model space, given which parameter lies where."""
    held: dict[tuple[str, str], list[_Run]] = {}
    replicas: dict[tuple[str, str], list[_Run]] = {}
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
                into = replicas if mark in seen else held
                seen.add(mark)
                into.setdefault((state, found.key), []).append(_Run(found.box, cut, stored))
    made = _Pieces(spaces)
    states: dict[str, dict[str, Tensor]] = {}
    for (state, key), runs in held.items():
        dtype, shape = runs[0].stored[0].payload.dtype, weights[key].shape
        extra = tuple(_pieces_of(replicas.get((state, key), ())))
        states.setdefault(state, {})[key] = Tensor(key, dtype, shape, made.of(runs, dtype), extra)
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


class _Run(NamedTuple):
    """A box of a tensor that lies in one buffer, how its chunks cut it, and the chunks."""

    box: Box
    cut: list[_Cut]
    stored: Sequence[Piece[Payload]]


def _pieces_of(runs: Iterable[_Run]) -> Iterator[Piece[Payload]]:
    for run in runs:
        for number, box, start in run.cut:
            yield Piece(box, run.stored[number].payload, start)


class _Pieces:
    """Makes the pieces of tensors; of many, what states have in common is made once."""

    def __init__(self, spaces: Sequence[FlatSpace]) -> None:
        self._spaces = spaces
        self._cuts: dict[tuple[int, ...], FlatCut | None] = {}

    @cached_property
    def _files(self) -> dict[str, int]:
        """Number of every file."""
        chunks = (each for s in self._spaces for stored in s.states.values() for each in stored)
        names = dict.fromkeys(each.payload.item.file for each in chunks)
        return {name: number for number, name in enumerate(names)}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """The files: one list, which all tensors share."""
        return tuple(self._files)

    def of(self, runs: Sequence[_Run], dtype: torch.dtype) -> Sequence[Piece[Payload]]:
        """The pieces of one state of a tensor."""
        if sum(len(run.cut) for run in runs) < MANY:
            return tuple(_pieces_of(runs))
        payloads = [run.stored[number].payload for run in runs for number, _, _ in run.cut]
        alone = all(each.record is None and each.dtype == dtype for each in payloads)
        cut = self._cut(runs, payloads) if alone else None
        if cut is None:
            return tuple(_pieces_of(runs))
        items = [(self._files[i.file], i.offset, i.length) for i in (p.item for p in payloads)]
        return FlatPieces(dtype, cut, self._names, *np.array(items, dtype=np.int64).T)

    def _cut(self, runs: Sequence[_Run], payloads: Sequence[Payload]) -> FlatCut | None:
        alike = (*(id(run.cut) for run in runs), *(payload.numel for payload in payloads))
        if alike not in self._cuts:
            numels = iter(payloads)
            pieces = [[(box, start, next(numels).numel) for _, box, start in r.cut] for r in runs]
            self._cuts[alike] = FlatCut.of([run.box for run in runs], pieces)
        return self._cuts[alike]


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
