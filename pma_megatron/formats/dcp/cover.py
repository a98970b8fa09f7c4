"""Entries of a checkpoint against each other: chunks tile their tensor, and no two share bytes."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Mapping

from pma_megatron.base.boxes import Box
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item


def cover(boxes: Iterable[Box], shape: tuple[int, ...]) -> bool:
    """True if `boxes`, all inside `shape`, cover each of its elements exactly once.

    The sum over all elements of a random weight, times how often the element is covered, is as it
    should be: wrong with a chance of 2^-50, and linear in the boxes. A weight is the product of one
    per axis, so that of a box is a product of differences.
    """
    boxes = list(boxes)
    if len(boxes) == 1:
        return boxes[0].sizes == shape
    if 0 in shape:
        return True
    sums: list[dict[int, int]] = [{} for _ in shape]

    def weight(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> int:
        product = 1
        for known, low, n in zip(sums, offsets, sizes, strict=True):
            for at in (low, low + n):
                if at not in known:
                    known[at] = secrets.randbits(61)
            product = product * (known[low + n] - known[low]) % _PRIME
        return product

    total = sum(weight(box.offsets, box.sizes) for box in boxes)
    return (total - weight((0,) * len(shape), shape)) % _PRIME == 0


_PRIME = (1 << 61) - 1


def refuse_shared(of_tensors: list[Item], objects: Mapping[str, Item], what: str) -> None:
    items = sorted([*of_tensors, *objects.values()], key=lambda i: (i.file, i.offset, i.length))
    for one, other in itertools.pairwise(items):
        if one.file == other.file and other.offset < one.offset + one.length:
            raise CheckpointError(
                f"{what}: two entries share bytes of {one.file} from {other.offset}: damaged. "
                "Exclude this checkpoint"
            )
