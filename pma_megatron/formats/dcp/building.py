"""The shards of an output after those of a base: the same entries, some of them with new bytes.

Items that keep all their bytes are copied as they are; items with new payloads are laid out afresh
(the same records, and the sizes that the new dtypes need). Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.dcp.metadata_writer import Stored, StoredRows
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.output import Changes, Destination, OutputItem
from pma_megatron.formats.pickles import dump_inert, new_tensor
from pma_megatron.formats.pieces import ItemNumbers, StoredPieces, narrow
from pma_megatron.formats.placed import COPIED, SPECIAL, Kind, PlacedItems, Places
from pma_megatron.formats.relay import relay
from pma_megatron.formats.zips import lay_out

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Shards:
    """Shards that were laid out.

    Attributes:
        sizes: shard file -> bytes.
        items: of the output.
        places: base payload -> where its new bytes go.
        stored: key -> where its chunks are stored now; of keys that the output has.
        dtypes: keys of tensors that have another dtype in the output, and which.
        of_base: the base's shard files, those included of which nothing is left.
    """

    sizes: dict[str, int]
    items: PlacedItems
    places: Places
    stored: Mapping[str, Stored]
    dtypes: Mapping[str, torch.dtype]
    of_base: frozenset[str]


def lay_out_shards(
    files: ItemFiles,
    tensors: Mapping[str, Tensor],
    objects: Mapping[str, Item],
    changes: Changes,
    edited: Callable[[str], bytes | None],
) -> Shards:
    """Lay out what `changes` leaves of a checkpoint, file by file, in the order of the base.

    Args:
        files: the base's.
        tensors: of the base, by key.
        objects: of the base, by key.
        changes: what the output has that the base has not.
        edited: key -> the whole zip of an entry that changes and holds no payload; None for others.
    """
    build = _Build(
        files,
        {key: tensor for key, tensor in tensors.items() if key not in changes.drop},
        {key: item for key, item in objects.items() if key not in changes.drop},
        changes,
    )
    build.gather()
    build.find_new()
    build.find_edited(edited)
    return replace(build.finished(), of_base=_files(tensors.values(), objects.values()))


@dataclass(slots=True)
class _Build:
    """Rows, one per chunk and object, in the order of the keys.

    Attributes:
        chunks: of the tensors, by their numbers.
        names: of files, sorted.
        file_of: number of a file by its name.
        lists: see `_numbers`.
        owner: per row, the number of its tensor, or -1.
        order: of the rows in the base's files; an item's number is its place there.
        by_place: finds places in that order.
        kinds: what is laid out afresh around one tensor, by shape and dtype.
        several: item of several payloads -> those that get new bytes.
        special: row -> (the item, its payloads' places), as if it lay at byte 0.
    """

    files: ItemFiles
    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Item]
    changes: Changes
    chunks: list[StoredPieces] = field(default_factory=list)
    names: tuple[str, ...] = ()
    file_of: dict[str, int] = field(default_factory=dict)
    lists: dict[int, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)
    by_place: ItemNumbers = field(default_factory=lambda: ItemNumbers(_NONE, _NONE))
    file: np.ndarray = field(default_factory=lambda: _NONE)
    start: np.ndarray = field(default_factory=lambda: _NONE)
    length: np.ndarray = field(default_factory=lambda: _NONE)
    owner: np.ndarray = field(default_factory=lambda: _NONE)
    bounds: np.ndarray = field(default_factory=lambda: _NONE)
    order: np.ndarray = field(default_factory=lambda: _NONE)
    number: np.ndarray = field(default_factory=lambda: _NONE)
    kind: np.ndarray = field(default_factory=lambda: _NONE)
    kinds: dict[tuple[tuple[int, ...], torch.dtype], int] = field(default_factory=dict)
    made: list[Kind] = field(default_factory=list)
    special: dict[int, tuple[OutputItem, Mapping[Payload, Destination]]] = field(
        default_factory=dict
    )

    def gather(self) -> None:
        """The rows, and their order in the files."""
        every = (tensor.pieces for tensor in self.tensors.values())
        chunks = self.chunks = [pieces for pieces in every if isinstance(pieces, StoredPieces)]
        assert len(chunks) == len(self.tensors)  # as `.metadata` says them
        of_objects = [*self.objects.values()]
        self.names = tuple(sorted(_files(self.tensors.values(), of_objects)))
        file_of = self.file_of = {name: number for number, name in enumerate(self.names)}
        self.file = _joined(
            [self._numbers(pieces.files)[pieces.file] for pieces in chunks],
            [file_of[item.file] for item in of_objects],
        )
        self.start = _joined([p.starts for p in chunks], [item.offset for item in of_objects])
        self.length = _joined([p.lengths for p in chunks], [item.length for item in of_objects])
        self.bounds = np.cumsum([0, *(len(pieces) for pieces in chunks)])
        self.owner = np.full(len(self.file), -1, dtype=np.int64)
        self.owner[: self.bounds[-1]] = np.repeat(np.arange(len(chunks)), np.diff(self.bounds))
        self.order = np.lexsort((self.start, self.file))
        self.by_place = ItemNumbers(self.file[self.order], self.start[self.order])
        self.number = np.empty(len(self.order), dtype=np.int64)
        self.number[self.order] = np.arange(len(self.order))
        self.kind = np.full(len(self.file), COPIED, dtype=np.int64)

    def find_new(self) -> None:
        """Rows whose payloads get new bytes."""
        several: dict[int, list[Payload]] = {}
        for pieces, dtype in self.changes.payloads.groups:
            if isinstance(pieces, StoredPieces):
                rows = self._rows(pieces.files, pieces.file, pieces.starts)
                there = rows >= 0
                self.kind[rows[there]] = self._kinds_of(pieces.sizes, dtype)[there]
                continue
            for payload in dict.fromkeys(piece.payload for piece in pieces):
                row = self._row(payload.item)
                if row >= 0 and payload.record is None and self.owner[row] >= 0:
                    sizes = self._sizes(row)
                    self.kind[row] = self._kind(sizes, dtype)
                elif row >= 0:
                    several.setdefault(row, []).append(payload)
        for row, payloads in several.items():
            relaid = relay(
                self.files,
                self._item(row),
                payloads,
                int(self.number[row]),
                partial(_at, self, row),
            )
            self.special[row] = relaid.item, relaid.places

    def find_edited(self, edited: Callable[[str], bytes | None]) -> None:
        """Rows of entries that change and hold no new payload."""
        taken = self.kind != COPIED
        taken[[*self.special]] = True
        keys = [*self.tensors, *self.objects]
        first = [*self.bounds[:-1], *range(self.bounds[-1], len(self.file))]
        for key, low, high in zip(keys, first, [*first[1:], len(self.file)], strict=True):
            if taken[low:high].all() or (content := edited(key)) is None:
                continue
            for row in range(low, high):
                if not taken[row]:
                    placed = _at(self, row, len(content))
                    self.special[row] = OutputItem(placed, None, None, {}, literal=content), {}

    def finished(self) -> Shards:
        """Where everything goes."""
        lengths = self.length.copy()
        known = np.array([each.skeleton.length for each in self.made], dtype=np.int64)
        lengths[self.kind >= 0] = known[self.kind[self.kind >= 0]]
        for row, (item, _) in self.special.items():
            self.kind[row], lengths[row] = SPECIAL, item.placed.length
        file, inside = self.file[self.order], lengths[self.order]
        before = np.cumsum(inside) - inside
        first = np.searchsorted(file, np.arange(len(self.names)))
        sorted_starts = before - before[first[file]] if len(file) else before
        starts = sorted_starts[self.number]
        special, places = {}, dict[Payload, Destination]()
        for row, (item, inner) in self.special.items():
            offset = int(starts[row])
            placed = replace(item.placed, offset=offset)
            special[int(self.number[row])] = replace(item, placed=placed)
            places |= {p: replace(to, start=to.start + offset) for p, to in inner.items()}
        items = PlacedItems(
            self.names,
            narrow(file),
            narrow(self.start[self.order]),
            narrow(self.length[self.order]),
            narrow(sorted_starts),
            narrow(inside),
            self.kind[self.order].astype(np.int32),
            tuple(self.made),
            special,
            self.names,
        )
        nbytes = np.add.reduceat(inside, first) if len(inside) else inside
        sizes = {name: int(count) for name, count in zip(self.names, nbytes, strict=True)}
        rows = {
            k: (int(self.bounds[n]), int(self.bounds[n + 1])) for n, k in enumerate(self.tensors)
        }
        rows |= {key: (row, row + 1) for row, key in enumerate(self.objects, int(self.bounds[-1]))}
        stored = StoredRows(Stored(self.names, self.file, starts, lengths), rows)
        return Shards(
            sizes, items, Places(items, places), stored, self._dtypes(), frozenset(self.names)
        )

    def _dtypes(self) -> dict[str, torch.dtype]:
        keys = [*self.tensors]
        found: dict[str, torch.dtype] = {}
        rows = np.flatnonzero(self.kind >= 0)
        pairs = np.unique(np.stack([self.owner[rows], self.kind[rows]]), axis=1)
        for owner, kind in pairs.T.tolist():
            dtype = self.made[kind].dtype
            if dtype != self.tensors[keys[owner]].dtype:
                found[keys[owner]] = dtype
        return found

    # Rows.

    def _rows(self, files: tuple[str, ...], file: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The row of each item, -1 where the output has none."""
        known = self.by_place.find(self._numbers(files)[file], starts)
        rows: np.ndarray = np.where(known < 0, -1, self.order[known])
        return rows

    def _row(self, item: Item) -> int:
        file = np.array([self.file_of.get(item.file, -1)])
        known = int(self.by_place.find(file, np.array([item.offset]))[0])
        return -1 if known < 0 else int(self.order[known])

    def _numbers(self, files: tuple[str, ...]) -> np.ndarray:
        """Number of a file among these -> among all, -1 where the output has it not; worked out
        once, as all tensors of a checkpoint name one list."""
        known = self.lists.get(id(files))
        if known is None:
            numbers = np.array([self.file_of.get(name, -1) for name in files], dtype=np.int64)
            known = self.lists[id(files)] = files, numbers
        return known[1]

    def _item(self, row: int) -> Item:
        name = self.names[int(self.file[row])]
        return Item(name, int(self.start[row]), int(self.length[row]))

    def _sizes(self, row: int) -> tuple[int, ...]:
        """Of the chunk in a row."""
        owner = int(self.owner[row])
        pieces = self.chunks[owner]
        return tuple(pieces.sizes[row - int(self.bounds[owner])].tolist())

    def _kinds_of(self, sizes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        """The kind of each chunk."""
        if not len(sizes) or (sizes == sizes[0]).all():
            one = [self._kind(tuple(sizes[0].tolist()), dtype)] if len(sizes) else []
            return np.repeat(np.array(one, dtype=np.int64), len(sizes))
        each, which = np.unique(sizes, axis=0, return_inverse=True)
        numbers = [self._kind(tuple(row), dtype) for row in each.tolist()]
        kinds: np.ndarray = np.array(numbers, dtype=np.int64)[which.reshape(-1)]
        return kinds

    def _kind(self, sizes: tuple[int, ...], dtype: torch.dtype) -> int:
        found = self.kinds.get((sizes, dtype))
        if found is None:
            numel = int(np.prod(sizes, dtype=np.int64))
            content = dump_inert(new_tensor(sizes, dtype))
            skeleton = lay_out(content, [("0", numel * dtype.itemsize)])
            found = self.kinds[sizes, dtype] = len(self.made)
            self.made.append(Kind(skeleton, dtype, numel))
        return found


def _files(tensors: Iterable[Tensor], objects: Iterable[Item]) -> frozenset[str]:
    """Where they are."""
    found = {item.file for item in objects}
    for pieces in (tensor.pieces for tensor in tensors):
        if isinstance(pieces, StoredPieces):
            found |= {pieces.files[number] for number in np.unique(pieces.file)}
    return frozenset(found)


def _at(build: _Build, row: int, length: int) -> Item:
    """An item of the output before it is known where in its file it lies."""
    return Item(build.names[int(build.file[row])], 0, length)


def _joined(columns: list[np.ndarray], last: list[int]) -> np.ndarray:
    return np.concatenate([*(c.astype(np.int64) for c in columns), np.array(last, dtype=np.int64)])


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


def fill(skeleton: Any, data: Mapping[str, bytes]) -> bytes:
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
