"""Where a `.metadata` says that its entries lie, and the chunks of its tensors, as columns.

Every field that is read is checked, of records that were decoded one by one and of `Rows` of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.alike import Rows
from pma_megatron.formats.base import Item
from pma_megatron.formats.dcp.cover import covered
from pma_megatron.formats.inert import Name, brief
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.pieces import StoredPieces
from pma_megatron.formats.schema import (
    LIMIT,
    a_list,
    is_count,
    is_shape,
    pairs_of,
    record_fields,
    wrong,
)

_DCP = "torch.distributed.checkpoint"
CHUNK = Name(f"{_DCP}.metadata", "ChunkStorageMetadata")
INDEX = Name(f"{_DCP}.metadata", "MetadataIndex")
INFO = Name(f"{_DCP}.filesystem", "_StorageInfo")
_OBJECT = -1
"""The dimensions of the index of an object."""


class _Columns:
    """A row per item: numbers of its key and its file, bytes, dimensions of its chunk, and where
    the offsets of that begin in `offsets`."""

    def __init__(self) -> None:
        self.rows = [array("q") for _ in range(6)]
        self.offsets = array("q")

    def add(
        self, key: int, file: int, start: int, length: int, offset: Sequence[int] | None
    ) -> None:
        """One row."""
        dimensions = _OBJECT if offset is None else len(offset)
        values = (key, file, start, length, dimensions, len(self.offsets))
        for column, value in zip(self.rows, values, strict=True):
            column.append(value)
        self.offsets.extend(offset or ())

    def extend(self, columns: Sequence[Any], dimensions: int, offsets: np.ndarray) -> None:
        """Many rows of one kind."""
        count = len(offsets)
        first = len(self.offsets) + np.arange(count) * max(dimensions, 0)
        for column, values in zip(
            self.rows, (*columns, np.full(count, dimensions), first), strict=True
        ):
            column.frombytes(np.asarray(values, dtype=np.int64).tobytes())
        self.offsets.frombytes(offsets.astype(np.int64).tobytes())

    def arrays(self) -> list[np.ndarray]:
        """All columns, `offsets` the last."""
        return [
            np.frombuffer(column, dtype=np.int64) if column else np.empty(0, dtype=np.int64)
            for column in (*self.rows, self.offsets)
        ]


class Storage:
    """Where entries are stored, as far as anything can ask for them: the file may list others."""

    def __init__(self, value: Any, what: str, below: str, reserved: Collection[str]) -> None:
        """Check `storage_data`.

        Args:
            value: it.
            what: the file, for messages.
            below: goes before the names of files.
            reserved: names that no payload may have.

        Raises:
            CheckpointError: a field is not of the kind that it has to be.
        """
        self._what, self._below, self._reserved = what, below, reserved
        self._keys: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._files: list[str] = []
        columns = _Columns()
        where = f"{what}: storage_data"
        if not isinstance(value, dict):  # an index is a record, so the keys are its own
            raise wrong(where, "a dictionary", value)
        for index, info in pairs_of(value, where):
            if type(index) is Rows:
                self._add_rows(index, columns, where)
            else:
                self._add(index, info, columns, where)
        key, self._file, self._start, self._length, self._dimensions, *rest = columns.arrays()
        self._first, self._offsets = rest
        self.files = tuple(self._files)
        self._order = np.argsort(key, kind="stable")
        self._bounds = np.searchsorted(key[self._order], np.arange(len(self._keys) + 1))

    def _add(self, index: Any, info: Any, columns: _Columns, where: str) -> None:
        """One record."""
        said = record_fields(index, f"{where} has a key that is no MetadataIndex;", INDEX)
        key, offset = said.get("fqn"), said.get("offset")
        if type(key) is not str or not (offset is None or is_shape(offset)):
            raise wrong(f"{where}: an index", "a name and offsets", (key, offset))
        at = f"{where} of {brief(key)}"
        said = record_fields(info, at, INFO)
        if said.get("transform_descriptors"):
            raise CheckpointError(
                f"{at} goes through {brief(said['transform_descriptors'])}; only plain torch.save "
                "items are supported: re-save the checkpoint without compression"
            )
        file = self._file_number(said.get("relative_path"), at)
        start, length = said.get("offset"), said.get("length")
        if not (is_count(start) and is_count(length) and start + length < LIMIT):
            raise wrong(f"{at}: offset and length", "bytes of a file", (start, length))
        number = self._keys.setdefault(key, len(self._keys))
        columns.add(number, file, start, length, offset)

    def _add_rows(self, rows: Rows, columns: _Columns, where: str) -> None:
        """Many records, of which each says the same fields."""
        fields, numbers, texts = _split(rows)
        index, info = fields.get(INDEX, {}), fields.get(INFO, {})
        known = (
            fields.keys() == {INDEX, INFO}
            and index.get("fqn", ("",))[0] == "text"
            and index.get("offset", ("none", 0, 0))[0] in ("none", "shape")
            and info.get("relative_path", ("",))[0] == "text"
            and all(info.get(name, ("",))[0] == "number" for name in ("offset", "length"))
            and info.get("transform_descriptors", ("none",))[0] == "none"
        )
        if not known:
            raise wrong(where, "indexes and where they are stored", rows.fields)
        keys = texts[index["fqn"][1]]
        paths = texts[info["relative_path"][1]]
        start, length = numbers[:, info["offset"][1]], numbers[:, info["length"][1]]
        kind, first, dimensions = index.get("offset", ("none", 0, 0))
        offsets = numbers[:, first : first + dimensions]
        if min(start.min(), length.min(), offsets.min(initial=0)) < 0:
            raise wrong(where, "counts", "a negative number")
        if (start > LIMIT - 1 - length).any():
            raise wrong(f"{where}: offset and length", "bytes of a file", "more than that")
        known_keys = self._keys
        numbered = (
            [known_keys.setdefault(key, len(known_keys)) for key in keys],
            [self._file_number(path, where) for path in paths],
        )
        kind_of = dimensions if kind == "shape" else _OBJECT
        columns.extend((*numbered, start, length), kind_of, offsets)

    def _file_number(self, path: Any, at: str) -> int:
        if type(path) is str and path in self._names:
            return self._names[path]
        name = plain_name(path, f"{at}: relative_path")
        if name in self._reserved:
            raise wrong(f"{at}: relative_path", "a file of payload", path)
        self._names[path] = len(self._files)
        self._files.append(self._below + name)
        return self._names[path]

    def object(self, key: str) -> Item:
        """The item of an object.

        Raises:
            CheckpointError: none is said.
        """
        rows = self._rows(key, _OBJECT)
        if not len(rows):
            raise CheckpointError(f"{self._what}: {key} at None has no storage: damaged")
        row = rows[-1]
        return Item(self.files[self._file[row]], int(self._start[row]), int(self._length[row]))

    def pieces(
        self, key: str, dtype: torch.dtype, offsets: np.ndarray, sizes: np.ndarray
    ) -> StoredPieces:
        """The chunks of a tensor, by their boxes; raises as `object`."""
        rows = self._matching(key, offsets)
        return StoredPieces(
            dtype,
            offsets,
            sizes,
            self.files,
            self._file[rows],
            self._start[rows],
            self._length[rows],
        )

    def _rows(self, key: str, dimensions: int) -> np.ndarray:
        number = self._keys.get(key)
        if number is None:
            return np.empty(0, dtype=np.int64)
        rows: np.ndarray = self._order[self._bounds[number] : self._bounds[number + 1]]
        of_these: np.ndarray = rows[self._dimensions[rows] == dimensions]
        return of_these

    def _matching(self, key: str, offsets: np.ndarray) -> np.ndarray:
        """The row of each chunk."""
        count, dimensions = offsets.shape
        rows = self._rows(key, dimensions)
        said = self._offsets[self._first[rows][:, None] + np.arange(dimensions)]
        if len(rows) == count and dimensions:
            ours, theirs = np.lexsort(offsets.T), np.lexsort(said.T)
            if np.array_equal(offsets[ours], said[theirs]):
                result = np.empty(count, dtype=np.int64)
                result[ours] = rows[theirs]
                return result
        found = dict(zip(map(tuple, said.tolist()), rows.tolist(), strict=True))
        result = np.empty(count, dtype=np.int64)
        for number, place in enumerate(map(tuple, offsets.tolist())):
            if place not in found:
                raise CheckpointError(f"{self._what}: {key} at {place} has no storage: damaged")
            result[number] = found[place]
        return result


def _split(
    rows: Rows,
) -> tuple[dict[Name, dict[str, tuple[str, int, int]]], np.ndarray, list[list[str]]]:
    """Class -> field -> its kind, its first column and how many; columns of numbers; of texts."""
    fields: dict[Name, dict[str, tuple[str, int, int]]] = {}
    wide = texts = 0
    for name, key, kind, many in rows.fields:
        first = texts if kind == "text" else wide
        fields.setdefault(name, {})[key] = kind, first, many
        texts += kind == "text"
        wide += many if kind in ("number", "shape") else 0
    numbers = np.frombuffer(rows.numbers, dtype=np.int64).reshape(rows.count, wide)
    return fields, numbers, [rows.texts[place::texts] for place in range(texts)]


def boxes_of(value: Any, shape: tuple[int, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of the chunks of a tensor, of shape `[chunks, dimensions]`.

    Raises:
        CheckpointError: one is no part of it, or they do not cover it exactly once.
    """
    parts = [
        _rows_of_chunks(chunk, shape, where) if type(chunk) is Rows else _chunk(chunk, shape, where)
        for chunk in a_list(value, f"{where}: chunks")
    ]
    none = np.empty((0, len(shape)), dtype=np.int64)
    at, extents = (np.concatenate([none, *(part[axis] for part in parts)]) for axis in range(2))
    if not covered(at, extents, shape):
        raise CheckpointError(
            f"{where} has {len(at)} chunks that do not cover each element of its shape {shape} "
            "exactly once: damaged. Exclude this checkpoint"
        )
    return at, extents


def _chunk(chunk: Any, shape: tuple[int, ...], where: str) -> tuple[np.ndarray, np.ndarray]:
    parts = record_fields(chunk, f"{where}: a chunk", CHUNK)
    offsets: Any = parts.get("offsets")
    sizes: Any = parts.get("sizes")
    inside = (
        is_shape(sizes)
        and isinstance(offsets, tuple)
        and len(sizes) == len(offsets) == len(shape)
        and all(map(is_count, offsets))
        and all(o + n <= d for o, n, d in zip(offsets, sizes, shape, strict=True))
    )
    if not inside:
        found = f"offsets {brief(offsets)} and sizes {brief(sizes)}"
        raise CheckpointError(
            f"{where} has a chunk with {found}, expected a part of its shape {shape}: damaged"
        )
    return np.array([offsets], dtype=np.int64), np.array([sizes], dtype=np.int64)


def _rows_of_chunks(
    rows: Rows, shape: tuple[int, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    fields, numbers, _ = _split(rows)
    said, expected = fields.get(CHUNK, {}), ("shape", len(shape))
    if fields.keys() != {CHUNK} or any(
        (said.get(name, ("",))[0], said.get(name, ("", 0, 0))[2]) != expected
        for name in ("offsets", "sizes")
    ):
        raise wrong(f"{where}: chunks", "offsets and sizes", rows.fields)
    low, extent = (
        numbers[:, said[name][1] : said[name][1] + len(shape)] for name in ("offsets", "sizes")
    )
    whole = np.array(shape, dtype=np.int64)
    inside = (low >= 0) & (extent >= 0) & (low <= whole) & (extent <= whole - low)
    if not inside.all():
        raise CheckpointError(f"{where} has chunks that are no part of its shape {shape}: damaged")
    return low, extent


def refuse_too_long(pieces: StoredPieces, where: str) -> None:
    """Chunks need no more bytes than their items have.

    Raises:
        CheckpointError: one does.
    """
    needed = pieces.sizes.astype(np.int64).prod(axis=1) * pieces.dtype.itemsize
    for number in np.flatnonzero(needed > pieces.lengths)[:1]:
        piece = pieces[int(number)]
        said = f"at most {piece.payload.item.length} bytes, as stored"
        raise wrong(f"{where}: {brief(piece.box.sizes)}", said, piece.box)


def refuse_shared(of_tensors: Sequence[StoredPieces], objects: Sequence[Item], what: str) -> None:
    """No two entries lie in the same bytes.

    Raises:
        CheckpointError: two do.
    """
    names = {item.file for item in objects}
    names.update(*(pieces.files for pieces in of_tensors[:1]))
    files = {name: number for number, name in enumerate(sorted(names))}
    columns = [
        (
            np.array([files[i.file] for i in objects], dtype=np.int64),
            np.array([i.offset for i in objects], dtype=np.int64),
            np.array([i.length for i in objects], dtype=np.int64),
        )
    ]
    translated = np.array([files[name] for name in of_tensors[0].files] if of_tensors else [0])
    columns += [(translated[p.file], p.starts, p.lengths) for p in of_tensors]
    file, start, length = (
        np.concatenate([column.astype(np.int64) for column in each])
        for each in zip(*columns, strict=True)
    )
    order = np.lexsort((length, start, file))
    file, start, end = file[order], start[order], (start + length)[order]
    begins = (start[1:] < end[:-1]) | (start[1:] == start[:-1])  # one of no bytes is a place too
    shared = (file[1:] == file[:-1]) & begins
    for place in np.flatnonzero(shared)[:1]:
        name = sorted(names)[file[place]]
        raise CheckpointError(
            f"{what}: two entries share bytes of {name} from {start[place + 1]}: damaged. "
            "Exclude this checkpoint"
        )
