"""The pieces of a tensor as columns: a checkpoint has hundreds of thousands of them."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.formats.base import Item, Payload


@dataclass(frozen=True, slots=True)
class Columns:
    """A row for every piece of a tensor, in the order of the pieces.

    Attributes:
        files: names of files.
        file: the number of its file in `files`.
        items: where in that file its item lies, in bytes.
        element: where in its payload it begins.
        offsets, sizes: of its box, `[pieces, dimensions]`.
        ordered: whether pieces are in the order of their offsets.
    """

    files: tuple[str, ...]
    file: np.ndarray
    items: np.ndarray
    element: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    ordered: bool = False


class ManyPieces(Sequence[Piece[Payload]]):
    """Pieces of a tensor that are no objects before they are asked for. No two overlap.

    Attributes:
        dtype: of all of them.
    """

    __slots__ = ("dtype",)
    dtype: torch.dtype

    @overload
    def __getitem__(self, place: int) -> Piece[Payload]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Piece[Payload], ...]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return tuple(map(self._one, range(*place.indices(len(self)))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._one(place % len(self))

    def __iter__(self) -> Iterator[Piece[Payload]]:
        return map(self._one, range(len(self)))

    @abstractmethod
    def _one(self, number: int) -> Piece[Payload]:
        """The piece of a number from 0 on."""

    @abstractmethod
    def columns(self) -> Columns:
        """All of them."""

    @abstractmethod
    def payloads(self) -> Iterable[Payload]:
        """What they lie in, each payload once."""

    @property
    def held_alike(self) -> object | None:
        """What others have too that lie in the same payloads; None where nothing is known."""
        return None

    @abstractmethod
    def touching(self, box: Box) -> list[Piece[Payload]]:
        """Pieces that overlap `box`."""

    @abstractmethod
    def covers(self, box: Box) -> bool | None:
        """Whether all of `box` lies in pieces; None where each of those has to be looked at."""

    @property
    @abstractmethod
    def extent(self) -> Box:
        """From the beginning of the tensor to the end of the last pieces."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (ManyPieces, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


class Boxes:
    """Boxes of a tensor, found by where they lie. No two overlap.

    Attributes:
        offsets, sizes: integers of shape `[boxes, dimensions]`.
    """

    __slots__ = ("_extent", "_grid", "_is_whole", "offsets", "sizes")

    def __init__(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self.offsets, self.sizes = narrow(offsets), narrow(sizes)
        self._grid: tuple[Any] | None = None
        self._extent: Box | None = None
        self._is_whole = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Boxes, (self.offsets, self.sizes)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, number: int) -> Box:
        return Box(tuple(self.offsets[number].tolist()), tuple(self.sizes[number].tolist()))

    def touching(self, box: Box) -> list[int]:
        """Numbers of those that overlap `box`."""
        cells = self._cells()
        if cells is None:
            low, sizes = self.offsets.astype(np.int64), self.sizes.astype(np.int64)
            at, extent = np.array(box.offsets, np.int64), np.array(box.sizes, np.int64)
            common = np.maximum(low, at) < np.minimum(low + sizes, at + extent)
            numbers: list[int] = np.flatnonzero(common.all(axis=1)).tolist()
            return numbers
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
                found.append(int(at_cell[cell]))
        return found

    def covers(self, box: Box) -> bool | None:
        """Whether all of `box` lies in them; None where each of those has to be looked at."""
        whole = self.extent
        if not self._is_whole or len(whole.sizes) != len(box.sizes):
            return None
        return not box.numel or box.lies_in(whole.sizes)

    @property
    def extent(self) -> Box:
        """From the beginning of the tensor to the end of the last ones."""
        if self._extent is None:
            sizes = self.sizes.astype(np.int64)
            ends = (self.offsets + sizes).max(axis=0, initial=0)
            self._extent = Box.whole(ends.tolist())
            self._is_whole = int(sizes.prod(axis=1).sum()) == self._extent.numel
        return self._extent

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


class StoredPieces(ManyPieces):
    """Pieces that each have an item of their own, made when they are asked for.

    A sequence like a tuple of `Piece`s, in some 40 bytes for each, however it is sent or kept. No
    two overlap.

    Attributes:
        dtype: of all of them.
        boxes: of the tensor, one for each.
        files: names of files.
        file: per piece, the number of its file in `files`.
        starts, lengths: per piece, where in that file its item lies, in bytes.

    >>> columns = [np.array([[0], [2]]), np.array([[2], [2]])]
    >>> items = [np.array([0, 0]), np.array([0, 300]), np.array([300, 300])]
    >>> pieces = StoredPieces(torch.float32, *columns, ("__0_0.distcp",), *items)
    >>> pieces[1].box, pieces[1].payload.item.offset
    (Box(offsets=(2,), sizes=(2,)), 300)
    """

    __slots__ = ("boxes", "file", "files", "lengths", "starts")

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
        self.dtype, self.files, self.boxes = dtype, files, Boxes(offsets, sizes)
        self.file, self.starts, self.lengths = map(narrow, (file, starts, lengths))

    @property
    def offsets(self) -> np.ndarray:
        """Of the boxes, integers of shape `[pieces, dimensions]`."""
        return self.boxes.offsets

    @property
    def sizes(self) -> np.ndarray:
        """Of the boxes, integers of shape `[pieces, dimensions]`."""
        return self.boxes.sizes

    def __len__(self) -> int:
        return len(self.starts)

    def _one(self, number: int) -> Piece[Payload]:
        box, file = self.boxes[number], self.files[self.file[number]]
        item = Item(file, int(self.starts[number]), int(self.lengths[number]))
        return Piece(box, Payload(item, self.dtype, box.numel))

    def __iter__(self) -> Iterator[Piece[Payload]]:
        columns = (self.offsets, self.sizes, self.file, self.starts, self.lengths)
        for offsets, sizes, file, start, length in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            box = Box(tuple(offsets), tuple(sizes))
            yield Piece(box, Payload(Item(self.files[file], start, length), self.dtype, box.numel))

    def columns(self) -> Columns:
        """See `ManyPieces`."""
        none = np.broadcast_to(np.int64(0), len(self))
        return Columns(self.files, self.file, self.starts, none, self.offsets, self.sizes)

    def payloads(self) -> Iterable[Payload]:
        """See `ManyPieces`."""
        return (piece.payload for piece in self)

    def touching(self, box: Box) -> list[Piece[Payload]]:
        """Pieces that overlap `box`."""
        return [self[number] for number in self.boxes.touching(box)]

    def covers(self, box: Box) -> bool | None:
        """Whether all of `box` lies in pieces; None where each of those has to be looked at."""
        return self.boxes.covers(box)

    @property
    def extent(self) -> Box:
        """From the beginning of the tensor to the end of the last pieces."""
        return self.boxes.extent

    def __reduce__(self) -> tuple[Any, ...]:
        columns = (self.offsets, self.sizes)
        items = (self.file, self.starts, self.lengths)
        return StoredPieces, (self.dtype, *columns, self.files, *items)


class Together(Sequence[Piece[Any]]):
    """Several sequences of pieces as one that finds them by their boxes."""

    def __init__(self, parts: Sequence[Sequence[Piece[Any]]]) -> None:
        self._parts = tuple(parts)
        self._indexes = tuple(PieceIndex(part, disjoint=False) for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, place: int) -> Piece[Any]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Piece[Any], ...]: ...
    def __getitem__(self, place: int | slice) -> Any:
        return tuple(self)[place]

    def __iter__(self) -> Iterator[Piece[Any]]:
        return itertools.chain.from_iterable(self._parts)

    def touching(self, box: Box) -> list[Piece[Any]]:
        """Pieces that overlap `box`."""
        return [piece for index in self._indexes for piece in index.touching(box)]


def payloads_of(
    pieces: Sequence[Piece[Payload]], seen: set[object] | None = None
) -> Iterable[Payload]:
    """What pieces lie in; one that several share may come several times.

    Args:
        pieces: of a tensor.
        seen: what `held_alike` says of those that were asked about, added to; of pieces that lie
            in the same payloads as others there are none.
    """
    if not isinstance(pieces, ManyPieces):
        return (piece.payload for piece in pieces)
    mark = pieces.held_alike
    if mark is not None and seen is not None:
        if mark in seen:
            return ()
        seen.add(mark)
    return pieces.payloads()


def together(parts: Sequence[Sequence[Piece[Any]]]) -> Sequence[Piece[Any]]:
    """The pieces of all parts."""
    return parts[0] if len(parts) == 1 else Together(parts)


class FileNumbers:
    """Numbers of files that pieces name by their places in a list, which many tensors share."""

    def __init__(self, number: Callable[[str], int]) -> None:
        """`number` gives that of a file; it is asked once for a file of a list."""
        self._number = number
        self._tables: dict[int, tuple[tuple[str, ...], np.ndarray]] = {}

    def of(self, files: tuple[str, ...], used: np.ndarray) -> np.ndarray:
        """The number of each of the `used` files of a list.

        >>> FileNumbers({"a": 7, "b": 3}.__getitem__).of(("a", "b"), np.array([1, 0, 1])).tolist()
        [3, 7, 3]
        """
        known = self._tables.get(id(files))
        if known is None:  # the list is kept too: its id is nobody else's then
            known = self._tables[id(files)] = files, np.full(len(files), -1, dtype=np.int64)
        table = known[1]
        if len(used) and (table[used] < 0).any():
            for each in np.unique(used).tolist():  # Python's integers: those of numpy wrap around
                table[each] = self._number(files[each])
        found: np.ndarray = table[used]
        return found


class ItemNumbers:
    """Finds items by where they lie, very many at once.

    >>> known = ItemNumbers(np.array([0, 0, 1]), np.array([0, 300, 0]))
    >>> known.find(np.array([1, 0, 0]), np.array([0, 300, 7])).tolist()
    [2, 1, -1]
    """

    def __init__(self, file: np.ndarray, starts: np.ndarray) -> None:
        """Know items that are sorted by the numbers of their files, then by where they begin."""
        self._starts = np.unique(starts).astype(np.int64)
        self._keys = self._key(file, np.searchsorted(self._starts, starts))

    def find(self, file: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The number of each of some items, -1 for one that is not known."""
        if not len(self._keys):
            return np.full(len(starts), -1, dtype=np.int64)
        wanted = np.searchsorted(self._starts, starts.astype(np.int64))
        wanted = np.minimum(wanted, len(self._starts) - 1)
        keys = self._key(file, wanted)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        known = (self._starts[wanted] == starts) & (self._keys[at] == keys)
        found: np.ndarray = np.where(known, at, -1)
        return found

    def _key(self, file: np.ndarray, start: np.ndarray) -> np.ndarray:
        key: np.ndarray = file.astype(np.int64) * len(self._starts) + start
        return key


def narrow(column: np.ndarray) -> np.ndarray:
    """Counts in the smallest type that holds them all; never uint64, which becomes a float beside
    other integers."""
    most = int(column.max(initial=0))
    kind = np.dtype(np.int64) if most >= 1 << 32 else np.min_scalar_type(most)
    return column.astype(kind, copy=False)
