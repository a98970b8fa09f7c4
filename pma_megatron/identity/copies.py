"""Two sources with the same content are one, whatever their folders are called.

Every optimizer step changes moments, and main params unless the learning rate is zero. So a file
whose moments and main params all equal those of another source is a copy of that one's. The
checksums in the zips tell, without reading payloads; where there are none, samples do. What
training leaves alone proves nothing: frozen layers, moments that are still zero, 16-bit weights
that small steps do not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from isal import isal_zlib

from pma_megatron.base.boxes import PieceIndex
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import MAIN_PARAM, Payload, StoredRecord, Tensor
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.source import Source
from pma_megatron.identity.samples import WEIGHT, Inventory, Stored, Wanted

_SMALLEST_BYTES = 32
_SAMPLES, _SAMPLE_BYTES = 16, 256
_LARGEST = 8
_ZEROS = bytes(1 << 20)

Place = tuple[str, str, tuple[int, ...]]
"""State, key and offsets of a piece."""
Checksums = Mapping[str, Mapping[Place, int]]
"""File -> place -> checksum of the bytes there."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What distinguishes one source from the others, in a few numbers per file.

    Attributes:
        path: the source's folder.
        trained: of moments and main params that are in motion.
        weights: of weights, in a source without an optimizer.
        exact: True if those are float32, which the smallest step changes.
        whole: of the largest weights of all files together, where they lie whole in them: a copy
            may have been cut into other files.
    """

    path: str
    trained: Checksums
    weights: Checksums
    exact: bool
    whole: Mapping[Place, int] = field(default_factory=dict)


def contents_of(source: Source, pieces: Inventory, files: ItemFiles) -> Contents:
    """Look up the checksums of the largest tensors in every file.

    Args:
        source: which.
        pieces: all that it stores.
        files: its items.

    Raises:
        CheckpointError: the source is damaged.
    """
    reader = _Reader(source, pieces, _Checksums(files))
    if reader.has_optimizer:
        moments, mains = reader.checksums(_is_moment), reader.checksums(reader.is_main)
        trained = {
            file: {**moments.get(file, {}), **mains.get(file, {})} for file in {*moments, *mains}
        }
        if not any(trained.values()):  # moments that began again: all main params, or nothing
            return Contents(source.path, {}, reader.at_rest(reader.is_main), True)
        return Contents(source.path, trained, {}, exact=True)
    exact = pieces.holds_only(torch.float32, least_bytes=_SMALLEST_BYTES)
    return Contents(source.path, {}, reader.checksums(_any), exact, reader.of_all())


def refuse_copies(contents: Sequence[Contents], rate_of: Callable[[int], float | None]) -> None:
    """Compare every source with every other one.

    Args:
        contents: oldest first.
        rate_of: number of a source -> learning rate that training went on with, None if unknown.

    Raises:
        CheckpointError: two hold the same in one file or in all; names both.
    """
    numbers = range(len(contents))
    for a, b in itertools.combinations(numbers, 2):
        older, newer = contents[a], contents[b]
        same = [f for f, places in newer.trained.items() if _same(places, older.trained.get(f))]
        if same and not _has_moments(newer, same) and rate_of(a) == 0.0:
            continue  # main params rest while the learning rate is zero
        if not same and newer.weights and rate_of(a) != 0.0:
            same = _same_weights(contents, older, newer)
            others = newer.weights.keys() != older.weights.keys()
            if not same and others and newer.whole and newer.whole == older.whole:
                same = list(newer.weights)
        if same:
            raise _copied(older, newer, same)


def _has_moments(contents: Contents, files: Sequence[str]) -> bool:
    return any(
        state not in (WEIGHT, MAIN_PARAM) for f in files for state, _, _ in contents.trained[f]
    )


def _same(places: Mapping[Place, int], others: Mapping[Place, int] | None) -> bool:
    """Whether all that moves in a file is the other's too; where nothing does, nothing says so."""
    return bool(places) and others is not None and places.items() <= others.items()


def _same_weights(contents: Sequence[Contents], older: Contents, newer: Contents) -> list[str]:
    """Files of weights alone that are copies: all of them, or some that are not frozen."""
    same = [f for f, places in newer.weights.items() if _same(places, older.weights.get(f))]
    if len(same) == len(newer.weights) or not newer.exact:
        return same if len(same) == len(newer.weights) else []
    others = [other for other in contents if other.exact and other not in (older, newer)]
    return [
        file
        for file in same
        if any(
            file in o.weights and not _same(newer.weights[file], o.weights[file]) for o in others
        )
    ]


def _copied(older: Contents, newer: Contents, same: Sequence[str]) -> CheckpointError:
    count = len(newer.trained or newer.weights)
    whole = len(same) == count
    what = "the same content" if whole else f"the same {same[0]} ({len(same)} of {count} files)"
    return CheckpointError(
        f"{older.path} and {newer.path} hold {what}, though training changes it in every step: one "
        "is a copy of the other, or was partly overwritten with it. Restore what was overwritten, "
        f"or {left_out('the copy')}"
    )


def _is_moment(state: str, key: str, tensor: Tensor) -> bool:
    return state not in (WEIGHT, MAIN_PARAM)


def _any(state: str, key: str, tensor: Tensor) -> bool:
    return True


class _Reader:
    """What moves in one source, file by file."""

    def __init__(self, source: Source, pieces: Inventory, checksums: _Checksums) -> None:
        self._source, self._pieces, self._checksums = source, pieces, checksums
        states = source.space.states
        self._moments = {state: t for state, t in states.items() if state != MAIN_PARAM}
        self._has_mains = bool(states.get(MAIN_PARAM))
        self._indexes: dict[tuple[str, str], PieceIndex[Payload]] = {}

    @property
    def has_optimizer(self) -> bool:
        """True unless only weights were saved."""
        return bool(self._source.space.states or self._source.optimizer_keys)

    def is_main(self, state: str, key: str, tensor: Tensor) -> bool:
        """True for main params, and for float32 weights where those are the main params."""
        if state == MAIN_PARAM:
            return True
        return state == WEIGHT and tensor.dtype == torch.float32 and not self._has_mains

    def checksums(self, wanted: Wanted) -> dict[str, dict[Place, int]]:
        """File -> place -> checksum of the largest pieces there that training moves."""
        by_file = self._pieces.largest(wanted, least_bytes=_SMALLEST_BYTES).items()
        return {file: self._sums(s for s in found if self._moves(s)) for file, found in by_file}

    def at_rest(self, wanted: Wanted) -> dict[str, dict[Place, int]]:
        """The same of the largest pieces that are not zero, whether or not training moves them."""
        by_file = self._pieces.largest(wanted, least_bytes=_SMALLEST_BYTES).items()
        sums = {
            file: self._sums(s for s in found if not self._is_zero(s.piece.payload))
            for file, found in by_file
        }
        return {file: places for file, places in sums.items() if places}

    def of_all(self) -> dict[Place, int]:
        """Place -> checksum of the largest pieces, whatever files they are in."""
        return self._sums(self._pieces.first(_any, _LARGEST, least_bytes=_SMALLEST_BYTES))

    def _sums(self, pieces: Iterable[Stored]) -> dict[Place, int]:
        return {
            (s.state, s.key, s.piece.box.offsets): self._checksums.of(s.piece.payload)[0]
            for s in pieces
        }

    def _moves(self, each: Stored) -> bool:
        if each.state not in (WEIGHT, MAIN_PARAM):
            return not self._is_zero(each.piece.payload)
        if not self._moments:
            return True
        touching = (
            piece.payload
            for state, tensors in self._moments.items()
            if each.key in tensors
            for piece in self._index(state, each.key).touching(each.piece.box)
        )
        return any(not self._is_zero(payload) for payload in touching)

    def _index(self, state: str, key: str) -> PieceIndex[Payload]:
        if (state, key) not in self._indexes:
            self._indexes[state, key] = PieceIndex(self._moments[state][key].pieces)
        return self._indexes[state, key]

    def _is_zero(self, payload: Payload) -> bool:
        return self._checksums.of(payload)[1]


class _Checksums:
    """Checksums of records, from the directories of their zips."""

    def __init__(self, files: ItemFiles) -> None:
        self._files = files
        self._known: dict[Payload, tuple[int, bool]] = {}

    def of(self, payload: Payload) -> tuple[int, bool]:
        """(checksum of the record that holds `payload`, whether it is all zeros)."""
        if payload not in self._known:
            self._known[payload] = self._look_up(payload)
        return self._known[payload]

    def _look_up(self, payload: Payload) -> tuple[int, bool]:
        record, _ = self._files.find(payload)
        if record.crc32:
            return record.crc32, record.crc32 == _crc_of_zeros(record.nbytes)
        return self._by_samples(record)

    def _by_samples(self, record: StoredRecord) -> tuple[int, bool]:
        """A zip that was written without checksums says zero for all of them."""
        count = min(_SAMPLE_BYTES, record.nbytes)
        last = record.nbytes - count
        starts = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
        data = b"".join(
            self._files.read(record.file, record.start + start, count) for start in starts
        )
        return isal_zlib.crc32(data), not any(data)


@lru_cache(maxsize=1024)
def _crc_of_zeros(nbytes: int) -> int:
    crc = 0
    for first in range(0, nbytes, len(_ZEROS)):
        crc = isal_zlib.crc32(_ZEROS[: nbytes - first], crc)
    return crc
