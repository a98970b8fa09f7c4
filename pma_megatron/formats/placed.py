"""The items of a large output as columns, and where the payloads of its base go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.output import Destination, OutputItem, Placing
from pma_megatron.formats.pieces import ItemNumbers, ManyPieces, StoredPieces
from pma_megatron.formats.zips import Skeleton

COPIED, SPECIAL = -1, -2
_RECORD = "data/0"


class Kind(NamedTuple):
    """Zips of one tensor each, of one shape and dtype: all have the same bytes around it."""

    skeleton: Skeleton
    dtype: torch.dtype
    numel: int

    @property
    def start(self) -> int:
        """Where in the zip its elements begin, in bytes."""
        return self.skeleton.payloads[_RECORD][0]


@dataclass(frozen=True, slots=True, eq=False)
class PlacedItems(Sequence[OutputItem]):
    """Items of an output, made when they are asked for, in the order of the base's files.

    Attributes:
        files: names of files.
        file: per item, the number of its file in `files`.
        base_starts, base_lengths: where in that file the base has it, in bytes.
        starts, lengths: where the output has it.
        kind: per item, a number in `kinds`, `COPIED`, or `SPECIAL`.
        kinds: of zips that are built afresh around one tensor.
        special: number of an item -> it, where it is none of those.
        base_files: names of the base's files, where the output calls them otherwise.
    """

    files: tuple[str, ...]
    file: np.ndarray
    base_starts: np.ndarray
    base_lengths: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    kind: np.ndarray
    kinds: tuple[Kind, ...]
    special: Mapping[int, OutputItem]
    base_files: tuple[str, ...]
    _found: list[tuple[dict[str, int], ItemNumbers]] = field(
        default_factory=list, init=False, repr=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        columns = (self.file, self.base_starts, self.base_lengths, self.starts, self.lengths)
        rest = (self.kind, self.kinds, self.special, self.base_files)
        return PlacedItems, (self.files, *columns, *rest)

    def __len__(self) -> int:
        return len(self.file)

    @overload
    def __getitem__(self, number: int) -> OutputItem: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[OutputItem, ...]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return tuple(self[each] for each in range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        kind = int(self.kind[number])
        if kind == SPECIAL:
            return self.special[number]
        file = int(self.file[number])
        placed = Item(self.files[file], int(self.starts[number]), int(self.lengths[number]))
        if kind >= 0:
            return OutputItem(placed, self.kinds[kind].skeleton, None, {})
        base = int(self.base_starts[number]), int(self.base_lengths[number])
        return OutputItem(placed, None, Item(self.base_files[file], *base), {})

    def __iter__(self) -> Iterator[OutputItem]:
        return (self[number] for number in range(len(self)))

    def renamed(self, moved: Callable[[str], str]) -> PlacedItems:
        """The same in files of other names."""
        special = {
            number: replace(item, placed=replace(item.placed, file=moved(item.placed.file)))
            for number, item in self.special.items()
        }
        return replace(self, files=tuple(map(moved, self.files)), special=special)

    def number_at(self, item: Item) -> int:
        """The number of what an item of the base has become.

        Raises:
            KeyError: the output has it not.
        """
        number_of, by_place = self._lookup()
        file = np.array([number_of[item.file]])
        found = int(by_place.find(file, np.array([item.offset]))[0])
        if found < 0:
            raise KeyError(item)
        return found

    def numbers_of(self, pieces: StoredPieces) -> np.ndarray:
        """`number_at` of the item of every piece."""
        number_of, by_place = self._lookup()
        table = np.array([number_of.get(name, -1) for name in pieces.files], dtype=np.int64)
        return by_place.find(table[pieces.file], pieces.starts)

    def _lookup(self) -> tuple[dict[str, int], ItemNumbers]:
        if not self._found:
            number_of = {name: number for number, name in enumerate(self.base_files)}
            self._found.append((number_of, ItemNumbers(self.file, self.base_starts)))
        return self._found[0]


@dataclass(frozen=True, slots=True)
class Places:
    """Payload of the base -> where its new bytes go.

    Attributes:
        items: of the output.
        special: payloads in items that hold several.
    """

    items: PlacedItems
    special: Mapping[Payload, Destination]

    def __getitem__(self, payload: Payload) -> Destination:
        found = self.special.get(payload)
        return self._made(self.items.number_at(payload.item)) if found is None else found

    def _made(self, number: int) -> Destination:
        items, kind = self.items, int(self.items.kind[number])
        if kind < 0:
            raise KeyError(number)
        file, made = items.files[items.file[number]], items.kinds[kind]
        start = int(items.starts[number]) + made.start
        return Destination(file, start, made.dtype, made.numel, _RECORD, number)

    def renamed(self, moved: Callable[[str], str]) -> Places:
        """The same in files of other names."""
        special = {p: replace(place, file=moved(place.file)) for p, place in self.special.items()}
        return Places(self.items.renamed(moved), special)


@dataclass(frozen=True, slots=True)
class PlacedPieces(Sequence[Piece[Destination]]):
    """Pieces of the base where the output has them, made when they are asked for."""

    pieces: ManyPieces
    places: Placing

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, place: int) -> Piece[Destination]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Piece[Destination], ...]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return tuple(map(self._placed, self.pieces[place]))
        return self._placed(self.pieces[place])

    def __iter__(self) -> Iterator[Piece[Destination]]:
        return map(self._placed, self.pieces)

    def touching(self, box: Box) -> list[Piece[Destination]]:
        """Those that overlap `box`."""
        return [self._placed(piece) for piece in self.pieces.touching(box)]

    def _placed(self, piece: Piece[Payload]) -> Piece[Destination]:
        return Piece(piece.box, self.places[piece.payload], piece.start)
