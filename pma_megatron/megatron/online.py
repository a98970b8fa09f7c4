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

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pma_megatron.comm import Comm
from pma_megatron.errors import UsageError
from pma_megatron.megatron.budget import Need, check
from pma_megatron.megatron.hostcopy import HostCopy
from pma_megatron.megatron.params import live_tensors
from pma_megatron.megatron.shard import Shard
from pma_megatron.megatron.store import WindowStore
from pma_megatron.megatron.swap import averaged_state, averaged_weights, backup_bytes
from pma_megatron.megatron.window import EMA, Average, Entry, make_window, vectors_needed
from pma_megatron.request import Method


class OnlineAverage:
    """The last N weights of a run, `interval_tokens` apart, or their exponential average.

    An entry is taken at the first iteration whose consumed tokens reach the next multiple of
    `interval_tokens`. Main params in float32 and the model's floating buffers (`expert_bias`) are
    averaged, each rank's own part of them, without communication.

    Attributes:
        report: what it takes of this node's memory, a line for the log.
    """

    def __init__(
        self, models: Sequence[Any], optimizer: Any, method: Method, last: int,
        interval_tokens: int, *, consumed_tokens: int = 0, window_dir: str | Path | None = None,
        metadata: Mapping[str, Any] | None = None, comm: Comm | None = None,
    ) -> None:  # fmt: skip
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
            raise UsageError(f"--pma-interval-tokens must be at least 1, got {interval_tokens}")
        self._comm = Comm() if comm is None else comm
        self._models, self._interval = models, interval_tokens
        self._tensors = self._comm.agree(
            "tensors of the model", lambda: live_tensors(models, optimizer, metadata)
        )
        self.shard = Shard(self._tensors)
        folder = None if window_dir is None else Path(window_dir)
        self.report = check(self._need(method, last, folder), self._comm)
        to_host = HostCopy(self.shard, optimizer)
        self._window = self._comm.agree(
            "running average", lambda: make_window(to_host, method, last, folder)
        )
        self._stores: dict[Path, WindowStore] = {}
        self._next_tokens = 0
        self._await_after(consumed_tokens)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is held, oldest first; of an exponential average the newest with its count."""
        return self._window.entries

    def step(self, iteration: int, consumed_tokens: int, args: Any = None) -> bool:
        """Take an entry if it is time; call it after every optimizer step.

        Args:
            iteration: that has just ended.
            consumed_tokens: until then.
            args: Megatron's arguments as of now, to be stored with the entry; may change later.

        Returns:
            whether an entry was taken.
        """
        if consumed_tokens < self._next_tokens:
            return False
        for store in self._stores.values():
            store.wait()  # the oldest entry's memory is about to be used again
        self._window.capture(
            Entry(iteration=iteration, tokens=consumed_tokens, args=copy.copy(args))
        )
        self._await_after(consumed_tokens)
        return True

    def average(self) -> Average | None:
        """The average of what is held; None with fewer than two entries (`why_none` says more)."""
        return self._window.average()

    def why_none(self) -> str | None:
        """Why there is no average yet, None if there is one."""
        return self._window.why_none()

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

    def save_state(self, folder: str | Path, *, wait: bool = True) -> None:
        """Write entries that are not on disk yet below `folder`, which all ranks share. Collective.

        Args:
            folder: of this average alone.
            wait: return when they are there; otherwise a thread writes them.
        """
        self._store(folder).save(wait=wait)

    def wait(self) -> None:
        """Until no thread writes the state; before a process is forked, for instance."""
        self._window.settle()
        for store in self._stores.values():
            store.wait()

    def load_state(self, folder: str | Path, iteration: int, consumed_tokens: int) -> list[str]:
        """Continue the average of a run that is resumed at `iteration`. Collective.

        Entries after `iteration` are left out, and deleted at the next `save_state`. The parallel
        layout may be another than when they were written.

        Args:
            folder: as in `save_state`.
            iteration: where the run stands.
            consumed_tokens: until then.

        Returns:
            what the user should know (missing entries, for instance), a line each.

        Raises:
            CheckpointError: entries are damaged, or of another model.
        """
        notes = self._store(folder).load(iteration)
        self._await_after(consumed_tokens)
        return [*notes, *self._gaps(consumed_tokens)]

    def forget(self, since: int) -> None:
        """Drop the entries of iteration `since` and later, which a loss spike has spoiled."""
        self._window.forget(since)
        for store in self._stores.values():
            store.forget(since)

    def _store(self, folder: str | Path) -> WindowStore:
        root = Path(folder)
        if root not in self._stores:
            self._stores[root] = WindowStore(root, self.shard, self._window, self._comm)
        return self._stores[root]

    def _some(self) -> Average:
        average = self.average()
        if average is None:
            raise UsageError(f"there is no average yet: {self.why_none()}; look at average() first")
        return average

    def _await_after(self, tokens: int) -> None:
        self._next_tokens = (tokens // self._interval + 1) * self._interval

    def _need(self, method: Method, last: int, folder: Path | None) -> Need:
        vector = self.shard.nbytes
        stages = method.name == EMA or self.shard.device.type == "cuda"
        return Need(
            window=vectors_needed(method, last) * vector,
            working=backup_bytes(self._tensors, self.shard) + (vector if stages else 0),
            folder=None if folder is None else str(folder),
        )

    def _gaps(self, tokens: int) -> Iterator[str]:
        """Entries that should be there by their tokens; a job that was killed may not have
        written its last ones."""
        marks = [entry.tokens // self._interval for entry in self.entries]
        for (older, newer), entry in zip(pairwise(marks), self.entries, strict=False):
            if newer > older + 1:
                yield (
                    f"{newer - older - 1} entries after iteration {entry.iteration} are missing: "
                    "the average goes on with those that are there"
                )
        missing = tokens // self._interval - (marks[-1] if marks else 0)
        if missing > 0:
            yield (
                f"up to {missing} newest entries are missing: the average goes on with those that "
                "are there"
            )
