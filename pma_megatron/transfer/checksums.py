"""Checksums of what is written, put together from parts that many ranks write in any order."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

from isal import isal_zlib

from pma_megatron.errors import PublishError
from pma_megatron.formats.output import Destination

_COPY_BYTES = 1 << 20
_LONGEST = 1 << 60  # bytes of a file


class Checksums:
    """CRC-32 of everything written into payloads, joined in any order.

    Attributes:
        parts: (item, record) -> [(start in bytes, bytes, crc)].
        copies: file -> the same of bytes that were copied, counted from the file's beginning.
    """

    def __init__(self) -> None:
        self.parts: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
        self.copies: dict[str, list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()
        self._told: dict[int, dict[Any, tuple[int, int]]] = {}

    def add(self, place: Destination, start_bytes: int, data: memoryview) -> None:
        """Note `data`, written at `start_bytes` of the payload at `place`."""
        self.add_sum(place, start_bytes, len(data), isal_zlib.crc32(data))

    def add_sum(self, place: Destination, start_bytes: int, nbytes: int, crc: int) -> None:
        """Note `nbytes` whose CRC-32 is known; see `add`."""
        with self._lock:
            self.parts.setdefault((place.item, place.record), []).append((start_bytes, nbytes, crc))
            self._tell((place.item, place.record), nbytes, placed(place, start_bytes, nbytes, crc))

    def add_copy(self, file: str, offset: int, nbytes: int, crc: int) -> None:
        """Note `nbytes` that were copied to `offset` of `file`."""
        with self._lock:
            self.copies.setdefault(file, []).append((offset, nbytes, crc))
            self._tell(file, nbytes, _shifted(nbytes, crc, _LONGEST - offset - nbytes))

    def told(self) -> int:
        """A checksum of what this thread noted since it last asked, in whatever parts it did.

        0 if it noted nothing.
        """
        noted = self._told.pop(threading.get_ident(), {})
        return isal_zlib.crc32(repr(sorted(noted.items(), key=str)).encode()) if noted else 0

    def join(self, other: Checksums) -> None:
        """Take over what `other`, of the same kind, has noted."""
        with self._lock:
            for place, parts in other.parts.items():
                self.parts.setdefault(place, []).extend(parts)
            for file, copies in other.copies.items():
                self.copies.setdefault(file, []).extend(copies)

    def _tell(self, where: Any, nbytes: int, part: int) -> None:
        own = self._told.setdefault(threading.get_ident(), {})
        before, sum_ = own.get(where, (0, 0))
        own[where] = before + nbytes, sum_ ^ part

    def __getstate__(self) -> tuple[object, ...]:
        return self.parts, self.copies

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        (self.parts, self.copies), self._lock, self._told = state, threading.Lock(), {}


def joined_crc(parts: Sequence[tuple[int, int, int]], nbytes: int) -> int:
    """CRC-32 of a payload of `nbytes` from its parts (start, bytes, crc).

    Raises:
        PublishError: the parts do not cover the payload exactly: planned and written differ.
    """
    crc, at = 0, 0
    for start, count, part in [*sorted(parts), (nbytes, 0, 0)]:
        if start != at:
            raise PublishError(
                f"a payload has {start - at} bytes unaccounted for at {at}: this is a bug, please "
                "report it. Nothing was published"
            )
        crc = isal_zlib.crc32_combine(crc, part, count) if count else crc
        at += count
    return crc


def crc_of(descriptor: int, offset: int, nbytes: int) -> int:
    """CRC-32 of bytes of an open file."""
    crc = 0
    for at in range(offset, offset + nbytes, _COPY_BYTES):
        crc = isal_zlib.crc32(os.pread(descriptor, min(_COPY_BYTES, offset + nbytes - at), at), crc)
    return crc


class ScatteredChecksums(Checksums):
    """The same where a payload is written in very many short parts: one number per payload.

    CRC-32 is linear: that of a payload is the sum (exclusive or) of what each part gives alone at
    its place among zeros, in whatever order the parts come.

    Attributes:
        sums: (item, record) -> (bytes, what they give).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[tuple[int, str], tuple[int, int]] = {}

    def add_sum(self, place: Destination, start_bytes: int, nbytes: int, crc: int) -> None:
        """See `Checksums.add_sum`."""
        part = placed(place, start_bytes, nbytes, crc)
        with self._lock:
            before, sum_ = self.sums.get((place.item, place.record), (0, 0))
            self.sums[place.item, place.record] = before + nbytes, sum_ ^ part
            self._tell((place.item, place.record), nbytes, part)

    def join(self, other: Checksums) -> None:
        """See `Checksums.join`."""
        assert isinstance(other, ScatteredChecksums)
        super().join(other)
        with self._lock:
            for place, (count, part) in other.sums.items():
                nbytes, sum_ = self.sums.get(place, (0, 0))
                self.sums[place] = nbytes + count, sum_ ^ part

    def __getstate__(self) -> tuple[object, ...]:
        return (*super().__getstate__(), self.sums)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:2])
        self.sums = state[2]


def placed(place: Destination, start_bytes: int, nbytes: int, crc: int) -> int:
    """What `nbytes` with that CRC-32 give to the one of their payload, alone among zeros."""
    after = place.numel * place.dtype.itemsize - start_bytes - nbytes
    return _shifted(nbytes, crc, after)


def _shifted(nbytes: int, crc: int, after: int) -> int:
    return isal_zlib.crc32_combine(crc ^ crc_of_zeros(nbytes), 0, after)


def scattered_crc(sums: Sequence[tuple[int, int]], nbytes: int) -> int:
    """CRC-32 of a payload of `nbytes` from `ScatteredChecksums.sums` of all who wrote it.

    Raises:
        PublishError: the parts do not have as many bytes as the payload.
    """
    written, crc = 0, crc_of_zeros(nbytes)
    for count, sum_ in sums:
        written, crc = written + count, crc ^ sum_
    if written != nbytes:
        raise PublishError(
            f"{written} bytes were written of a tensor of {nbytes}: this is a bug, please report "
            "it. Nothing was published"
        )
    return crc


@functools.lru_cache(maxsize=1 << 12)
def crc_of_zeros(nbytes: int) -> int:
    """CRC-32 of `nbytes` zeros.

    >>> import zlib
    >>> crc_of_zeros(1000) == zlib.crc32(bytes(1000))
    True
    """
    if nbytes <= _COPY_BYTES:
        return isal_zlib.crc32(bytes(nbytes))
    half, rest = divmod(nbytes, 2)
    crc = crc_of_zeros(half)
    crc = isal_zlib.crc32_combine(crc, crc, half)
    return isal_zlib.crc32(b"\0", crc) if rest else crc
