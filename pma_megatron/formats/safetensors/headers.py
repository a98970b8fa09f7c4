"""Safetensors files: what their headers say, checked, and what those of new files will say.

The library writes whole tensors from memory, and opens a file by mapping it, so headers are made
and read here. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.openfiles import SourceStream, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.inert import brief
from pma_megatron.formats.json_files import without_repeats
from pma_megatron.formats.schema import is_count, is_shape

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library refuses longer ones
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
STORABLE = frozenset(NAMES)
"""Dtypes that the files can hold."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_METADATA = "__metadata__"
_NAME_CHARACTERS = 1024
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file begins with; see `formats.output.Frame`."""

    data: bytes
    length: int
    payloads: Mapping[str, tuple[int, int]]

    def structure(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """The header; it has no checksums."""
        return [(0, self.data)]


def header_of(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Header:
    """Lay out one file of `entries`.

    Wider elements come first, so that each lies where its dtype may lie in memory.

    >>> made = header_of([Entry("a", torch.bfloat16, (3,)), Entry("b", torch.float32, (2,))], {})
    >>> made.payloads["b"][0] % 8, made.payloads["a"][0] - made.payloads["b"][0]
    (0, 8)
    """
    fields: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    at = 0
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in ordered:
        fields[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(LENGTH_BYTES, "little") + text
    payloads = {
        entry.name: (len(data) + fields[entry.name]["data_offsets"][0], entry.nbytes)
        for entry in ordered
    }
    return Header(data, len(data) + at, payloads)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one file says of itself.

    Attributes:
        entries: its tensors, in the order of their bytes.
        starts: tensor -> its first byte in the file.
        metadata: plain text that it carries.
        data: the header itself, with its length in front.
        nbytes: of the whole file.
    """

    entries: tuple[Entry, ...]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]
    data: bytes
    nbytes: int


def read_header(path: Path) -> FileHeader:
    """The header of the file at `path`, once it is sure that it describes every byte of it once.

    Raises:
        CheckpointError: it is no safetensors file, cut short, or its header contradicts itself or
            the file: a length beyond it, tensors that overlap or leave a gap, a name that is there
            twice, shapes that are no counts or do not have as many bytes, an unknown dtype.
    """
    try:
        with SourceStream(path) as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            first = stream.read(LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if len(first) < LENGTH_BYTES or length > nbytes - LENGTH_BYTES:
                raise _wrong(path, f"a header of {length} bytes in a file of {nbytes}: cut short")
            if length > MAX_HEADER_BYTES:
                raise _wrong(path, f"a header of {length} bytes, and {MAX_HEADER_BYTES} at most")
            text = _read(stream, length)
    except OSError as error:
        raise unread(path, error) from error
    entries, begins, metadata = _parsed(path, text)
    data = first + text
    _refuse_gaps(path, entries, begins, nbytes - len(data))
    starts = {name: len(data) + begin for name, begin in begins.items()}
    return FileHeader(entries, starts, metadata, data, nbytes)


def _read(stream: Any, count: int) -> bytes:
    """`count` bytes, fewer only at the end of the file."""
    parts, left = [], count
    while left and (part := stream.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _parsed(path: Path, text: bytes) -> tuple[tuple[Entry, ...], dict[str, int], dict[str, str]]:
    if not text.startswith(b"{"):
        raise _wrong(path, "a header that is no JSON object")
    try:
        fields = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"a header that cannot be read ({str(error)[:100]})") from error
    metadata = fields.pop(_METADATA, {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise _wrong(path, f"a header whose {_METADATA} is {brief(metadata)}, no texts by name")
    found = [_entry(path, name, value) for name, value in fields.items()]
    found.sort(key=lambda each: each[1])
    return tuple(entry for entry, _ in found), {e.name: begin for e, begin in found}, metadata


def _entry(path: Path, name: str, value: Any) -> tuple[Entry, int]:
    if not name.isprintable() or len(name) > _NAME_CHARACTERS:
        raise _wrong(path, f"a tensor called {brief(name)}, which no trainer writes")
    if type(value) is not dict or set(value) != _FIELDS:
        raise _wrong(path, f"no dtype, shape and data_offsets of {name}, but {brief(value)}")
    dtype = DTYPES.get(value["dtype"]) if type(value["dtype"]) is str else None
    if dtype is None:
        raise _wrong(path, f"{name} of dtype {brief(value['dtype'])}, which is not known here")
    shape, offsets = value["shape"], value["data_offsets"]
    two = type(offsets) is list and len(offsets) == 2 and all(map(is_count, offsets))
    if not (type(shape) is list and is_shape(shape) and two):
        raise _wrong(path, f"{name} of shape {brief(shape)} at {brief(offsets)}, no counts")
    entry = Entry(name, dtype, tuple(shape))
    if entry.nbytes != offsets[1] - offsets[0]:
        raise _wrong(
            path,
            f"{name} of {brief(tuple(shape))} in {value['dtype']}, {entry.nbytes} bytes, at "
            f"{offsets[0]} to {offsets[1]}",
        )
    return entry, offsets[0]


def _refuse_gaps(
    path: Path, entries: Sequence[Entry], begins: Mapping[str, int], nbytes: int
) -> None:
    at = 0
    for entry in sorted(entries, key=lambda e: (begins[e.name], e.nbytes)):
        if begins[entry.name] != at:
            what = "overlaps the tensor before it" if begins[entry.name] < at else "leaves a gap"
            raise _wrong(path, f"{entry.name} at {begins[entry.name]}, expected {at}: it {what}")
        at += entry.nbytes
    if at > nbytes:
        raise _wrong(path, f"tensors of {at} bytes, and {nbytes} after its header: cut short")
    if at < nbytes:
        raise _wrong(path, f"{nbytes - at} bytes after its last tensor that are of no tensor")


def _wrong(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is no safetensors file that can be read: it has {what}")
