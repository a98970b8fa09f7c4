"""The work of a merge, in terms of pieces and places alone: what the plan hands to the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from isal import isal_zlib

from pma_megatron.base.boxes import Box, Piece, PieceIndex, slices
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.output import Destination, Folder
from pma_megatron.formats.source import Source
from pma_megatron.transfer.blocks import BlockReader, FolderWriters

UNIT_ELEMENTS = 8 << 20
"""Elements of one work unit, the grain in which work is split over ranks and threads."""
_FILL_BYTES = 8
"""Bytes that are copied or zeroed for each of those: 64 MiB in one unit, where nothing is added."""


def most_filled(itemsize: int) -> int:
    """Elements of so many bytes that one unit fills, at most."""
    return max(1, UNIT_ELEMENTS * _FILL_BYTES // itemsize)


def moved_bytes(itemsize: int, *, reads: bool) -> int:
    """That filling an element moves."""
    return itemsize * (2 if reads else 1)


class Workload(Protocol):
    """What the engine needs to know of a plan beside its units."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The opened sources, oldest first."""

    @property
    def visible(self) -> tuple[tuple[int, ...], ...]:
        """Per source, the ranks that can read it."""

    @property
    def coefficients(self) -> tuple[tuple[float, ...], ...]:
        """Per output, one coefficient per source."""

    @property
    def threads(self) -> int:
        """Threads per rank."""


@dataclass(frozen=True, slots=True)
class Average:
    """Average one global tensor and write it wherever it is wanted.

    Attributes:
        key: the tensor, for messages.
        kept: True passes the newest source's values through unchanged.
        lead: the pieces that set the order of work: those of the newest source.
        numbers: which sources are read, oldest first; only the newest where its values stay.
        sources: where each of those holds it.
        dtypes: stored dtype per source.
        targets: where it goes; replicas and the rounded weights included. Each payload has a
            `dtype`; only its writer knows what else it is (`formats.output.Destination`, or a live
            slot).
        target_bytes: bytes written per element, to share the work evenly.
        proof: the newest source's stored weights, where the flat map that led here must be proved.
        proof_itemsize: bytes per element of those, 0 without a proof.
    """

    key: str
    kept: bool
    lead: Sequence[Piece[Payload]]
    numbers: tuple[int, ...]
    sources: tuple[PieceIndex[Payload], ...]
    dtypes: tuple[torch.dtype, ...]
    targets: PieceIndex[Any]
    target_bytes: int
    proof: PieceIndex[Payload] | None
    proof_itemsize: int

    @property
    def bytes_per_element(self) -> int:
        """That are read and written, to share the work evenly."""
        return sum(dtype.itemsize for dtype in self.dtypes) + self.target_bytes

    @property
    def read_bytes_per_element(self) -> int:
        """That are read of all its sources."""
        return sum(dtype.itemsize for dtype in self.dtypes) + self.proof_itemsize

    def units(self) -> Iterator[AverageUnit]:
        """All units, piece by piece; see `cut` for those of many tasks in the order of files."""
        for piece in self.lead:
            for box in slices(piece.box, UNIT_ELEMENTS):
                yield AverageUnit(self, piece, box, box.numel * self.bytes_per_element)

    def unit(self, number: int, nth: int) -> AverageUnit:
        """The `nth` unit of piece `number`; the cut depends on the task alone, so results do not on
        the ranks."""
        piece = self.lead[number]
        box = next(itertools.islice(slices(piece.box, UNIT_ELEMENTS), nth, None))
        return AverageUnit(self, piece, box, box.numel * self.bytes_per_element)


class Fill:
    """A task in which no coefficient has a part: elements that stay, are known, or become zero."""

    __slots__ = ()
    reads: ClassVar[bool] = False
    """Whether it reads the newest source."""

    @property
    def folder(self) -> Folder:
        """In which folder of an output it writes."""
        return Folder.CHECKPOINT

    @property
    def numel(self) -> int:
        """Elements to be filled."""
        raise NotImplementedError

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 1

    def file_order(self, first: int) -> tuple[str, int, int]:
        """Where the element `first` is written: file, offset, element."""
        raise NotImplementedError

    @property
    def unit_numel(self) -> int:
        """Elements of a unit, but the last."""
        return most_filled(self.itemsize)

    def unit(self, nth: int) -> FillUnit:
        """The `nth` unit."""
        first = nth * self.unit_numel
        count = min(self.unit_numel, self.numel - first)
        return FillUnit(self, first, count, count * moved_bytes(self.itemsize, reads=self.reads))

    def fill(
        self, at: int, newest: BlockReader, writers: Sequence[FolderWriters], data: memoryview
    ) -> None:
        """The elements from `at` on that fit `data`, which may be used for them.

        Raises:
            CheckpointError, PublishError: see `BlockReader.read` and `BlockWriter.pwrite`.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Copy(Fill):
    """Bytes of an item of the newest source that stay as they are.

    Not copied inside the kernel: what is written is what was compared with its checksum.
    """

    item: Item
    source_offset: int
    file: str
    offset: int
    nbytes: int
    reads: ClassVar[bool] = True

    @property
    def numel(self) -> int:
        """Bytes to be copied."""
        return self.nbytes

    def file_order(self, first: int) -> tuple[str, int, int]:
        """See `Fill`."""
        return self.file, self.offset, first

    def fill(
        self, at: int, newest: BlockReader, writers: Sequence[FolderWriters], data: memoryview
    ) -> None:
        newest.read_item(self.item, self.source_offset + at, data)
        crc = isal_zlib.crc32(data)
        for writer in writers:
            writer.copy(self.file, self.offset + at, data, crc)


@dataclass(frozen=True, slots=True)
class Write(Fill):
    """Bytes that the plan already made."""

    file: str
    offset: int
    data: bytes

    @property
    def numel(self) -> int:
        """Bytes to be written."""
        return len(self.data)

    def file_order(self, first: int) -> tuple[str, int, int]:
        """See `Fill`."""
        return self.file, self.offset, first

    def fill(
        self, at: int, newest: BlockReader, writers: Sequence[FolderWriters], data: memoryview
    ) -> None:
        for writer in writers:
            made = memoryview(self.data)[at : at + len(data)]
            writer.pwrite(self.file, self.offset + at, made)


@dataclass(frozen=True, slots=True)
class _Range(Fill):
    """Elements of a payload of the output, from `start` on."""

    place: Destination
    start: int
    count: int

    @property
    def folder(self) -> Folder:
        """See `Fill`."""
        return self.place.folder

    @property
    def numel(self) -> int:
        """Elements in the range."""
        return self.count

    @property
    def itemsize(self) -> int:
        """Bytes per element in the output."""
        return self.place.dtype.itemsize

    def file_order(self, first: int) -> tuple[str, int, int]:
        """See `Fill`."""
        return self.place.file, self.place.start, self.start + first

    def read(self, at: int, newest: BlockReader, into: memoryview) -> None:
        """The elements from `at` of the range on, as many as fit."""
        raise NotImplementedError

    def fill(
        self, at: int, newest: BlockReader, writers: Sequence[FolderWriters], data: memoryview
    ) -> None:
        """See `Fill`."""
        self.read(at, newest, data)
        for writer in writers:
            writer.put(self.place, self.start + at, data)


@dataclass(frozen=True, slots=True)
class Zero(_Range):
    """A range of a payload that becomes zero: reset moments, gaps between parameters."""

    def read(self, at: int, newest: BlockReader, into: memoryview) -> None:
        """See `_Range`."""
        into[:] = bytes(len(into))


@dataclass(frozen=True, slots=True)
class Keep(_Range):
    """Elements of a written payload that stay the newest source's: padding, what has no name."""

    payload: Payload
    reads: ClassVar[bool] = True

    def read(self, at: int, newest: BlockReader, into: memoryview) -> None:
        """See `_Range`."""
        newest.read_bytes(self.payload, self.start + at, into)


@dataclass(frozen=True, slots=True)
class Carry(_Range):
    """Elements of the newest source that no average is of, as they are: counters, masks."""

    payload: Payload
    source_start: int
    reads: ClassVar[bool] = True

    def read(self, at: int, newest: BlockReader, into: memoryview) -> None:
        """See `_Range`."""
        newest.read_bytes(self.payload, self.source_start + at, into)


Task = Average | Fill


@dataclass(frozen=True, slots=True)
class AverageUnit:
    """A bounded part of an average: a box of its tensor, which lies in the piece `lead`."""

    task: Average
    lead: Piece[Payload]
    box: Box
    cost_bytes: int

    @property
    def file_order(self) -> tuple[str, int, int]:
        """What to sort by, so that files are read from their beginnings: file, offset, element."""
        item = self.lead.payload.item
        return item.file, item.offset, self.lead.start

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from the other units of its plan, in every job that makes this plan."""
        payload = self.lead.payload
        place = (payload.item.file, payload.item.offset, payload.record, self.lead.start)
        return self.task.key, self.task.kept, *place, self.box.offsets, self.box.sizes

    @property
    def read_bytes(self) -> int:
        """Payload bytes that it reads from all its sources."""
        return self.box.numel * self.task.read_bytes_per_element


@dataclass(frozen=True, slots=True)
class FillUnit:
    """A bounded part of what is filled: `count` elements from `first` on."""

    task: Fill
    first: int
    count: int
    cost_bytes: int

    @property
    def file_order(self) -> tuple[str, int, int]:
        """What to sort by, so that files are written from their beginnings."""
        return self.task.file_order(self.first)

    @property
    def identity(self) -> tuple[object, ...]:
        """See `AverageUnit.identity`."""
        return type(self.task).__name__, self.task.folder.value, *self.file_order, self.count

    @property
    def read_bytes(self) -> int:
        """Payload bytes that it reads from the newest source."""
        return self.count * self.task.itemsize if self.task.reads else 0

    def fill(
        self, newest: BlockReader, writers: Sequence[FolderWriters], buffer: memoryview
    ) -> None:
        """Do it in steps of the buffer's size; raises as `Fill.fill`."""
        size, end = self.task.itemsize, self.first + self.count
        step = len(buffer) // size
        for at in range(self.first, end, step):
            self.task.fill(at, newest, writers, buffer[: min(step, end - at) * size])


Unit = AverageUnit | FillUnit


def parted(every: Iterable[Unit]) -> tuple[list[AverageUnit], list[FillUnit]]:
    """The units of averages, and the others, each in the order given."""
    averages: list[AverageUnit] = []
    fills: list[FillUnit] = []
    for unit in every:
        if isinstance(unit, AverageUnit):
            averages.append(unit)
        else:
            fills.append(unit)
    return averages, fills
