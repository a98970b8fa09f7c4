"""Boxes of a global tensor and the bytes that hold them: pure arithmetic, no torch, no files.

Every stored tensor, whatever the layout, is a list of `Piece`s: a box of the tensor's global index
space whose elements lie in row-major order, without gaps, somewhere in a payload. Sharding over
TP, PP, EP or DP, flat optimizer buckets and another chunking all come down to other pieces.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

P = TypeVar("P")
_ONE = (1,)


@dataclass(frozen=True, slots=True)
class Box:
    """A box `[offsets, offsets + sizes)` of a global tensor; `()` is a scalar."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """All of a tensor of that shape."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def lies_in(self, shape: Sequence[int]) -> bool:
        """Whether it is a part of a tensor of that shape, with elements."""
        whole = Box.whole(shape)
        return len(self.sizes) == len(shape) and whole.intersect(self) == self

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None."""
        offsets, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if low >= high:
                return None
            offsets.append(low)
            sizes.append(high - low)
        return Box(tuple(offsets), tuple(sizes))


@dataclass(frozen=True, slots=True)
class Piece(Generic[P]):
    """A box whose elements lie row-major at elements `[start, start + box.numel)` of `payload`."""

    box: Box
    payload: P
    start: int = 0


@dataclass(frozen=True, slots=True)
class Part(Generic[P]):
    """The overlap of a wanted box with a piece, as strided views of both.

    `sizes` is the overlap's shape; `unit_start` and `unit_strides` place it in a row-major buffer
    of the wanted box, `start` and `strides` in the piece's payload, where the piece begins at
    `origin`. All count elements.
    """

    payload: P
    sizes: tuple[int, ...]
    unit_start: int
    unit_strides: tuple[int, ...]
    start: int
    strides: tuple[int, ...]
    origin: int

    @property
    def span(self) -> int:
        """Elements from the first to the last one of the overlap, in the payload."""
        return _span(self.sizes, self.strides)

    @property
    def numel(self) -> int:
        """Number of elements of the overlap."""
        return math.prod(self.sizes)

    @property
    def rows(self) -> tuple[int, int]:
        """(first, number) of the payload's elements in all rows that hold some of the overlap.

        A row is a step along the first axis on which the overlap is longer than one. Overlaps that
        lie side by side in a piece have the same rows.
        """
        axis = next((i for i, size in enumerate(self.sizes) if size > 1), None)
        if axis is None:
            return self.start, 1
        step = self.strides[axis]
        return self.start - (self.start - self.origin) % step, self.sizes[axis] * step

    @property
    def is_run(self) -> bool:
        """True if the overlap has no gaps on either side: one copy of bytes moves it."""
        return _span(self.sizes, self.unit_strides) == self.numel == self.span

    def halves(self) -> tuple[Part[P], Part[P]]:
        """Two parts cut along the first axis longer than one."""
        axis = next(i for i, size in enumerate(self.sizes) if size > 1)
        half = self.sizes[axis] // 2
        before, after = self.sizes[:axis], self.sizes[axis + 1 :]
        return (
            replace(self, sizes=(*before, half, *after)),
            replace(
                self,
                sizes=(*before, self.sizes[axis] - half, *after),
                unit_start=self.unit_start + half * self.unit_strides[axis],
                start=self.start + half * self.strides[axis],
            ),
        )


def row_major_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor of shape `sizes`."""
    strides, count = [], 1
    for size in reversed(sizes):
        strides.append(count)
        count *= size
    return tuple(reversed(strides))


def overlaps(box: Box, pieces: Iterable[Piece[P]]) -> list[Part[P]]:
    """Every overlap of `box` with `pieces`."""
    if len(box.sizes) == 1:
        return _overlaps_in_a_row(box.offsets[0], box.sizes[0], pieces)
    unit_strides = row_major_strides(box.sizes)
    parts = []
    for piece in pieces:
        common = box.intersect(piece.box)
        if common is None:
            continue
        strides = row_major_strides(piece.box.sizes)
        inside = _dot(common.offsets, box.offsets, unit_strides)
        start = piece.start + _dot(common.offsets, piece.box.offsets, strides)
        parts.append(
            Part(piece.payload, common.sizes, inside, unit_strides, start, strides, piece.start)
        )
    return parts


def _overlaps_in_a_row(offset: int, size: int, pieces: Iterable[Piece[P]]) -> list[Part[P]]:
    """The same in one dimension: a flat buffer is cut into very many parameters."""
    parts = []
    for piece in pieces:
        (first,), (count,) = piece.box.offsets, piece.box.sizes
        low, high = max(offset, first), min(offset + size, first + count)
        if low < high:
            start = piece.start + low - first
            common = (high - low,)
            parts.append(Part(piece.payload, common, low - offset, _ONE, start, _ONE, piece.start))
    return parts


def slices(box: Box, limit: int) -> Iterator[Box]:
    """Cut `box` into boxes of at most `limit` elements that follow each other in its row order."""
    axis, rows = 0, 1
    for axis in range(len(box.sizes)):
        row = math.prod(box.sizes[axis + 1 :])
        if row <= limit:
            rows = max(1, limit // max(row, 1))
            break
    else:
        yield box
        return
    outer = [range(size) for size in box.sizes[:axis]]
    for index in itertools.product(*outer):
        head = tuple(o + i for o, i in zip(box.offsets[:axis], index, strict=True))
        for first in range(0, box.sizes[axis], rows):
            count = min(rows, box.sizes[axis] - first)
            offsets = (*head, box.offsets[axis] + first, *box.offsets[axis + 1 :])
            yield Box(offsets, (*(1,) * axis, count, *box.sizes[axis + 1 :]))


def flat_range(box: Box, start: int, stop: int) -> list[tuple[Box, int]]:
    """Elements `[start, stop)` of `box` in row-major order as boxes, each with its first index."""
    if start >= stop:
        return []
    if start == 0 and stop == box.numel:
        return [(box, 0)]
    row = math.prod(box.sizes[1:])
    first, last = -(-start // row), stop // row
    result = []

    def rows(low: int, high: int) -> Box:
        return Box((box.offsets[0] + low, *box.offsets[1:]), (high - low, *box.sizes[1:]))

    def within(index: int, low: int, high: int) -> None:
        if low < high:
            inner = Box(box.offsets[1:], box.sizes[1:])
            for part, at in flat_range(inner, low, high):
                whole = Box((box.offsets[0] + index, *part.offsets), (1, *part.sizes))
                result.append((whole, index * row + at))

    if first > last:  # the range lies within one row
        within(last, start - last * row, stop - last * row)
        return result
    if start < first * row:
        within(first - 1, start - (first - 1) * row, row)
    if first < last:
        result.append((rows(first, last), first * row))
    within(last, 0, stop - last * row)
    return result


class PieceIndex(Generic[P]):
    """Finds the pieces that touch a box without looking at all of them.

    A stacked MoE tensor has layers x experts pieces, and every one of them is asked for once per
    source: each question is a search in the pieces sorted by their offsets, along the first axes
    that are cut into single elements and the one after them. They are sorted when first asked for.
    """

    __slots__ = ("_disjoint", "_given", "_longest", "_offsets", "_sorted")

    def __init__(self, pieces: Iterable[Piece[P]], *, disjoint: bool = True) -> None:
        """Index `pieces`; `disjoint` False where they may overlap (replicas, several targets)."""
        self._given: Iterable[Piece[P]] = pieces if isinstance(pieces, Sequence) else tuple(pieces)
        self._disjoint = disjoint
        self._sorted: list[Piece[P]] | None = None
        self._offsets: Sequence[tuple[int, ...]] = ()
        self._longest: tuple[int, ...] = ()

    def _ready(self) -> list[Piece[P]]:
        if self._sorted is None:
            found = sorted(self._given, key=_offsets)
            self._offsets = [piece.box.offsets for piece in found]
            self._longest = tuple(map(max, zip(*(p.box.sizes for p in found), strict=True)))
            self._sorted = found  # the last: threads may share an index
        return self._sorted

    def touching(self, box: Box) -> list[Piece[P]]:
        """Pieces that overlap `box`."""
        # Some sequences (`formats.pieces`) find them by themselves.
        own: Callable[[Box], list[Piece[P]]] | None = getattr(self._given, "touching", None)
        if own is not None:
            return own(box)
        pieces = self._ready()
        if not box.offsets or not pieces:
            return list(pieces)
        if self._disjoint:
            at = bisect_left(self._offsets, box.offsets)
            if at < len(pieces) and pieces[at].box == box:
                return [pieces[at]]
        low, high = self._between(box)
        return [p for p in pieces[low:high] if p.box.intersect(box) is not None]

    def _between(self, box: Box) -> tuple[int, int]:
        """First and end of the sorted pieces that may overlap `box`."""
        axis, last = 0, len(self._longest) - 1
        while axis < last and self._longest[axis] == box.sizes[axis] == 1:
            axis += 1
        head, first = box.offsets[:axis], box.offsets[axis]
        return (
            bisect_left(self._offsets, (*head, first - self._longest[axis] + 1)),
            bisect_left(self._offsets, (*head, first + box.sizes[axis])),
        )

    def covers(self, box: Box) -> bool:
        """True if every element of `box` lies in a piece (pieces must not overlap each other)."""
        own: Callable[[Box], bool | None] | None = getattr(self._given, "covers", None)
        known = own(box) if own is not None else None
        if known is not None:
            return known
        return sum(part.numel for part in overlaps(box, self.touching(box))) == box.numel


def _offsets(piece: Piece[P]) -> tuple[int, ...]:
    return piece.box.offsets


def _dot(offsets: Sequence[int], base: Sequence[int], strides: Sequence[int]) -> int:
    return sum((o - b) * s for o, b, s in zip(offsets, base, strides, strict=True))


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
