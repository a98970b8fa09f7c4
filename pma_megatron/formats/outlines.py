"""Zips of many records that ranks of one save wrote alike: what they share is read once.

Under ZeRO-3 every rank's model states are a zip with a record for each parameter of the model, at
the same places in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pma_megatron.formats.zips import ReadAt, ZipRecord

_LARGE_BYTES = 4096
_MOST_BYTES = 16 << 20
_SUM_BYTES = 4


@dataclass(frozen=True)
class Outline:
    """What surrounds the records of a zip that was read, however many they are.

    A zip of as many bytes that has the same bytes there, but for checksums that are the same in
    both of their places, has the same records at the same places: nothing else would be found by
    reading it. What is in its records is not looked at.

    Attributes:
        length: bytes of the zip.
        spans: (first byte, bytes) of what is read of another: all but large records.
        said: those bytes, one span after the other.
        fixed: which of them must be the same.
        sums: of each record, where in `said` its checksum begins, twice: `[records, 2]`.
        records: by name; their checksums are those of the zip that was read.
    """

    length: int
    spans: tuple[tuple[int, int], ...]
    said: np.ndarray
    fixed: np.ndarray
    sums: np.ndarray
    records: Mapping[str, ZipRecord]

    @staticmethod
    def of(
        read_at: ReadAt,
        length: int,
        records: Mapping[str, ZipRecord],
        places: Mapping[str, tuple[int, int]],
    ) -> Outline | None:
        """The outline of a zip; None where there is too much around its records.

        Args:
            read_at, length: see `zips.read_records`.
            records, places: what `zips.read_placed` returned.
        """
        in_order = sorted(records.values(), key=lambda record: record.start)
        large = [record for record in in_order if record.nbytes > _LARGE_BYTES]
        edges = [0, *(e for r in large for e in (r.start, r.start + r.nbytes)), length]
        spans = [(low, high - low) for low, high in zip(edges[::2], edges[1::2], strict=True)]
        if sum(nbytes for _, nbytes in spans) > _MOST_BYTES:
            return None
        said = np.frombuffer(b"".join(read_at(*span) for span in spans), np.uint8)
        fixed = np.ones(len(said), dtype=bool)
        firsts = np.array([first for first, _ in spans])
        before = np.cumsum([0, *(nbytes for _, nbytes in spans)])[:-1]

        def inside(at: np.ndarray) -> np.ndarray:
            span = np.searchsorted(firsts, at, side="right") - 1
            found: np.ndarray = before[span] + at - firsts[span]
            return found

        sums = inside(np.array([places[name] for name in records], dtype=np.int64).reshape(-1, 2))
        fixed[(sums.reshape(-1, 1) + np.arange(_SUM_BYTES)).reshape(-1)] = False
        for record in in_order:
            if 0 < record.nbytes <= _LARGE_BYTES:
                low = int(inside(np.array(record.start)))
                fixed[low : low + record.nbytes] = False
        return Outline(length, tuple(spans), said, fixed, sums, records)

    def fits(self, read_at: ReadAt) -> Mapping[str, ZipRecord] | None:
        """The records of another zip of as many bytes; None if it is not like this one."""
        data = b"".join(read_at(*span) for span in self.spans)
        if len(data) != len(self.said):
            return None
        said = np.frombuffer(data, np.uint8)
        if ((said != self.said) & self.fixed).any():
            return None
        sums = self._sums(said)
        if (sums[:, 0] != sums[:, 1]).any():
            return None
        if np.array_equal(sums, self._own):
            return self.records
        crcs = sums[:, 0].copy()
        return OutlinedRecords(self, crcs, bool(crcs.any()))

    @cached_property
    def _own(self) -> np.ndarray:
        return self._sums(self.said)

    @cached_property
    def number_of(self) -> Mapping[str, int]:
        """Record -> its number."""
        return {name: number for number, name in enumerate(self.records)}

    def _sums(self, said: np.ndarray) -> np.ndarray:
        """The checksums that a zip says, `[records, 2]`."""
        each = said[self.sums[..., None] + np.arange(_SUM_BYTES)]
        found: np.ndarray = np.ascontiguousarray(each).view("<u4")[..., 0]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class OutlinedRecords(Mapping[str, ZipRecord]):
    """Records of a zip that has an outline, made when they are asked for.

    Attributes:
        outline: says where they are.
        crcs: their checksums, `[records]`.
        summed: whether the zip has any.
    """

    outline: Outline
    crcs: np.ndarray
    summed: bool

    def __len__(self) -> int:
        return len(self.crcs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline.records)

    def __getitem__(self, name: str) -> ZipRecord:
        like = self.outline.records[name]
        crc = int(self.crcs[self.outline.number_of[name]]) if self.summed else None
        return ZipRecord(name, like.start, like.nbytes, crc)
