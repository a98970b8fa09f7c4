"""Buffers of one block that are used again and again, as tensors and as bytes.

pread into a buffer that is used again costs no page faults and does not grow resident memory. torch
and the kernel calls release the GIL, so threads overlap reading, adding and writing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

BLOCK_ELEMENTS = 1 << 18
"""Elements added at once: a float32 block of 1 MiB stays in a core's cache."""
_GAP_BYTES = 576  # buffers at equal places of their pages would wait for each other


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    return memoryview(block.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


class BlockBuffer:
    """The first `numel` elements of a reused buffer, as a tensor and as bytes."""

    __slots__ = ("data", "itemsize", "numel", "tensor")

    def __init__(self, whole: torch.Tensor, numel: int) -> None:
        self.tensor, self.numel = whole[:numel], numel
        self.data, self.itemsize = as_bytes(self.tensor), whole.dtype.itemsize


class BlockBuffers:
    """One buffer of a block's size per dtype, made when first asked for. For one thread."""

    def __init__(self) -> None:
        self._whole: dict[torch.dtype, torch.Tensor] = {}
        self._last: dict[torch.dtype, BlockBuffer] = {}

    def buffer(self, dtype: torch.dtype, numel: int) -> BlockBuffer:
        """The buffer for `numel` elements of `dtype`; what it held before is lost."""
        buffer = self._last.get(dtype)
        if buffer is None or buffer.numel != numel:
            buffer = self._last[dtype] = BlockBuffer(self.whole(dtype), numel)
        return buffer

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """A block and one element more: a merge group's error flag travels with the data."""
        if dtype not in self._whole:
            self._whole[dtype] = torch.empty(BLOCK_ELEMENTS + 1, dtype=dtype)
        return self._whole[dtype]


class Room:
    """One thread's buffers for a step, made once and made larger where a unit needs it."""

    def __init__(self) -> None:
        self._whole = torch.empty(0, dtype=torch.uint8)
        self._made: dict[tuple[int, ...], list[memoryview]] = {}

    def buffers(self, dtypes: Sequence[torch.dtype], elements: int) -> list[memoryview]:
        """A buffer for so many elements of each dtype; what they held before is lost."""
        sizes = tuple(elements * dtype.itemsize for dtype in dtypes)
        if sizes not in self._made:
            needed = sum(size + -size % 64 + _GAP_BYTES for size in sizes)
            if needed > self._whole.numel():
                self._made.clear()
                self._whole = torch.empty(needed, dtype=torch.uint8)
            data, at, found = as_bytes(self._whole), 0, []
            for size in sizes:
                found.append(data[at : at + size])
                at += size + -size % 64 + _GAP_BYTES
            self._made[sizes] = found
        return list(self._made[sizes])


def same_bits(one: BlockBuffer, other: BlockBuffer) -> bool:
    """True if two buffers of one dtype hold the same bytes."""
    kind = f"u{one.itemsize}"  # comparing whole elements beats comparing bytes
    return np.array_equal(np.frombuffer(one.data, kind), np.frombuffer(other.data, kind))
