"""What one rank of a Megatron model holds of its main params, as one flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pma_megatron.geometry import flat_range
from pma_megatron.live_tensor import Place
from pma_megatron.megatron.params import LiveTensor
from pma_megatron.megatron.replicas import replica_group
from pma_megatron.online.shard import Shard, Slot, StoredBox
from pma_megatron.policy import MAIN


@dataclass(frozen=True, eq=False, slots=True)
class LiveSlot(Slot):
    """The owned part of one parameter, or a floating buffer."""

    live: LiveTensor

    def main(self) -> torch.Tensor:
        """The live main params (the tensor itself where it is not trained), 1-D."""
        return self.live.states()[MAIN].detach().view(-1)

    def weights(self) -> torch.Tensor:
        """The elements of the tensor that the forward pass uses, 1-D, shared."""
        return self.live.tensor.detach().view(-1)[self.live.first :][: self.live.numel]


class LiveShard(Shard):
    """The owned parts of `live_tensors`, one after the other."""

    slots: tuple[LiveSlot, ...]

    def __init__(self, tensors: Sequence[LiveTensor]) -> None:
        slots, at = [], 0
        for live in tensors:
            if live.numel:
                slots.append(LiveSlot(at, live.numel, live.part is not None, live))
                at += live.numel
        super().__init__(slots, slots[0].live.tensor.device if slots else torch.device("cpu"))

    def stored(self) -> Iterator[StoredBox]:
        """Where all of the vector lies in a checkpoint of vectors."""
        for slot in self.slots:
            yield from (stored for _, stored in _boxes(slot))

    def written(self) -> Iterator[StoredBox]:
        """What of that this rank writes; replicas that hold the same take turns."""
        turns = {False: 0, True: 0}
        groups = {expert: replica_group(expert) for expert in turns}
        for slot in self.slots:
            live = slot.live
            if live.sharded:
                mine = getattr(live.part, "distributed_optimizer_instance_id", 0) == 0
            else:
                group = groups[live.expert]
                mine = turns[live.expert] % group.size() == group.rank()
                turns[live.expert] += 1
            if mine:
                yield from (stored for place, stored in _boxes(slot) if place.first_replica)


def _boxes(slot: LiveSlot) -> Iterator[tuple[Place, StoredBox]]:
    """Place by place, all that a slot holds."""
    first, last = slot.live.first, slot.live.first + slot.live.numel
    for place in slot.live.places:
        low = max(first, place.start) - place.start
        high = min(last, place.start + place.box.numel) - place.start
        for box, inside in flat_range(place.box, low, high):
            at = slot.start + place.start + inside - first
            yield place, StoredBox(place.key, place.global_shape, box, at)
