"""Parameters that are cut over ranks by their elements, an equal share each, as ZeRO-3 cuts them.

A large job has millions of such pieces. Their boxes follow from the shape and the number of ranks,
and where they lie from the place of the parameter among the others of a rank, so nothing is kept
for a piece, and it is made when it is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece, flat_range, row_major_strides
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.flat import FlatRange
from pma_megatron.formats.pieces import Columns, ManyPieces, narrow

T = TypeVar("T")
_SHAPES = 1024
_FEW = 32


def share_of(shape: Sequence[int], rank: int, ranks: int) -> tuple[int, list[tuple[Box, int]]]:
    """A parameter's share of one rank under ZeRO-3: its elements, ceil(numel / ranks) but for the
    last ranks, and the boxes in it with where each begins.
    """
    numel = math.prod(shape)
    share = -(-numel // ranks)
    low, high = min(rank * share, numel), min((rank + 1) * share, numel)
    return share, [(box, at - low) for box, at in flat_range(Box.whole(shape), low, high)]


def _once(values: Sequence[T]) -> tuple[T, ...]:
    """All of them, or one where they are the same."""
    return tuple(values[:1]) if len({*values}) == 1 else tuple(values)


class _Cut(NamedTuple):
    """The boxes of a shape, in the order of its elements, and so of the ranks.

    Attributes:
        share: elements of a rank, but of the last ones.
        offsets, sizes: of the boxes, `[boxes, dimensions]`.
        rank: per box, whose it is.
        inside: per box, where in that rank's share it begins.
        begins: per box, how many elements of the shape come before it.
    """

    share: int
    offsets: np.ndarray
    sizes: np.ndarray
    rank: np.ndarray
    inside: np.ndarray
    begins: np.ndarray


@lru_cache(maxsize=_SHAPES)
def _cut(shape: tuple[int, ...], ranks: int) -> _Cut:
    found, counts, share = list[tuple[Box, int]](), list[int](), 0
    for rank in range(ranks):
        share, boxes = share_of(shape, rank, ranks)
        found += boxes
        counts.append(len(boxes))
    dimensions = len(shape)
    offsets = np.array([b.offsets for b, _ in found], np.int64).reshape(len(found), dimensions)
    sizes = np.array([b.sizes for b, _ in found], np.int64).reshape(len(found), dimensions)
    owner = np.repeat(np.arange(ranks), counts)
    inside = np.array([at for _, at in found], dtype=np.int64)
    begins = owner * share + inside
    return _Cut(share, narrow(offsets), narrow(sizes), narrow(owner), narrow(inside), begins)


@dataclass(frozen=True, slots=True, eq=False)
class RankItems:
    """An item of each rank, of which all that a checkpoint holds on the ranks is in.

    Attributes:
        items: in the order of the ranks.
        files: theirs.
        offsets: where in those they begin, int64 `[ranks]`.
    """

    items: tuple[Item, ...]
    files: tuple[str, ...]
    offsets: np.ndarray

    @staticmethod
    def of(items: Sequence[Item]) -> RankItems:
        """Those items."""
        offsets = np.array([item.offset for item in items], dtype=np.int64)
        return RankItems(tuple(items), tuple(item.file for item in items), offsets)


@dataclass(frozen=True, slots=True, eq=False)
class Holders:
    """A flat payload per rank, in which the shares of parameters follow each other.

    Attributes:
        ranks: what their payloads are in.
        dtype: of all of them.
        records, numels, starts: name, elements, and where the first parameter begins; of each rank,
            or one for all.
    """

    ranks: RankItems
    dtype: torch.dtype
    records: tuple[str | None, ...]
    numels: tuple[int, ...]
    starts: np.ndarray

    @staticmethod
    def of(ranks: RankItems, payloads: Sequence[Payload], starts: Sequence[int]) -> Holders:
        """Payloads of one dtype, one in the item of each rank, in the order of the ranks."""
        records = _once([payload.record for payload in payloads])
        numels = _once([payload.numel for payload in payloads])
        begin = np.array(_once(starts), dtype=np.int64)
        return Holders(ranks, payloads[0].dtype, records, numels, begin)

    def __len__(self) -> int:
        return len(self.ranks.items)

    def payload(self, rank: int) -> Payload:
        """That of a rank."""
        record, numel = self.records[rank % len(self.records)], self.numels[rank % len(self.numels)]
        return Payload(self.ranks.items[rank], self.dtype, numel, record)


class SharedPieces(ManyPieces):
    """The pieces of one parameter of which every rank holds an equal share.

    Attributes:
        holders: the ranks' payloads.
        shape: of the parameter.
        at: where its share begins among those of the other parameters in a payload.

    >>> ranks = RankItems.of([Item("rank_0", 0, 99), Item("rank_1", 0, 99)])
    >>> holders = Holders(ranks, torch.float32, ("data/0",), (9,), np.array([0]))
    >>> pieces = SharedPieces(holders, (3, 2), 5)
    >>> [(piece.box.offsets, piece.box.sizes, piece.start) for piece in pieces]
    [((0, 0), (1, 2), 5), ((1, 0), (1, 1), 7), ((1, 1), (1, 1), 5), ((2, 0), (1, 2), 6)]
    """

    __slots__ = ("at", "holders", "shape")

    def __init__(self, holders: Holders, shape: tuple[int, ...], at: int) -> None:
        self.holders, self.shape, self.at = holders, shape, at
        self.dtype = holders.dtype

    @property
    def _cut(self) -> _Cut:
        return _cut(self.shape, len(self.holders))

    def __len__(self) -> int:
        return len(self._cut.rank)

    def __iter__(self) -> Iterator[Piece[Payload]]:
        return self._made(np.arange(len(self)))

    def _made(self, numbers: np.ndarray) -> Iterator[Piece[Payload]]:
        cut, holders = self._cut, self.holders
        ranks = cut.rank[numbers]
        starts = self._starts()[ranks] + cut.inside[numbers]
        columns = (cut.offsets[numbers], cut.sizes[numbers], ranks, starts)
        for offsets, sizes, rank, start in zip(*(c.tolist() for c in columns), strict=True):
            yield Piece(Box(tuple(offsets), tuple(sizes)), holders.payload(rank), start)

    def _one(self, number: int) -> Piece[Payload]:
        """One of them, as a merge asks for each: many times as fast as `_made` is for one."""
        cut, holders = self._cut, self.holders
        rank = int(cut.rank[number])
        box = Box(tuple(cut.offsets[number].tolist()), tuple(cut.sizes[number].tolist()))
        begin = int(holders.starts[rank % len(holders.starts)])
        return Piece(box, holders.payload(rank), begin + self.at + int(cut.inside[number]))

    def _starts(self) -> np.ndarray:
        """Per rank, where in its payload its share begins."""
        return np.broadcast_to(self.holders.starts + self.at, len(self.holders))

    def columns(self) -> Columns:
        """See `ManyPieces`."""
        cut, element = self._cut, self._starts()[self._cut.rank] + self._cut.inside
        ranks, boxes = self.holders.ranks, (cut.offsets, cut.sizes)
        items = ranks.offsets[cut.rank]
        return Columns(ranks.files, cut.rank, items, element, *boxes, ordered=True)

    def payloads(self) -> Iterator[Payload]:
        """See `ManyPieces`."""
        return map(self.holders.payload, range(self.used))

    @property
    def held_alike(self) -> object | None:
        """See `ManyPieces`."""
        return id(self.holders), self.used

    @property
    def used(self) -> int:
        """How many ranks hold some of it: the first ones."""
        numel = math.prod(self.shape)
        return -(-numel // self._cut.share) if numel else 0

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """Per rank, where in its payload its share begins, and how many elements are in it."""
        share = self._cut.share
        before = np.arange(len(self.holders), dtype=np.int64) * share
        return self._starts(), np.clip(math.prod(self.shape) - before, 0, share)

    def touching(self, box: Box) -> list[Piece[Payload]]:
        """Pieces that overlap `box`."""
        cut = self._cut
        if not len(cut.rank) or len(box.sizes) != len(self.shape) or not all(box.sizes):
            return []
        strides = row_major_strides(self.shape)
        low = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
        last = low + sum((n - 1) * s for n, s in zip(box.sizes, strides, strict=True))
        begin = max(int(cut.begins.searchsorted(low, "right")) - 1, 0)
        stop = int(cut.begins.searchsorted(last, "right"))
        whole = all(
            o + n <= extent for o, n, extent in zip(box.offsets, box.sizes, self.shape, strict=True)
        )
        if (
            last - low + 1 == box.numel and whole
        ):  # it has no gaps, so all between its ends is in it
            return [self._one(number) for number in range(begin, stop)]
        if stop - begin > _FEW:
            numbers = np.arange(begin, stop)
            first, sizes = (c[numbers].astype(np.int64) for c in (cut.offsets, cut.sizes))
            wanted, extent = np.array(box.offsets), np.array(box.sizes)
            common = np.maximum(first, wanted) < np.minimum(first + sizes, wanted + extent)
            return [*self._made(numbers[common.all(axis=1)])]
        found = (self._one(number) for number in range(begin, stop))
        return [piece for piece in found if piece.box.intersect(box) is not None]

    def covers(self, box: Box) -> bool | None:
        """Whether all of `box` lies in pieces; None where each of those has to be looked at."""
        if len(self.shape) != len(box.sizes):
            return None
        return not box.numel or box.lies_in(self.shape)

    @property
    def extent(self) -> Box:
        """All of the parameter."""
        return Box.whole(self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedPieces, (self.holders, self.shape, self.at)


@dataclass(frozen=True, slots=True)
class SharedRanges(Sequence[FlatRange]):
    """What lies where in the flat space of one rank, worked out when it is asked for.

    Attributes:
        shapes: key -> shape of each parameter, in the order of the space.
        keys: of those that have elements: of each some rank holds a share.
        rank, ranks: whose it is.
    """

    shapes: Mapping[str, tuple[int, ...]]
    keys: frozenset[str]
    rank: int
    ranks: int

    @staticmethod
    def of_ranks(
        shapes: Mapping[str, tuple[int, ...]], names: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], SharedRanges]:
        """Those of all ranks, by the names of their spaces."""
        keys = frozenset(key for key, shape in shapes.items() if math.prod(shape))
        return {name: SharedRanges(shapes, keys, n, len(names)) for n, name in enumerate(names)}

    def _made(self) -> list[FlatRange]:
        found, at = [], 0
        for key, shape in self.shapes.items():
            share, boxes = share_of(shape, self.rank, self.ranks)
            found += [FlatRange(at + first, key, box) for box, first in boxes]
            at += share
        return found

    def __len__(self) -> int:
        return len(self._made())

    @overload
    def __getitem__(self, place: int) -> FlatRange: ...
    @overload
    def __getitem__(self, place: slice) -> list[FlatRange]: ...
    def __getitem__(self, place: int | slice) -> Any:
        return self._made()[place]

    def __iter__(self) -> Iterator[FlatRange]:
        return iter(self._made())


def gaps(
    every: Sequence[SharedPieces], covered: dict[Payload, list[tuple[int, int]]]
) -> list[tuple[Payload, list[tuple[int, int]]]]:
    """What no parameter fills of the payloads that some fill: (start, elements).

    Args:
        every: the parameters.
        covered: (start, elements) that others fill; what payloads of `every` are among them, or
            are held in two ways, is added there instead.
    """
    by_holders: dict[int, list[SharedPieces]] = {}
    for pieces in every:
        by_holders.setdefault(id(pieces.holders), []).append(pieces)
    payloads_of = {
        number: [*map(one.holders.payload, range(len(one.holders)))]
        for number, (one, *_) in by_holders.items()
    }
    times = Counter(payload for each in payloads_of.values() for payload in {*each})
    found: list[tuple[Payload, list[tuple[int, int]]]] = []
    for number, together in by_holders.items():
        held = [pieces.held() for pieces in together]
        starts = np.stack([begin for begin, _ in held], axis=1)
        counts = np.stack([numel for _, numel in held], axis=1)
        for payload, begin, numel in zip(payloads_of[number], starts, counts, strict=True):
            begin, numel = begin[numel > 0], numel[numel > 0]
            if times[payload] > 1 or payload in covered:
                pairs = zip(begin.tolist(), numel.tolist(), strict=True)
                covered.setdefault(payload, []).extend(pairs)
            elif len(begin):
                found.append((payload, _between(begin, numel, payload.numel)))
    return [(payload, each) for payload, each in found if each]


def _between(starts: np.ndarray, counts: np.ndarray, numel: int) -> list[tuple[int, int]]:
    """What of `numel` elements lies in no range."""
    order = np.argsort(starts)
    ends = np.maximum.accumulate((starts + counts)[order])
    low, high = np.concatenate([[0], ends]), np.concatenate([starts[order], [numel]])
    free = high > low
    return [*zip(low[free].tolist(), (high - low)[free].tolist(), strict=True)]
