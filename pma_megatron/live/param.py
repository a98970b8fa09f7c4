"""A live tensor of any trainer: where it lies in a checkpoint, and what of it a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from pma_megatron.base.boxes import Box


@dataclass(frozen=True, slots=True)
class Place:
    """Elements of a parameter, from `start` on, are `box` of a checkpoint's tensor, in row order.

    `first_replica` is False where another model-parallel rank writes the same elements (norms of
    tensor-parallel ranks, the tied embedding of the last stage).
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    first_replica: bool


class LiveTensor(Protocol):
    """One parameter or saved floating buffer of this rank."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Its parts in a checkpoint's tensors."""

    @property
    def trained(self) -> bool:
        """False for frozen parameters and buffers: they are their own main params."""

    @property
    def expert(self) -> bool:
        """True if its replicas are an expert-data-parallel group."""

    @property
    def first(self) -> int:
        """First element of the flattened tensor whose main params this rank holds."""

    @property
    def numel(self) -> int:
        """How many of them; all, unless main params are sharded over replicas."""

    @property
    def sharded(self) -> bool:
        """True if replicas hold different parts of the main params."""

    @property
    def by_copy(self) -> bool:
        """True if `states` are copies, which `set_states` hands back."""

    def states(self) -> dict[str, torch.Tensor]:
        """`param` (main params) and moments of this rank's part, as stored, flat or not."""

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Hand changed copies to the optimizer."""
