"""The one loop: units in, finished elements out, over threads and ranks.

Threads of a rank take units from one list. A rank works alone, or a team of ranks makes the same
averages together: each member reads some of the sources and the team sums the blocks, or members
take turns at the blocks. What a block becomes depends on the plan alone, so results do not depend
on threads or on how units are split over ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch

from pma_megatron.base.boxes import Box, slices
from pma_megatron.base.comm import Comm, Team
from pma_megatron.base.memory import collector_at_rest
from pma_megatron.base.spelling import named
from pma_megatron.errors import CheckpointError, PlanError, RankError
from pma_megatron.merging import streaming
from pma_megatron.merging.accumulate import Accumulator, Work, Workspace
from pma_megatron.merging.ahead import Found, found_ahead
from pma_megatron.merging.sums import Sum
from pma_megatron.merging.tasks import Average, AverageUnit, FillUnit, Unit, Workload, parted
from pma_megatron.merging.threads import over_threads
from pma_megatron.storage.paths import path_of
from pma_megatron.storage.spool import active, expect, expect_no_more
from pma_megatron.transfer.blocks import BlockReader, readers
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS, as_bytes
from pma_megatron.transfer.reads import Reads

SOURCE_BYTES = 4 << 20
"""A block of all sources at once: it bounds memory, and stays near the cores."""
_DENSE = 0.75
_LEAST_ELEMENTS = 1 << 14

S = TypeVar("S")
U = TypeVar("U")
Progress = Callable[[int], None]
"""Called with the cost in bytes of each finished unit."""


@dataclass(slots=True)
class Tally:
    """What this rank did.

    Attributes:
        read_bytes: payload bytes read from sources.
        written_bytes: bytes handed to the writers.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read_bytes: int, written_bytes: int) -> None:
        """Count, from any thread."""
        with self.lock:
            self.read_bytes += read_bytes
            self.written_bytes += written_bytes


def run(
    plan: Workload,
    units: Sequence[Unit],
    writers: Sequence[Any],
    comm: Comm,
    team: Team,
    progress: Progress,
    reads: Mapping[int, Reads],
    finished: Callable[[Unit], None] | None = None,
) -> Tally:
    """Do this rank's units, alone or with its team.

    Args:
        plan: sources and coefficients.
        units: this rank's; the members of a team have the same ones in the same order.
        writers: one per output. Copies and zeros need a `BlockWriter`.
        comm: all ranks; a failure of any of them stops this one.
        team: the ranks that this one works with.
        progress: told of every finished unit.
        reads: number of a source -> takes note of what is read of it (`source_checksums.checked`).
        finished: called with each unit that a rank has done alone, by the thread that did it.

    Raises:
        CheckpointError: a source vanished, is damaged, or has NaN or Inf.
        PlanError: main parameters are not what the weights say (the map's proof failed).
        PublishError: the output cannot be written.
        RankError: another rank failed.
    """
    if team.size == 1 and active() is not None:
        _expect(plan, sum(unit.read_bytes for unit in units), comm.size)
    with (
        collector_at_rest(),  # all threads would wait for it, as long as for a hundred units
        reading(plan, comm.rank, reads) as opened,
        comm.watched("merge") as check,
    ):
        sums = tuple(Sum.of(values) for values in plan.coefficients)
        add = Accumulator(plan, opened, writers, sums)
        job = _Job(add, team, comm, progress, check, finished)
        if team.size > 1:
            job.run_shared(units)
        else:
            job.run_alone(units)
    expect_no_more()
    return job.tally


def _expect(plan: Workload, read_bytes: int, ranks: int) -> None:
    """Where most of what lies in the sources is read, few large requests to a store are best, and
    a rank that reads all of it asks for it now. Not while the merge is planned, which would wait
    for its short questions behind that."""
    there = sum(nbytes for source in plan.sources for nbytes, _ in source.stamps.values())
    if read_bytes * ranks < _DENSE * there:
        return
    paths = [path_of(source.path) for source in reversed(plan.sources)]
    if ranks > 1 or not expect(paths, soon=True):
        expect(paths, kept=False)


def assign(plan: Workload, team: Team) -> tuple[int, ...]:
    """Per source, the place in the team that reads it: one that sees it, evenly spread.

    Raises:
        PlanError: a source is visible to no rank of the team.
    """
    load = [0] * team.size
    chosen = []
    for number, ranks in enumerate(plan.visible):
        able = [place for place, rank in enumerate(team.members) if rank in ranks]
        if not able:
            raise PlanError(
                f"{plan.sources[number].path} can be read by ranks {list(ranks)}, but by none of "
                f"the ranks {list(team.members)}, which share one part of the model. Put it where "
                f"one of them sees it, or make {named('merge_parallel_size')} the number of ranks "
                "that together see every source"
            )
        place = min(able, key=lambda m: (load[m], (m - number) % team.size))
        load[place] += 1
        chosen.append(place)
    return tuple(chosen)


@contextlib.contextmanager
def reading(
    plan: Workload, rank: int, reads: Mapping[int, Reads]
) -> Iterator[dict[int, BlockReader]]:
    """Readers of the sources that this rank sees, by number, for the time of the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads here are the parallelism; torch's would get in the way
    try:
        seen = ((n, s) for n, s in enumerate(plan.sources) if rank in plan.visible[n])
        with readers(seen, reads) as opened:
            yield opened
    finally:
        torch.set_num_threads(threads)


def block_elements(task: Average) -> int:
    """The greatest block of a task: it depends on the plan alone, as all members of a team must."""
    per_element = sum(dtype.itemsize for dtype in task.dtypes)
    return max(_LEAST_ELEMENTS, min(BLOCK_ELEMENTS, SOURCE_BYTES // per_element))


def blocks(box: Box, limit: int) -> Iterator[tuple[int, Box]]:
    """Blocks of at most `limit` elements of a unit's box, each with its first element's number."""
    first = 0
    for block in slices(box, limit):
        yield first, block
        first += block.numel


@dataclass(slots=True)
class _Job:
    add: Accumulator
    team: Team
    comm: Comm
    progress: Progress
    check: Callable[[], None]
    finished: Callable[[Unit], None] | None
    tally: Tally = field(default_factory=Tally)
    failed: Exception | None = None
    located: Work | None = None
    located_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def threads(self) -> int:
        """Threads of this rank."""
        return self.add.plan.threads

    # One rank, all sources.

    def run_alone(self, units: Sequence[Unit]) -> None:
        """Every unit, by any thread."""
        with ThreadPoolExecutor(self.threads) as scouts:
            over_threads(
                found_ahead(units, self._find, scouts, self.threads),
                self.threads,
                lambda each, space: self._do(*each, space),
                lambda: Workspace(len(self.add.writers)),
            )

    def _find(self, unit: Unit) -> Found | None:
        if not isinstance(unit, AverageUnit):
            return None
        work = self.add.locate(unit, unit.task.numbers)
        cold = [each.reader.advise() for each in work.inputs]  # all: it asks storage for them
        return Found(work, streaming.ranges(work), any(cold))

    def _do(self, unit: Unit, found: Callable[[], Found | None], space: Workspace) -> None:
        self.check()
        if isinstance(unit, AverageUnit):
            located = found()
            assert located is not None
            self._average(unit, located, space)
        else:
            self._fill(unit, space)
        if self.finished is not None:
            self.finished(unit)
        self.progress(unit.cost_bytes)

    def _average(self, unit: AverageUnit, found: Found, space: Workspace) -> None:
        work = found.work
        for part in found.streamed:
            self._stream(work, part, space, found.is_cold)
        if found.streamed:
            return
        for first, block in blocks(unit.box, block_elements(unit.task)):
            self.check()
            averages, read_bytes = self.add.average(work, block, first, space)
            self.tally.add(read_bytes, self.add.write(work, block, first, averages))

    def _stream(self, work: Work, each: streaming.Range, space: Workspace, is_cold: bool) -> None:
        for first, numel in streaming.calls(each):
            self.check()
            outcome = streaming.stream(work, each, first, numel, space.room, is_cold=is_cold)
            if outcome != streaming.Outcome.DONE:
                self._refuse(work, each.first + first, each.first + first + numel, space)
            self.tally.add(*(size * numel for size in each.itemsizes))

    def _refuse(self, work: Work, begin: int, end: int, space: Workspace) -> NoReturn:
        """Say what is wrong with elements of a unit: block by block that is known precisely."""
        for first, block in blocks(work.box, block_elements(work.task)):
            if first < end and begin < first + block.numel:
                self.add.average(work, block, first, space)
        raise CheckpointError(
            f"{work.task.key} at {work.box.offsets} was not finite, or not what the weights say, "
            "and is when it is read again: something writes to the sources. Merge again once that "
            "has ended"
        )

    def _fill(self, unit: FillUnit, space: Workspace) -> None:
        buffer = as_bytes(space.raw().whole(torch.float32)[:BLOCK_ELEMENTS])
        unit.fill(self.add.readers[self.add.last], self.add.writers, buffer)
        written_bytes = unit.count * unit.task.itemsize * len(self.add.writers)
        self.tally.add(unit.read_bytes, written_bytes)

    # A team: the same blocks in the same order on every member.

    def run_shared(self, units: Sequence[Unit]) -> None:
        """All members go through the same blocks in the same order."""
        mine = self._mine()
        averages, fills = parted(units)
        spaces = [Workspace(len(self.add.writers)) for _ in range(self.threads + 1)]
        turns = enumerate(
            (unit, *at) for unit in averages for at in blocks(unit.box, block_elements(unit.task))
        )
        pending: deque[tuple[int, AverageUnit, int, Box, Future[Work]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:

            def begin() -> None:
                for turn, (unit, first, block) in itertools.islice(turns, 1):
                    space = spaces[turn % len(spaces)]
                    future = pool.submit(self._partial, unit, mine(turn), first, block, space)
                    pending.append((turn, unit, first, block, future))

            for _ in spaces:
                begin()
            while pending:
                turn, unit, first, block, future = pending.popleft()
                space = spaces[turn % len(spaces)]
                work = self._exchange(turn, unit, future, space, block.numel)
                finished = self.add.finish(work, block, space)
                with self._reported_later():
                    if self.team.all_write or self._has_turn(turn):
                        self.tally.add(0, self.add.write(work, block, first, finished))
                    self.progress(unit.cost_bytes * block.numel // max(work.box.numel, 1))
                begin()
        if self.failed is not None:
            raise self.failed
        if assign(self.add.plan, self.team)[self.add.last] == self.team.place:
            for fill in fills:
                self._do(fill, lambda: None, spaces[0])

    def _mine(self) -> Callable[[int], Sequence[int]]:
        """turn -> numbers of the sources that this member reads for it."""
        if self.team.by_source:
            own = assign(self.add.plan, self.team)
            numbers = [number for number, place in enumerate(own) if place == self.team.place]
            return lambda turn: numbers
        every = range(len(self.add.plan.sources))
        return lambda turn: every if self._has_turn(turn) else ()

    def _has_turn(self, turn: int) -> bool:
        return turn % self.team.size == self.team.place

    @contextlib.contextmanager
    def _reported_later(self) -> Iterator[None]:
        """Keep an error until the next block: raising alone would leave the team waiting."""
        try:
            yield
        except Exception as error:
            self.failed = self.failed or error

    def _partial(
        self, unit: AverageUnit, numbers: Sequence[int], first: int, block: Box, space: Workspace
    ) -> Work:
        if not self.team.by_source:
            work = self.add.locate(unit, numbers)
        else:
            with self.located_lock:
                if self.located is None or self.located.unit is not unit:
                    self.located = self.add.locate(unit, numbers)
                work = self.located
        self.tally.add(self.add.partial(work, block, first, space), 0)
        return work

    def _exchange(
        self, turn: int, unit: AverageUnit, part: Future[Work], space: Workspace, numel: int
    ) -> Work:
        """Make a block whole on every member; one's error reaches the others with a block."""
        error, work = self.failed, None
        try:
            work = part.result()
            self.check()
        except Exception as caught:  # raised below, once the others know
            error = error or caught
        sums = zip(self.add.sums_of(unit.task), space.sums, strict=True)
        for k, (how, buffers) in enumerate(sums):
            block = buffers.whole(how.dtype)[: numel + 1]
            block[numel] = 0.0 if error is None else 1.0
            if error is not None:
                block[:numel] = 0.0
            if self.team.by_source:
                self.team.reduce(block, self.comm)
            else:
                self.team.broadcast(block, turn % self.team.size, self.comm)
            if k == 0 and float(block[numel]) > 0:
                raise error or RankError("another rank of the team failed")
        if error is not None and work is None:  # its block was another's; it is told at its turn
            self.failed = error
            work = self.add.locate(unit, ())
        assert work is not None
        return work
