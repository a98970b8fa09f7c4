"""The pieces of a tensor as columns: a checkpoint has hundreds of thousands of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.formats.base import Item, Payload


class StoredPieces(Sequence[Piece[Payload]]):
    """Pieces that each have an item of their own, made when they are asked for.

    A sequence like a tuple of `Piece`s, in some 40 bytes for each, however it is sent or kept.

    Attributes:
        dtype: of all of them.
        offsets, sizes: of their boxes, integers of shape `[pieces, dimensions]`.
        files: names of files.
        file: per piece, the number of its file in `files`.
        starts, lengths: per piece, where in that file its item lies, in bytes.

    >>> columns = [np.array([[0], [2]]), np.array([[2], [2]])]
    >>> items = [np.array([0, 0]), np.array([0, 300]), np.array([300, 300])]
    >>> pieces = StoredPieces(torch.float32, *columns, ("__0_0.distcp",), *items)
    >>> pieces[1].box, pieces[1].payload.item.offset
    (Box(offsets=(2,), sizes=(2,)), 300)
    """

    __slots__ = ("_grid", "dtype", "file", "files", "lengths", "offsets", "sizes", "starts")

    def __init__(
        self,
        dtype: torch.dtype,
        offsets: np.ndarray,
        sizes: np.ndarray,
        files: tuple[str, ...],
        file: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self.dtype, self.files = dtype, files
        self._grid: tuple[Any] | None = None
        columns = (offsets, sizes, file, starts, lengths)
        self.offsets, self.sizes, self.file, self.starts, self.lengths = map(narrow, columns)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, place: int) -> Piece[Payload]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Piece[Payload], ...]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return tuple(self._made(place))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        box = Box(tuple(self.offsets[place].tolist()), tuple(self.sizes[place].tolist()))
        file = self.files[self.file[place]]
        item = Item(file, int(self.starts[place]), int(self.lengths[place]))
        return Piece(box, Payload(item, self.dtype, box.numel))

    def __iter__(self) -> Iterator[Piece[Payload]]:
        return self._made(slice(None))

    def _made(self, places: slice) -> Iterator[Piece[Payload]]:
        columns = (self.offsets, self.sizes, self.file, self.starts, self.lengths)
        for offsets, sizes, file, start, length in zip(
            *(column[places].tolist() for column in columns), strict=True
        ):
            box = Box(tuple(offsets), tuple(sizes))
            yield Piece(box, Payload(Item(self.files[file], start, length), self.dtype, box.numel))

    def touching(self, box: Box) -> list[Piece[Payload]]:
        """Pieces that overlap `box`."""
        cells = self._cells()
        if cells is None:
            low, sizes = self.offsets.astype(np.int64), self.sizes.astype(np.int64)
            at, extent = np.array(box.offsets, np.int64), np.array(box.sizes, np.int64)
            common = np.maximum(low, at) < np.minimum(low + sizes, at + extent)
            return [self[int(number)] for number in np.flatnonzero(common.all(axis=1))]
        size, counts, at_cell = cells
        ranges = [
            range(o // s, min((o + n - 1) // s + 1, count))
            for o, n, s, count in zip(box.offsets, box.sizes, size, counts, strict=True)
        ]
        found = []
        for place in itertools.product(*ranges):
            cell = 0
            for index, count in zip(place, counts, strict=True):
                cell = cell * count + index
            if at_cell[cell] >= 0:
                found.append(self[int(at_cell[cell])])
        return found

    def _cells(self) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray] | None:
        """Where all pieces are of one size, and lie at multiples of it: that size, how many there
        are along each axis, and the number of the piece in each place, -1 for none."""
        if self._grid is None:
            self._grid = (self._find_cells(),)
        return self._grid[0]

    def _find_cells(self) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray] | None:
        if not len(self) or not self.sizes.shape[1] or (self.sizes != self.sizes[0]).any():
            return None
        size = self.sizes[0].astype(np.int64)
        if not size.all():
            return None
        places, beside = np.divmod(self.offsets.astype(np.int64), size)
        counts = tuple((places.max(axis=0) + 1).tolist())
        if beside.any() or math.prod(counts) > 2 * len(self):
            return None
        cells = np.full(math.prod(counts), -1, dtype=np.int64)
        cells[np.ravel_multi_index(tuple(places.T), counts)] = np.arange(len(self))
        return tuple(size.tolist()), counts, cells

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (StoredPieces, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        columns = (self.offsets, self.sizes)
        items = (self.file, self.starts, self.lengths)
        return StoredPieces, (self.dtype, *columns, self.files, *items)


def narrow(column: np.ndarray) -> np.ndarray:
    """Counts in the smallest type that holds them all; never uint64, which becomes a float beside
    other integers."""
    most = int(column.max(initial=0))
    kind = np.dtype(np.int64) if most >= 1 << 32 else np.min_scalar_type(most)
    return column.astype(kind, copy=False)
