"""What one rank of a DeepSpeed engine holds of its main params, as one flat vector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch.distributed as dist

from pma_megatron.deepspeed.params import LiveTensor
from pma_megatron.online.shard import Shard, Slot


class EngineShard(Shard[LiveTensor]):
    """The owned parts of `live_tensors`, one after the other."""

    def written(self) -> Iterator[Slot[LiveTensor]]:
        """The slots that this rank writes; where every replica has all, they take turns."""
        turns: Counter[bool] = Counter()
        for slot in self.slots:
            live = slot.live
            if live.sharded or live.group is None:
                mine = True
            elif not live.trained:
                # Ranks may differ in a buffer, and DeepSpeed saves that of the first.
                mine = dist.get_rank(live.group) == 0
            else:
                size = dist.get_world_size(live.group)
                mine = turns[live.expert] % size == dist.get_rank(live.group)
                turns[live.expert] += 1
            if mine:
                yield slot
