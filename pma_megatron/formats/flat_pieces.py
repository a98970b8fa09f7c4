"""The pieces of a parameter in the chunks of flat buffers, as columns.

A parameter lies in a buffer in the order of its elements, so what of it lies in each chunk is found
by counting, and states that are chunked alike share all but where their chunks are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece, row_major_strides
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.pieces import Boxes, Columns, ManyPieces, narrow


@dataclass(frozen=True, slots=True, eq=False)
class FlatCut:
    """How the chunks of flat buffers cut one parameter.

    Attributes:
        ranges: boxes of the parameter; each lies in one buffer, in the order of its elements.
        first: per range, the number of its first piece, and at the end that of all pieces.
        boxes: of the pieces, in the order of the ranges, and in each of its elements.
        begins: per piece, how many elements are in those before it.
        element: per piece, where in the payload of its chunk it begins.
        numel: per piece, elements of that payload.
    """

    ranges: Boxes
    first: np.ndarray
    boxes: Boxes
    begins: np.ndarray
    element: np.ndarray
    numel: np.ndarray

    @staticmethod
    def of(
        ranges: Sequence[Box], pieces: Sequence[Sequence[tuple[Box, int, int]]]
    ) -> FlatCut | None:
        """The cut of some ranges; None where one of them is not in chunks all over.

        Args:
            ranges: boxes of the parameter, of which no two overlap.
            pieces: per range, in the order of its elements: box, where in the payload of its chunk
                it begins, and elements of that payload.
        """
        boxes = _boxes([box for each in pieces for box, _, _ in each])
        sizes = np.array([box.numel for each in pieces for box, _, _ in each], dtype=np.int64)
        first = np.cumsum([0, *map(len, pieces)])
        begins = np.cumsum([0, *sizes])
        if any(begins[first[1:]] - begins[first[:-1]] != [box.numel for box in ranges]):
            return None
        element = np.array([start for each in pieces for _, start, _ in each], dtype=np.int64)
        numel = np.array([count for each in pieces for _, _, count in each], dtype=np.int64)
        return FlatCut(
            _boxes(ranges), narrow(first), boxes, begins[:-1], narrow(element), narrow(numel)
        )

    def near(self, box: Box) -> Iterator[int]:
        """Numbers of the pieces that may overlap `box`, and of all that do."""
        for number in self.ranges.touching(box):
            low, high = int(self.first[number]), int(self.first[number + 1])
            if high - low > 1:
                whole = self.ranges[number]
                common = whole.intersect(box)
                assert common is not None
                strides = row_major_strides(whole.sizes)
                inside = zip(common.offsets, common.sizes, whole.offsets, strides, strict=True)
                steps = [((o - w) * s, (n - 1) * s) for o, n, w, s in inside]
                begin = int(self.begins[low]) + sum(step for step, _ in steps)
                last = begin + sum(step for _, step in steps)
                begins = self.begins[low:high]
                low, high = (
                    low + int(begins.searchsorted(begin, "right")) - 1,
                    low + int(begins.searchsorted(last, "right")),
                )
            yield from range(low, high)


def _boxes(boxes: Sequence[Box]) -> Boxes:
    dimensions = len(boxes[0].sizes) if boxes else 0
    offsets, sizes = (
        np.array([getattr(box, name) for box in boxes], np.int64).reshape(len(boxes), dimensions)
        for name in ("offsets", "sizes")
    )
    return Boxes(offsets, sizes)


class FlatPieces(ManyPieces):
    """The pieces of one state of a parameter in flat buffers.

    Attributes:
        cut: their boxes, and where they begin in their chunks.
        files: names of files.
        file: per piece, the number of its chunk's file in `files`.
        starts, lengths: per piece, where in that file its chunk's item lies, in bytes.

    >>> cut = FlatCut.of([Box((2,), (4,))], [[(Box((2,), (3,)), 1, 4), (Box((5,), (1,)), 0, 9)]])
    >>> items = [np.array([0, 0]), np.array([0, 300]), np.array([300, 300])]
    >>> pieces = FlatPieces(torch.float32, cut, ("__0_0.distcp",), *items)
    >>> [(p.box.offsets, p.payload.item.offset, p.start) for p in pieces.touching(Box((4,), (9,)))]
    [((2,), 0, 1), ((5,), 300, 0)]
    """

    __slots__ = ("cut", "file", "files", "lengths", "starts")

    def __init__(
        self,
        dtype: torch.dtype,
        cut: FlatCut,
        files: tuple[str, ...],
        file: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self.dtype, self.cut, self.files = dtype, cut, files
        self.file, self.starts, self.lengths = map(narrow, (file, starts, lengths))

    def __len__(self) -> int:
        return len(self.starts)

    def _one(self, number: int) -> Piece[Payload]:
        return Piece(self.cut.boxes[number], self._payload(number), int(self.cut.element[number]))

    def _payload(self, number: int) -> Payload:
        file = self.files[self.file[number]]
        item = Item(file, int(self.starts[number]), int(self.lengths[number]))
        return Payload(item, self.dtype, int(self.cut.numel[number]))

    def columns(self) -> Columns:
        """See `ManyPieces`."""
        boxes, element = self.cut.boxes, self.cut.element
        return Columns(self.files, self.file, self.starts, element, boxes.offsets, boxes.sizes)

    def payloads(self) -> Iterable[Payload]:
        """See `ManyPieces`."""
        return dict.fromkeys(map(self._payload, range(len(self))))

    def partly(self) -> Iterator[tuple[Payload, int, int]]:
        """Payloads that hold something else too, with where a piece begins in each, and its
        elements."""
        cut = self.cut
        sizes = cut.boxes.sizes.astype(np.int64).prod(axis=1)
        # Pieces of one payload follow each other.
        same = (self.file[1:] == self.file[:-1]) & (self.starts[1:] == self.starts[:-1])
        heads = np.flatnonzero(np.concatenate([[True], ~same])[: len(self)])
        held = np.add.reduceat(sizes, heads) if len(heads) else sizes
        counts = np.diff([*heads, len(self)])
        for number in np.flatnonzero(np.repeat(held, counts) != cut.numel).tolist():
            yield self._payload(number), int(cut.element[number]), int(sizes[number])

    def touching(self, box: Box) -> list[Piece[Payload]]:
        """Pieces that overlap `box`."""
        boxes = self.cut.boxes
        return [self._one(n) for n in self.cut.near(box) if boxes[n].intersect(box) is not None]

    def covers(self, box: Box) -> bool | None:
        """Whether all of `box` lies in pieces; None where each of those has to be looked at."""
        return self.cut.ranges.covers(box)

    @property
    def extent(self) -> Box:
        """From the beginning of the tensor to the end of the last pieces."""
        return self.cut.ranges.extent

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatPieces, (self.dtype, self.cut, self.files, self.file, self.starts, self.lengths)
