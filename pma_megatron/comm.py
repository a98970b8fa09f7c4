"""Ranks: who am I, what do the others say, and an error on one rank is an error on all.

`Comm` works without a process group (one rank) and with one. Every rank makes the same calls in the
same order; `agree` is the one place where errors meet. During the merge, which has no collective to
meet in, a failing rank leaves a note in the rendezvous store and the others look for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pma_megatron.errors import PmaError, RankError, UsageError

T = TypeVar("T")
_NOTE = "pma_megatron/failed"
_LOOK_EVERY_S = 0.5
_TIMEOUT = timedelta(minutes=30)
# Of the process, not of a Comm: a note must not outlive the call that failed.
_epochs = itertools.count()


@dataclass(frozen=True, slots=True)
class Team:
    """Ranks that make the same averages together, block by block.

    Attributes:
        members: their global ranks.
        place: this rank's index in `members`.
        group: their process group; None for a team of one.
        by_source: True if members read different sources and sum; False if they take turns at
            blocks, each reading all sources, and send what they made to the others.
        all_write: True if every member keeps the result, False if one of them writes each block.
    """

    members: tuple[int, ...]
    place: int
    group: Any = None
    by_source: bool = True
    all_write: bool = False

    @staticmethod
    def of(group: Any, *, by_source: bool) -> Team:
        """The ranks of a process group, this one included; each keeps the result."""
        members = tuple(dist.get_process_group_ranks(group))
        place = members.index(dist.get_rank())
        return Team(members, place, group if len(members) > 1 else None, by_source, all_write=True)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)

    def reduce(self, block: torch.Tensor) -> torch.Tensor:
        """Sum a block over the team, in place. With NCCL it goes through this rank's GPU."""
        return self._exchange(block, lambda data: dist.all_reduce(data, group=self.group))

    def broadcast(self, block: torch.Tensor, place: int) -> torch.Tensor:
        """Overwrite a block with that of the member at `place`, in place."""
        source = self.members[place]
        return self._exchange(block, lambda d: dist.broadcast(d, source, group=self.group))

    def _exchange(self, block: torch.Tensor, move: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        if self.group is None:
            return block
        if "nccl" in str(dist.get_backend_config(self.group)):
            on_device = block.to(torch.device("cuda", torch.cuda.current_device()))
            move(on_device)
            return block.copy_(on_device)
        move(block)
        return block


class Comm:
    """The ranks of this job.

    Attributes:
        rank: this process.
        size: number of processes.
        merge_size: ranks that share the sources of one slice.
        team: those of them that this rank works with.
    """

    def __init__(self, merge_parallel_size: int = 1) -> None:
        """Use the default process group if there is one.

        Args:
            merge_parallel_size: ranks that share the sources of one slice; divides `size`.

        Raises:
            UsageError: it does not divide the number of ranks.
        """
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        if merge_parallel_size < 1 or self.size % merge_parallel_size:
            raise UsageError(
                f"--merge-parallel-size {merge_parallel_size} must divide the number of ranks, "
                f"{self.size}: start a multiple of it with torchrun --nproc-per-node"
            )
        self.merge_size = merge_parallel_size
        self.shard_rank = self.rank // merge_parallel_size
        self.shard_size = self.size // merge_parallel_size
        self._next_look_s = 0.0
        self.team = Team((self.rank,), 0)
        if merge_parallel_size > 1:
            for shard in range(self.shard_size):
                first = shard * merge_parallel_size
                members = tuple(range(first, first + merge_parallel_size))
                group = dist.new_group(list(members), timeout=_TIMEOUT)
                if shard == self.shard_rank:
                    self.team = Team(members, self.rank - first, group)
        self._store = _default_store() if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone talks to the user and publishes."""
        return self.rank == 0

    def agree(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return its result, or raise on every rank.

        Raises:
            PmaError: this rank's own error, if it failed; RankError naming the others' if not.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # it is raised below, after every rank knows of it
            error = caught
        said = None if error is None else f"{type(error).__name__}: {error}"
        failures = [(r, s) for r, s in enumerate(self.gather(said)) if s is not None]
        if error is not None and not isinstance(error, RankError):
            raise error
        if failures:
            rank, cause = next(
                ((r, s) for r, s in failures if not s.startswith(RankError.__name__)), failures[0]
            )
            raise RankError(f"rank {rank} failed in stage {stage!r}: {cause}")
        return result  # type: ignore[return-value]

    def on_main(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only and return its result on every rank, or raise on every rank."""
        made = self.agree(stage, lambda: work() if self.is_main else None)
        return self.broadcast(made)  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T]:
        """The value of every rank on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of global rank `source`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    @contextlib.contextmanager
    def watched(self, stage: str) -> Iterator[Callable[[], None]]:
        """A stage without collectives: yields a check that raises soon after another rank failed.

        Raises:
            RankError: from the yielded check, naming the failed rank and its cause.
        """
        key = f"{_NOTE}/{next(_epochs)}"
        try:
            yield lambda: self._look(key, stage)
        except Exception as error:
            if self._store is not None and not isinstance(error, RankError):
                with contextlib.suppress(RuntimeError):  # the store's own host may be gone
                    self._store.set(key, f"{self.rank}\n{type(error).__name__}: {error}")
            raise

    def _look(self, key: str, stage: str) -> None:
        now_s = time.monotonic()
        if self._store is None or now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_EVERY_S
        if self._store.check([key]):
            rank, _, cause = self._store.get(key).decode().partition("\n")
            raise RankError(f"rank {rank} failed in stage {stage!r}: {cause}")


@contextlib.contextmanager
def process_group_from_environment() -> Iterator[None]:
    """Join the job that `torchrun` started, for the time of the block; nothing without torchrun.

    gloo on CPU; where CUDA is, tensors on the GPU go through NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _default_store() -> Any:
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError) as error:
        raise PmaError(
            f"torch {torch.__version__} gives no access to the rendezvous store ({error}); "
            "use the torch versions named in setup.py"
        ) from error
