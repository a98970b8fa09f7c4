"""Thin snapshots of a training job: main params alone, every so many tokens, behind its back."""

from __future__ import annotations

import atexit
import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.errors import PublishError
from pma_megatron.formats.rates import LEARNING_RATE
from pma_megatron.megatron.params import sharded_state, unwrap
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.online.snapshots import SnapshotWriter
from pma_megatron.storage.paths import in_store

_log = logging.getLogger(__name__)
_AT_EXIT_S = 60.0  # another rank may be gone, and a job that ends must end


class ThinSnapshots:
    """Writes and prunes the snapshots of one run. The constructor is collective."""

    def __init__(
        self,
        root: str | Path,
        models: Sequence[Any],
        to_host: HostCopy,
        interval_tokens: int,
        *,
        dtype: torch.dtype,
        keep: int | None,
        consumed_tokens: int,
        iteration: int,
        comm: Comm,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Agree on who writes what.

        Args:
            root: folder of the snapshots, shared by all ranks, or an address.
            models: the chunks.
            to_host: of this rank's vector; not used by anything else meanwhile.
            interval_tokens: from one snapshot to the next.
            dtype: float32 or bfloat16.
            keep: how many of the newest stay; None for all.
            consumed_tokens: where the run stands.
            iteration: likewise; later ones that are there are of a branch that was given up.
            comm: the ranks.
            metadata: what `sharded_state_dict` gets; None for its default.

        Raises:
            UsageError, PublishError, PlanError: see `SnapshotWriter`.
        """
        self._models, self._copy, self._comm = models, to_host, comm
        self._interval, self._metadata = interval_tokens, metadata
        self._parts = to_host.shard.chunks()
        chunks = [chunk for chunk, _ in self._parts]
        self._writer = SnapshotWriter(
            root,
            chunks,
            dtype,
            comm,
            self._common,
            keep_in_store=keep if in_store(root) else None,
            trained_from=iteration,
        )
        self.root = self._writer.root
        self._keep = None if in_store(root) else keep
        self._vector = to_host.buffer()
        self._next_tokens = 0
        self._await_after(consumed_tokens)
        # The job may end right after a snapshot has begun, and daemon threads are cut off then.
        atexit.register(self._end)

    def is_due(self, consumed_tokens: int) -> bool:
        """Whether `step` begins a snapshot there."""
        return consumed_tokens >= self._next_tokens

    def step(self, iteration: int, consumed_tokens: int, args: Any) -> bool:
        """Begin a snapshot if it is time; returns whether it did."""
        self._writer.trained(iteration)
        if not self.is_due(consumed_tokens):
            return False
        self.finish()
        self._copy.start(self._vector)
        objects = _objects(self._models, self._metadata)
        stored = copy.copy(args)
        setattr(stored, LEARNING_RATE, self._copy.learning_rate)
        self._writer.write(iteration, self._part, stored, objects)
        self._await_after(consumed_tokens)
        return True

    def finish(self, timeout_s: float = 600.0) -> None:
        """Wait for the last snapshot; what went wrong with it is logged, training goes on."""
        try:
            self._writer.wait(timeout_s)
        except PublishError as error:
            _log.warning("%s", error)
            return
        if self._comm.is_main and self._keep is not None:
            self._writer.prune(self._keep)

    def forget(self, since: int) -> None:
        """Snapshots of iteration `since` and later were spoiled by a loss spike, and training went
        back to weights of before it."""
        self.finish()  # one that is still being written is given up too
        self._writer.train_on(since - 1)

    def _end(self) -> None:
        self.finish(_AT_EXIT_S)
        self._writer.wait_for_uploads(_AT_EXIT_S)

    def _part(self, number: int) -> torch.Tensor:
        self._copy.wait()
        chunk, at = self._parts[number]
        return self._vector[at : at + chunk.box.numel]

    def _common(self, iteration: int) -> dict[str, Any]:
        plain = (bool, int, float, str)
        metadata = {k: v for k, v in (self._metadata or {}).items() if isinstance(v, plain)}
        return {"content_metadata": metadata, "num_floating_point_operations_so_far": 0}

    def _await_after(self, tokens: int) -> None:
        self._next_tokens = (tokens // self._interval + 1) * self._interval


def _objects(models: Sequence[Any], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Opaque entries (`_extra_state`) that Megatron's models ask for, from the rank that saves."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica

    entries = [e for m in models for e in nested_values(sharded_state(unwrap(m), metadata))]
    return {
        e.unique_key: e.data
        for e in entries
        if isinstance(e, ShardedObject) and is_main_replica(e.replica_id)
    }
