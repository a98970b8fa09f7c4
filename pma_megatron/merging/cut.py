"""Tasks cut into units: a row of numbers each, made into a unit when its turn comes.

A large plan has hundreds of thousands of units, and every rank of a job knows all of them; it does
its own part alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

from pma_megatron.base.boxes import Box, slices
from pma_megatron.formats.pieces import FileNumbers, ManyPieces, narrow
from pma_megatron.merging import tasks
from pma_megatron.merging.bulk import FillColumns, Fills
from pma_megatron.merging.tasks import (
    Average,
    AverageUnit,
    Fill,
    Task,
    Unit,
    most_filled,
    moved_bytes,
)

AnyUnit = TypeVar("AnyUnit", bound=Unit, covariant=True)


class Units(Sequence[AnyUnit], Generic[AnyUnit]):
    """The units of some tasks, in the order in which files are read from their beginnings.

    Attributes:
        costs_bytes: per unit, what it moves.
        read_bytes: that all of them read.
    """

    __slots__ = ("_nth", "_piece", "_reads", "_task", "_tasks", "costs_bytes")

    def __init__(
        self, tasks: Sequence[Task | Fills], columns: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Cut `tasks`, or show a part of them, whose `columns` are known."""
        self._tasks = tasks
        if columns is None:
            columns = _Cut().of(tasks)
        self._task, self._piece, self._nth = (columns[name] for name in ("task", "piece", "nth"))
        self.costs_bytes, self._reads = columns["cost"], columns["reads"]

    def __len__(self) -> int:
        return len(self._task)

    @overload
    def __getitem__(self, number: int) -> AnyUnit: ...
    @overload
    def __getitem__(self, number: slice) -> Units[AnyUnit]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return self.part(np.arange(len(self))[number])
        task = self._tasks[self._task[number]]
        piece, nth = int(self._piece[number]), int(self._nth[number])
        if isinstance(task, Average):
            return task.unit(piece, nth)
        return (task if isinstance(task, Fill) else task.fill(piece)).unit(nth)

    def __iter__(self) -> Iterator[AnyUnit]:
        return (self[number] for number in range(len(self)))

    def part(self, numbers: np.ndarray) -> Units[AnyUnit]:
        """Those of the given numbers."""
        columns = {
            "task": self._task[numbers],
            "piece": self._piece[numbers],
            "nth": self._nth[numbers],
            "cost": self.costs_bytes[numbers],
            "reads": self._reads[numbers],
        }
        return Units(self._tasks, columns)

    @property
    def cost_bytes(self) -> int:
        """What all of them move."""
        return int(self.costs_bytes.sum(dtype=np.int64))

    @property
    def read_bytes(self) -> int:
        """Payload bytes that all of them read."""
        return int(self._reads.sum(dtype=np.int64))


@overload
def units(tasks: Iterable[Average]) -> Units[AverageUnit]: ...
@overload
def units(tasks: Iterable[Task | Fills]) -> Units[Unit]: ...
def units(tasks: Iterable[Task | Fills]) -> Units[Any]:
    """All units of some tasks, in the order in which files are read from their beginnings."""
    return Units(tuple(tasks))


def share(every: Units[AnyUnit], rank: int, size: int) -> Units[AnyUnit]:
    """This rank's contiguous part of the units, split by bytes so that all finish together."""
    costs = every.costs_bytes.astype(np.int64)
    total = int(costs.sum()) or 1
    middle = np.cumsum(costs) - costs / 2
    owner = np.minimum((middle * size / total).astype(np.int64), size - 1)
    return every.part(np.flatnonzero(owner == rank))


class _Cut:
    """Columns of units in the making."""

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, int] = {}
        self._numbers = FileNumbers(self._file)

    def of(self, tasks: Sequence[Task | Fills]) -> dict[str, np.ndarray]:
        """The columns of all units, in their order."""
        for number, task in enumerate(tasks):
            if isinstance(task, Average):
                self._average(number, task)
            elif isinstance(task, Fill):
                self._fill(number, task)
            else:
                self._fills(number, task.columns(), reads=task.reads)
        none = np.empty(0, dtype=np.uint8)
        names = ("task", "piece", "nth", "cost", "reads", "file", "offset", "element")
        # Each row list is let go as it is joined: units may be millions.
        columns = {name: np.concatenate([none, *self._rows.pop(name, ())]) for name in names}
        rank = np.empty(len(self._files), dtype=np.int64)
        for place, (_, number) in enumerate(sorted(self._files.items())):
            rank[number] = place
        by_file = columns.pop("element"), columns.pop("offset"), narrow(rank)[columns.pop("file")]
        order = np.lexsort(by_file)
        return {name: narrow(columns.pop(name)[order]) for name in [*columns]}

    def _add(self, count: int, **columns: np.ndarray | int) -> None:
        for name, column in columns.items():
            whole = np.broadcast_to(narrow(np.asarray(column, dtype=np.int64)), (count,))
            self._rows.setdefault(name, []).append(whole)

    def _file(self, name: str) -> int:
        return self._files.setdefault(name, len(self._files))

    def _average(self, number: int, task: Average) -> None:
        lead = task.lead
        if isinstance(lead, ManyPieces):
            said = lead.columns()
            sizes, offset, element = (
                column.astype(np.int64) for column in (said.sizes, said.items, said.element)
            )
            file = self._numbers.of(said.files, said.file)
        else:
            boxes = [piece.box.sizes for piece in lead]
            dimensions = len(boxes[0]) if boxes else 0
            sizes = np.array(boxes, dtype=np.int64).reshape(len(boxes), dimensions)
            items = [piece.payload.item for piece in lead]
            file = np.array([self._file(item.file) for item in items], dtype=np.int64)
            offset = np.array([item.offset for item in items], dtype=np.int64)
            element = np.array([piece.start for piece in lead], dtype=np.int64)
        piece, nth, numel = _sliced(sizes)
        self._add(
            len(piece),
            task=number,
            piece=piece,
            nth=nth,
            cost=numel * task.bytes_per_element,
            reads=numel * task.read_bytes_per_element,
            file=file[piece],
            offset=offset[piece],
            element=element[piece],
        )

    def _fill(self, number: int, task: Fill) -> None:
        file, offset, element = task.file_order(0)
        one = np.array([task.numel]), np.array([task.itemsize])
        columns = FillColumns((file,), np.zeros(1, int), np.array([offset]), *one)
        self._fills(number, columns, reads=task.reads, element=element)

    def _fills(self, number: int, columns: FillColumns, *, reads: bool, element: int = 0) -> None:
        files = np.array([self._file(name) for name in columns.files], dtype=np.int64)
        for itemsize in np.unique(columns.itemsize).tolist():
            rows = np.flatnonzero(columns.itemsize == itemsize)
            most, numel = most_filled(itemsize), columns.numel[rows].astype(np.int64)
            counts = -(-numel // most)
            which = np.repeat(np.arange(len(rows)), counts)
            nth = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
            count = np.minimum(most, numel[which] - nth * most)
            self._add(
                len(which),
                task=number,
                piece=rows[which],
                nth=nth,
                cost=count * moved_bytes(itemsize, reads=reads),
                reads=count * itemsize if reads else 0,
                file=files[columns.file[rows[which]]],
                offset=columns.offsets[rows[which]],
                element=element + nth * most,
            )


def _sliced(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slices of some boxes: number of the box, which of its slices, elements."""
    numel = sizes.prod(axis=1)
    whole = (numel > 0) & (numel <= tasks.UNIT_ELEMENTS)
    known: dict[tuple[int, ...], list[int]] = {}
    pieces, nths, counts = [np.flatnonzero(whole)], [np.zeros(whole.sum(), int)], [numel[whole]]
    for number in np.flatnonzero(~whole).tolist():
        size = tuple(sizes[number].tolist())
        if size not in known:
            box = Box((0,) * len(size), size)
            known[size] = [math.prod(part.sizes) for part in slices(box, tasks.UNIT_ELEMENTS)]
        cut = known[size]
        pieces.append(np.full(len(cut), number))
        nths.append(np.arange(len(cut)))
        counts.append(np.array(cut, dtype=np.int64))
    piece, nth, count = (np.concatenate(each).astype(np.int64) for each in (pieces, nths, counts))
    order = np.lexsort((nth, piece))
    return piece[order], nth[order], count[order]
