"""Fills of one kind by the ten thousand, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from pma_megatron.formats.output import OutputItem, OutputLayout
from pma_megatron.formats.pieces import StoredPieces
from pma_megatron.formats.placed import COPIED, PlacedItems, Places
from pma_megatron.merging.tasks import Copy, Fill, Write, Zero


class FillColumns(NamedTuple):
    """What decides how fills are cut and ordered, a row per fill.

    Attributes:
        files: names of files.
        file: number of the file in `files`.
        offsets: where it is written in that file, as `Fill.file_order` says.
        numel: elements.
        itemsize: bytes of each.
    """

    files: Sequence[str]
    file: np.ndarray
    offsets: np.ndarray
    numel: np.ndarray
    itemsize: np.ndarray


class Fills(Protocol):
    """Many fills of one kind."""

    reads: ClassVar[bool]
    """See `Fill`."""

    def columns(self) -> FillColumns:
        """All of them."""

    def fill(self, number: int) -> Fill:
        """One of them."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Payloads that become zero as a whole: reset moments."""

    places: Places
    pieces: StoredPieces
    reads: ClassVar[bool] = False

    def columns(self) -> FillColumns:
        """See `Fills`."""
        items = self.places.items
        numbers = items.numbers_of(self.pieces)
        starts = np.array([kind.start for kind in items.kinds], dtype=np.int64)
        numel = np.array([kind.numel for kind in items.kinds], dtype=np.int64)
        sizes = np.array([kind.dtype.itemsize for kind in items.kinds], dtype=np.int64)
        kind, offsets = items.kind[numbers], items.starts[numbers].astype(np.int64)
        columns = offsets + starts[kind], numel[kind], sizes[kind]
        return FillColumns(items.files, items.file[numbers], *columns)

    def fill(self, number: int) -> Zero:
        """See `Fills`."""
        payload = self.pieces[number].payload
        return Zero(self.places[payload], 0, payload.numel)


@dataclass(frozen=True, slots=True)
class Copies:
    """Items that are copied as they are."""

    items: PlacedItems
    numbers: np.ndarray
    reads: ClassVar[bool] = True

    def columns(self) -> FillColumns:
        """See `Fills`."""
        items, numbers = self.items, self.numbers
        offsets, nbytes = (
            column[numbers].astype(np.int64) for column in (items.starts, items.base_lengths)
        )
        return FillColumns(
            items.files, items.file[numbers], offsets, nbytes, np.ones(len(numbers), np.int64)
        )

    def fill(self, number: int) -> Copy:
        """See `Fills`."""
        item = self.items[int(self.numbers[number])]
        assert item.source is not None
        placed, source = item.placed, item.source
        return Copy(source, source.offset, placed.file, placed.offset, source.length)


def untouched(layout: OutputLayout) -> Iterator[Copy | Write | Copies]:
    """The tasks of all bytes of an output that are no average: written as laid out, or copied."""
    items: Sequence[OutputItem] = layout.items
    if isinstance(items, PlacedItems):
        yield Copies(items, np.flatnonzero(items.kind == COPIED))
        items = tuple(items.special.values())
    for item in items:
        placed = item.placed
        if item.literal is not None:
            yield Write(placed.file, placed.offset, item.literal)
        elif item.skeleton is None and item.source is not None:
            source = item.source
            yield Copy(source, source.offset, placed.file, placed.offset, source.length)
        elif item.skeleton is not None and item.source is not None:
            for record, (offset, _) in item.kept.items():
                start, nbytes = item.skeleton.payloads[record]
                yield Copy(item.source, offset, placed.file, placed.offset + start, nbytes)
