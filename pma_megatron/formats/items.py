"""Torch-saved items inside the files of one folder: where a payload's bytes are."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from isal import isal_zlib

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.base.openfiles import MAX_COPIED_BYTES, Files, open_source, read_at, unread
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item, Payload, StoredRecord
from pma_megatron.formats.outlines import Outline
from pma_megatron.formats.pickles import TensorRef, load_inert
from pma_megatron.formats.schema import LIMIT
from pma_megatron.formats.zips import Mould, ReadAt, ZipRecord, read_placed, read_records
from pma_megatron.storage.paths import in_store
from pma_megatron.storage.spool import ahead

_WINDOW_BYTES = 4096  # headers of small records share one read
_MOULDS, _LIKE = 256, 4
"""Lengths of zips of a tensor of which some are known, and how many of one length: a tensor of
other dimensions has as many bytes."""
_PICKLE_BYTES, _PICKLES = 4096, 1024
"""Pickles of one tensor whose values are kept: tensors of one shape have the same bytes there."""


class ItemFiles:
    """The items of one checkpoint folder, indexed when first asked for. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._indexes: dict[Item, Mapping[str, ZipRecord]] = {}
        self._outlines: dict[int, tuple[Outline, ...]] = {}
        self._stored: dict[Item, tuple[StoredRecord, ...]] = {}
        self._found: dict[Payload, tuple[StoredRecord, int]] = {}
        self._moulds: dict[int, tuple[tuple[Mould, Any], ...]] = {}
        self._lock = threading.Lock()
        self._files: Files | None = None

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Files that are read in the block stay open to its end: for very many small reads."""
        files = Files(self.path, os.O_RDONLY)
        try:
            with self.reading_with(files):
                yield
        finally:
            files.close()

    @contextlib.contextmanager
    def reading_with(self, files: Files) -> Iterator[None]:
        """In the block what is read here is read from those files, which stay open meanwhile."""
        before = self._files
        self._files = files if before is None else before
        try:
            yield
        finally:
            self._files = before

    def records(self, item: Item, content: memoryview | None = None) -> Mapping[str, ZipRecord]:
        """Index of the zip at `item`, read once; `content` is all of it, where that is at hand."""
        found = self._indexes.get(item)
        if found is None:
            if content is None:
                with self._opened(item) as read_at:
                    found = self._read_records(read_at, item)
            else:
                found = read_records(partial(_cut, content), item.length, what=self._at(item))
            with self._lock:
                self._indexes[item] = found
        return found

    def _read_records(self, read_at: ReadAt, item: Item) -> Mapping[str, ZipRecord]:
        """Index of a zip; of one as long as the one before it, by what surrounds its records."""
        length = item.length
        known = self._outlines.get(length)
        for outline in known or ():
            found = outline.fits(read_at)
            if found is not None:
                return found
        records, places = read_placed(read_at, length, what=self._at(item))
        # Of a length that is met once nothing is kept: most zips of a folder have one of their own.
        made = None if known is None else Outline.of(read_at, length, records, places)
        with self._lock:
            if length in self._outlines or len(self._outlines) < _MOULDS:
                news = () if made is None else (made,)
                self._outlines[length] = (*(known or ()), *news)[-_LIKE:]
        return records

    def check(self, item: Item) -> None:
        """There is a zip at `item`; nothing of it is kept. Raises as `records`."""
        if item not in self._indexes:
            with self._opened(item) as read_at:
                read_records(read_at, item.length, what=self._at(item))

    def look_ahead(self, items: Iterable[Item]) -> None:
        """Zips are looked at soon: of objects of a store, both ends of each are asked for now."""
        for item in items if in_store(self.path) else ():
            with contextlib.suppress(OSError):  # said when it is read
                descriptor = open_source(self.path / item.file, whole=False)
                try:
                    for at in (item.offset, item.offset + max(item.length - _WINDOW_BYTES, 0)):
                        ahead(descriptor, at, min(_WINDOW_BYTES, item.length))
                finally:
                    os.close(descriptor)

    def stored(self, item: Item, content: memoryview | None = None) -> tuple[StoredRecord, ...]:
        """The records of the zip at `item` by place in its file, in that order; see `records`."""
        found = self._stored.get(item)
        if found is None:
            indexed = self.records(item, content).values()
            records = sorted(indexed, key=lambda record: record.start)
            found = tuple(_placed(item, record) for record in records)
            with self._lock:
                found = self._stored.setdefault(item, found)
        return found

    def read_record(self, item: Item, name: str) -> bytes:
        """The bytes of one small record of `item`, compared with their checksum.

        Raises:
            CheckpointError: the item has no such record, or its bytes are damaged.
        """
        with self._opened(item) as read_at:
            found = self._indexes.get(item)
            if found is None:
                found = self._read_records(read_at, item)
                with self._lock:
                    self._indexes[item] = found
            record = found.get(name)
            if record is None:
                raise CheckpointError(f"{self.path / item.file} at {item.offset} has no {name}")
            data = read_at(record.start, record.nbytes)
        refuse_other_bytes(self.path, _placed(item, record), isal_zlib.crc32(data))
        return data

    def read_small(self, file: str) -> bytes:
        """A small file whole; if it is torch's zip, every record is compared with its checksum.

        Raises:
            CheckpointError: it is missing or damaged, or longer than such files are.
        """
        nbytes = size_of(self.path / file)
        if nbytes > MAX_COPIED_BYTES:
            raise CheckpointError(
                f"{self.path / file} has {nbytes} bytes, and is no payload that is known: move "
                "it out of the checkpoint, or exclude this checkpoint"
            )
        data = self.read(file, 0, nbytes)
        if file.endswith(".pt") and data[:2] == b"PK":
            item = Item(file, 0, nbytes)
            for record in self.records(item):
                self.read_record(item, record)
        return data

    def decode(self, item: Item, what: str, known: Set[tuple[str, str]] | None = None) -> Any:
        """What the pickle of `item` says, every tensor in a record that holds it; `load_inert`.

        Raises:
            CheckpointError: it is damaged or hostile.
        """
        sizes = {name: record.nbytes for name, record in self.records(item).items()}
        return load_inert(self.read_record(item, "data.pkl"), what=what, known=known, sizes=sizes)

    def locate(self, payload: Payload) -> tuple[Path, int]:
        """File and byte offset of the first element of `payload`.

        Raises:
            CheckpointError: the item does not hold the tensor that the metadata promises.
        """
        record, skip = self.find(payload)
        return self.path / record.file, record.start + skip

    def find(self, payload: Payload) -> tuple[StoredRecord, int]:
        """The record that holds `payload`, and the byte of it at which the first element lies.

        Raises:
            CheckpointError: see `locate`.
        """
        found = self._found.get(payload)
        if found is None:
            found = self._find(payload)
            with self._lock:
                self._found[payload] = found
        return found

    def _find(self, payload: Payload) -> tuple[StoredRecord, int]:
        item, name, skip = payload.item, payload.record, 0
        if name is None:
            ref, records = self._tensor(item)
            numel = math.prod(ref.size)
            if numel != payload.numel or ref.storage.dtype != payload.dtype:
                raise CheckpointError(
                    f"{self._at(item)} holds {numel} elements of {ref.storage.dtype}, .metadata "
                    f"says {payload.numel} of {payload.dtype}: damaged, exclude this checkpoint"
                )
            name, skip = f"data/{ref.storage.key}", ref.offset * payload.dtype.itemsize
        else:
            records = self.records(item)
        record = records.get(name)
        if record is None or record.nbytes < skip + payload.nbytes:
            raise CheckpointError(
                f"{self._at(item)}: record {name} is missing or shorter "
                f"than {skip + payload.nbytes} bytes: damaged, exclude this checkpoint"
            )
        return _placed(item, record), skip

    def _tensor(self, item: Item) -> tuple[TensorRef, Mapping[str, ZipRecord]]:
        """The one tensor of `item`, and its records, which are not kept: items are many."""
        ref = None
        with self._opened(item) as read_at:
            records: Mapping[str, ZipRecord] | None = self._indexes.get(item)
            known = self._moulds.get(item.length, ())
            for mould, like in known if records is None else ():
                records = mould.fits(read_at, item.length)
                if records is not None:
                    ref = like
                    break
            if records is None:
                records = read_records(read_at, item.length, what=self._at(item))
            said = records.get("data.pkl")
            if ref is None and said is not None and said.nbytes <= _PICKLE_BYTES:
                data = read_at(said.start, said.nbytes)
                refuse_other_bytes(self.path, _placed(item, said), isal_zlib.crc32(data))
                with contextlib.suppress(CheckpointError):  # said again below, with a place
                    ref = _decoded(data, tuple((r.name, r.nbytes) for r in records.values()))
                    if len(known) < _LIKE:
                        self._keep(Mould.of(read_at, item.length, records), ref, item.length)
        if ref is None:
            ref = self.decode(item, self._at(item))
        if not isinstance(ref, TensorRef) or not ref.is_contiguous():
            raise CheckpointError(f"{self._at(item)} holds {ref!r}, expected one contiguous tensor")
        return ref, records

    def _keep(self, mould: Mould | None, ref: Any, length: int) -> None:
        """What a zip of a tensor is like, for others of as many bytes."""
        if mould is None:
            return
        with self._lock:
            if length in self._moulds or len(self._moulds) < _MOULDS:
                self._moulds[length] = (*self._moulds.get(length, ()), (mould, ref))

    def _at(self, item: Item) -> str:
        return f"{self.path}/{item.file} at {item.offset}"

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` of `file` at `offset`.

        Raises:
            CheckpointError: the file is missing or too short.
        """
        with self._open(file) as read:
            return read(offset, nbytes)

    @contextlib.contextmanager
    def _opened(self, item: Item) -> Iterator[ReadAt]:
        """Reads of `item`, whose file is open in the block; those that lie together are one."""
        first, window = 0, b""

        def read_at(offset: int, nbytes: int) -> bytes:
            nonlocal first, window
            if offset < first or offset + nbytes > first + len(window):
                wanted = max(nbytes, min(_WINDOW_BYTES, item.length - offset))
                first, window = offset, read(item.offset + offset, wanted)
            return window[offset - first : offset - first + nbytes]

        with self._open(item.file) as read:
            yield read_at

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Callable[[int, int], bytes]]:
        """Reads of `file`, (offset, bytes) -> bytes, which is open in the block; see `read`."""
        files = self._files

        def read(offset: int, nbytes: int) -> bytes:
            there = nbytes
            if nbytes > _WINDOW_BYTES:  # before it is allocated
                there = min(nbytes, max(os.fstat(descriptor).st_size - offset, 0))
            data = bytearray(there)
            got = read_at(descriptor, memoryview(data), min(offset, LIMIT - 1))
            if got != nbytes:
                raise CheckpointError(
                    f"{self.path / file} ends at byte {offset + got}, {offset + nbytes} are "
                    "needed: it was truncated or replaced. Run `pma list`, then merge again "
                    "without it"
                )
            return bytes(data)

        try:
            if files is not None:
                with files.opened(file) as descriptor:
                    yield read
                return
            descriptor = open_source(self.path / file, whole=False)
            try:
                yield read
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unread(self.path / file, error) from error


@lru_cache(maxsize=_PICKLES)
def _decoded(data: bytes, sizes: tuple[tuple[str, int], ...]) -> Any:
    """What a small pickle says, in a zip with records of these sizes."""
    return load_inert(data, what="an item", sizes=dict(sizes))


def refuse_other_bytes(folder: Path | str, record: StoredRecord, crc32: int) -> None:
    """Bytes that are not those that were saved are refused.

    Args:
        folder: the checkpoint.
        record: one of its records; without a checksum it passes.
        crc32: of the bytes that were read.

    Raises:
        CheckpointError: they differ.
    """
    if record.crc32 not in (None, crc32):
        raise CheckpointError(
            f"{folder}/{record.file}: record {record.name} at byte {record.start} is damaged: "
            f"{record.nbytes} bytes with CRC-32 {crc32:08x}, the file says {record.crc32:08x}. "
            f"Restore the file from a copy, or {left_out(str(folder))}"
        )


def payload_of(item: Item, ref: TensorRef) -> Payload:
    """The storage of a tensor of `item`."""
    return Payload(item, ref.storage.dtype, ref.storage.numel, f"data/{ref.storage.key}")


def piece_of(item: Item, ref: TensorRef) -> Piece[Payload]:
    """A contiguous tensor of `item`, all of it."""
    return Piece(Box.whole(ref.size), payload_of(item, ref), ref.offset)


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        CheckpointError: it is gone.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be read ({error.strerror}): exclude this checkpoint, or restore it"
        ) from error


def _cut(content: memoryview, offset: int, nbytes: int) -> bytes:
    return bytes(content[offset : offset + nbytes])


def _placed(item: Item, record: ZipRecord) -> StoredRecord:
    return StoredRecord(
        item.file, item.offset + record.start, record.nbytes, record.name, record.crc32
    )
