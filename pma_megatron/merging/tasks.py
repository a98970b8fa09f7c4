"""The work of a merge, in terms of pieces and places alone: what the plan hands to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pma_megatron.base.boxes import Box, Piece, PieceIndex, slices
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.output import Destination
from pma_megatron.formats.source import Source

UNIT_ELEMENTS = 8 << 20
"""Elements of one work unit, the grain in which work is split over ranks and threads."""


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
    lead: tuple[Piece[Payload], ...]
    numbers: tuple[int, ...]
    sources: tuple[PieceIndex[Payload], ...]
    dtypes: tuple[torch.dtype, ...]
    targets: PieceIndex[Any]
    target_bytes: int
    proof: PieceIndex[Payload] | None
    proof_itemsize: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of an item of the newest source that stay as they are."""

    item: Item
    source_offset: int
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Elements of a written payload that stay the newest source's: padding, what has no name."""

    payload: Payload
    place: Destination
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Zero:
    """A range of a payload that becomes zero: reset moments, gaps between parameters."""

    place: Destination
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that the plan already made."""

    file: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Unit:
    """A bounded part of one task; `box` for averages, a byte range `(start, count)` otherwise."""

    task: Average | Copy | Keep | Zero | Write
    lead: Piece[Payload] | None
    box: Box | None
    first: int
    count: int
    cost_bytes: int


def units(task: Average | Copy | Keep | Zero | Write) -> Iterator[Unit]:
    """Cut a task into units; the cut depends on the task alone, so results do not on the ranks."""
    if isinstance(task, Average):
        per_element = sum(d.itemsize for d in task.dtypes) + task.target_bytes
        for piece in task.lead:
            for box in slices(piece.box, UNIT_ELEMENTS):
                yield Unit(task, piece, box, 0, 0, box.numel * per_element)
        return
    total = (
        task.nbytes
        if isinstance(task, Copy)
        else (len(task.data) if isinstance(task, Write) else task.numel)
    )
    scale = task.place.dtype.itemsize if isinstance(task, (Keep, Zero)) else 1
    for first in range(0, total, UNIT_ELEMENTS):
        count = min(UNIT_ELEMENTS, total - first)
        reads = isinstance(task, (Copy, Keep))
        yield Unit(task, None, None, first, count, count * scale * (2 if reads else 1))


def share(all_units: Sequence[Unit], rank: int, size: int) -> list[Unit]:
    """This rank's contiguous part of the units, split by bytes so that all finish together."""
    total = sum(unit.cost_bytes for unit in all_units) or 1
    mine, before = [], 0
    for unit in all_units:
        middle = before + unit.cost_bytes / 2
        if min(int(middle * size / total), size - 1) == rank:
            mine.append(unit)
        before += unit.cost_bytes
    return mine
