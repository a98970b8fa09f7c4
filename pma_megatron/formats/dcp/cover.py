"""Whether chunks tile their tensor."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable

import numpy as np

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


def covered(offsets: np.ndarray, sizes: np.ndarray, shape: tuple[int, ...]) -> bool:
    """`cover` of columns of shape `[chunks, dimensions]`, at once in one dimension, and where all
    chunks are of one size."""
    if len(shape) == 1:
        there = np.flatnonzero(sizes[:, 0])
        there = there[np.argsort(offsets[there, 0], kind="stable")]
        begins, ends = offsets[there, 0], offsets[there, 0] + sizes[there, 0]
        return np.array_equal(np.append(begins, shape), np.append(0, ends))
    plain = len(offsets) > 1 and shape and 0 not in shape
    if plain and (sizes == sizes[0]).all() and sizes[0].all():
        places, beside = np.divmod(offsets, sizes[0])
        counts = [n // int(size) for n, size in zip(shape, sizes[0], strict=True)]
        whole = all(c * int(size) == n for c, size, n in zip(counts, sizes[0], shape, strict=True))
        if whole and not beside.any() and math.prod(counts) == len(offsets):
            numbers = np.ravel_multi_index(tuple(places.T), counts)
            return len(np.unique(numbers)) == len(offsets)
    pairs = zip(offsets.tolist(), sizes.tolist(), strict=True)
    return cover([Box(tuple(low), tuple(extent)) for low, extent in pairs], shape)
