"""From files to files in C, where a unit's elements are rows of bytes in every source and output.

The kernel reads a step of every source, compares, sums, rounds and writes it before it reads the
next one, so that all of a step stays near its core, and comes back to Python once in
`CALL_ELEMENTS`. It gives the bits that `accumulate` gives block by block, which is what is used for
everything else: rows that are short or not in one piece, teams, live models, sums by torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from pma_megatron.formats.base import StoredRecord
from pma_megatron.formats.output import Destination
from pma_megatron.merging import sums
from pma_megatron.merging.accumulate import Work
from pma_megatron.storage.paths import in_store
from pma_megatron.storage.spool import active, present
from pma_megatron.transfer.blocks import BlockReader, BlockWriter, FolderWriters
from pma_megatron.transfer.buffers import Room
from pma_megatron.transfer.units import UnitReader

CALL_ELEMENTS = 4 << 20
"""Elements of one call, after which a failure elsewhere is noticed."""
_LEAST_ROW = 1 << 15  # elements on average: shorter rows are better put together in a block

Rows = list[tuple[int, int, Any, int]]
"""(first element of the unit, elements, where, element or byte of that)."""


@dataclass(frozen=True, slots=True)
class Step:
    """How much is read at once.

    Attributes:
        room_bytes: all buffers of a step.
        least, most: elements.
    """

    room_bytes: int
    least: int
    most: int

    def elements(self, dtypes: Sequence[torch.dtype]) -> int:
        """Elements of a step, given the dtypes of all its buffers."""
        fit = self.room_bytes // sum(dtype.itemsize for dtype in dtypes)
        return max(self.least, min(self.most, 1 << fit.bit_length() - 1))


WARM = Step(3 << 20, 1 << 14, 1 << 18)
"""It stays near a core: shorter reads cost more calls than larger buffers cost in its caches."""
COLD = Step(8 << 20, 1 << 14, 1 << 21)
"""Longer reads, within what a rank may take."""


class Outcome(IntEnum):
    """How a call of the kernel ended."""

    DONE = 0
    NOT_READ = 1
    NOT_FINITE = 2
    NOT_PROVED = 3
    NOT_WRITTEN = 4


@dataclass(frozen=True, slots=True)
class Target:
    """A row of an output: element `start` of `place`, in a folder that is written."""

    writer: BlockWriter
    place: Destination
    start: int


@dataclass(frozen=True, slots=True)
class Range:
    """Elements of a unit that are one row in every source and every output.

    Attributes:
        first: its first element, counted in the unit.
        numel: its elements.
        sources: per input its record and the byte of that; what proves the newest is the last.
        targets: per output, where it goes.
        itemsizes: bytes read, and bytes written, per element.
    """

    first: int
    numel: int
    sources: tuple[tuple[StoredRecord, int], ...]
    targets: tuple[tuple[Target, ...], ...]
    itemsizes: tuple[int, int]


def ranges(work: Work) -> list[Range]:
    """The unit as ranges that the kernel streams, in order; [] if it cannot, or should not."""
    compiled, every = sums.KERNEL.compiled, _readers(work)
    if compiled is None or not compiled.STREAMS or not work.inputs or not work.outputs:
        return []
    rows: list[Rows] = []
    for reader, _ in every:
        if reader.runs is None:
            return []
        rows.append(sorted(reader.runs, key=_first))
    written: list[Rows] = []
    for out in work.outputs:
        if out.runs is None or not isinstance(out.writer, FolderWriters):
            return []
        written.append(out.runs)
    edges = {0, work.box.numel}
    for start, count, _, _ in itertools.chain(*rows, *written):
        edges |= {start, start + count}
    if len(edges) > 2 and work.box.numel < _LEAST_ROW * (len(edges) - 1):
        return []
    sizes = [dtype.itemsize for _, dtype in every]
    found = []
    for low, high in itertools.pairwise(sorted(edges)):
        sources = [_at(own, size, low) for own, size in zip(rows, sizes, strict=True)]
        targets = [_targets(out.writer, out.runs or [], low, high) for out in work.outputs]
        if not all(sources) or not all(targets) or _letters(work, targets) is None:
            return []
        wanted = sum(t.place.dtype.itemsize for t in itertools.chain(*targets))
        moved = sum(sizes), wanted
        found.append(Range(low, high - low, tuple(filter(None, sources)), tuple(targets), moved))
    return found


def stream(
    work: Work, each: Range, first: int, numel: int, room: Room, *, is_cold: bool = False
) -> Outcome:
    """Average `numel` elements of a range from its element `first` on, and write them.

    What is cold, not in the page cache, is read in longer steps: then storage is what takes time.

    Returns:
        DONE; or NOT_FINITE or NOT_PROVED, which `Accumulator.average` of the same elements says
        precisely. What was read and written of them is not noted then.

    Raises:
        CheckpointError: a file vanished, ended early, could not be read, or is damaged.
        PublishError: no space, no permission, or a failing disk.
    """
    every, targets = _readers(work), list(itertools.chain(*each.targets))
    sizes = [dtype.itemsize for _, dtype in every]
    at = [
        (record, start + first * size)
        for (record, start), size in zip(each.sources, sizes, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        places = []
        for (reader, _), (record, start) in zip(every, at, strict=True):
            opened = _opened(stack, reader.reader, record.file)
            places.append((opened, record.start + start))
        if active() is not None:
            _fetch(stack, every, places, [numel * size for size in sizes])
        for target in targets:
            opened = _opened(stack, target.writer, target.place.file)
            start = (target.start + first) * target.place.dtype.itemsize
            places.append((opened, target.place.start + start))
        found = _call(work, each, numel, places, room, COLD if is_cold else WARM)
    outcome, _, which, error, crcs, crc = found
    if outcome == Outcome.NOT_READ:
        (record, _), (_, start) = at[which], places[which]
        reason = OSError(error, os.strerror(error))
        if not error:
            reason = OSError(0, f"it ends before byte {start + numel * sizes[which]}")
        raise every[which][0].reader.refusal(record.file, reason)
    if outcome == Outcome.NOT_WRITTEN:
        target = targets[which]
        raise target.writer.refusal(target.place.file, OSError(error, os.strerror(error)))
    if outcome == Outcome.DONE:
        read = [*crcs[: len(work.inputs)], *([crc] if work.proof is not None else [])]
        for (reader, _), (record, start), size, its in zip(every, at, sizes, read, strict=True):
            reader.reader.noted(record, start, numel * size, its)
        for target, its in zip(targets, crcs[len(work.inputs) :], strict=True):
            size = target.place.dtype.itemsize
            start = (target.start + first) * size
            target.writer.checksums.add_sum(target.place, start, numel * size, its)
    return Outcome(outcome)


def calls(each: Range) -> Iterator[tuple[int, int]]:
    """(first element of the range, elements) of every call that does it."""
    for first in range(0, each.numel, CALL_ELEMENTS):
        yield first, min(CALL_ELEMENTS, each.numel - first)


def _call(
    work: Work, each: Range, numel: int, places: list[tuple[int, int]], room: Room, size: Step
) -> tuple[int, int, int, int, list[int], int]:
    """Call the kernel; see `stream` there for what it gives."""
    kernel, inputs = sums.KERNEL, len(work.inputs)
    dtypes = [dtype for _, dtype in _readers(work)]
    dtypes += [dtype for _, dtype in _readers(work)[inputs:]]  # what is proved, rounded
    dtypes += [target.place.dtype for target in itertools.chain(*each.targets)]
    step = size.elements(dtypes)
    buffers = room.buffers(dtypes, step)
    letters = _letters(work, each.targets)
    assert letters is not None
    places, proof = list(places), None
    if work.proof is not None:
        proof = (inputs - 1, letters[2], *buffers[inputs : inputs + 2], places.pop(inputs))
        del buffers[inputs : inputs + 2]
    rest = iter(buffers[inputs:])
    asked = tuple(
        (how.weights, how.divisor, how.dtype == torch.float64, tuple(next(rest) for _ in own), kind)
        for how, own, kind in zip(work.sums, each.targets, letters[1], strict=True)
    )
    result: tuple[int, int, int, int, list[int], int] = kernel.compiled.stream(
        kernel.number,
        numel,
        step,
        tuple(buffers[:inputs]),
        letters[0],
        asked,
        tuple(places),
        proof,
        BlockReader.compares,
    )
    return result


def _opened(stack: contextlib.ExitStack, owner: BlockReader | BlockWriter, file: str) -> int:
    try:
        return stack.enter_context(owner.files.opened(file))
    except OSError as error:
        raise owner.refusal(file, error) from error


def _fetch(
    stack: contextlib.ExitStack,
    every: Sequence[tuple[UnitReader, torch.dtype]],
    places: Sequence[tuple[int, int]],
    nbytes: Sequence[int],
) -> None:
    """What is read of objects of a store is there until `stack` is closed."""
    asked = [(*place, count) for place, count in zip(places, nbytes, strict=True)]
    try:
        stack.enter_context(present(asked))
    except OSError as error:
        reader = next((r.reader for r, _ in every if in_store(r.reader.path)), every[0][0].reader)
        raise reader.refusal(error.filename or "", error) from error


def _readers(work: Work) -> list[tuple[UnitReader, torch.dtype]]:
    """Of every input, and of what proves the newest."""
    every = [(each.reader, each.dtype) for each in work.inputs]
    return every if work.proof is None else [*every, work.proof]


def _letters(work: Work, targets: Sequence[Sequence[Target]]) -> tuple[str, list[str], str] | None:
    """The names of dtypes of sources, outputs, and what proves; None if the kernel has none."""
    dtypes = [each.dtype for each in work.inputs]
    found = sums.letters_of(dtypes, work.sums, [[t.place.dtype for t in own] for own in targets])
    if found is None or work.proof is None:
        return None if found is None else (*found, "")
    known = work.proof[1] in sums.LETTERS and torch.float64 not in (work.proof[1], dtypes[-1])
    return (*found, sums.LETTERS[work.proof[1]]) if known else None


def _first(row: tuple[int, int, Any, int]) -> int:
    return row[0]


def _at(rows: Rows, itemsize: int, low: int) -> tuple[StoredRecord, int] | None:
    """Where element `low` of the unit is; rows that end before it are removed."""
    while rows and rows[0][0] + rows[0][1] <= low:
        rows.pop(0)
    if not rows or rows[0][0] > low:
        return None
    start, _, record, offset = rows[0]
    return record, offset + (low - start) * itemsize


def _targets(writer: Any, rows: Rows, low: int, high: int) -> tuple[Target, ...]:
    """Where elements [low, high) go; nowhere if that folder was published before."""
    found = []
    for start, count, place, inside in rows:
        own = writer.writers.get(place.folder)
        if own is not None and start <= low and high <= start + count:
            found.append(Target(own, place, inside + low - start))
    return tuple(found)
