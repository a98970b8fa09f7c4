"""Copies this rank's vector to the host while training goes on.

On a GPU the copy runs on a stream of its own, into pinned memory, and only the next optimizer step
waits for it, which is the first to change what is copied. On the CPU it is done at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pma_megatron.online.shard import Shard


class HostCopy:
    """One copy at a time; `start`, then `wait` before the target is read."""

    def __init__(self, shard: Shard[Any], stepping: Sequence[Any] | None) -> None:
        """Make a stream of its own on a GPU.

        Args:
            shard: what to copy.
            stepping: the torch optimizers whose steps change it; None if they may step without
                Python (a captured graph), so that nothing can wait but what is queued next.
        """
        self.shard = shard
        self._stepping = stepping
        self.on_gpu = shard.device.type == "cuda"
        self._done: Any = None
        self._stream: Any = torch.cuda.Stream(shard.device) if self.on_gpu else None
        self._step_waits = (
            self.on_gpu
            and stepping is not None
            and all(_hook(optimizer, self._hold) for optimizer in stepping)
        )

    @property
    def learning_rate(self) -> float | None:
        """The largest that training goes on with; None if that is not known.

        At zero main params rest, so that two copies may be equal.
        """
        groups = [group for each in self._stepping or () for group in _param_groups(each)]
        rates = [float(group["lr"]) for group in groups if "lr" in group]
        return max(rates, default=None)

    def buffer(self) -> torch.Tensor:
        """Memory for one vector, pinned where that makes the copy asynchronous."""
        return torch.empty(self.shard.numel, dtype=torch.float32, pin_memory=self.on_gpu)

    def start(self, into: torch.Tensor) -> None:
        """Begin to copy the live values, as float32."""
        if not self.on_gpu:
            for slot in self.shard.slots:
                slot.of(into).copy_(slot.main())
            return
        current = torch.cuda.current_stream(self.shard.device)
        self._stream.wait_stream(current)
        for slot in self.shard.slots:
            if not slot.live.trained:  # small, and changed before the optimizer's step
                slot.of(into).copy_(slot.main(), non_blocking=True)
        with torch.cuda.stream(self._stream):
            for slot in self.shard.slots:
                if slot.live.trained:
                    slot.of(into).copy_(slot.main(), non_blocking=True)
            self._stream.wait_stream(current)  # `wait` speaks for both
            self._done = self._stream.record_event()
        if not self._step_waits:
            self._hold()

    def wait(self) -> None:
        """Until the target holds the values. For any thread."""
        if self._done is not None:
            self._done.synchronize()

    def _hold(self, *_: Any) -> None:
        """Have the GPU not go past this point before the copy is done."""
        if self._done is not None:
            torch.cuda.current_stream(self.shard.device).wait_event(self._done)


def _param_groups(optimizer: Any) -> Sequence[dict[str, Any]]:
    return getattr(optimizer, "param_groups", None) or ()


def _hook(optimizer: Any, before: Any) -> bool:
    """Call `before` before each step of the optimizer; False if that is not sure."""
    register = getattr(optimizer, "register_step_pre_hook", None)
    if register is None:
        return False
    register(before)
    return True
