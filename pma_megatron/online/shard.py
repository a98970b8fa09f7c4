"""What one rank holds of a model's main params, as one flat vector, and where that is stored.

A running average works on such vectors: one entry of a window is one of them. Which elements are
in it is `LiveTensor`'s answer: a rank's part of each main param, and floating buffers whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pma_megatron.base.boxes import Box, PieceIndex, flat_range
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.source import Source
from pma_megatron.formats.torch_dist.chunks import Chunk
from pma_megatron.live.param import LiveTensor, Place
from pma_megatron.merging.policy import MAIN
from pma_megatron.transfer.blocks import BlockReader
from pma_megatron.transfer.reads import Reads

Tensor = TypeVar("Tensor", bound=LiveTensor)


@dataclass(frozen=True, eq=False, slots=True)
class VectorPart(Generic[Tensor]):
    """One tensor's elements, from `start` of the vector on."""

    live: Tensor
    start: int

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Its part of a vector, 1-D, shared."""
        return vector[self.start : self.start + self.live.numel]

    def main(self) -> torch.Tensor:
        """The live main params (the tensor itself where it is not trained), 1-D."""
        return self.live.states()[MAIN].detach().view(-1)


class Shard(ABC, Generic[Tensor]):
    """The vector's layout.

    Attributes:
        slots: its tensors, in order.
        numel: its length.
        device: where the live main params are.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Lay out the owned parts of `tensors`, one after the other.

        Nothing is asked for its states yet: Megatron would make empty ones before it loads.
        """
        slots, at = [], 0
        for live in tensors:
            if live.numel:
                slots.append(VectorPart(live, at))
                at += live.numel
        self.slots, self.numel, self.device = tuple(slots), at, device

    @property
    def nbytes(self) -> int:
        """Bytes of one vector (float32)."""
        return 4 * self.numel

    @abstractmethod
    def written(self) -> Iterator[VectorPart[Tensor]]:
        """The slots that this rank writes of a checkpoint of vectors; replicas that hold the same
        take turns."""

    def chunks(self) -> list[tuple[Chunk, int]]:
        """What this rank writes of a checkpoint of vectors: (chunk, its first element).

        Over all ranks every stored element once.
        """
        return [
            (Chunk(place.key, place.global_shape, box), at)
            for slot in self.written()
            for place, box, at in _boxes(slot)
            if place.first_replica
        ]

    def read(self, source: Source, vector: torch.Tensor, reads: Reads) -> None:
        """Fill a vector from a checkpoint of vectors, whatever layout wrote it.

        Args:
            source: the checkpoint.
            vector: of this rank.
            reads: takes note of what is read (`source_checksums.checked`).

        Raises:
            CheckpointError: a tensor is missing, of another shape, or not float32; or damage.
        """
        indexes: dict[str, PieceIndex[Any]] = {}
        with BlockReader.of(source.format, source.path, reads) as reader:
            for slot in self.slots:
                for place, box, at in _boxes(slot):
                    if place.key not in indexes:
                        indexes[place.key] = _index(source, place)
                    reader.read(box, indexes[place.key], vector[at : at + box.numel])


def _boxes(slot: VectorPart[Any]) -> Iterator[tuple[Place, Box, int]]:
    """(place, box of its tensor, first element in the vector) of all that a slot holds."""
    first, last = slot.live.first, slot.live.first + slot.live.numel
    for place in slot.live.places:
        low = max(first, place.start) - place.start
        high = min(last, place.start + place.box.numel) - place.start
        for box, inside in flat_range(place.box, low, high):
            yield place, box, slot.start + place.start + inside - first


def _index(source: Source, place: Place) -> PieceIndex[Any]:
    stored = source.tensor(MAIN, place.key)
    if stored is None or stored.shape != place.global_shape or stored.dtype != torch.float32:
        found = "nothing" if stored is None else f"shape {stored.shape}, {stored.dtype}"
        raise CheckpointError(
            f"{source.path}: {place.key} should have shape {place.global_shape} in float32, found "
            f"{found}: it is of another model, or not the state of a running average. Move "
            f"{Path(source.path).parent} elsewhere to start a new one"
        )
    return PieceIndex(stored.pieces)
