"""Ranks: who am I, what do the others say, and an error on one rank is an error on all.

`Comm` works without a process group (one rank) and with one. Every rank makes the same calls in the
same order; `agree` is the one place where errors meet. During the merge, which has no collective to
meet in, a failing rank leaves a note in the rendezvous store and the others look for it. Who is
there at all, `presence` knows: no collective is entered before every rank has come to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pma_megatron.base import steps
from pma_megatron.base.durations import format_duration
from pma_megatron.base.faults import point
from pma_megatron.base.packing import packed, unpacked
from pma_megatron.base.presence import TIMEOUT_S, Presence, kept_by_torchrun
from pma_megatron.base.spelling import given, named
from pma_megatron.base.stopping import Stopped, shielded
from pma_megatron.errors import PmaError, RankError, UsageError

T = TypeVar("T")
# Of collectives: what they fail with says less than `presence`, which must have had its time.
_LEAST_TIMEOUT_S = 1800.0
_OF_THE_GROUP = "the time allowed is that of the process group"
_entangled = False


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

    def reduce(self, block: torch.Tensor, comm: Comm) -> torch.Tensor:
        """Sum a block over the team, in place. With NCCL it goes through this rank's GPU.

        Raises:
            RankError: a member is gone, or has stood still for too long.
        """
        return self._exchange(
            block, lambda data: dist.all_reduce(data, group=self.group, async_op=True), comm
        )

    def broadcast(self, block: torch.Tensor, place: int, comm: Comm) -> torch.Tensor:
        """Overwrite a block with that of the member at `place`, in place; raises as `reduce`."""
        source = self.members[place]
        return self._exchange(
            block, lambda data: dist.broadcast(data, source, group=self.group, async_op=True), comm
        )

    def _exchange(
        self, block: torch.Tensor, move: Callable[[torch.Tensor], Any], comm: Comm
    ) -> torch.Tensor:
        if self.group is None:
            return block
        if "nccl" in str(dist.get_backend_config(self.group)):
            on_device = block.to(torch.device("cuda", torch.cuda.current_device()))
            move(on_device).wait()
            return block.copy_(on_device)
        comm.wait_for(move(block), self.members)
        return block


class Comm:
    """The `size` ranks of this job, of which this process is `rank`.

    Attributes:
        merge_size: ranks that share the sources of one slice.
        team: those of them that this rank works with.
    """

    def __init__(self, merge_parallel_size: int = 1, *, timeout_s: float | None = None) -> None:
        """Use the default process group if there is one.

        Args:
            merge_parallel_size: ranks that share the sources of one slice; divides `size`.
            timeout_s: how long another rank may stand still; by default what
                `process_group_from_environment` was told, in a trainer the time that its own
                process group allows.

        Raises:
            UsageError: it does not divide the number of ranks.
        """
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        if merge_parallel_size < 1 or self.size % merge_parallel_size:
            raise UsageError(
                f"{given('merge_parallel_size', merge_parallel_size)} must divide the number of "
                f"ranks, {self.size}: start a multiple of it with torchrun --nproc-per-node"
            )
        self.merge_size = merge_parallel_size
        self.shard_rank = self.rank // merge_parallel_size
        self.shard_size = self.size // merge_parallel_size
        self.team = Team((self.rank,), 0)
        if merge_parallel_size > 1:
            for shard in range(self.shard_size):
                first = shard * merge_parallel_size
                members = tuple(range(first, first + merge_parallel_size))
                group = dist.new_group(list(members), timeout=_collectives(_timeout_s()))
                if shard == self.shard_rank:
                    self.team = Team(members, self.rank - first, group)
        self._presence = None
        if self.size > 1:
            limit_s = _timeout_s() if timeout_s is None else timeout_s
            hint = _hint() if limit_s == _given_timeout_s else _OF_THE_GROUP
            self._presence = Presence(_default_store(), self.rank, self.size, limit_s, hint)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone talks to the user and publishes."""
        return self.rank == 0

    def agree(self, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return its result, or raise on every rank.

        Tests may make a rank fail at `stage`, when its work is done: see `faults`.

        Raises:
            PmaError: this rank's own error, if it failed; RankError naming the others' if not.
        """
        result, error = None, None
        steps.at(stage)
        if self._presence is None:
            result = work()
            point(stage, self.rank)
            return result
        with self._presence.at(stage), self._leaving(stage):
            try:
                result = work()
                point(stage, self.rank)
            except Exception as caught:  # it is raised below, after every rank knows of it
                if isinstance(caught, RankError) and caught.lost:
                    raise
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

    def on(self, owner: int, stage: str, work: Callable[[], T]) -> T:
        """Run `work` on one rank and return its result on every rank; raises as `agree`."""
        made = self.agree(stage, lambda: work() if self.rank == owner else None)
        return self.broadcast(made, owner)  # type: ignore[return-value]

    def on_main(self, stage: str, work: Callable[[], T]) -> T:
        """`on` rank 0."""
        return self.on(0, stage, work)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(values, value))
        return values

    def collect(self, value: T) -> list[T]:
        """The value of every rank on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        self._together(lambda: dist.gather_object(value, values))
        return values or []

    def told_main(self, value: T | None, source: int) -> T | None:
        """The value of rank `source` on rank 0, None elsewhere.

        Not `collect`, which pads what every rank sends to the longest.
        """
        if self.size == 1 or source == 0:
            return value if self.is_main else None
        box = [packed(value) if self.rank == source else None]
        self._together(lambda: dist.broadcast_object_list(box, src=source))
        made: T | None = unpacked(box[0]) if self.is_main else None
        return made

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of global rank `source`, on every rank."""
        if self.size == 1:
            return value
        box = [packed(value) if self.rank == source else None]
        self._together(lambda: dist.broadcast_object_list(box, src=source))
        return value if self.rank == source else unpacked(box[0])

    def wait_for(self, work: Any, mates: Collection[int]) -> None:
        """Wait for a collective of some ranks; raises as `Team.reduce`."""
        global _entangled
        assert self._presence is not None
        try:
            self._presence.wait_for(work, mates)
        except (RankError, KeyboardInterrupt):
            _entangled = True
            raise
        except RuntimeError as error:
            raise self._presence.broken(error) from error

    @contextlib.contextmanager
    def watched(self, stage: str) -> Iterator[Callable[[], None]]:
        """A stage without collectives: yields a check that raises soon after another rank failed,
        and tells the others that this rank moves.

        Raises:
            RankError: from the yielded check, naming the failed rank and its cause.
        """
        if self._presence is None:
            yield lambda: None
            return
        try:
            yield self._presence.look_at_times
        except Exception as error:
            if not isinstance(error, RankError):
                cause = f"{type(error).__name__}: {error}"
                self._presence.failed(f"rank {self.rank} failed in stage {stage!r}: {cause}")
            raise

    def moved(self) -> None:
        """Tell the others that this rank moves, where nothing else shows it."""
        if self._presence is not None:
            self._presence.tick()

    def _together(self, exchange: Callable[[], Any]) -> None:
        assert self._presence is not None
        self._presence.meet()
        try:
            exchange()
        except RuntimeError as error:
            raise self._presence.broken(error) from error

    @contextlib.contextmanager
    def _leaving(self, stage: str) -> Iterator[None]:
        """The others must not wait for a rank that was asked to end."""
        try:
            yield
        except KeyboardInterrupt as stop:
            assert self._presence is not None
            _leave(self._presence, stop, f" in stage {stage!r}")
            raise


def _leave(presence: Presence, stop: KeyboardInterrupt, where: str) -> None:
    """Tell the others why this rank goes.

    Raises:
        RankError: torchrun ends the others when one rank fails, and that it did is the news.
    """
    why = presence.why_ended()
    by = str(stop) or "its keyboard"
    presence.leave(f"rank {dist.get_rank()} was stopped by {by}{where}", asked=True)
    if why is not None and isinstance(stop, Stopped):
        why.published, why.unpublished, why.kept = stop.published, stop.unpublished, stop.kept
        raise why from stop


def entangled() -> bool:
    """True if a collective is under way that nothing but the end of the process takes back."""
    return _entangled


_given_timeout_s: float | None = None


@contextlib.contextmanager
def process_group_from_environment(timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Join the job that `torchrun` started, for the time of the block; nothing without torchrun.

    gloo on CPU; where CUDA is, tensors on the GPU go through NCCL.

    Args:
        timeout_s: how long to wait for a rank that does not come, or that stands still.

    Raises:
        RankError: a rank did not come in time.
    """
    global _given_timeout_s
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    rank = int(os.environ["RANK"])
    store = _joined(rank, size, timeout_s)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=_collectives(timeout_s)
    )
    _given_timeout_s = timeout_s
    presence = Presence(_default_store(), rank, size, timeout_s, _hint())
    try:
        with presence.at("start"):  # what lies between two stages is life too
            yield
    except KeyboardInterrupt as stop:
        _leave(presence, stop, "")
        raise
    except BaseException as error:
        with shielded():  # torchrun ends the others when one rank is gone: that is no news
            presence.leave(f"rank {rank} failed: {type(error).__name__}: {error}")
            if not entangled():
                dist.destroy_process_group()
            raise
    else:
        with contextlib.suppress(RankError):  # rank 0 may keep the store, so it must not end first
            presence.meet()
        dist.destroy_process_group()
    finally:
        _given_timeout_s = None


def _joined(rank: int, size: int, timeout_s: float) -> Any:
    """The rendezvous store, when every rank has come to it."""
    host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
    limit = timedelta(seconds=timeout_s)
    try:
        if kept_by_torchrun():
            store = next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))[0]
        else:  # not by torch's own words, which do not tell who is missing
            store = dist.TCPStore(
                host, int(port), size, rank == 0, limit, wait_for_workers=False, multi_tenant=True
            )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {rank} of {size} waited {format_duration(timeout_s)} at most and did not reach "
            f"the rendezvous store at {host}:{port} ({str(error).splitlines()[0]}). Start every "
            "rank, with the MASTER_ADDR and MASTER_PORT of rank 0",
            speaker=rank,
        ) from error
    Presence(dist.PrefixStore("pma_megatron_start", store), rank, size, timeout_s, _hint()).meet()
    return store


def _timeout_s() -> float:
    """What the command was told, else what the trainer's own process group allows."""
    if _given_timeout_s is not None:
        return _given_timeout_s
    try:
        group = dist.distributed_c10d._get_default_group()
        kind = group._device_types[0]
        return float(group._get_backend(kind).options._timeout.total_seconds())
    except (AttributeError, IndexError, RuntimeError):
        return TIMEOUT_S


def _hint() -> str:
    return f"{named('timeout_s')} sets how long others wait"


def _collectives(timeout_s: float) -> timedelta:
    return timedelta(seconds=max(_LEAST_TIMEOUT_S, 2 * timeout_s))


def _default_store() -> Any:
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError) as error:
        raise PmaError(
            f"torch {torch.__version__} gives no access to the rendezvous store ({error}); "
            "use the torch versions named in setup.py"
        ) from error
