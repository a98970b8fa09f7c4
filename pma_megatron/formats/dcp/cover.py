"""Whether chunks tile their tensor."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from pma_megatron.base.boxes import Box


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
