"""A running average of the weights of a Megatron model, for any training loop.

    online = OnlineAverage(models, optimizer, Method(name="wma"), last=6, interval_tokens=8 * 10**9)
    online.load_state(folder, iteration)            # after a resume
    for iteration in ...:
        ...                                         # forward, backward, optimizer.step()
        online.step(iteration, consumed_tokens)
        if evaluate_now and online.average() is not None:
            with online.averaged_weights():
                ...                                 # the same batches again
        if save_now:
            online.save_state(folder)

Every rank makes every call, in the same order. The `--pma-*` flags drive the same class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.spelling import named, speaking
from pma_megatron.errors import UsageError
from pma_megatron.live.load import ARGUMENTS
from pma_megatron.megatron.params import live_tensors, stepping
from pma_megatron.megatron.shard import MegatronShard
from pma_megatron.megatron.swap import averaged_state, averaged_weights, backup_bytes
from pma_megatron.merging.request import Method
from pma_megatron.online.average import RunningAverage


class OnlineAverage(RunningAverage):
    """The last N weights of a run, `interval_tokens` apart, or their exponential average.

    An entry is taken at the first iteration whose consumed tokens reach the next multiple of
    `interval_tokens`. Main params in float32 and the model's floating buffers (`expert_bias`) are
    averaged, each rank's own part of them, without communication.
    """

    @speaking(ARGUMENTS)
    def __init__(
        self,
        models: Sequence[Any],
        optimizer: Any,
        method: Method,
        last: int,
        interval_tokens: int,
        *,
        consumed_tokens: int = 0,
        window_dir: str | Path | None = None,
        metadata: Mapping[str, Any] | None = None,
        comm: Comm | None = None,
    ) -> None:
        """Make room for the window. Collective.

        Args:
            models: the chunks, as Megatron's training passes them around.
            optimizer: Megatron's.
            method: how entries are weighted; `ema` runs on without end.
            last: N; unused by `ema`.
            interval_tokens: from one entry to the next.
            consumed_tokens: where the run stands now.
            window_dir: node-local folder for the window; None for host memory.
            metadata: what `sharded_state_dict` gets; None for its default.
            comm: the ranks, by default all.

        Raises:
            UsageError: a model or optimizer that cannot be averaged in place; too little memory or
                disk; coefficients of another number; values out of range.
        """
        if interval_tokens < 1:
            raise UsageError(
                f"{named('interval_tokens')} must be at least 1, got {interval_tokens}"
            )
        comm = Comm() if comm is None else comm
        self._models = models
        self._tensors = comm.agree(
            "tensors of the model", lambda: live_tensors(models, optimizer, metadata)
        )
        shard = MegatronShard(self._tensors)
        super().__init__(
            shard,
            method,
            last,
            interval_tokens,
            position=consumed_tokens,
            backup_bytes=backup_bytes(self._tensors, shard),
            stepping=stepping(optimizer),
            window_dir=window_dir,
            comm=comm,
        )

    def step(self, iteration: int, consumed_tokens: int, args: Any = None) -> bool:
        """Take an entry if it is time; call it after every optimizer step.

        Args:
            iteration: that has just ended.
            consumed_tokens: until then.
            args: Megatron's arguments as of now, to be stored with the entry; may change
                later. Give them on every rank: a changed sequence length is told from them.

        Returns:
            whether an entry was taken.
        """
        return self._step(iteration, consumed_tokens, args)

    def load_state(
        self, folder: str | Path, iteration: int, consumed_tokens: int, args: Any = None
    ) -> list[str]:
        """Continue the average of a run that is resumed at `iteration`. Collective.

        Entries after `iteration` are left out, and deleted at the next `save_state`. The parallel
        layout may be another than when they were written.

        Args:
            folder: as in `save_state`.
            iteration: where the run stands.
            consumed_tokens: until then.
            args: as in `step`: a changed sequence length is told from lost entries by them.

        Returns:
            what the user should know (missing entries, for instance), a line each.

        Raises:
            CheckpointError: entries are damaged, or of another model.
        """
        return self._load_state(folder, iteration, consumed_tokens, args)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Forward passes inside the block use the average; then every bit is as it was.

        Raises:
            UsageError: there is no average yet.
        """
        return averaged_weights(self._models, self._tensors, self.shard, self._some())

    def averaged_state(self) -> AbstractContextManager[None]:
        """As `averaged_weights`, main params too: what is saved inside resumes from the average.

        Raises:
            UsageError: there is no average yet.
        """
        return averaged_state(self._models, self._tensors, self.shard, self._some())
