"""torch's own load of a checkpoint, wherever it lies: of one in a store it reads the ranges that it
needs."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader

from pma_megatron.base.openfiles import SourceStream
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.storage.protocol import PART_BYTES


def reader_of(folder: Path) -> FileSystemReader:
    """What torch.distributed.checkpoint reads a folder with."""
    reader = FileSystemReader(folder)
    if in_store(folder):
        reader.fs = _OfStore()
    return reader


class _OfStore(FileSystem):
    @contextlib.contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        with io.BufferedReader(SourceStream(path_of(path)), PART_BYTES) as stream:
            yield cast(io.IOBase, stream)
