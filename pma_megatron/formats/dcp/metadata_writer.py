"""Write the `.metadata` of torch.distributed.checkpoint for hundreds of thousands of chunks.

What it says once is pickled as torch's own classes (`written`). What it says for every chunk is a
template of opcodes, made of one such object, in which numbers are filled in for all chunks at once:
no object for each of them is ever made.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pma_megatron.formats.base import Item, Tensor
from pma_megatron.formats.dcp.metadata import ORIGINAL_SHAPE, DcpMetadata
from pma_megatron.formats.dcp.written import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
    pickled,
)
from pma_megatron.formats.pieces import StoredPieces

_NUMBER = 0x40000000
"""Stands for the first number of a template; the others are counted from here."""
_TEXT, _CLASS = "\0text ", "\0class "
_CHUNKS, _STORAGE = "\0chunks ", "\0storage"
_MARK = re.compile(rb"X\x10\0\0\0\0chunks (\d{8})|X\x08\0\0\0\0storage")
_TYPES = {1: "u1", 2: "<u2", 4: "<i4", 8: "<i8"}
_OPCODES = {1: b"K", 2: b"M", 4: b"J", 8: b"\x8a\x08"}
_LIMITS = {1: 1 << 8, 2: 1 << 16, 4: 1 << 31, 8: 1 << 63}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the chunks of a tensor are stored, or an object, in bytes of files.

    Attributes:
        files: names of files.
        file: per chunk, the number of its file in `files`.
        starts, lengths: per chunk, where in that file.
    """

    files: tuple[str, ...]
    file: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, items: Iterable[Item]) -> Stored:
        """Where some items are."""
        every = [*items]
        files = tuple(dict.fromkeys(item.file for item in every))
        columns = (
            [files.index(item.file) for item in every],
            [item.offset for item in every],
            [item.length for item in every],
        )
        return cls(files, *(np.array(column, dtype=np.int64) for column in columns))


@dataclass(frozen=True, slots=True)
class StoredRows(Mapping[str, Stored]):
    """Where the chunks of a tensor are stored, or an object, by its key.

    Attributes:
        every: all chunks and objects.
        rows: key -> the first row of its own there, and the row after the last.
    """

    every: Stored
    rows: Mapping[str, tuple[int, int]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __getitem__(self, key: str) -> Stored:
        own = slice(*self.rows[key])
        every = self.every
        return Stored(every.files, every.file[own], every.starts[own], every.lengths[own])


def stored_of(tensors: Mapping[str, Tensor], objects: Mapping[str, Item]) -> dict[str, Stored]:
    """Where entries are stored, by key."""
    found = {
        key: Stored.of(piece.payload.item for piece in tensor.pieces)
        for key, tensor in tensors.items()
    }
    return found | {key: Stored.of([item]) for key, item in objects.items()}


def dump_metadata(
    base: DcpMetadata,
    stored: Mapping[str, Stored],
    drop: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    below: str = "",
) -> bytes:
    """`.metadata` of an output: `base` with other places, without `drop`, with other `dtypes`.

    Args:
        base: what it is like.
        stored: where the output stores each entry.
        drop: keys that it has not.
        dtypes: of tensors that have another one.
        below: goes before the names of files in `stored`, and is not said here.
    """
    keys = [key for key in base.order if key not in drop]
    boxes = {key: _boxes(base.tensors[key]) for key in keys if key in base.tensors}
    lists = {id(where.files): where.files for where in stored.values()}.values()
    names = {name.removeprefix(below) for files in lists for name in files}
    writer = _Writer(keys, names, {offsets.shape[1] for offsets, _ in boxes.values()})
    for part in _parts(_outer(base, keys, dtypes)):
        if isinstance(part, memoryview):
            writer.stream.write(part)
        elif part is None:
            writer.storage(stored, boxes, below)
        else:
            writer.chunks(*boxes[keys[part]])
    return writer.stream.getvalue()


def _outer(base: DcpMetadata, keys: list[str], dtypes: Mapping[str, torch.dtype]) -> memoryview:
    """All of it, with marks where chunks and what is stored belong; without its beginning."""
    entries: dict[str, Any] = dict.fromkeys(keys, BytesStorageMetadata())
    for number, key in enumerate(keys):
        if key not in base.tensors:
            continue
        tensor, said = base.tensors[key], base.properties[key]
        properties = TensorProperties(
            dtypes.get(key, said.dtype), said.requires_grad, said.memory_format, said.pin_memory
        )
        mark: Any = f"{_CHUNKS}{number:08d}"
        entries[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), mark)
    output = Metadata(entries, _STORAGE)
    if base.planner_data is not None:
        kept = set(keys)
        output.planner_data = {k: v for k, v in base.planner_data.items() if k in kept}
    if base.original_shapes is not None:
        kept = set(keys)
        output.mcore_data = {
            key: {} if shape is None else {ORIGINAL_SHAPE: shape}
            for key, shape in base.original_shapes.items()
            if key in kept
        }
    return memoryview(pickled(output))


def _parts(outer: memoryview) -> Iterator[memoryview | int | None]:
    """Bytes as they are; the number of a key whose chunks follow; None where all storage does."""
    at = 0
    for found in _MARK.finditer(outer):
        yield outer[at : found.start()]
        yield int(found[1]) if found[1] is not None else None
        at = found.end()
    yield outer[at:]
    yield memoryview(pickle.STOP)


@dataclass(frozen=True, slots=True)
class _Template:
    """The opcodes of one object around its numbers.

    Attributes:
        around: them, before the first number, between two, and after the last.
        columns: of each number, which column it is of; those of references come first.
        references: how many columns those are.
    """

    around: tuple[bytes, ...]
    columns: tuple[int, ...]
    references: int

    def filled(self, columns: list[np.ndarray]) -> bytes:
        """The opcodes of many objects, of which each column has the numbers."""
        widths = [4] * self.references + [_width(c) for c in columns[self.references :]]
        code, gaps = bytearray(self.around[0]), []
        for column, following in zip(self.columns, self.around[1:], strict=True):
            code += b"j" if column < self.references else _OPCODES[widths[column]]
            gaps.append((len(code), widths[column], columns[column]))
            code += bytes(widths[column]) + following
        count = len(columns[0])
        rows = np.tile(np.frombuffer(bytes(code), dtype=np.uint8), (count, 1))
        for first, width, values in gaps:
            numbers = np.ascontiguousarray(values, dtype=_TYPES[width])
            rows[:, first : first + width] = numbers.view(np.uint8).reshape(count, width)
        return rows.tobytes()


def _width(column: np.ndarray) -> int:
    """Bytes that the largest number of a column takes, as pickles have them."""
    most = int(column.max(initial=0))
    return next(width for width, limit in _LIMITS.items() if most < limit)


class _Writer:
    """A pickle in the making, of which classes, keys and names of files are remembered first."""

    def __init__(self, keys: list[str], files: set[str], dimensions: set[int]) -> None:
        self.stream = io.BytesIO()
        self.stream.write(pickle.PROTO + b"\x04")
        self._memo: dict[str, int] = {}
        self._files: dict[int, np.ndarray] = {}
        # The first that are remembered are short to refer to.
        self._templates = {many: self._made(many) for many in (None, *sorted(dimensions))}
        for text in (*keys, *sorted(files)):
            self._remembered(text)

    def chunks(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """The list of a tensor's chunks, of shape `[chunks, dimensions]`."""
        template = self._templates[offsets.shape[1]][0]
        self._batches(b"]", b"e", template, [*offsets.T, *sizes.T], len(offsets))

    def storage(
        self,
        stored: Mapping[str, Stored],
        boxes: Mapping[str, tuple[np.ndarray, np.ndarray]],
        below: str,
    ) -> None:
        """The dictionary that says where everything is."""
        self.stream.write(b"}")
        objects = [array("q") for _ in range(4)]
        for key, where in stored.items():
            texts = [np.full(len(where.file), self._memo[key]), self._named(where, below)]
            if key not in boxes:
                of_one = (*texts, where.starts, where.lengths)
                for column, numbers in zip(objects, of_one, strict=True):
                    column.append(int(numbers[0]))
                continue
            offsets = boxes[key][0].T
            columns = [*texts, *offsets, where.starts, where.lengths]
            template = self._templates[len(offsets)][1]
            self._batches(b"", b"u", template, columns, len(where.file))
        if objects[0]:
            columns = [np.frombuffer(column, dtype=np.int64) for column in objects]
            self._batches(b"", b"u", self._templates[None][1], columns, len(columns[0]))

    def _named(self, where: Stored, below: str) -> np.ndarray:
        """The number of what is remembered of the file of each chunk."""
        table = self._files.get(id(where.files))
        if table is None:
            names = (name.removeprefix(below) for name in where.files)
            table = np.array([self._memo[name] for name in names], dtype=np.int64)
            self._files[id(where.files)] = table
        numbers: np.ndarray = table[where.file]
        return numbers

    def _batches(
        self, before: bytes, after: bytes, template: _Template, columns: list[Any], count: int
    ) -> None:
        self.stream.write(before)
        if not columns:  # a scalar is one chunk without offsets
            self.stream.write(b"(" + template.around[0] * count + after)
            return
        for first in range(0, count, _BATCH):
            rows = template.filled([column[first : first + _BATCH] for column in columns])
            self.stream.write(b"(" + rows + after)

    def _made(self, dimensions: int | None) -> tuple[_Template, _Template]:
        """Of a chunk, and of an index with where it is; `dimensions` None for an object."""
        many = dimensions or 0
        low = torch.Size(range(_NUMBER, _NUMBER + many))
        high = torch.Size(range(_NUMBER + many, _NUMBER + 2 * many))
        index = MetadataIndex(_TEXT + "0", None if dimensions is None else low)
        info = _StorageInfo(_TEXT + "1", _NUMBER + many, _NUMBER + many + 1)
        chunk = self._template(pickled(ChunkStorageMetadata(low, high)), 0)
        return chunk, self._template(pickled(index) + pickled(info), 2)

    def _template(self, code: bytes, references: int) -> _Template:
        """A template of some opcodes: what is remembered is referred to, stand-ins are gaps."""
        around, columns = [bytearray()], []
        for (op, value, at), (_, _, following) in itertools.pairwise(
            pickletools.genops(code + pickle.STOP)
        ):
            if op.name == "GLOBAL":
                around[-1] += self._reference(_CLASS + str(value))
            elif op.name == "BINUNICODE" and str(value).startswith(_TEXT):
                columns.append(int(str(value).removeprefix(_TEXT)))
                around.append(bytearray())
            elif op.name == "BINUNICODE":
                around[-1] += self._reference(str(value))
            elif isinstance(value, int) and value >= _NUMBER:
                columns.append(references + value - _NUMBER)
                around.append(bytearray())
            else:
                around[-1] += code[at:following]
        return _Template(tuple(map(bytes, around)), tuple(columns), references)

    def _reference(self, name: str) -> bytes:
        """The opcode that asks for a text, or a class."""
        number = self._remembered(name)
        return b"h" + bytes([number]) if number < 256 else b"j" + number.to_bytes(4, "little")

    def _remembered(self, name: str) -> int:
        """The number of a text; or of a class, whose module and name come after `_CLASS`."""
        number = self._memo.get(name)
        if number is None:
            number = self._memo[name] = len(self._memo)
            data = name.encode()
            said = b"X" + len(data).to_bytes(4, "little") + data
            if name.startswith(_CLASS):
                said = b"c" + "\n".join([*name.removeprefix(_CLASS).split(" "), ""]).encode()
            self.stream.write(said + pickle.MEMOIZE + pickle.POP)
        return number


_BATCH = 4096


def _boxes(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of its chunks, of shape `[chunks, dimensions]`."""
    pieces, dimensions = tensor.pieces, len(tensor.shape)
    if isinstance(pieces, StoredPieces):
        return pieces.offsets, pieces.sizes
    boxes = [piece.box for piece in pieces]
    offsets, sizes = (
        np.array(each, dtype=np.int64).reshape(len(boxes), dimensions)
        for each in ([box.offsets for box in boxes], [box.sizes for box in boxes])
    )
    return offsets, sizes
