"""One source's, and one output's, part of a unit: where its bytes are is found once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pma_megatron.base.boxes import Box, Part, PieceIndex, overlaps
from pma_megatron.formats.base import Payload, StoredRecord
from pma_megatron.formats.output import Destination
from pma_megatron.transfer.blocks import BlockReader, Writer
from pma_megatron.transfer.buffers import BlockBuffer


class UnitReader:
    """One source's part of a unit: its bytes are found once, then read block by block.

    Attributes:
        reader: of the source.
        runs: (first element of the unit, elements, record, byte of it) of everything, where that
            is rows of bytes; else None.
    """

    def __init__(self, reader: BlockReader, box: Box, index: PieceIndex[Payload]) -> None:
        self.reader, self._index = reader, index
        self._parts = overlaps(box, index.touching(box))
        self.runs: list[tuple[int, int, StoredRecord, int]] | None = None
        if all(part.is_run for part in self._parts):
            self.runs = [
                (p.unit_start, p.numel, *reader.place(p.payload, p.start)) for p in self._parts
            ]

    def advise(self) -> bool:
        """Have the kernel read ahead of `read`; whether there is something to be fetched."""
        return sum(self.reader.advise(part) for part in self._parts) > 0

    def read(self, block: Box, first: int, buffer: BlockBuffer) -> None:
        """Fill `buffer` with `block`, which begins at element `first` of the unit.

        Raises:
            CheckpointError: a file vanished, ended early, could not be read, or is damaged.
        """
        if self.runs is None:
            self.reader.read(block, self._index, buffer.tensor)
            return
        itemsize, last = buffer.itemsize, first + buffer.numel
        for start, numel, record, offset in self.runs:
            low, high = max(first, start), min(last, start + numel)
            if low < high:
                into = buffer.data[(low - first) * itemsize : (high - first) * itemsize]
                self.reader.pread(record, offset + (low - start) * itemsize, into)


class UnitWriter:
    """One output's part of a unit: where its elements go is found once, then written by blocks.

    Attributes:
        dtypes: those in which elements are wanted, each once.
        writer: of the output.
        runs: (first element of the unit, elements, place, element of it) of everything, where that
            is rows of elements; else None.
    """

    def __init__(self, writer: Writer, box: Box, targets: PieceIndex[Any]) -> None:
        self.writer, self._targets = writer, targets
        self.runs: list[tuple[int, int, Any, int]] | None = None
        parts = overlaps(box, targets.touching(box))
        self.dtypes: tuple[torch.dtype, ...] = tuple(dict.fromkeys(p.payload.dtype for p in parts))
        if all(part.is_run for part in parts):
            self.runs = [(p.unit_start, p.numel, p.payload, p.start) for p in parts]

    def write(self, block: Box, first: int, rounded: Mapping[torch.dtype, BlockBuffer]) -> int:
        """Write `block`, which begins at element `first` of the unit; returns bytes written.

        Args:
            block: a part of the unit.
            first: number of its first element in the unit.
            rounded: the block in each of `dtypes`.

        Raises:
            PublishError: no space, no permission, or a failing disk.
        """
        written = 0
        for inside, numel, place, start in self._strips(block, first, block.numel):
            buffer = rounded[place.dtype]
            strip = buffer.data[inside * buffer.itemsize : (inside + numel) * buffer.itemsize]
            self.writer.put(place, start, strip)
            written += len(strip)
        return written

    def _strips(self, block: Box, first: int, count: int) -> Iterator[tuple[int, int, Any, int]]:
        """(start in the block, elements, place, start in the payload) of what `block` fills."""
        if self.runs is None:
            for part in overlaps(block, self._targets.touching(block)):
                yield from _strips(part)
            return
        for start, numel, place, inside in self.runs:
            low, high = max(first, start), min(first + count, start + numel)
            if low < high:
                yield low - first, high - low, place, inside + low - start


def _strips(part: Part[Destination]) -> Iterator[tuple[int, int, Any, int]]:
    """The part as runs that are contiguous on both sides."""
    if part.is_run:
        yield part.unit_start, part.numel, part.payload, part.start
    else:
        for half in part.halves():
            yield from _strips(half)
