"""What one rank of a DeepSpeed engine holds of its main params, as one flat vector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from pma_megatron.deepspeed.params import EngineTensor, live_tensors, replica_group
from pma_megatron.online.shard import Shard, VectorPart


class EngineShard(Shard[EngineTensor]):
    """The owned parts of `live_tensors(engine)`, one after the other."""

    def __init__(self, engine: Any) -> None:
        tensors = live_tensors(engine)
        super().__init__(tensors, tensors[0].flat.device if tensors else torch.device("cpu"))
        self._engine = engine

    def written(self) -> Iterator[VectorPart[EngineTensor]]:
        """The slots that this rank writes; where every replica has all, they take turns."""
        turns: Counter[str] = Counter()
        for slot in self.slots:
            live, mine = slot.live, True
            if not live.sharded and live.replicas is not None:
                group = replica_group(self._engine, live.replicas)
                # Ranks may differ in a buffer, and DeepSpeed saves that of the first.
                turn = turns[live.replicas] if live.trained else 0
                mine = turn % dist.get_world_size(group) == dist.get_rank(group)
                turns[live.replicas] += live.trained
            if mine:
                yield slot
