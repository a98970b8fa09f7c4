"""Torch-saved items inside the files of one folder: where a payload's bytes are."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Set
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.pickles import TensorRef, load_inert
from pma_megatron.formats.schema import LIMIT
from pma_megatron.formats.zips import Record, read_records
from pma_megatron.openfiles import open_source

_WINDOW_BYTES = 4096  # headers of small records share one read


class ItemFiles:
    """The items of one checkpoint folder, indexed when first asked for. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._indexes: dict[Item, dict[str, Record]] = {}
        self._starts: dict[Payload, int] = {}
        self._lock = threading.Lock()

    def records(self, item: Item) -> dict[str, Record]:
        """Index of the zip at `item`, read once."""
        found = self._indexes.get(item)
        if found is None:
            what = f"{self.path / item.file} at {item.offset}"
            found = read_records(self._reader(item), item.length, what=what)
            with self._lock:
                self._indexes[item] = found
        return found

    def read_record(self, item: Item, name: str) -> bytes:
        """The bytes of one small record of `item`.

        Raises:
            CheckpointError: the item has no such record.
        """
        record = self.records(item).get(name)
        if record is None:
            raise CheckpointError(f"{self.path / item.file} at {item.offset} has no {name}")
        return self.read(item.file, item.offset + record.start, record.nbytes)

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
        start = self._starts.get(payload)
        if start is None:
            start = self._find(payload)
            with self._lock:
                self._starts[payload] = start
        return self.path / payload.item.file, start

    def _find(self, payload: Payload) -> int:
        item, name, skip = payload.item, payload.record, 0
        if name is None:
            what = f"{self.path / item.file} at {item.offset}"
            ref = self.decode(item, what)
            if not isinstance(ref, TensorRef) or not ref.is_contiguous():
                raise CheckpointError(f"{what} holds {ref!r}, expected one contiguous tensor")
            numel = math.prod(ref.size)
            if numel != payload.numel or ref.storage.dtype != payload.dtype:
                raise CheckpointError(
                    f"{what} holds {numel} elements of {ref.storage.dtype}, .metadata says "
                    f"{payload.numel} of {payload.dtype}: damaged, exclude this checkpoint"
                )
            name, skip = f"data/{ref.storage.key}", ref.offset * payload.dtype.itemsize
        record = self.records(item).get(name)
        if record is None or record.nbytes < skip + payload.nbytes:
            raise CheckpointError(
                f"{self.path / item.file} at {item.offset}: record {name} is missing or shorter "
                f"than {skip + payload.nbytes} bytes: damaged, exclude this checkpoint"
            )
        return item.offset + record.start + skip

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` of `file` at `offset`.

        Raises:
            CheckpointError: the file is missing or too short.
        """
        path = self.path / file
        try:
            with os.fdopen(open_source(path), "rb", buffering=0) as stream:
                left = max(os.fstat(stream.fileno()).st_size - offset, 0)  # before it is allocated
                stream.seek(min(offset, LIMIT - 1))
                data = stream.read(min(nbytes, left))
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be read ({error.strerror}): it vanished or its storage failed, "
                "perhaps removed by the run's own retention. Exclude it, or stop the clean-up"
            ) from error
        if len(data) != nbytes:
            raise CheckpointError(
                f"{path} ends at byte {offset + len(data)}, {offset + nbytes} are needed: it was "
                "truncated or replaced. Run `pma list`, then merge again without it"
            )
        return data

    def _reader(self, item: Item) -> Any:
        first, window = 0, b""

        def read_at(offset: int, nbytes: int) -> bytes:
            nonlocal first, window
            if offset < first or offset + nbytes > first + len(window):
                wanted = max(nbytes, min(_WINDOW_BYTES, item.length - offset))
                first, window = offset, self.read(item.file, item.offset + offset, wanted)
            return window[offset - first : offset - first + nbytes]

        return read_at
