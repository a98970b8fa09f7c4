"""Write what files have around their payloads, each rank around those that it wrote.

An item is finished by the rank that wrote all of it. Of items that several ranks wrote the
checksums are exchanged, and the first of those ranks finishes them. Rank 0 gets one number per
stretch of a file, not one per item, and puts the checksum of every file together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from isal import isal_zlib

from pma_megatron.base.comm import Comm
from pma_megatron.base.durable import sync
from pma_megatron.base.openfiles import Files
from pma_megatron.errors import PublishError
from pma_megatron.formats.manifest import FileSum, Part, sum_of_parts
from pma_megatron.formats.output import OutputItem, OutputLayout
from pma_megatron.merging.leftovers import Target
from pma_megatron.merging.publish import writing
from pma_megatron.transfer.checksums import (
    Checksums,
    ScatteredChecksums,
    crc_of,
    joined_crc,
    scattered_crc,
)

Records = Mapping[str, Sequence[Part]]
"""Record of an item -> what was written of it: (first byte, bytes, CRC-32)."""
_Crc = Callable[[int, str, int], int]
"""(number of an item, record, bytes) -> CRC-32."""


@dataclass(frozen=True, slots=True)
class Structured:
    """A folder whose shards are whole.

    Attributes:
        sums: of every file in it.
        payloads: CRC-32 of every payload that was written, by its name, where the layout wants it.
    """

    sums: Mapping[str, FileSum]
    payloads: Mapping[str, int]


@dataclass(slots=True)
class _Made:
    """What one rank finished.

    Attributes:
        parts: file -> what is known of it: (first byte, bytes, CRC-32).
        items: how many.
        payloads: see `Structured`.
    """

    parts: dict[str, list[Part]] = field(default_factory=dict)
    items: int = 0
    payloads: dict[str, int] = field(default_factory=dict)

    def add(self, file: str, start: int, nbytes: int, crc: int) -> None:
        """Add to what is known of a file."""
        self.parts.setdefault(file, []).append((start, nbytes, crc))


def structure(
    layout: OutputLayout, target: Target, own: Checksums, comm: Comm
) -> Structured | None:
    """Write what surrounds the payloads, and flush it to the disk. Every rank makes this call.

    Args:
        layout: of the folder.
        target: the folder.
        own: checksums of what this rank wrote into it.
        comm: the ranks.

    Returns:
        The folder on rank 0, None elsewhere.

    Raises:
        PublishError: bytes of a payload are unaccounted for, or the folder cannot be written.
    """
    if isinstance(own, ScatteredChecksums):  # of few files, with a header each
        numbers, crc = list(range(len(layout.items))), _scattered(comm.collect(own))
        numbers = numbers if comm.is_main else []
    else:
        numbers, crc = _shares(layout, own, comm)
    made = comm.agree("structure", lambda: _write(layout, target, numbers, crc, own))
    every = comm.collect(made)
    whole: list[Structured] = []  # of rank 0, which alone has use for it
    comm.on_main("sums", lambda: whole.append(_joined(layout, target, every)))
    return whole[0] if whole else None


def _scattered(written: Sequence[Checksums]) -> _Crc:
    """Of payloads that all ranks wrote parts of."""
    sums: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for each in written:
        assert isinstance(each, ScatteredChecksums)
        for place, sum_ in each.sums.items():
            sums.setdefault(place, []).append(sum_)
    return lambda number, record, nbytes: scattered_crc(sums.get((number, record), ()), nbytes)


def _shares(layout: OutputLayout, own: Checksums, comm: Comm) -> tuple[list[int], _Crc]:
    """The items that this rank finishes, in their order, and the checksums of their payloads."""
    mine: dict[int, dict[str, Sequence[Part]]] = {}
    for (number, record), parts in own.parts.items():
        if _written(layout.items[number]):
            mine.setdefault(number, {})[record] = parts
    shared = [n for n, records in mine.items() if not _is_whole(layout.items[n], records)]
    together: dict[int, dict[str, list[Part]]] = {}
    owners: dict[int, int] = {}
    told = {n: {record: coalesced(parts) for record, parts in mine.pop(n).items()} for n in shared}
    for rank, theirs in enumerate(comm.gather(told)):
        for number, records in theirs.items():
            owners.setdefault(number, rank)
            into = together.setdefault(number, {})
            for record, parts in records.items():
                into.setdefault(record, []).extend(parts)
    known: Mapping[int, Records] = {
        **mine,
        **{n: each for n, each in together.items() if owners[n] == comm.rank},
    }
    # Nobody wrote into those without payloads of their own: they are shared evenly.
    size, count = comm.size, len(layout.items)
    rest = (
        number
        for number in range(count * comm.rank // size, count * (comm.rank + 1) // size)
        if not _written(layout.items[number])
    )

    def crc(number: int, record: str, nbytes: int) -> int:
        return joined_crc(known.get(number, {}).get(record, ()), nbytes)

    return sorted([*known, *rest]), crc


def _written(item: OutputItem) -> bool:
    """Whether some of its payload is averaged, and not copied."""
    if item.skeleton is None:
        return False
    payloads = item.skeleton.payloads.items()
    return any(nbytes and record not in item.kept for record, (_, nbytes) in payloads)


def _is_whole(item: OutputItem, records: Records) -> bool:
    """Whether these parts are all of it."""
    assert item.skeleton is not None
    return all(
        record in item.kept or sum(count for _, count, _ in records.get(record, ())) == nbytes
        for record, (_, nbytes) in item.skeleton.payloads.items()
    )


def coalesced(parts: Iterable[Part]) -> list[Part]:
    """The same with those joined that follow each other without a gap.

    >>> import zlib
    >>> parts = coalesced([(2, 1, zlib.crc32(b"c")), (0, 2, zlib.crc32(b"ab"))])
    >>> parts == [(0, 3, zlib.crc32(b"abc"))]
    True
    """
    found: list[Part] = []
    for start, count, crc in sorted(parts):
        if found and found[-1][0] + found[-1][1] == start:
            first, before, known = found.pop()
            start, crc = first, isal_zlib.crc32_combine(known, crc, count)
            count += before
        found.append((start, count, crc))
    return found


def _write(
    layout: OutputLayout, target: Target, numbers: Sequence[int], crc: _Crc, own: Checksums
) -> _Made:
    """Finish some items; what lies together in a file is one write."""
    # Written as blocks are (`BlockWriter`); what is read has files of its own.
    made, pending = _Made(), _Pending(Files(target.staging, os.O_WRONLY))
    readable = Files(target.staging, os.O_RDWR)
    with writing(target), pending, contextlib.closing(readable):
        for number in numbers:
            item = layout.items[number]
            file, offset = item.placed.file, item.placed.offset
            if item.literal is not None:
                made.add(file, offset, len(item.literal), isal_zlib.crc32(item.literal))
            made.items += item.literal is not None or item.skeleton is not None
            if item.skeleton is None:
                continue
            crcs = _payloads(item, number, crc, readable)
            if layout.sums_payloads:
                made.payloads.update(crcs)
            for record, (start, nbytes) in item.skeleton.payloads.items():
                if record not in item.kept:  # those are among the copies
                    made.add(file, offset + start, nbytes, crcs[record])
            for start, data in item.skeleton.structure(crcs):
                made.add(file, offset + start, len(data), isal_zlib.crc32(data))
                pending.write(file, offset + start, data)
    for file, copies in own.copies.items():
        made.parts.setdefault(file, []).extend(copies)
    made.parts = {file: coalesced(parts) for file, parts in made.parts.items()}
    return made


class _Pending:
    """Writes of short pieces, in their order; it flushes them to the disk when its block ends."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._file, self._at, self._data = "", 0, bytearray()

    def __enter__(self) -> _Pending:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self.files.sync()
        finally:
            self.files.close()

    def write(self, file: str, at: int, data: bytes) -> None:
        """Write once it is known that nothing follows."""
        if file != self._file or at != self._at + len(self._data):
            self._flush()
            self._file, self._at, self._data = file, at, bytearray()
        self._data += data

    def _flush(self) -> None:
        done = 0
        if self._data:
            with self.files.opened(self._file) as descriptor, memoryview(self._data) as data:
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], self._at + done)


def _payloads(item: OutputItem, number: int, crc: _Crc, files: Files) -> dict[str, int]:
    """CRC-32 of every payload of an item that is laid out afresh."""
    assert item.skeleton is not None
    crcs = {record: known for record, (_, known) in item.kept.items() if known is not None}
    for record, (start, nbytes) in item.skeleton.payloads.items():
        if record in item.kept and record not in crcs:  # saved without checksums
            with files.opened(item.placed.file) as descriptor:
                crcs[record] = crc_of(descriptor, item.placed.offset + start, nbytes)
        elif record not in crcs:
            crcs[record] = crc(number, record, nbytes)
    return crcs


def _joined(layout: OutputLayout, target: Target, every: Sequence[_Made]) -> Structured:
    """What all ranks finished is the whole folder."""
    parts: dict[str, list[Part]] = {}
    payloads: dict[str, int] = {}
    for made in every:
        payloads.update(made.payloads)
        for file, known in made.parts.items():
            parts.setdefault(file, []).extend(known)
    wanted = sum(i.literal is not None or i.skeleton is not None for i in layout.items)
    finished = sum(made.items for made in every)
    if finished != wanted:
        raise PublishError(
            f"{finished} of {wanted} items were finished: this is a bug, please report it. Nothing "
            "was published"
        )
    with writing(target):
        for name in layout.files.keys() - parts.keys():  # of zeros alone: nobody wrote into it
            sync(target.staging / name)
    sums = {
        name: sum_of_parts(parts.get(name, ()), nbytes) for name, nbytes in layout.files.items()
    }
    return Structured(sums, payloads)
