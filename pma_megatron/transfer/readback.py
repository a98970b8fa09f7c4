"""What a job that was cut off has written, read back as if it were written again."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from isal import isal_zlib

from pma_megatron.base.openfiles import Files
from pma_megatron.base.spelling import named
from pma_megatron.errors import PublishError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.transfer.blocks import BlockReader, BlockWriter
from pma_megatron.transfer.checksums import Checksums


class ReadBack(BlockWriter):
    """Fills what it is given to write with what its folder holds there, and takes note of that."""

    def __init__(
        self, folder: Path, sums: Checksums | None = None, *, setting: str = "save"
    ) -> None:
        """See `BlockWriter`."""
        super().__init__(folder, sums, setting=setting)
        self.files = Files(folder, os.O_RDWR)

    def alone(self) -> ReadBack:
        """A reader of the same open files that takes note for itself."""
        other = copy.copy(self)
        other.checksums = type(self.checksums)()
        return other

    def pwrite(self, file: str, offset: int, data: memoryview) -> None:
        """Fill `data` from `offset` of `file`; where it ends early, the rest stays as it is.

        Raises:
            PublishError: it cannot be read.
        """
        try:
            done = 0
            with self.files.opened(file) as descriptor:
                while done < len(data):
                    got = os.preadv(descriptor, [data[done:]], offset + done)
                    if not got:
                        break
                    done += got
        except OSError as error:
            raise PublishError(
                f"cannot read {self.folder / file}, which a merge that was cut off has written "
                f"({error.strerror}): remove {self.folder}, or choose another "
                f"{named(self._setting)}, then run again"
            ) from error

    def copy(self, file: str, offset: int, data: memoryview, crc: int) -> None:
        """See `pwrite`; `crc` is of what `data` held before, and counts for nothing."""
        self.pwrite(file, offset, data)
        self.checksums.add_copy(file, offset, len(data), isal_zlib.crc32(data))


class NoReader(BlockReader):
    """Stands for the newest source where nothing of it has to be read: buffers stay as they are."""

    def __init__(self) -> None:
        """Open nothing."""

    def read_item(self, item: Item, offset: int, into: memoryview) -> None:
        """See `BlockReader.read_item`."""

    def read_bytes(self, payload: Payload, start: int, into: memoryview) -> None:
        """See `BlockReader.read_bytes`."""
