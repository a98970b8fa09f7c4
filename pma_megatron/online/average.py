"""A running average of the weights of a model, whatever trains it.

What a trainer adds: which tensors there are (a `Shard`), and how the average takes their place.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.errors import UsageError
from pma_megatron.merging.request import Method
from pma_megatron.online.average_upload import AveragePlace
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.online.memory_budget import Need, check
from pma_megatron.online.shard import Shard
from pma_megatron.online.store import WindowStore
from pma_megatron.online.window import (
    EMA,
    Member,
    WindowAverage,
    make_window,
    refuse_remote_window,
    vectors_needed,
)
from pma_megatron.runs.tokens import consumed_samples_of, consumed_tokens_of, why_incomparable
from pma_megatron.storage.paths import place_of

_log = logging.getLogger(__name__)


class RunningAverage(ABC):
    """The last N weights of a run, `interval` apart, or their exponential average.

    How far a run is, is counted in tokens, or in iterations where tokens are not known.

    Attributes:
        shard: what of the model is averaged on this rank.
        report: what it takes of this node's memory, a line for the log.
    """

    def __init__(
        self,
        shard: Shard[Any],
        method: Method,
        last: int,
        interval: int,
        *,
        position: int,
        backup_bytes: int,
        stepping: Sequence[Any] | None,
        window_dir: str | Path | None,
        comm: Comm,
    ) -> None:
        """Make room for the window. Collective.

        Args:
            shard: what of the model is averaged on this rank.
            method: how entries are weighted; `ema` runs on without end.
            last: N; unused by `ema`.
            interval: from one entry to the next.
            position: where the run stands now.
            backup_bytes: what a swap keeps on the host.
            stepping: as for `HostCopy`.
            window_dir: node-local folder for the window; None for host memory.
            comm: the ranks.

        Raises:
            UsageError: too little memory or disk; coefficients of another number; values out of
                range.
        """
        self.shard, self._comm, self._interval = shard, comm, interval
        refuse_remote_window(window_dir)
        folder = None if window_dir is None else Path(window_dir)
        self.report = check(self._need(method, last, folder, backup_bytes), comm)
        to_host = HostCopy(shard, stepping)
        self._window = comm.agree(
            "running average", lambda: make_window(to_host, method, last, folder)
        )
        self._stores: dict[str, WindowStore] = {}
        self._places: dict[str, AveragePlace] = {}
        self._next, self._told = 0, False
        self._await_after(position)

    @property
    def entries(self) -> tuple[Member, ...]:
        """What is held, oldest first; of an exponential average the newest with its count."""
        return self._window.entries

    def average(self) -> WindowAverage | None:
        """The average of what is held; None with fewer than two entries (`why_none` says more)."""
        average = self._window.average()
        why = None if average is None else average.not_by_tokens_because
        if why is not None and not self._told:
            self._told = True
            if self._comm.is_main:
                _log.warning(
                    "positions in the running average are in iterations, not tokens: %s", why
                )
        return average

    def why_none(self) -> str | None:
        """Why there is no average yet, None if there is one."""
        return self._window.why_none()

    @abstractmethod
    def averaged_weights(self) -> AbstractContextManager[None]:
        """Forward passes inside the block use the average; then every bit is as it was.

        Raises:
            UsageError: there is no average yet.
        """

    @abstractmethod
    def averaged_state(self) -> AbstractContextManager[None]:
        """As `averaged_weights`, main params too: what is saved inside resumes from the average.

        Raises:
            UsageError: there is no average yet.
        """

    def save_state(self, folder: str | Path, *, wait: bool = True) -> None:
        """Write entries that are not on disk yet below `folder`, which all ranks share. Collective.

        Args:
            folder: of this average alone, or an address in an object store, which they get to
                behind training (`wait_for_uploads`).
            wait: return when they are there, on a disk; otherwise a thread writes them.

        Raises:
            UsageError: an address at which nothing can be put.
            PublishError: the folder cannot be made or is not shared, or the store refuses.
        """
        self._store(folder).save(wait=wait)

    def wait(self) -> None:
        """Until no thread writes the state; before a process is forked, for instance."""
        self._window.settle()
        for store in self._stores.values():
            store.wait()

    def wait_for_uploads(self, timeout_s: float | None = None) -> None:
        """Until all that was saved at addresses is there; what is not by then stays on the disk, is
        told, and is put there by the next job. A process that ends does this for up to a minute.

        Args:
            timeout_s: None for as long as it takes.
        """
        for store in self._stores.values():
            store.wait_for_uploads(timeout_s)
        for place in self._places.values():
            place.wait(timeout_s)

    def place(self, root: str | Path) -> AveragePlace:
        """Where averages are saved, a folder or an address. Collective the first time.

        Called at the start of a job, before `load_state`, it looks at a store before hours are
        trained: later a store that is away ends no training.

        Raises:
            UsageError, PublishError: see `AveragePlace`.
        """
        known = str(place_of(root))
        if known not in self._places:
            self._places[known] = AveragePlace(root, self._comm)
        return self._places[known]

    def forget(self, since: int) -> None:
        """Drop the entries of iteration `since` and later, which a loss spike has spoiled."""
        self._window.forget(since)
        for store in self._stores.values():
            store.forget(since)

    def is_due(self, position: int) -> bool:
        """Whether `step` takes an entry there."""
        return position >= self._next

    def _step(self, iteration: int, position: int, args: Any) -> bool:
        """Take an entry if it is time; whether it was."""
        if not self.is_due(position):
            return False
        for store in self._stores.values():
            store.wait()  # the oldest entry's memory is about to be used again
        self._window.capture(
            Member(
                iteration=iteration,
                tokens=position,
                samples=_samples(args, position),
                interval=self._interval,
                args=copy.copy(args),
                learning_rate=self._window.copy.learning_rate,
            )
        )
        self._await_after(position)
        return True

    def _load_state(
        self, folder: str | Path, iteration: int, position: int, args: Any
    ) -> list[str]:
        notes = self._store(folder).load(iteration)
        self._await_after(position)
        now = Member(iteration=iteration, tokens=position, samples=_samples(args, position))
        return [*notes, *self._gaps(now)]

    def _some(self) -> WindowAverage:
        average = self.average()
        if average is None:
            raise UsageError(f"there is no average yet: {self.why_none()}; look at average() first")
        return average

    def _store(self, folder: str | Path) -> WindowStore:
        refuse_remote("folder", folder, stores=True, put=True)
        root = str(place_of(folder))
        if root not in self._stores:
            self._stores[root] = WindowStore(folder, self.shard, self._window, self._comm)
        return self._stores[root]

    def _await_after(self, position: int) -> None:
        self._next = (position // self._interval + 1) * self._interval

    def _need(self, method: Method, last: int, folder: Path | None, backup_bytes: int) -> Need:
        vector = self.shard.nbytes
        stages = method.name == EMA or self.shard.device.type == "cuda"
        return Need(
            window=vectors_needed(method, last) * vector,
            working=backup_bytes + (vector if stages else 0),
            folder=None if folder is None else str(folder),
        )

    def _gaps(self, now: Member) -> Iterator[str]:
        """Entries that were taken, by where the run stands now, and are not there; a job that was
        killed may not have written its last ones."""
        held = self.entries
        for older, newer in pairwise(held):
            lost = self._lost(older, newer) if newer.interval == older.interval else 0
            if lost:
                yield (
                    f"{lost} entries after iteration {older.iteration} are missing: the average "
                    "goes on with those that are there"
                )
        # Without any, the flag may be new to the run. What is lost was taken as the newest one was.
        newest_lost = self._lost(held[-1], now, is_entry=False) if held else 0
        if newest_lost:
            yield (
                f"up to {newest_lost} newest entries are missing: the average goes on with those "
                "that are there"
            )

    def _lost(self, older: Member, newer: Member, *, is_entry: bool = True) -> int:
        """Entries that were taken after one and until another, itself not counted if it is one."""
        tokens, interval = newer.tokens, older.interval
        if why_incomparable((older, newer)) is not None:
            if not (older.samples and newer.samples) or is_entry:
                return 0
            # Until it ended, the job before this one counted at its own sequence length.
            tokens = newer.samples * older.tokens // older.samples
        if not interval:
            return 0
        marks = tokens // interval - older.tokens // interval
        # An iteration may pass several marks, and is one entry.
        lost = min(marks, newer.iteration - older.iteration) - (1 if is_entry else 0)
        most = lost if self._window.method.name == EMA else self._window.last
        return max(0, min(lost, most))


def _samples(args: Any, position: int) -> int | None:
    """Consumed until now, where Megatron's arguments are those that the position is counted by."""
    said = getattr(args, "__dict__", {})
    return consumed_samples_of(said) if consumed_tokens_of(said)[0] == position else None
