"""Which bytes of one source were read, and their CRC-32, joined as they come.

A record is compared with its checksum as soon as all of it has been read, by any thread and in any
order. What other ranks must add to, or nobody read whole, stays open: see `integrity`.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from isal import isal_zlib

from pma_megatron.formats.base import StoredRecord
from pma_megatron.formats.items import refuse_other_bytes

Span = tuple[int, int, int]
"""(first byte, byte after the last, CRC-32) of a part of a record."""

Noted = tuple[StoredRecord, int, int, int]
"""A part of a record, as `Span`."""

SPANS = 1 << 16
"""Spans that are kept of one source."""


@dataclass(slots=True)
class Spans:
    """What was read of one record.

    Attributes:
        spans: in the order of their first byte; those that touch are one.
        uncounted: bytes that were read beside them, once there were too many spans to keep.
    """

    spans: list[Span] = field(default_factory=list)
    uncounted: int = 0

    def add(self, start: int, end: int, crc: int) -> None:
        """Add a part; what is known already adds nothing."""
        spans = self.spans
        at = bisect_right(spans, start, key=_first)
        if at and spans[at - 1][1] >= end:
            return
        if at and spans[at - 1][0] == start:
            at -= 1
            del spans[at]
        while at < len(spans) and spans[at][1] <= end:
            del spans[at]
        if at and spans[at - 1][1] == start:
            at -= 1
            start, crc = spans[at][0], isal_zlib.crc32_combine(spans.pop(at)[2], crc, end - start)
        if at < len(spans) and spans[at][0] == end:
            _, last, theirs = spans.pop(at)
            crc, end = isal_zlib.crc32_combine(crc, theirs, last - end), last
        spans.insert(at, (start, end, crc))

    def tiles(self, nbytes: int) -> list[tuple[int, int, int | None]]:
        """The record from its first byte to its last; what must be read again has no CRC."""
        tiles: list[tuple[int, int, int | None]] = []
        at = 0
        for span in sorted(self.spans, key=lambda s: (s[0], -s[1])):
            if span[0] < at:  # it overlaps the one before, and no part of a CRC can be cut off
                continue
            if span[0] > at:
                tiles.append((at, span[0], None))
            tiles.append(span)
            at = span[1]
        return [*tiles, (at, nbytes, None)] if at < nbytes else tiles

    def unread(self, nbytes: int) -> int:
        """Bytes of the record that nobody has read, at least."""
        read, at = self.uncounted, 0
        for start, end, _ in self.spans:
            read += max(0, end - max(at, start))
            at = max(at, end)
        return max(0, nbytes - read)


@dataclass(slots=True)
class _Run:
    """What a thread read of a record without a gap, and has not told the others."""

    record: StoredRecord
    start: int
    end: int
    crc: int


class Reads:
    """What was read of one source. Threads may share it.

    Each thread sums on as long as it reads on, and tells the others when it turns elsewhere: the
    books are kept per unit then, not per block. `settle` ends that.

    Attributes:
        path: the source, for messages.
        open: records that were read in part -> what is known of them.
        whole: records that were read whole; all of them had their checksum.
        unsummed: files with records that carry no checksum.
    """

    def __init__(self, path: str, limit: int = SPANS, *, telling: bool = False) -> None:
        """Keep at most `limit` spans; with `telling`, each thread must ask for its own (`told`)."""
        self.path = path
        self.open: dict[StoredRecord, Spans] = {}
        self.whole: set[StoredRecord] = set()
        self.unsummed: set[str] = set()
        self._limit, self._count = limit, 0
        self._lock = threading.Lock()
        self._runs: dict[int, _Run] = {}
        self._told: dict[int, list[Noted]] | None = {} if telling else None

    def note(self, record: StoredRecord, start: int, data: memoryview) -> None:
        """Take note of `data`, the bytes of `record` from its byte `start` on.

        Raises:
            CheckpointError: all of a record has been read now, and it is damaged.
        """
        if record.crc32 is None:
            self.unsummed.add(record.file)
            return
        run = self._runs.get(threading.get_ident())
        if run is not None and run.record is record and run.end == start:
            run.crc = isal_zlib.crc32(data, run.crc)
            run.end += len(data)
            self._ended(run)
        else:
            self._begin(_Run(record, start, start + len(data), isal_zlib.crc32(data)))

    def note_sum(self, record: StoredRecord, start: int, nbytes: int, crc: int) -> None:
        """Take note of `nbytes` whose CRC-32 is known; see `note`."""
        if record.crc32 is None:
            self.unsummed.add(record.file)
            return
        run = self._runs.get(threading.get_ident())
        if run is not None and run.record is record and run.end == start:
            run.crc = isal_zlib.crc32_combine(run.crc, crc, nbytes)
            run.end += nbytes
            self._ended(run)
        else:
            self._begin(_Run(record, start, start + nbytes, crc))

    def _begin(self, run: _Run) -> None:
        thread = threading.get_ident()
        last = self._runs.get(thread)
        self._runs[thread] = run
        if last is not None:
            self._add(last.record, last.start, last.end, last.crc)
        self._ended(run)

    def _ended(self, run: _Run) -> None:
        """Tell the others, if the record ends here."""
        if run.end == run.record.nbytes:
            del self._runs[threading.get_ident()]
            self._add(run.record, run.start, run.end, run.crc)

    def told(self) -> list[Noted]:
        """What this thread read since it last asked, but for records that it read in one go.

        Raises:
            CheckpointError: see `note`.
        """
        thread = threading.get_ident()
        run = self._runs.pop(thread, None)
        if run is not None:
            self._add(run.record, run.start, run.end, run.crc)
        return [] if self._told is None else self._told.pop(thread, [])

    def recall(self, noted: Iterable[Noted], unsummed: Iterable[str]) -> None:
        """Take note of what an earlier job read, and has told; raises as `note`."""
        with self._lock:
            self.unsummed.update(unsummed)
        for record, start, end, crc in noted:
            self._add(record, start, end, crc, tell=False)

    def settle(self) -> None:
        """Put together what threads have read; none of them reads any more.

        Raises:
            CheckpointError: a record that was read whole is damaged.
        """
        while self._runs:
            _, run = self._runs.popitem()
            self._add(run.record, run.start, run.end, run.crc)

    def _add(
        self, record: StoredRecord, start: int, end: int, crc: int, *, tell: bool = True
    ) -> None:
        with self._lock:
            if record in self.whole:
                return
            if start == 0 and end == record.nbytes:
                self._close(record, crc)
                return
            if tell and self._told is not None:
                noted = (record, start, end, crc)
                self._told.setdefault(threading.get_ident(), []).append(noted)
            found = self.open.get(record)
            if found is None:
                found = self.open[record] = Spans()
            if found.uncounted:
                found.uncounted += end - start
                return
            before = len(found.spans)
            found.add(start, end, crc)
            self._count += len(found.spans) - before
            if found.spans[0][:2] == (0, record.nbytes):
                self._close(record, found.spans[0][2])
            elif self._count > self._limit:  # from here on its bytes are counted, and that is all
                self._count -= len(found.spans)
                found.uncounted = record.nbytes - found.unread(record.nbytes)
                found.spans.clear()

    def _close(self, record: StoredRecord, crc: int) -> None:
        spans = self.open.pop(record, None)
        self._count -= 0 if spans is None else len(spans.spans)
        refuse_other_bytes(self.path, record, crc)
        self.whole.add(record)


def joined(parts: Iterable[Spans]) -> Spans:
    """What several ranks know of one record."""
    result = Spans()
    for part in parts:
        result.uncounted += part.uncounted
        for span in part.spans:
            result.add(*span)
    return result


def _first(span: Span) -> int:
    return span[0]
