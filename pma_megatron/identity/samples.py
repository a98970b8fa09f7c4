"""Which few elements of a source are looked at: some of every file, and of every tensor.

A checkpoint is mixed file by file, so every file is sampled, its largest tensors first: small ones
(norms) may look alike in any two checkpoints. The choice depends on the source alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from pma_megatron.base.boxes import Box, Piece, flat_range
from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM, Payload
from pma_megatron.formats.source import Source

WEIGHT = "weight"
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_UNNAMED = "moment"
_RUN = 512
_RUNS = 3
_PIECES_PER_FILE = 3
_TENSORS = 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece of one state of one tensor, as a file holds it."""

    state: str
    key: str
    piece: Piece[Payload]

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return self.piece.box.numel * self.piece.payload.dtype.itemsize


def file_of(source: Source, payload: Payload) -> str:
    """What one rank wrote at once: a file, or a parameter's folder in a Universal checkpoint."""
    return registry.get(source.format, source.path).saved_together(payload.item.file)


def stored(source: Source) -> Iterator[Stored]:
    """Every floating piece of a source: weights, main params, moments."""
    states: dict[str, Mapping[str, object]] = {WEIGHT: source.space.weights, **source.space.states}
    for state, tensors in states.items():
        for key in tensors:
            tensor = source.tensor(state, key)
            if tensor is not None and tensor.dtype in FLOATING:
                yield from (Stored(state, key, piece) for piece in tensor.pieces)
    for key, tensor in source.unnamed.items():
        if tensor.dtype in FLOATING:
            state = MAIN_PARAM if key.endswith(".param") else _UNNAMED
            yield from (Stored(state, key, piece) for piece in tensor.pieces)


def largest(source: Source, found: Iterable[Stored]) -> dict[str, list[Stored]]:
    """The largest pieces of every file."""
    files: dict[str, list[Stored]] = {}
    for each in found:
        files.setdefault(file_of(source, each.piece.payload), []).append(each)
    return {
        file: sorted(pieces, key=largest_first)[:_PIECES_PER_FILE] for file, pieces in files.items()
    }


def chosen(source: Source, found: Iterable[Stored]) -> list[Stored]:
    """Pieces of every file, and of every tensor up to a bound."""
    every = list(found)
    picked = {id(s): s for pieces in largest(source, every).values() for s in pieces}
    tensors: dict[tuple[str, str], Stored] = {}
    for each in every:
        tensors.setdefault((each.state, each.key), each)
    for each in list(tensors.values())[:_TENSORS]:
        picked.setdefault(id(each), each)
    return list(picked.values())


def runs(piece: Piece[Payload], seed: str, length: int = _RUN, count: int = _RUNS) -> Iterator[Box]:
    """A few short boxes of a piece, each without gaps in it: its start, and others by chance."""
    numel = piece.box.numel
    length = min(length, numel)
    draw = random.Random(f"{seed} {piece.box.offsets} {piece.payload.item.offset}")
    starts = {0, *(draw.randrange(numel - length + 1) for _ in range(count - 1))}
    for start in sorted(starts):
        yield from (box for box, _ in flat_range(piece.box, start, start + length))


def largest_first(each: Stored) -> tuple[int, str, str, tuple[int, ...]]:
    """What to sort by, so that the largest come first, and always in the same order."""
    return -each.nbytes, each.state, each.key, each.piece.box.offsets
