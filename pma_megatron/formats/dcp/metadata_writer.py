"""Write the `.metadata` of torch.distributed.checkpoint for hundreds of thousands of chunks.

What it says once is pickled from torch's own classes. What it says for every chunk is a template of
opcodes, made of one object of torch's, in which numbers are filled in for all chunks at once: no
object for each of them is ever made.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pma_megatron.formats.base import Item, Tensor
from pma_megatron.formats.dcp.metadata import ORIGINAL_SHAPE, DcpMetadata
from pma_megatron.formats.pieces import StoredPieces

_NUMBER, _WIDE_NUMBER = 0x40000000, 1 << 62
"""Stand for the numbers of a template, counted from here: of four bytes, or of eight."""
_TEXT = "\0text "
_CHUNKS, _STORAGE = "\0chunks ", "\0storage"
_MARK = re.compile(rb"X\x10\0\0\0\0chunks (\d{8})|X\x08\0\0\0\0storage")
_WIDTHS = {4: "<i4", 8: "<i8"}
_FROM = {4: _NUMBER, 8: _WIDE_NUMBER}
_OPCODE = {4: b"J", 8: b"\x8a\x08"}


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
    writer = _Writer(keys, {name.removeprefix(below) for files in lists for name in files})
    for part in _parts(_outer(base, keys, dtypes)):
        if isinstance(part, bytes):
            writer.stream.write(part)
        elif part is None:
            writer.storage(stored, boxes, below)
        else:
            writer.chunks(*boxes[keys[part]])
    return writer.stream.getvalue()


def _outer(base: DcpMetadata, keys: list[str], dtypes: Mapping[str, torch.dtype]) -> bytes:
    """All of it, with marks where chunks and what is stored belong; without its beginning."""
    # Not above: they take as long to import as torch, and who only reads needs none of them.
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, Any] = {}
    for number, key in enumerate(keys):
        if key not in base.tensors:
            entries[key] = BytesStorageMetadata()
            continue
        tensor, said = base.tensors[key], base.properties[key]
        properties = TensorProperties(
            dtype=dtypes.get(key, said.dtype),
            requires_grad=said.requires_grad,
            memory_format=said.memory_format,
            pin_memory=said.pin_memory,
        )
        mark: Any = f"{_CHUNKS}{number:08d}"
        entries[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), mark)
    output = Metadata(entries)
    kept = set(keys)
    if base.planner_data is not None:
        output.planner_data = {k: v for k, v in base.planner_data.items() if k in kept}
    if base.original_shapes is not None:
        output.mcore_data = {  # type: ignore[attr-defined]
            key: {} if shape is None else {ORIGINAL_SHAPE: shape}
            for key, shape in base.original_shapes.items()
            if key in kept
        }
    mark = _STORAGE
    output.storage_data = mark
    return _plain(output)


def _plain(value: Any) -> bytes:
    """The opcodes that make a value and remember nothing of it."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=3)  # one without frames
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()[2:-1]


def _parts(outer: bytes) -> Iterator[bytes | int | None]:
    """Bytes as they are; the number of a key whose chunks follow; None where all storage does."""
    at = 0
    for found in _MARK.finditer(outer):
        yield outer[at : found.start()]
        yield int(found[1]) if found[1] is not None else None
        at = found.end()
    yield outer[at:]
    yield pickle.STOP


@dataclass(frozen=True, slots=True)
class _Template:
    """The opcodes of one object.

    Attributes:
        code: them, with gaps for numbers.
        gaps: (first byte, bytes) of each number, in the order of the stand-ins.
    """

    code: bytes
    gaps: tuple[tuple[int, int], ...]

    def filled(self, columns: list[np.ndarray]) -> np.ndarray:
        """The opcodes of many, one row of bytes each; a column per gap."""
        count = len(columns[0])
        rows = np.tile(np.frombuffer(self.code, dtype=np.uint8), (count, 1))
        for (first, size), column in zip(self.gaps, columns, strict=True):
            numbers = np.ascontiguousarray(column, dtype=_WIDTHS[size])
            rows[:, first : first + size] = numbers.view(np.uint8).reshape(count, size)
        return rows


class _Writer:
    """A pickle in the making, of which classes, keys and names of files are remembered first."""

    def __init__(self, keys: list[str], files: set[str]) -> None:
        self.stream = io.BytesIO()
        self.stream.write(pickle.PROTO + b"\x04")
        self._memo: dict[tuple[str, str], int] = {}
        self._files: dict[int, np.ndarray] = {}
        self._templates: dict[tuple[int | None, int], tuple[_Template, _Template]] = {}
        for text in (*keys, *sorted(files)):
            self._remembered("text", text)

    def chunks(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """The list of a tensor's chunks, of shape `[chunks, dimensions]`."""
        columns = [*offsets.T, *sizes.T]
        template = self._template(offsets.shape[1], columns)[0]
        self._batches(b"]", b"e", template, columns, len(offsets))

    def storage(
        self,
        stored: Mapping[str, Stored],
        boxes: Mapping[str, tuple[np.ndarray, np.ndarray]],
        below: str,
    ) -> None:
        """The dictionary that says where everything is."""
        self.stream.write(b"}")
        objects: list[list[np.ndarray]] = []
        for key, where in stored.items():
            texts = [np.full(len(where.file), self._memo["text", key]), self._named(where, below)]
            if key not in boxes:
                objects.append([*texts, where.starts, where.lengths])
                continue
            columns = [*boxes[key][0].T, where.starts, where.lengths]
            template = self._template(boxes[key][0].shape[1], columns)[1]
            self._batches(b"", b"u", template, [*texts, *columns], len(where.file))
        if objects:
            columns = [np.concatenate(column) for column in zip(*objects, strict=True)]
            template = self._template(None, columns[2:])[1]
            self._batches(b"", b"u", template, columns, len(columns[0]))

    def _named(self, where: Stored, below: str) -> np.ndarray:
        """The number of what is remembered of the file of each chunk."""
        table = self._files.get(id(where.files))
        if table is None:
            names = (name.removeprefix(below) for name in where.files)
            table = np.array([self._memo["text", name] for name in names], dtype=np.int64)
            self._files[id(where.files)] = table
        numbers: np.ndarray = table[where.file]
        return numbers

    def _batches(
        self, before: bytes, after: bytes, template: _Template, columns: list[Any], count: int
    ) -> None:
        self.stream.write(before)
        if not columns:  # a scalar is one chunk without offsets
            self.stream.write(b"(" + template.code * count + after)
            return
        for first in range(0, count, _BATCH):
            rows = template.filled([column[first : first + _BATCH] for column in columns])
            self.stream.write(b"(" + rows.tobytes() + after)

    def _template(
        self, dimensions: int | None, columns: list[np.ndarray]
    ) -> tuple[_Template, _Template]:
        """Of a chunk, and of an index with where it is; `dimensions` None for an object."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        width = 4 if all(c.max(initial=0) < _NUMBER for c in columns) else 8
        found = self._templates.get((dimensions, width))
        if found is not None:
            return found
        first, many = _FROM[width], dimensions or 0
        low = torch.Size(range(first, first + many))
        high = torch.Size(range(first + many, first + 2 * many))
        index = MetadataIndex(_TEXT + "0", None if dimensions is None else low)
        info = _StorageInfo(_TEXT + "1", first + many, first + many + 1)
        pair = self._gapped(_plain(index) + _plain(info), width)
        made = self._gapped(_plain(ChunkStorageMetadata(low, high)), width), pair
        self._templates[dimensions, width] = made
        return made

    def _gapped(self, code: bytes, width: int) -> _Template:
        """A template of some opcodes: what is remembered is referred to, stand-ins are gaps."""
        found = bytearray()
        texts: list[tuple[str, int, int]] = []
        numbers: list[tuple[int, int, int]] = []
        ops = [*pickletools.genops(code + pickle.STOP)]
        for (op, value, at), (_, _, following) in itertools.pairwise(ops):
            place, end = int(at or 0), int(following or 0)
            if op.name == "GLOBAL":
                module, name = str(value).split(" ")
                found += b"j" + self._remembered(module, name).to_bytes(4, "little")
            elif op.name == "BINUNICODE" and str(value).startswith(_TEXT):
                found += b"j"
                texts.append((str(value), len(found), 4))
                found += bytes(4)
            elif op.name == "BINUNICODE":
                found += b"j" + self._remembered("text", str(value)).to_bytes(4, "little")
            elif isinstance(value, int) and value >= _FROM[width]:
                found += _OPCODE[width]
                numbers.append((value, len(found), width))
                found += bytes(width)
            else:
                found += code[place:end]
        gaps = [(first, size) for _, first, size in (*sorted(texts), *sorted(numbers))]
        return _Template(bytes(found), tuple(gaps))

    def _remembered(self, module: str, name: str) -> int:
        """The number of a class, or of a `text`."""
        number = self._memo.get((module, name))
        if number is None:
            number = self._memo[module, name] = len(self._memo)
            data = name.encode()
            said = b"X" + len(data).to_bytes(4, "little") + data
            if module != "text":
                said = f"c{module}\n{name}\n".encode()
            self.stream.write(said + pickle.MEMOIZE + pickle.POP)
        return number


_BATCH = 4096


def _boxes(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of its chunks, of shape `[chunks, dimensions]`."""
    pieces, dimensions = tensor.pieces, len(tensor.shape)
    if isinstance(pieces, StoredPieces):
        return pieces.offsets.astype(np.int64), pieces.sizes.astype(np.int64)
    boxes = [piece.box for piece in pieces]
    offsets, sizes = (
        np.array(each, dtype=np.int64).reshape(len(boxes), dimensions)
        for each in ([box.offsets for box in boxes], [box.sizes for box in boxes])
    )
    return offsets, sizes
