"""Move one block between files and a reused buffer: positional reads and writes, no mmap.

pread into a buffer that is used again costs no page faults and does not grow resident memory. torch
and the kernel calls release the GIL, so threads overlap reading, adding and writing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from isal import isal_zlib

from pma_megatron.errors import CheckpointError, PublishError
from pma_megatron.formats.base import Payload
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.output import Place
from pma_megatron.geometry import Box, Part, PieceIndex, overlaps

BLOCK_ELEMENTS = 1 << 18
"""Elements added at once: a float32 block of 1 MiB stays in a core's cache."""

_MIN_DENSITY = 4  # read a whole span if at least 1/4 of it is wanted


class Files:
    """File descriptors of one folder, opened once and shared by threads."""

    def __init__(self, folder: Path, flags: int) -> None:
        self._folder, self._flags = folder, flags
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, name: str) -> int:
        """The descriptor of `name`."""
        found = self._open.get(name)
        if found is None:
            with self._lock:
                found = self._open.get(name)
                if found is None:
                    found = self._open[name] = os.open(self._folder / name, self._flags)
        return found

    def sync(self) -> None:
        """Flush what was written to stable storage."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Close all; harmless if called twice."""
        while self._open:
            _, descriptor = self._open.popitem()
            os.close(descriptor)


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    return memoryview(block.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


class BlockReader:
    """Reads boxes of one source's tensors. Threads may share it; buffers are the caller's."""

    def __init__(self, path: str, items: ItemFiles) -> None:
        self.path, self._items = path, items
        self._files = Files(Path(path), os.O_RDONLY)

    def read(self, box: Box, index: PieceIndex[Payload], out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` with `box` in row-major order.

        Raises:
            CheckpointError: a file vanished, ended early or could not be read.
        """
        for part in overlaps(box, index.touching(box)):
            self._read_part(part, out)

    def advise(self, box: Box, index: PieceIndex[Payload]) -> None:
        """Tell the kernel that `box` is about to be read, so that reading runs ahead of adding."""
        for part in overlaps(box, index.touching(box)):
            _, start = self._items.locate(part.payload)
            itemsize = part.payload.dtype.itemsize
            with contextlib.suppress(OSError):  # advice only: `read` reports what is wrong
                os.posix_fadvise(
                    self._files.descriptor(part.payload.item.file),
                    start + part.start * itemsize,
                    part.span * itemsize,
                    os.POSIX_FADV_WILLNEED,
                )

    def _read_part(self, part: Part[Payload], out: torch.Tensor) -> None:
        numel = part.numel
        if part.unit_span == numel and part.span == numel:
            view = out[part.unit_start : part.unit_start + numel]
            self._pread(part.payload, part.start, as_bytes(view))
        elif part.span <= max(_MIN_DENSITY * numel, 1) and part.span <= 2 * BLOCK_ELEMENTS:
            data = torch.empty(part.span, dtype=out.dtype)
            self._pread(part.payload, part.start, as_bytes(data))
            target = out.as_strided(part.sizes, part.unit_strides, part.unit_start)
            target.copy_(data.as_strided(part.sizes, part.strides))
        else:
            for half in part.halves():
                self._read_part(half, out)

    def _pread(self, payload: Payload, first: int, into: memoryview) -> None:
        path, start = self._items.locate(payload)
        self.pread(payload.item.file, start + first * payload.dtype.itemsize, into)

    def pread(self, file: str, offset: int, into: memoryview) -> None:
        """Fill `into` from `file` at `offset`; see `read` for errors."""
        where = f"{self.path}/{file}"
        try:
            descriptor = self._files.descriptor(file)
            done = 0
            while done < len(into):
                got = os.preadv(descriptor, [into[done:]], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{where} ended at byte {offset + done} while it was read: it was truncated "
                        "or replaced. Run `pma list`, then merge again without it"
                    )
                done += got
        except OSError as error:
            raise CheckpointError(
                f"{where} could not be read ({error.strerror}): it vanished or its storage failed, "
                "perhaps removed by the run's own retention. Exclude it, or stop the clean-up"
            ) from error

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class Checksums:
    """CRC-32 of everything written into payloads, joined in any order.

    Attributes:
        parts: (item, record) -> [(start in bytes, bytes, crc)].
    """

    def __init__(self) -> None:
        self.parts: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()

    def add(self, place: Place, start_bytes: int, data: memoryview) -> None:
        """Note `data`, written at `start_bytes` of the payload at `place`."""
        crc = isal_zlib.crc32(data)
        with self._lock:
            self.parts.setdefault((place.item, place.record), []).append(
                (start_bytes, len(data), crc)
            )


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


class BlockWriter:
    """Writes blocks into the staged files of one output."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checksums = folder, Checksums()
        self._files = Files(folder, os.O_RDWR)

    def write(self, box: Box, targets: PieceIndex[Place], blocks: Rounded) -> int:
        """Write `box` (row-major in `blocks`) wherever `targets` want it; returns bytes written."""
        written = 0
        for part in overlaps(box, targets.touching(box)):
            place, data = part.payload, blocks.of(part.payload.dtype)
            for unit_start, start, numel in _runs(part):
                strip = as_bytes(data[unit_start : unit_start + numel])
                self.pwrite(place.file, place.start + start * place.dtype.itemsize, strip)
                self.checksums.add(place, start * place.dtype.itemsize, strip)
                written += len(strip)
        return written

    def pwrite(self, file: str, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of `file`.

        Raises:
            PublishError: no space, no permission, or a failing disk.
        """
        try:
            descriptor, done = self._files.descriptor(file), 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise PublishError(
                f"cannot write {self.folder / file}: {error.strerror}. Nothing was published and no "
                "source was touched; free space or choose another --save, then run again"
            ) from error

    def sync(self) -> None:
        """Flush what this rank wrote to stable storage.

        Raises:
            PublishError: the storage reports an error late.
        """
        try:
            self._files.sync()
        except OSError as error:
            raise PublishError(f"cannot flush {self.folder}: {error.strerror}") from error

    def close(self) -> None:
        """Close the files."""
        self._files.close()


class Rounded:
    """A float32 block in each dtype that a target wants, rounded once, on demand."""

    def __init__(self, block: torch.Tensor, scratch: dict[torch.dtype, torch.Tensor]) -> None:
        self._block, self._scratch = block, scratch
        self._made: dict[torch.dtype, torch.Tensor] = {block.dtype: block}

    def of(self, dtype: torch.dtype) -> torch.Tensor:
        """The block in `dtype`."""
        made = self._made.get(dtype)
        if made is None:
            if dtype not in self._scratch:
                self._scratch[dtype] = torch.empty(BLOCK_ELEMENTS, dtype=dtype)
            made = self._scratch[dtype][: self._block.numel()].copy_(self._block)
            self._made[dtype] = made
        return made


def _runs(part: Part[Place]) -> Iterator[tuple[int, int, int]]:
    """Runs contiguous on both sides: (start in the block, start in the payload, elements)."""
    if part.unit_span == part.numel and part.span == part.numel:
        yield part.unit_start, part.start, part.numel
    else:
        for half in part.halves():
            yield from _runs(half)
