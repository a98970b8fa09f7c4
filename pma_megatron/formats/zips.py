"""The zip that `torch.save` writes: find the tensor payloads inside it, and lay out a new one.

Payloads are stored uncompressed, so a slice of a tensor is a byte range of the file. torch writes
sizes only into the central directory at the END of the zip (APPNOTE.TXT 4.3.12), so an index costs
two small reads, whatever the payload's size. Source: caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from isal import isal_zlib

from pma_megatron.errors import CheckpointError

ALIGNMENT_BYTES = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
# The same as they are written: no flags, no compression, no times, no comments.
_NEW_LOCAL = struct.Struct("<4sH8x3I2H")
_NEW_CENTRAL = struct.Struct("<4s2H8x3I2H10xI")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_HAS_DESCRIPTOR = 0x8
_AFTER = b"PK\x07\x08"  # of a descriptor, which follows a record's bytes
_ID = ".data/serialization_id"  # digits made of all checksums
_SUM_IN_CENTRAL, _SUM_IN_LOCAL = 16, 14  # bytes before the checksum in such a header
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_LIMIT = 0xFFFFFFFF
_TAIL_BYTES = 4096

ReadAt = Callable[[int, int], bytes]
"""(offset from the start of the zip, number of bytes) -> bytes, shorter only at the end."""


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One file of the zip: `start` is where its bytes begin, relative to the zip's first byte.

    `crc32` is None in a zip without checksums (`torch.serialization.set_crc32_options(False)`).
    """

    name: str
    start: int
    nbytes: int
    crc32: int | None


def read_records(read_at: ReadAt, length: int, *, what: str) -> dict[str, ZipRecord]:
    """Index a zip of `length` bytes by record name without its first folder (`data/0`).

    Raises:
        CheckpointError: it is not a zip of stored records, it is cut short, or what surrounds a
            record contradicts the directory.
    """
    return read_placed(read_at, length, what=what)[0]


def read_placed(
    read_at: ReadAt, length: int, *, what: str
) -> tuple[dict[str, ZipRecord], dict[str, tuple[int, int]]]:
    """The same, and per record the bytes of the zip at which its checksum stands: in the directory,
    and beside the record.

    Raises:
        CheckpointError: see `read_records`.
    """
    try:
        return _read_records(read_at, length)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{what} is not a readable torch.save item ({error}): the file is truncated or "
            "damaged. Exclude this checkpoint or restore the file."
        ) from error


@dataclass(frozen=True, slots=True)
class Mould:
    """What surrounds the records of a zip that was read: zips of tensors of a shape share it.

    A zip that has the same bytes there, but for checksums that are the same in both of their
    places, has the same records at the same places: nothing else would be found by reading it.

    Attributes:
        head: bytes before those of its large record, `data.pkl` among them.
        tail_bytes: how many come after them.
        fixed: ranges of those that must be `said`; between them lie checksums and an id.
        said: their bytes, one after the other.
        sums: per record that varies, its name and the two places of its checksum.
        records: all of them.
    """

    head: bytes
    tail_bytes: int
    fixed: tuple[slice, ...]
    said: bytes
    sums: tuple[tuple[str, slice, slice], ...]
    records: Mapping[str, ZipRecord]

    @staticmethod
    def of(read_at: ReadAt, length: int, records: Mapping[str, ZipRecord]) -> Mould | None:
        """The mould of a zip with one large record; None where others may not be like it.

        Args:
            read_at, length: see `read_records`.
            records: what that returned.
        """
        large = max(records.values(), key=lambda record: record.nbytes)
        end = large.start + large.nbytes
        pickle = records.get("data.pkl")
        if pickle is None or not pickle.crc32 or large.name in (pickle.name, _ID):
            return None  # without a checksum there, others may mean something else
        if pickle.start > large.start or max(large.start, length - end) > _TAIL_BYTES:
            return None
        tail, free, sums = read_at(end, length - end), [], []
        for record in (large, *(records[name] for name in (_ID,) if name in records)):
            after = record.start + record.nbytes - end
            said = struct.pack("<I", record.crc32 or 0)
            at = tail.rfind(said)
            if after < 0 or tail[after : after + 8] != _AFTER + said or tail.count(said) != 2:
                return None
            sums.append((record.name, slice(after + 4, after + 8), slice(at, at + 4)))
            content = slice(max(record.start - end, 0), after)
            free += [content, *sums[-1][1:]]
        free.sort(key=lambda part: part.start)
        edges = [0, *(edge for part in free for edge in (part.start, part.stop)), len(tail)]
        if edges != sorted(edges):
            return None
        fixed = tuple(slice(*pair) for pair in zip(edges[::2], edges[1::2], strict=True))
        said = b"".join([tail[part] for part in fixed])
        return Mould(read_at(0, large.start), len(tail), fixed, said, tuple(sums), records)

    def fits(self, read_at: ReadAt, length: int) -> Mapping[str, ZipRecord] | None:
        """The records of another zip, as long as this one was; None if it is not like it."""
        if read_at(0, len(self.head)) != self.head:
            return None
        tail = read_at(length - self.tail_bytes, self.tail_bytes)
        if b"".join([tail[part] for part in self.fixed]) != self.said:
            return None
        found = dict(self.records)
        for name, one, other in self.sums:
            if tail[one] != tail[other]:
                return None
            old = found[name]
            crc = int.from_bytes(tail[one], "little")
            found[name] = ZipRecord(name, old.start, old.nbytes, crc)
        return found


def _read_records(
    read_at: ReadAt, length: int
) -> tuple[dict[str, ZipRecord], dict[str, tuple[int, int]]]:
    tail_start = max(0, length - _TAIL_BYTES)
    tail = read_at(tail_start, length - tail_start)
    end = tail.rfind(b"PK\x05\x06")
    if len(tail) != length - tail_start or end < 0:
        raise ValueError("no end-of-directory record")
    _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, end)
    if count == 0xFFFF or size == _LIMIT or offset == _LIMIT:
        signature, _, at, _ = _LOCATOR64.unpack_from(tail, end - _LOCATOR64.size)
        if signature != b"PK\x06\x07" or at + _END64.size > length:
            raise ValueError("no zip64 locator")
        _, _, _, _, _, _, _, count, size, offset = _END64.unpack(read_at(at, _END64.size))
    if offset + size > length:
        raise ValueError("the directory reaches past the end")
    inside = offset >= tail_start
    directory = tail[offset - tail_start :][:size] if inside else read_at(offset, size)
    entries, at = [], 0
    for _ in range(count):
        entry = _CENTRAL.unpack_from(directory, at)
        name_len, extra_len, comment_len = entry[10], entry[11], entry[12]
        said_at = offset + at + _SUM_IN_CENTRAL
        at += _CENTRAL.size
        name = directory[at : at + name_len]
        extra = directory[at + name_len : at + name_len + extra_len]
        at += name_len + extra_len + comment_len
        if entry[0] != b"PK\x01\x02" or entry[4] != 0:
            raise ValueError(f"record {name.decode()!r} is compressed or damaged")
        packed, nbytes, header = _zip64_sizes(extra, entry[8], entry[9], entry[16])
        if packed != nbytes or header + _LOCAL.size + nbytes > offset:
            raise ValueError(f"record {name.decode()!r} does not lie where the directory says")
        entries.append(_Entry(name, header, nbytes, entry[7], said_at))
    # torch writes zeros instead of checksums if it is told to; some record of a zip has bytes.
    summed = any(entry.crc32 for entry in entries)
    records: dict[str, ZipRecord] = {}
    places: dict[str, tuple[int, int]] = {}
    entries.sort(key=lambda entry: entry.header)
    ends = [*(entry.header for entry in entries[1:]), offset]
    for each, end in zip(entries, ends, strict=True):
        start, said_at = _check_surroundings(read_at, each, end)
        short = each.name.decode().partition("/")[2]
        if short in records:
            raise ValueError(f"record {short!r} is there twice")
        records[short] = ZipRecord(short, start, each.nbytes, each.crc32 if summed else None)
        places[short] = each.said_at, said_at
    return records, places


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the central directory says of a record, and where in the zip it says the checksum."""

    name: bytes
    header: int
    nbytes: int
    crc32: int
    said_at: int


def _check_surroundings(read_at: ReadAt, entry: _Entry, end: int) -> tuple[int, int]:
    """Where a record's bytes begin, and where its checksum stands beside them; what comes before
    and after them must be as the directory says.

    Raises:
        ValueError: it is not.
    """
    fixed = read_at(entry.header, _LOCAL.size + len(entry.name))
    local = _LOCAL.unpack_from(fixed)
    start: int = entry.header + _LOCAL.size + local[9] + local[10]
    after = start + entry.nbytes
    if local[0] != b"PK\x03\x04" or local[3] != 0 or fixed[_LOCAL.size :] != entry.name:
        raise ValueError(f"record {entry.name.decode()!r} does not lie where the directory says")
    if after > end:
        raise ValueError(f"record {entry.name.decode()!r} reaches into the next one")
    if local[2] & _HAS_DESCRIPTOR:  # sizes and checksum follow the bytes
        tail = read_at(after, min(_DESCRIPTOR64.size, end - after))
        said = (_AFTER, entry.crc32, entry.nbytes, entry.nbytes)
        narrow = entry.nbytes <= _LIMIT and tail.startswith(_DESCRIPTOR.pack(*said))
        right = narrow or tail == _DESCRIPTOR64.pack(*said)
        said_at = after + len(_AFTER)
    else:
        said_at = entry.header + _SUM_IN_LOCAL
        right = local[6] == entry.crc32 and local[8] in (entry.nbytes, _LIMIT)
    if not right:
        raise ValueError(
            f"record {entry.name.decode()!r} has another size or checksum in its own header than "
            "in the directory"
        )
    return start, said_at


def _zip64_sizes(extra: bytes, packed: int, nbytes: int, header: int) -> tuple[int, int, int]:
    values = [nbytes, packed, header]  # the order in which the extra field holds them
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = [i for i, value in enumerate(values) if value == _LIMIT]
            numbers = struct.unpack_from(f"<{len(wide)}Q", extra, at + 4)
            for i, number in zip(wide, numbers, strict=True):
                values[i] = number
        at += 4 + size
    return values[1], values[0], values[2]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A zip to be written: where each payload goes, and everything around the payloads.

    Attributes:
        length: bytes of the whole zip.
        payloads: record name -> (start relative to the zip, bytes).
    """

    length: int
    payloads: Mapping[str, tuple[int, int]]
    _records: tuple[tuple[str, int, int, bytes | None, int], ...]  # name, header, start, data, n
    _directory_start: int

    def structure(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """All bytes but the payloads, as (offset, bytes), once the payloads' CRC-32 are known."""
        pieces: list[tuple[int, bytes]] = []
        directory = b""
        for name, header, start, data, nbytes in self._records:
            crc = crcs[name] if data is None else isal_zlib.crc32(data)
            full = f"archive/{name}".encode()
            local_extra = _extra(header, start, len(full), nbytes)
            size, version = min(nbytes, _LIMIT), 45 if nbytes >= _LIMIT else 20
            lengths = len(full), len(local_extra)
            local = _NEW_LOCAL.pack(b"PK\x03\x04", version, crc, size, size, *lengths)
            pieces.append((header, local + full + local_extra + (data or b"")))
            directory += _central_entry(full, crc, nbytes, header)
        end = _end_records(len(self._records), len(directory), self._directory_start)
        pieces.append((self._directory_start, directory + end))
        return pieces


def lay_out(
    pickle_bytes: bytes,
    payloads: Sequence[tuple[str, int]],
    literals: Mapping[str, bytes] | None = None,
) -> Skeleton:
    """Lay out the zip of one `torch.save`.

    Args:
        pickle_bytes: the content of `data.pkl`.
        payloads: (storage key, bytes) of each tensor storage, in the order of the file.
        literals: storage key -> its bytes, for small ones that are known already.
    """
    known = literals or {}
    small: list[tuple[str, bytes | None, int]] = [
        ("data.pkl", pickle_bytes, len(pickle_bytes)),
        (".format_version", b"1", 1),
        (".storage_alignment", str(ALIGNMENT_BYTES).encode(), 2),
        ("byteorder", b"little", 6),
    ]
    big: list[tuple[str, bytes | None, int]] = [(f"data/{k}", known.get(k), n) for k, n in payloads]
    records, starts, at = [], {}, 0
    for name, data, nbytes in [*small, *big, ("version", b"3\n", 2)]:
        fixed = _LOCAL.size + len(f"archive/{name}") + (20 if nbytes >= _LIMIT else 0)
        start = at + fixed
        if name.startswith("data/"):  # aligned, torch.load(mmap=True) can map it into memory
            start += 4
            start += -start % ALIGNMENT_BYTES
            if data is None:
                starts[name] = (start, nbytes)
        records.append((name, at, start, data, nbytes))
        at = start + nbytes
    directory_bytes = sum(
        len(_central_entry(f"archive/{name}".encode(), 0, nbytes, header))
        for name, header, _, _, nbytes in records
    )
    end = _end_records(len(records), directory_bytes, at)
    return Skeleton(at + directory_bytes + len(end), starts, tuple(records), at)


def _extra(header: int, start: int, name_bytes: int, nbytes: int) -> bytes:
    extra = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= _LIMIT else b""
    padding = start - header - _LOCAL.size - name_bytes - len(extra)
    return extra + (
        struct.pack("<2s H", b"FB", padding - 4) + b"Z" * (padding - 4) if padding else b""
    )


def _central_entry(name: bytes, crc: int, nbytes: int, header: int) -> bytes:
    wide = [value for value in (nbytes, nbytes, header) if value >= _LIMIT]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, at = min(nbytes, _LIMIT), min(header, _LIMIT)
    version = 45 if wide else 20
    lengths = len(name), len(extra)
    entry = _NEW_CENTRAL.pack(b"PK\x01\x02", version, version, crc, size, size, *lengths, at)
    return entry + name + extra


def _end_records(count: int, directory_bytes: int, directory_start: int) -> bytes:
    if directory_start < _LIMIT and count < 0xFFFF:
        return _END.pack(b"PK\x05\x06", 0, 0, count, count, directory_bytes, directory_start, 0)
    end64 = _END64.pack(
        b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, directory_bytes, directory_start
    )
    locator = _LOCATOR64.pack(b"PK\x06\x07", 0, directory_start + directory_bytes, 1)
    return end64 + locator + _END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _LIMIT, _LIMIT, 0)
