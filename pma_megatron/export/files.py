"""Safetensors files: laid out before a byte is written, and read again by what they say.

The library writes whole tensors from memory, so headers are made here; it is what opens the
finished files, before they are published and when they are verified. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.openfiles import open_source
from pma_megatron.errors import VerifyError
from pma_megatron.formats.base import Item
from pma_megatron.formats.output import Destination, Folder, OutputItem, OutputLayout

INDEX_FILE = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library refuses longer ones
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
STORABLE = frozenset(_NAMES)
"""Dtypes that the files can hold."""
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an exported model, as a file has it."""

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
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in ordered:
        fields[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    payloads = {
        entry.name: (len(data) + fields[entry.name]["data_offsets"][0], entry.nbytes)
        for entry in ordered
    }
    return Header(data, len(data) + at, payloads)


def shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """The tensors of each file, in order; a file goes beyond `max_bytes` for one tensor alone.

    >>> one = Entry("a", torch.float32, (10,))
    >>> [len(shard) for shard in shards([one, one, one], 80)]
    [2, 1]
    """
    found: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if found[-1] and held + entry.nbytes > max_bytes:
            found.append([])
            held = 0
        found[-1].append(entry)
        held += entry.nbytes
    return found


def lay_out(
    entries: Sequence[Entry], max_bytes: int, aliases: Mapping[str, str], small: Mapping[str, bytes]
) -> tuple[OutputLayout, dict[str, Destination]]:
    """Lay out a folder of safetensors files.

    Args:
        entries: the tensors, in the order of the model.
        max_bytes: of the tensors in one file.
        aliases: second name of a tied parameter -> its first, which is among `entries`.
        small: the other files.

    Returns:
        the folder, and where each tensor goes.
    """
    parts = shards(entries, max_bytes)
    files: dict[str, int] = {}
    items: list[OutputItem] = []
    places: dict[str, Destination] = {}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = _ONE_FILE
        if len(parts) > 1:
            name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        names = {entry.name for entry in part}
        tied = {alias: owner for alias, owner in aliases.items() if owner in names}
        header = header_of(part, tied)
        for entry in part:
            start = header.payloads[entry.name][0]
            places[entry.name] = Destination(
                name, start, entry.dtype, entry.numel, entry.name, number, Folder.MODEL
            )
            weight_map[entry.name] = name
        files[name] = header.length
        items.append(OutputItem(Item(name, 0, header.length), header, None, {}))
    last = None
    written = OrderedDict(small)
    if len(parts) > 1:
        total = {"total_size": sum(entry.nbytes for entry in entries)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        last, written[INDEX_FILE] = INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode()
    return (
        OutputLayout(
            files=files,
            items=tuple(items),
            places={},
            small_files=written,
            last_file=last,
            sums_payloads=True,
        ),
        places,
    )


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in an exported folder: `entry` from byte `start` of `file`."""

    entry: Entry
    file: str
    start: int


def stored_in(folder: Path, files: Collection[str] | None = None) -> dict[str, Stored]:
    """The tensors of every safetensors file in a folder, as the library and the headers say.

    Args:
        folder: an exported model.
        files: what was written there, by name; None to take whatever lies there for it.

    Raises:
        VerifyError: a file cannot be opened, is no plain file, has no valid header, or two have the
            same tensor.
    """
    found: dict[str, Stored] = {}
    there = sorted(folder.glob("*.safetensors"))
    for path in (path for path in there if files is None or path.name in files):
        for name, stored in _read_header(path).items():
            if name in found:
                raise VerifyError(f"{folder}: {found[name].file} and {path.name} both have {name}")
            found[name] = stored
    _refuse_other_index(folder, found)
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with os.fdopen(open_source(path), "rb") as stream:
            with safe_open(path, framework="pt") as opened:
                names = set(opened.keys())
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                raise VerifyError(f"{path}: a header of {length} bytes")
            fields = json.loads(stream.read(length))
        fields.pop("__metadata__", None)
        if set(fields) != names:
            raise VerifyError(f"{path}: its header names tensors that safetensors does not open")
        return {
            name: Stored(
                Entry(name, _DTYPES[each["dtype"]], tuple(each["shape"])),
                path.name,
                _LENGTH_BYTES + length + each["data_offsets"][0],
            )
            for name, each in fields.items()
        }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerifyError(
            f"{path} is no safetensors file that can be read ({error}): damaged"
        ) from error


def _refuse_other_index(folder: Path, found: Mapping[str, Stored]) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_bytes())["weight_map"]
        same = said == {name: stored.file for name, stored in found.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerifyError(f"{path} cannot be read ({error}): damaged") from error
    if not same:
        raise VerifyError(f"{path} does not say which tensors lie in which file: damaged")
