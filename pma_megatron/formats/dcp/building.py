"""The shards of an output after those of a base: the same entries, some of them with new bytes.

Items that keep all their bytes are copied as they are; items with new payloads are laid out afresh
(the same records, and the sizes that the new dtypes need). Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.output import Changes, Destination, OutputItem
from pma_megatron.formats.pickles import dump_inert, new_tensor
from pma_megatron.formats.relay import relay
from pma_megatron.formats.zips import Skeleton, lay_out

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex


@dataclass(frozen=True, slots=True)
class Entry:
    """One chunk of a tensor, or an object.

    Attributes:
        key: under which it is stored.
        index: of it in `.metadata`.
        item: its zip.
        sizes: of the chunk; None for an object.
    """

    key: str
    index: MetadataIndex
    item: Item
    sizes: tuple[int, ...] | None


def entries_of(tensors: Mapping[str, Tensor], objects: Mapping[str, Item]) -> list[Entry]:
    """Every chunk and every object of a checkpoint."""
    from torch.distributed.checkpoint.metadata import MetadataIndex  # as slow as torch to import

    result = []
    for key, tensor in tensors.items():
        for piece in tensor.pieces:
            index = MetadataIndex(key, torch.Size(piece.box.offsets))
            result.append(Entry(key, index, piece.payload.item, piece.box.sizes))
    for key, item in objects.items():
        result.append(Entry(key, MetadataIndex(key), item, None))
    return result


def new_dtypes(tensors: Mapping[str, Tensor], changes: Changes) -> dict[str, torch.dtype]:
    """Keys of tensors that have another dtype in the output, and which."""
    dtypes: dict[str, torch.dtype] = {}
    for key, tensor in tensors.items():
        changed = (changes.payloads.get(p.payload) for p in tensor.pieces)
        new = {dtype for dtype in changed if dtype is not None}
        if new and new != {tensor.dtype}:
            dtypes[key] = new.pop()
    return dtypes


@dataclass(slots=True)
class Build:
    """Shards that are being laid out.

    Attributes:
        files: the base's.
        changes: what the output has that the base has not.
        sizes: shard file -> bytes.
        items: of the output.
        places: base payload -> where its new bytes go.
        moved: item of the base -> of the output.
    """

    files: ItemFiles
    changes: Changes
    sizes: dict[str, int] = field(default_factory=dict)
    items: list[OutputItem] = field(default_factory=list)
    places: dict[Payload, Destination] = field(default_factory=dict)
    moved: dict[Item, Item] = field(default_factory=dict)

    def place(self, entries: Iterable[Entry], edited: Callable[[Entry], bytes | None]) -> None:
        """Lay out `entries`, file by file, in the order of the base.

        Args:
            entries: that the output has.
            edited: the whole zip of an entry that changes and holds no payload; None for others.
        """
        by_item: dict[Item, list[Payload]] = {}
        for payload in self.changes.payloads:
            by_item.setdefault(payload.item, []).append(payload)
        for entry in sorted(entries, key=lambda e: (e.item.file, e.item.offset)):
            if entry.item in by_item:
                self._relay(entry, by_item[entry.item])
            elif (content := edited(entry)) is not None:
                placed = self._reserve(entry.item, len(content))
                self.items.append(OutputItem(placed, None, None, {}, literal=content))
            else:
                placed = self._reserve(entry.item, entry.item.length)
                self.items.append(OutputItem(placed, None, entry.item, {}))

    def _reserve(self, base_item: Item, length: int) -> Item:
        offset = self.sizes.get(base_item.file, 0)
        self.sizes[base_item.file] = offset + length
        placed = Item(base_item.file, offset, length)
        self.moved[base_item] = placed
        return placed

    def _relay(self, entry: Entry, payloads: list[Payload]) -> None:
        """An item with new payloads: a tensor of its own, or one object holding many."""
        if payloads[0].record is None and entry.sizes is not None:
            dtype = self.changes.payloads[payloads[0]]
            skeleton = _skeleton(entry.sizes, dtype, payloads[0].numel)
            placed = self._reserve(entry.item, skeleton.length)
            start = placed.offset + skeleton.payloads["data/0"][0]
            self.places[payloads[0]] = Destination(
                placed.file, start, dtype, payloads[0].numel, "data/0", len(self.items)
            )
            self.items.append(OutputItem(placed, skeleton, None, {}))
            return
        relaid = relay(
            self.files,
            entry.item,
            payloads,
            len(self.items),
            lambda length: self._reserve(entry.item, length),
        )
        self.items.append(relaid.item)
        self.places.update(relaid.places)


@lru_cache(maxsize=4096)
def _skeleton(sizes: tuple[int, ...], dtype: torch.dtype, numel: int) -> Skeleton:
    """The zip of a tensor: one for all tensors of a shape."""
    return lay_out(dump_inert(new_tensor(sizes, dtype)), [("0", numel * dtype.itemsize)])


def saved(
    files: ItemFiles,
    item: Item,
    value: Any,
    zero: set[str],
    filled: Mapping[str, bytes] = MappingProxyType({}),
) -> bytes:
    """The whole zip of a small edited object.

    Args:
        files: the base's.
        item: the object there.
        value: what it says now (`load_inert`, changed).
        zero: keys of its storages that become zero.
        filled: key of a storage -> an element, of which all in it become copies.
    """
    records = files.records(item)
    data = {n: files.read_record(item, n) for n in records if n.startswith("data/")}
    data = {n: bytes(len(b)) if n.partition("/")[2] in zero else b for n, b in data.items()}
    for key, element in filled.items():
        data[f"data/{key}"] = element * (len(data[f"data/{key}"]) // len(element))
    skeleton = lay_out(dump_inert(value), [(n.partition("/")[2], len(b)) for n, b in data.items()])
    return fill(skeleton, data)


def fill(skeleton: Skeleton, data: Mapping[str, bytes]) -> bytes:
    """A zip in memory: `skeleton` with its payloads."""
    from isal import isal_zlib

    result = bytearray(skeleton.length)
    for name, content in data.items():
        start, nbytes = skeleton.payloads[name]
        result[start : start + nbytes] = content
    crcs = {name: isal_zlib.crc32(content) for name, content in data.items()}
    for offset, content in skeleton.structure(crcs):
        result[offset : offset + len(content)] = content
    return bytes(result)
