"""What one rank of a Megatron model holds of its main params, as one flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pma_megatron.megatron.params import MegatronTensor
from pma_megatron.megatron.replicas import replica_group
from pma_megatron.online.shard import Shard, VectorPart


class MegatronShard(Shard[MegatronTensor]):
    """The owned parts of `live_tensors`, one after the other."""

    def __init__(self, tensors: Sequence[MegatronTensor]) -> None:
        super().__init__(tensors, tensors[0].tensor.device if tensors else torch.device("cpu"))

    def written(self) -> Iterator[VectorPart[MegatronTensor]]:
        """The slots that this rank writes; where every replica has all, they take turns."""
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
                yield slot
