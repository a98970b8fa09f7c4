"""Which few elements of a source are looked at: some of every file, and of every tensor.

A checkpoint is mixed file by file, so every file is sampled, its largest tensors first: small ones
(norms) may look alike in any two checkpoints. The choice depends on the source alone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.formats import registry
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.pieces import FileNumbers, ManyPieces, narrow
from pma_megatron.formats.source import Source

WEIGHT = "weight"
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_UNNAMED = "moment"
_RUN = 512
_RUNS = 3
_PIECES_PER_FILE = 3
_PIECES = 4096
_TENSORS = 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece of one state of one tensor, as a file holds it."""

    state: str
    key: str
    piece: Piece[Payload]


def file_of(source: Source, payload: Payload) -> str:
    """What one rank wrote at once: a file, or a parameter's folder in a Universal checkpoint."""
    return registry.get(source.format, source.path).saved_together(payload.item.file)


def stored(source: Source) -> Iterator[tuple[str, str, Tensor]]:
    """State, key and tensor of every floating tensor of a source: weights, main params, moments."""
    states: dict[str, Mapping[str, object]] = {WEIGHT: source.space.weights, **source.space.states}
    for state, tensors in states.items():
        for key in tensors:
            tensor = source.tensor(state, key)
            if tensor is not None and tensor.dtype in FLOATING:
                yield state, key, tensor
    for key, tensor in source.unnamed.items():
        if tensor.dtype in FLOATING:
            yield MAIN_PARAM if key.endswith(".param") else _UNNAMED, key, tensor


Wanted = Callable[[str, str, Tensor], bool]
"""(state, key, tensor) -> whether its pieces are looked at."""


class Inventory:
    """Every floating piece of a source as columns, of which a few are made.

    The more files there are, the fewer pieces of each are looked at, but of each there is one.
    """

    def __init__(self, source: Source) -> None:
        self.tensors = [*stored(source)]
        files = _Files(source)
        rows = [_columns(tensor.pieces, files) for _, _, tensor in self.tensors]
        named = sorted(range(len(rows)), key=lambda number: self.tensors[number][:2])
        self._file, self._nbytes, self._place = (
            _joined([rows[number][axis] for number in named]) for axis in range(3)
        )
        counts = [len(rows[number][0]) for number in named]
        self._tensor = np.repeat(narrow(np.array(named, dtype=np.int64)), counts)
        del rows
        order = np.argsort(-self._nbytes.astype(np.int64), kind="stable")
        self._order = narrow(order)
        self._files = [*files.names]
        self.per_file = max(1, min(_PIECES_PER_FILE, _PIECES // max(1, len(self._files))))

    def runs(
        self, piece: Piece[Payload], seed: str, length: int = _RUN, count: int = _RUNS
    ) -> Iterator[Box]:
        """`runs` of a piece; as many elements in one run where there are very many files."""
        if self.per_file == 1:
            length, count = length * count, 1
        return runs(piece, seed, length, count)

    def largest(
        self, wanted: Wanted, *, least_bytes: int = 0, most: int | None = None
    ) -> dict[str, list[Stored]]:
        """The largest pieces of every file, at most `most` of each."""
        rows = self._rows(wanted, least_bytes)
        files = self._file[rows]
        order = np.argsort(files, kind="stable")
        first = np.searchsorted(files[order], files[order])
        rows = rows[
            order[np.arange(len(order)) - first < min(most or self.per_file, self.per_file)]
        ]
        found: dict[str, list[Stored]] = {}
        for row in rows:
            found.setdefault(self._files[self._file[row]], []).append(self._made(row))
        return found

    def first(self, wanted: Wanted, most: int, *, least_bytes: int = 0) -> list[Stored]:
        """The largest pieces of all files together."""
        return [self._made(row) for row in self._rows(wanted, least_bytes)[:most]]

    def chosen(self, wanted: Wanted) -> list[Stored]:
        """Pieces of every file, and of every tensor up to a bound."""
        picked = [each for pieces in self.largest(wanted).values() for each in pieces]
        known = {(each.state, each.key, each.piece.box.offsets) for each in picked}
        named = (each for each in self.tensors if len(each[2].pieces) and wanted(*each))
        for state, key, tensor in itertools.islice(named, _TENSORS):
            each = Stored(state, key, tensor.pieces[0])
            if (state, key, each.piece.box.offsets) not in known:
                picked.append(each)
        return picked

    def holds_only(self, dtype: torch.dtype, *, least_bytes: int) -> bool:
        """Whether all pieces, but short ones, are of this dtype."""
        return not len(self._rows(lambda _, __, tensor: tensor.dtype != dtype, least_bytes))

    def _rows(self, wanted: Wanted, least_bytes: int) -> np.ndarray:
        """Rows that are wanted, the largest first."""
        taken = np.array([wanted(*each) for each in self.tensors], dtype=bool)
        if not len(taken):
            return np.empty(0, dtype=np.int64)
        mask = taken[self._tensor] & (self._nbytes >= least_bytes)
        rows: np.ndarray = self._order[mask[self._order]]
        return rows

    def _made(self, row: int) -> Stored:
        state, key, tensor = self.tensors[self._tensor[row]]
        return Stored(state, key, tensor.pieces[int(self._place[row])])


class _Files:
    """Numbers of what was written at once."""

    def __init__(self, source: Source) -> None:
        self._together = registry.get(source.format, source.path).saved_together
        self.names: dict[str, int] = {}
        self.numbers = FileNumbers(self.number)

    def number(self, file: str) -> int:
        return self.names.setdefault(self._together(file), len(self.names))


def _columns(
    pieces: Sequence[Piece[Payload]], files: _Files
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of the file, bytes, and number of every piece, in the order of their offsets."""
    if isinstance(pieces, ManyPieces):
        said = pieces.columns()
        nbytes = said.sizes.astype(np.int64).prod(axis=1) * pieces.dtype.itemsize
        file = files.numbers.of(said.files, said.file)
        if said.ordered or not said.offsets.shape[1]:
            order = np.arange(len(pieces))
        else:
            order = np.lexsort(said.offsets.T[::-1])
    else:
        file = np.array([files.number(p.payload.item.file) for p in pieces], dtype=np.int64)
        sizes = [p.box.numel * p.payload.dtype.itemsize for p in pieces]
        nbytes = np.array(sizes, dtype=np.int64)
        boxes = [p.box.offsets for p in pieces]
        order = np.array(sorted(range(len(boxes)), key=boxes.__getitem__), dtype=np.int64)
    return narrow(file[order]), narrow(nbytes[order]), narrow(order)


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.uint8), *columns])


def runs(piece: Piece[Payload], seed: str, length: int, count: int) -> Iterator[Box]:
    """A few short boxes of a piece, each without gaps in it: its start, and others by chance; by
    chance too where it is one alone.

    Each has `length` elements, or as many more as its last row needs to be whole, or all of a piece
    that is shorter.
    """
    box = piece.box
    if not box.numel:
        return
    sizes = _of_whole_rows(box.sizes, length)
    choices = tuple(whole - part + 1 for whole, part in zip(box.sizes, sizes, strict=True))
    draw = random.Random(f"{seed} {box.offsets} {piece.payload.item.offset}")
    starts = {draw.randrange(math.prod(choices)) for _ in range(max(1, count - 1))}
    starts |= {0} if count > 1 else set()
    for start in sorted(starts):
        inside = np.unravel_index(start, choices)
        offsets = (first + int(at) for first, at in zip(box.offsets, inside, strict=True))
        yield Box(tuple(offsets), sizes)


def _of_whole_rows(sizes: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Sizes of a box of at least `length` elements that follow each other in one of those sizes.

    >>> _of_whole_rows((8, 100, 300), 512), _of_whole_rows((8, 100), 512)
    ((1, 2, 300), (6, 100))
    """
    row = math.prod(sizes)
    for axis, size in enumerate(sizes):
        row //= size
        if row <= length:
            return (*(1,) * axis, min(-(-length // row), size), *sizes[axis + 1 :])
    return sizes
