"""What one rank holds of a model's main params, as one flat vector, and where that is stored.

A running average works on such vectors: one entry of a window is one of them. Which elements are
in it is the trainer's to say: a rank's part of each main param, and floating buffers whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pma_megatron.blocks import BlockReader
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.source import Source
from pma_megatron.formats.torch_dist.chunks import Chunk
from pma_megatron.geometry import Box, PieceIndex
from pma_megatron.policy import MAIN


@dataclass(frozen=True, eq=False, slots=True)
class Slot(ABC):
    """One tensor's elements in the vector.

    Attributes:
        start: the first one.
        numel: how many.
        trained: False where something else than an optimizer step changes them (buffers).
    """

    start: int
    numel: int
    trained: bool

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Its part of a vector, 1-D, shared."""
        return vector[self.start : self.start + self.numel]

    @abstractmethod
    def main(self) -> torch.Tensor:
        """The live main params (the tensor itself where it is not trained), 1-D."""


@dataclass(frozen=True, slots=True)
class StoredBox:
    """Elements of the vector, from `at` on, are `box` of a checkpoint's tensor, in row order."""

    key: str
    global_shape: tuple[int, ...]
    box: Box
    at: int


class Shard(ABC):
    """The vector's layout.

    Attributes:
        slots: its tensors, in order.
        numel: its length.
        device: where the live main params are.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        self.slots, self.device = tuple(slots), device
        self.numel = sum(slot.numel for slot in slots)

    @property
    def nbytes(self) -> int:
        """Bytes of one vector (float32)."""
        return 4 * self.numel

    @abstractmethod
    def stored(self) -> Iterator[StoredBox]:
        """Where all of the vector lies in a checkpoint of vectors."""

    @abstractmethod
    def written(self) -> Iterator[StoredBox]:
        """What of that this rank writes; over all ranks every stored element once."""

    def chunks(self) -> list[tuple[Chunk, int]]:
        """What this rank writes of a checkpoint of vectors: (chunk, its first element)."""
        return [(Chunk(each.key, each.global_shape, each.box), each.at) for each in self.written()]

    def read(self, source: Source, vector: torch.Tensor) -> None:
        """Fill a vector from a checkpoint of vectors, whatever layout wrote it.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or not float32; or damage.
        """
        path = Path(source.path)
        reader = BlockReader(source.path, registry.get(source.format, source.path).files(path))
        indexes: dict[str, PieceIndex[Any]] = {}
        try:
            for each in self.stored():
                if each.key not in indexes:
                    indexes[each.key] = _index(source, each)
                target = vector[each.at : each.at + each.box.numel]
                reader.read(each.box, indexes[each.key], target)
        finally:
            reader.close()


def _index(source: Source, wanted: StoredBox) -> PieceIndex[Any]:
    stored = source.tensor(MAIN, wanted.key)
    if stored is None or stored.shape != wanted.global_shape or stored.dtype != torch.float32:
        found = "nothing" if stored is None else f"shape {stored.shape}, {stored.dtype}"
        raise CheckpointError(
            f"{source.path}: {wanted.key} should have shape {wanted.global_shape} in float32, "
            f"found {found}: it is of another model, or not the state of a running average. Move "
            f"{Path(source.path).parent} elsewhere to start a new one"
        )
    return PieceIndex(stored.pieces)
