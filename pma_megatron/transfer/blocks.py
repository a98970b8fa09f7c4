"""Move one block between files and a reused buffer: positional reads and writes, no mmap."""

from __future__ import annotations

import contextlib
import functools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from isal import isal_zlib

from pma_megatron.base.boxes import Box, Part, Piece, PieceIndex, overlaps
from pma_megatron.base.openfiles import Files, read_at, unread
from pma_megatron.base.spelling import named
from pma_megatron.errors import CheckpointError, PublishError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Item, Payload, StoredRecord
from pma_megatron.formats.items import ItemFiles, refuse_other_bytes
from pma_megatron.formats.output import Destination, Folder
from pma_megatron.formats.source import Source
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.storage.spool import ahead
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS, as_bytes
from pma_megatron.transfer.checksums import Checksums
from pma_megatron.transfer.reads import Reads, Spans

_COPY_BYTES = 1 << 20
_LEAST_AHEAD_BYTES = 128 << 10  # Linux's own, where a mount says nothing else
_MIN_DENSITY = 4  # read a whole span if at least 1/4 of it is wanted


class BlockReader:
    """Reads boxes of one source's tensors. Threads may share it; buffers are the caller's.

    Every byte that comes through it counts towards the checksum of its record.

    Attributes:
        path: the source.
        files: its open files; who reads with them says so to `noted`.
        compares: False to take no note of what is read, to measure what that costs.
    """

    compares = True

    def __init__(self, path: str, items: ItemFiles, reads: Reads | None = None) -> None:
        """Open `path`.

        Args:
            path: the source.
            items: where its records are.
            reads: takes note of what is read; its owner compares what stays open.
        """
        self.path, self._items = path, items
        self._reads = reads or Reads(path)
        self.files = Files(path_of(path), os.O_RDONLY)
        self._one_for_both = items.reading_with(self.files)

    @classmethod
    def of(cls, kind: str, path: str, reads: Reads | None = None) -> BlockReader:
        """The reader of a checkpoint in format `kind`; use it in `with`, which closes its files."""
        return cls(path, registry.get(kind, path).files(path_of(path)), reads)

    def __enter__(self) -> BlockReader:
        self._one_for_both.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._one_for_both.__exit__(*error)
        self.close()

    def read(self, box: Box, index: PieceIndex[Payload], out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` with `box` in row-major order.

        Raises:
            CheckpointError: a file vanished, ended early, could not be read, or is damaged.
        """
        for part in overlaps(box, index.touching(box)):
            self._read_part(part, out)

    def values(self, box: Box, index: PieceIndex[Payload], dtype: torch.dtype) -> torch.Tensor:
        """`box` as a new 1-D tensor of `dtype`, which is the stored one; see `read` for errors."""
        out = torch.empty(box.numel, dtype=dtype)
        self.read(box, index, out)
        return out

    def whole(
        self, box: Box, index: PieceIndex[Payload], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The same; None where some of `box` lies in no piece."""
        parts = overlaps(box, index.touching(box))
        if sum(part.numel for part in parts) != box.numel:
            return None
        out = torch.empty(box.numel, dtype=dtype)
        for part in parts:
            self._read_part(part, out)
        return out

    def look_ahead(self, box: Box, pieces: Sequence[Piece[Payload]]) -> None:
        """`box` is read soon: of an object of a store it is asked for now; see `read`."""
        if in_store(self.path):
            for part in overlaps(box, PieceIndex(pieces).touching(box)):
                self.advise(part)

    def place(self, payload: Payload, start: int) -> tuple[StoredRecord, int]:
        """The record of `payload`, and the byte of it at which element `start` lies."""
        record, skip = self._items.find(payload)
        return record, skip + start * payload.dtype.itemsize

    def read_bytes(self, payload: Payload, start: int, into: memoryview) -> None:
        """Fill `into` from element `start` of `payload` on; see `read` for errors."""
        self.pread(*self.place(payload, start), into)

    def read_item(self, item: Item, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` of the file, all of it within `item`; see `read`."""
        self.fill(item.file, offset, into)
        end = offset + len(into)
        whole = offset == item.offset and len(into) == item.length
        records = self._items.stored(item, into if whole else None)
        begin = bisect_right(records, offset, key=lambda record: record.start) - 1
        for record in records[max(begin, 0) :]:
            if record.start >= end:
                break
            low, high = max(offset, record.start), min(end, record.start + record.nbytes)
            if low < high:
                part = into[low - offset : high - offset]
                self._reads.note(record, low - record.start, part)

    def compare(self, record: StoredRecord, known: Spans, buffer: memoryview) -> None:
        """Read what is not `known` of a record, and compare it with its checksum.

        Raises:
            CheckpointError: see `read`.
        """
        whole = 0
        for start, end, crc in known.tiles(record.nbytes):
            if crc is None:
                crc = 0
                for at in range(start, end, len(buffer)):
                    part = buffer[: min(len(buffer), end - at)]
                    self.fill(record.file, record.start + at, part)
                    crc = isal_zlib.crc32(part, crc)
            whole = isal_zlib.crc32_combine(whole, crc, end - start)
        refuse_other_bytes(self.path, record, whole)

    def refuse_damaged(self, box: Box, index: PieceIndex[Payload]) -> None:
        """Compare every record that holds some of `box`, to tell damage from odd values.

        Raises:
            CheckpointError: see `read`.
        """
        buffer = memoryview(bytearray(_COPY_BYTES))
        for piece in index.touching(box):
            self.compare(self._items.find(piece.payload)[0], Spans(), buffer)

    def advise(self, part: Part[Payload]) -> bool:
        """Tell the kernel that `part` is about to be read, so that reading runs ahead of adding.

        Returns:
            Whether it has to be fetched: it is not in the page cache.
        """
        record, first = self.place(part.payload, part.start)
        first, count = record.start + first, part.span * part.payload.dtype.itemsize
        # Advice only: `read` reports what is wrong.
        with contextlib.suppress(OSError), self.files.opened(record.file) as descriptor:
            if ahead(descriptor, first, count):
                return True
            if not _is_cached(descriptor, first + count - 1):
                step = _read_ahead_bytes(os.fstat(descriptor).st_dev)
                if part.numel * _MIN_DENSITY < part.span:  # only some of it is read
                    count = min(count, step)
                for at in range(first, first + count, step):
                    length = min(step, first + count - at)
                    os.posix_fadvise(descriptor, at, length, os.POSIX_FADV_WILLNEED)
                return True
        return False

    def _read_part(self, part: Part[Payload], out: torch.Tensor) -> None:
        numel = part.numel
        first, count = part.rows
        if part.is_run:
            view = out[part.unit_start : part.unit_start + numel]
            self.pread(*self.place(part.payload, part.start), as_bytes(view))
        elif count <= max(_MIN_DENSITY * numel, 1) and count <= 2 * BLOCK_ELEMENTS:
            # Whole rows, so that all who read other parts of them read the same bytes.
            data = torch.empty(count, dtype=out.dtype)
            self.pread(*self.place(part.payload, first), as_bytes(data))
            start = out.storage_offset() + part.unit_start
            target = out.as_strided(part.sizes, part.unit_strides, start)
            target.copy_(data.as_strided(part.sizes, part.strides, part.start - first))
        else:
            for half in part.halves():
                self._read_part(half, out)

    def pread(self, record: StoredRecord, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of `record` on; see `read` for errors."""
        self.fill(record.file, record.start + start, into)
        if self.compares:
            self._reads.note(record, start, into)

    def fill(self, file: str, offset: int, into: memoryview) -> None:
        """Fill `into` from `file` at `offset` without taking note of it; see `read` for errors."""
        try:
            with self.files.opened(file) as descriptor:
                done = read_at(descriptor, into, offset)
            if done < len(into):
                raise self.refusal(file, OSError(0, f"it ends at byte {offset + done}"))
        except OSError as error:
            raise self.refusal(file, error) from error

    def refusal(self, file: str, error: OSError) -> CheckpointError:
        """What is raised where `file` could not be read; no number means that it ended early."""
        if error.errno:
            return unread(f"{self.path}/{file}", error)
        return CheckpointError(
            f"{self.path}/{file} was read, and {error.strerror}: it was truncated or replaced. Run "
            "`pma list`, then merge again without it"
        )

    def noted(self, record: StoredRecord, start: int, nbytes: int, crc: int) -> None:
        """Somebody read `nbytes` of a record from its byte `start` on, with this CRC-32.

        Raises:
            CheckpointError: all of a record has been read now, and it is damaged.
        """
        if self.compares:
            self._reads.note_sum(record, start, nbytes, crc)

    def close(self) -> None:
        """Close the files."""
        self.files.close()


@contextlib.contextmanager
def readers(
    sources: Iterable[tuple[int, Source]], reads: Mapping[int, Reads] | None = None
) -> Iterator[dict[int, BlockReader]]:
    """Readers of numbered sources, open in the block.

    Args:
        sources: number and source.
        reads: number -> takes note of what is read; by default each reader has its own.
    """
    with contextlib.ExitStack() as stack:
        yield {
            number: stack.enter_context(
                BlockReader.of(source.format, source.path, reads[number] if reads else None)
            )
            for number, source in sources
        }


class Writer(Protocol):
    """Takes finished elements: files of an output, or tensors of a live model."""

    def put(self, place: Any, start: int, data: memoryview) -> None:
        """Store `data` from element `start` of `place` on."""


class BlockWriter:
    """Writes blocks into the staged files of one folder of an output.

    Attributes:
        folder: where.
        checksums: of what was written.
        files: its open files; who writes with them says so to `checksums`.
    """

    def __init__(
        self, folder: Path, sums: Checksums | None = None, *, setting: str = "save"
    ) -> None:
        """Write into `folder`.

        Args:
            folder: its files are there, at their full length.
            sums: takes note of what is written.
            setting: the one that says where `folder` lies, for messages.
        """
        self.folder, self.checksums = folder, sums or Checksums()
        # Not for reading too: a client of NFS would read the rest of each page that ranks share,
        # and write it back over what another rank has written there.
        self.files, self._setting = Files(folder, os.O_WRONLY), setting

    def put(self, place: Destination, start: int, data: memoryview) -> None:
        """Write `data` at element `start` of the payload at `place`; see `pwrite` for errors."""
        at = start * place.dtype.itemsize
        self.pwrite(place.file, place.start + at, data)
        self.checksums.add(place, at, data)

    def pwrite(self, file: str, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of `file`.

        Raises:
            PublishError: no space, no permission, or a failing disk.
        """
        try:
            done = 0
            with self.files.opened(file) as descriptor:
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:] if done else data, offset + done)
        except OSError as error:
            raise self.refusal(file, error) from error

    def refusal(self, file: str, error: OSError) -> PublishError:
        """What is raised where `file` could not be written."""
        return PublishError(
            f"cannot write {self.folder / file}: {error.strerror}. Nothing was published and "
            f"no source was touched; free space or choose another {named(self._setting)}, then "
            "run again"
        )

    def copy(self, file: str, offset: int, data: memoryview, crc: int) -> None:
        """Write what was copied from a source; see `pwrite` for errors."""
        self.pwrite(file, offset, data)
        self.checksums.add_copy(file, offset, len(data), crc)

    def sync(self, moved: Callable[[], None] = lambda: None) -> None:
        """Flush what this rank wrote to stable storage; `moved` is called after each file.

        Raises:
            PublishError: the storage reports an error late.
        """
        try:
            self.files.sync(moved)
        except OSError as error:
            raise PublishError(f"cannot flush {self.folder}: {error.strerror}") from error

    def close(self) -> None:
        """Close the files."""
        self.files.close()


class FolderWriters:
    """The folders of one output: a place says in which of them it lies.

    What lies in a folder without a writer is left alone: that one was published before.
    """

    def __init__(self, writers: Mapping[Folder, BlockWriter]) -> None:
        self.writers = writers

    def put(self, place: Destination, start: int, data: memoryview) -> None:
        """See `BlockWriter.put`."""
        writer = self.writers.get(place.folder)
        if writer is not None:
            writer.put(place, start, data)

    def pwrite(self, file: str, offset: int, data: memoryview) -> None:
        """See `BlockWriter.pwrite`; only checkpoints have bytes that are no elements."""
        writer = self.writers.get(Folder.CHECKPOINT)
        if writer is not None:
            writer.pwrite(file, offset, data)

    def copy(self, file: str, offset: int, data: memoryview, crc: int) -> None:
        """See `BlockWriter.copy`; the same."""
        writer = self.writers.get(Folder.CHECKPOINT)
        if writer is not None:
            writer.copy(file, offset, data, crc)

    def sync(self, moved: Callable[[], None] = lambda: None) -> None:
        """See `BlockWriter.sync`."""
        for writer in self.writers.values():
            writer.sync(moved)

    def close(self) -> None:
        """Close the files."""
        for writer in self.writers.values():
            writer.close()


@functools.cache
def _read_ahead_bytes(device: int) -> int:
    """What the kernel reads ahead of a file there: a longer advice is cut off after as much."""
    bdi = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError, ValueError):
        return max(int(Path(bdi).read_text()) << 10, _LEAST_AHEAD_BYTES)
    return _LEAST_AHEAD_BYTES


def _is_cached(descriptor: int, offset: int) -> bool:
    """True if the byte at `offset` is in the page cache, so that read-ahead would be idle work."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):
        return False
