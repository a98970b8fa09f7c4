"""Which stored weight flat main params round to: found by their first elements, then compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch

from pma_megatron.base.boxes import Piece
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.flat import FlatMap, FlatSpace, read_elements, read_flat, rounds_to
from pma_megatron.formats.items import ItemFiles

FINGERPRINT_ELEMENTS = 64
_COMPARE_ELEMENTS = 1 << 16


def holds(
    files: ItemFiles,
    spaces: Sequence[FlatSpace],
    weights: Mapping[str, Tensor],
    ranges: FlatMap,
    *,
    samples: int = 64,
) -> bool:
    """True if `ranges`, found on another checkpoint, fits this one (checked on samples).

    The buffers must have the same names and lengths and the weights the same chunks; then the
    first elements of up to `samples` parameters are compared.
    """
    if {(s.group, s.name) for s in spaces} != set(ranges):
        return False
    by_box = {(key, p.box): p for key, tensor in weights.items() for p in tensor.pieces}
    places = [(space, found) for space in spaces for found in ranges[space.group, space.name]]
    if any(
        (found.key, found.box) not in by_box or found.start + found.box.numel > space.numel
        for space, found in places
    ):
        return False
    step = max(1, len(places) // samples)
    for space, found in places[::step]:
        piece = by_box[found.key, found.box]
        count = min(FINGERPRINT_ELEMENTS, found.box.numel)
        stored = read_elements(files, piece, 0, count)
        main = read_flat(files, space.states[MAIN_PARAM], found.start, count)
        if not rounds_to(main, stored):
            return False
    return True


class Fingerprints:
    """Stored weights of one checkpoint, by the bytes that they start with."""

    def __init__(self, files: ItemFiles, pieces: Sequence[Piece[Payload]]) -> None:
        self._files = files
        self._pieces = pieces
        # Shorter weights have shorter fingerprints: one table per (dtype, length).
        self._tables: dict[tuple[torch.dtype, int], dict[bytes, list[int]]] = {}
        self._constant: set[int] = set()
        self._tells: dict[int, bool] = {}
        for number, piece in enumerate(pieces):
            count = min(FINGERPRINT_ELEMENTS, piece.box.numel)
            data = read_elements(files, piece, 0, count)
            table = self._tables.setdefault((data.dtype, count), {})
            table.setdefault(_bytes(data), []).append(number)
            if bool((data == data[0]).all()):
                self._constant.add(number)

    def tells(self, number: int) -> bool:
        """False if a weight seems to be all one value, as one in other places may be too."""
        if number not in self._constant:
            return True
        if number not in self._tells:
            numel = self._numel(number)
            count = min(FINGERPRINT_ELEMENTS, numel)
            data = read_elements(self._files, self._pieces[number], numel - count, count)
            self._tells[number] = bool((data != data[0]).any())
        return self._tells[number]

    def starting(self, window: torch.Tensor) -> list[int]:
        """Numbers of the weights whose first elements are those of `window`, rounded."""
        return [
            number
            for (dtype, count), table in self._tables.items()
            if count <= len(window)
            for number in table.get(_bytes(window[:count].to(dtype)), ())
        ]

    def longest(
        self,
        stored: Sequence[Piece[Payload]],
        at: int,
        end: int,
        window: torch.Tensor,
        taken: AbstractSet[int],
        wanted: Callable[[int], bool],
    ) -> list[int]:
        """Numbers of the longest weights that start at element `at` of a flat space.

        Several are bit-identical as far as they were compared. One alone was found by its first
        elements: the merge proves the rest.

        Args:
            stored: the space's main params.
            at: where to look.
            end: the first element of the space, or of its stored chunk, that they may not reach.
            window: the elements from `at`, `FINGERPRINT_ELEMENTS` of them unless the space ends.
            taken: numbers that were found elsewhere.
            wanted: whether a number may be there at all.
        """
        numbers = [
            n
            for n in self.starting(window)
            if n not in taken and wanted(n) and at + self._numel(n) <= end
        ]
        if len(numbers) > 1:
            numbers = [n for n in numbers if self.equal(n, stored, at)]
            longest = max((self._numel(n) for n in numbers), default=0)
            numbers = [n for n in numbers if self._numel(n) == longest]
        return numbers

    def equal(self, number: int, stored: Sequence[Piece[Payload]], at: int) -> bool:
        """True if both ends of a weight are the rounded main params from `at`."""
        piece, numel = self._pieces[number], self._numel(number)
        count = min(_COMPARE_ELEMENTS, numel)
        return all(
            rounds_to(
                read_flat(self._files, stored, at + first, count),
                read_elements(self._files, piece, first, count),
            )
            for first in {0, numel - count}
        )

    def _numel(self, number: int) -> int:
        return self._pieces[number].box.numel


def _bytes(data: torch.Tensor) -> bytes:
    return data.view(torch.uint8).numpy().tobytes()
