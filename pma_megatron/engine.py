"""The one loop that multiplies a weight by a coefficient.

Per block: read the same box of every source into a reused buffer, add it times its coefficient to
an accumulator per output, round once per stored dtype, write. The accumulator is float32 where the
coefficients are exact in it (`coefficients.exact_weights`), float64 where they are not, so that the
result is always within N x 2^-24 x sum |w_i x_i| of the float64 average. Threads of a rank take
units from one list; ranks have a part of the list each, or share the sources of a part.
What a block becomes depends on the plan alone, so results do not depend on ranks or threads.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pma_megatron.blocks import (
    BLOCK_ELEMENTS,
    BlockReader,
    BlockWriter,
    Room,
    Rooms,
    Rounded,
    UnitReader,
    UnitWriter,
    copy_bytes,
    same_bits,
)
from pma_megatron.coefficients import exact_weights
from pma_megatron.comm import Comm
from pma_megatron.errors import CheckpointError, PlanError, RankError
from pma_megatron.formats import registry
from pma_megatron.geometry import Box, slices
from pma_megatron.planning import MergePlan
from pma_megatron.tasks import Average, Copy, Unit, Write, Zero, share

Progress = Callable[[int], None]
"""Called with the cost in bytes of each finished unit."""

_ZEROS = bytes(1 << 20)


@dataclass(slots=True)
class Tally:
    """What this rank did.

    Attributes:
        read_bytes: payload bytes read from sources.
        written_bytes: bytes written into outputs.
        writers: one per output, not yet flushed; they know the checksums of what they wrote.
    """

    writers: list[BlockWriter]
    read_bytes: int = 0
    written_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read_bytes: int, written_bytes: int) -> None:
        """Count, from any thread."""
        with self.lock:
            self.read_bytes += read_bytes
            self.written_bytes += written_bytes

    def sync(self) -> None:
        """Flush and close what this rank wrote.

        Raises:
            PublishError: the storage reports an error late.
        """
        for writer in self.writers:
            writer.sync()
            writer.close()


def run(plan: MergePlan, staging: Sequence[Path], comm: Comm, progress: Progress) -> Tally:
    """Fill the staged files of every output with this rank's part of the work.

    Args:
        plan: the agreed plan.
        staging: one folder per output, its files already at their full length.
        comm: the ranks.
        progress: told of every finished unit.

    Raises:
        CheckpointError: a source vanished, is damaged, or has NaN or Inf.
        PlanError: main parameters are not what the weights say (the map's proof failed).
        PublishError: the output cannot be written.
        RankError: another rank failed.
    """
    mine = share(plan.units, comm.shard_rank, comm.shard_size)
    readers = _readers(plan, comm)
    writers = [BlockWriter(folder) for folder in staging]
    tally = Tally(writers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads here are the parallelism; torch's would get in the way
    try:
        with comm.watched("merge") as check:
            sums = tuple(_Sum.of(output.values) for output in plan.outputs)
            job = _Job(plan, comm, readers, writers, tally, progress, check, sums)
            if comm.merge_size > 1:
                job.run_shared(mine)
            else:
                job.run_alone(mine)
        return tally
    except BaseException:
        for writer in writers:
            writer.close()
        raise
    finally:
        torch.set_num_threads(threads)
        for reader in readers.values():
            reader.close()


def cost_bytes(plan: MergePlan, comm: Comm) -> int:
    """Total of what `progress` will be told on this rank."""
    return sum(unit.cost_bytes for unit in share(plan.units, comm.shard_rank, comm.shard_size))


def assign(plan: MergePlan, comm: Comm) -> tuple[int, ...]:
    """Per source, the place in the merge group that reads it: one that sees it, evenly spread.

    Raises:
        PlanError: a source is visible to no rank of some merge group.
    """
    first = comm.shard_rank * comm.merge_size
    load = [0] * comm.merge_size
    chosen = []
    for number, ranks in enumerate(plan.visible):
        able = [m for m in range(comm.merge_size) if first + m in ranks]
        if not able:
            raise PlanError(
                f"{plan.sources[number].path} can be read by ranks {list(ranks)}, but by none of "
                f"merge group {comm.shard_rank} (ranks {first} to {first + comm.merge_size - 1}). "
                "Make --merge-parallel-size the number of ranks that together see every source"
            )
        place = min(able, key=lambda m: (load[m], (m - number) % comm.merge_size))
        load[place] += 1
        chosen.append(place)
    return tuple(chosen)


def _readers(plan: MergePlan, comm: Comm) -> dict[int, BlockReader]:
    readers = {}
    for number, source in enumerate(plan.sources):
        if comm.rank in plan.visible[number]:
            known = registry.get(plan.selection.refs[number].format, source.path)
            readers[number] = BlockReader(source.path, known.files(Path(source.path)))
    return readers


class _Workspace:
    """One thread's buffers, made once."""

    def __init__(self, outputs: int) -> None:
        self.sums = [Rooms() for _ in range(outputs)]
        self.averages = [Rooms() for _ in range(outputs)]
        self.raw, self.proof, self.rounded = Rooms(), Rooms(), Rooms()


@dataclass(frozen=True, slots=True)
class _Sum:
    """How one output is summed: sum of weight times source, in `dtype`, divided once."""

    weights: tuple[float, ...]
    divisor: float
    dtype: torch.dtype

    @staticmethod
    def of(values: Sequence[float]) -> _Sum:
        """The sum that gives these coefficients."""
        exact = exact_weights(values)
        if exact is None:
            return _Sum(tuple(values), 1.0, torch.float64)
        return _Sum(tuple(map(float, exact[0])), float(exact[1]), torch.float32)


@dataclass(frozen=True, slots=True)
class _Input:
    """One source in a unit, and its weight per output."""

    number: int
    reader: UnitReader
    dtype: torch.dtype
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """A unit of averaging, with everything located that its blocks need."""

    unit: Unit
    task: Average
    box: Box
    sums: tuple[_Sum, ...]
    inputs: tuple[_Input, ...]
    proof: tuple[UnitReader, torch.dtype] | None
    outputs: tuple[UnitWriter, ...]


def _blocks(box: Box) -> Iterator[tuple[int, Box]]:
    """Blocks of a unit's box, each with the number of its first element in the unit."""
    first = 0
    for block in slices(box, BLOCK_ELEMENTS):
        yield first, block
        first += block.numel


@dataclass(slots=True)
class _Job:
    plan: MergePlan
    comm: Comm
    readers: dict[int, BlockReader]
    writers: list[BlockWriter]
    tally: Tally
    progress: Progress
    check: Callable[[], None]
    sums: tuple[_Sum, ...]
    failed: Exception | None = None
    located: _Work | None = None
    located_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def last(self) -> int:
        """Number of the newest source."""
        return len(self.plan.sources) - 1

    # One rank, all sources.

    def run_alone(self, mine: list[Unit]) -> None:
        """Threads take units from one list until it is empty or something fails."""
        queue, lock, stop = iter(mine), threading.Lock(), threading.Event()

        def work() -> None:
            space = _Workspace(len(self.writers))
            while not stop.is_set():
                with lock:
                    unit = next(queue, None)
                if unit is None:
                    return
                try:
                    self._do(unit, space)
                except BaseException:
                    stop.set()
                    raise

        with ThreadPoolExecutor(self.plan.request.threads) as pool:
            futures = [pool.submit(work) for _ in range(self.plan.request.threads)]
        _raise_first(futures)

    def _do(self, unit: Unit, space: _Workspace) -> None:
        self.check()
        if isinstance(unit.task, Average):
            work = self._locate(unit, unit.task, unit.task.numbers)
            for each in work.inputs:
                each.reader.advise()
            for first, block in _blocks(work.box):
                self.check()
                self._weighted(work, block, first, space)
                averages = self._averages(work, block, space)
                self._write(work, block, first, averages, space)
        else:
            self._do_bytes(unit)
        self.progress(unit.cost_bytes)

    def _locate(self, unit: Unit, task: Average, numbers: Sequence[int]) -> _Work:
        """Find the bytes of a unit in those sources, and in every output."""
        box = unit.box
        assert box is not None
        inputs, proof = [], None
        sums = self._sums(task)
        for number, index, dtype in zip(task.numbers, task.sources, task.dtypes, strict=True):
            if number in numbers:
                reader = UnitReader(self.readers[number], box, index)
                weights = tuple(each.weights[number] for each in sums)
                inputs.append(_Input(number, reader, dtype, weights))
        if task.proof is not None and self.last in numbers:
            dtype = task.proof.touching(box)[0].payload.dtype
            proof = (UnitReader(self.readers[self.last], box, task.proof), dtype)
        outputs = tuple(UnitWriter(writer, box, task.targets) for writer in self.writers)
        return _Work(unit, task, box, sums, tuple(inputs), proof, outputs)

    def _sums(self, task: Average) -> tuple[_Sum, ...]:
        if task.kept:
            return (_Sum((1.0,) * len(self.plan.sources), 1.0, torch.float32),) * len(self.writers)
        return self.sums

    def _weighted(self, work: _Work, block: Box, first: int, space: _Workspace) -> None:
        """Sum weight times source over the inputs into `space.sums`, oldest first."""
        numel, read_bytes = block.numel, 0
        sums = [r.room(s.dtype, numel) for r, s in zip(space.sums, work.sums, strict=True)]
        begun = [False] * len(sums)
        for each in work.inputs:
            room = space.raw.room(each.dtype, numel)
            each.reader.read(block, first, room)
            read_bytes += len(room.data)
            if each.number == self.last and work.proof is not None:
                read_bytes += self._prove(work, block, first, room, space)
            for k, weight in enumerate(each.weights):
                if weight == 0.0:
                    continue
                total = sums[k].tensor
                if begun[k]:
                    total.add_(room.tensor, alpha=weight)
                elif weight == 1.0:
                    total.copy_(room.tensor)
                else:
                    total.copy_(room.tensor).mul_(weight)
                begun[k] = True
        for done, room in zip(begun, sums, strict=True):
            if not done:
                room.tensor.zero_()
        self.tally.add(read_bytes, 0)

    def _averages(self, work: _Work, block: Box, space: _Workspace) -> list[Room]:
        """The finished sums as float32 averages, rounded once, all finite."""
        averages = []
        for how, sums, rooms in zip(work.sums, space.sums, space.averages, strict=True):
            room = sums.room(how.dtype, block.numel)
            if how.divisor != 1.0:
                room.tensor.div_(how.divisor)
            if how.dtype != torch.float32:
                rounded = rooms.room(torch.float32, block.numel)
                rounded.tensor.copy_(room.tensor)
                room = rounded
            averages.append(room)
        self._refuse_nonfinite(work, block, averages)
        return averages

    def _prove(self, work: _Work, block: Box, first: int, main: Room, space: _Workspace) -> int:
        """The newest source's rounded main parameters must be its weights, bit for bit."""
        assert work.proof is not None
        reader, dtype = work.proof
        stored = space.proof.room(dtype, main.numel)
        reader.read(block, first, stored)
        if not same_bits(Rounded(main, space.rounded).of(dtype), stored):
            self._refuse_nan(work.task, block, self.last, main.tensor)
            raise PlanError(
                f"{self.plan.sources[-1].path}: main params of {work.task.key}, rounded, differ "
                f"from the stored weights at {block.offsets}: the optimizer buffer's layout cannot "
                "be proved. Use --average weights, or re-save with "
                "--dist-ckpt-optim-fully-reshardable"
            )
        return len(stored.data)

    def _refuse_nonfinite(self, work: _Work, block: Box, sums: Sequence[Room]) -> None:
        # A sum is finite only if all its terms are: one cheap pass, and a close look if it is not.
        if all(math.isfinite(room.tensor.sum().item()) for room in sums):
            return
        task = work.task
        for each in work.inputs:
            data = torch.empty(block.numel, dtype=each.dtype)
            index = task.sources[task.numbers.index(each.number)]
            self.readers[each.number].read(block, index, data)
            self._refuse_nan(task, block, each.number, data)
        if all(bool(torch.isfinite(room.tensor).all()) for room in sums):
            return
        if len(work.inputs) < len(task.numbers):
            raise RankError(f"{task.key} is not finite in a source that another rank reads")
        raise CheckpointError(
            f"{task.key} at {block.offsets} overflows float32 with these coefficients, though "
            "every source is finite: use coefficients that sum to 1"
        )

    def _refuse_nan(self, task: Average, block: Box, number: int, data: torch.Tensor) -> None:
        count = int((~torch.isfinite(data)).sum())
        if count:
            raise CheckpointError(
                f"{self.plan.sources[number].path}: {task.key} has {count} NaN or Inf values in "
                f"the block at {block.offsets}. Averaging would spread them: leave this "
                "checkpoint out with --exclude"
            )

    def _write(self, work: _Work, block: Box, first: int, sums: Sequence[Room],
               space: _Workspace) -> None:  # fmt: skip
        written = 0
        for writer, room in zip(work.outputs, sums, strict=True):
            written += writer.write(block, first, Rounded(room, space.rounded))
        self.tally.add(0, written)

    def _do_bytes(self, unit: Unit) -> None:
        task, at, end = unit.task, unit.first, unit.first + unit.count
        if isinstance(task, Copy):
            for writer in self.writers:
                copy_bytes(self.readers[self.last], task.source_file, task.source_offset + at,
                           writer, task.file, task.offset + at, unit.count)  # fmt: skip
            self.tally.add(unit.count, unit.count * len(self.writers))
            return
        scale = task.place.dtype.itemsize if isinstance(task, Zero) else 1
        while at < end:
            count = min(len(_ZEROS) // scale, end - at)
            for writer in self.writers:
                if isinstance(task, Zero):
                    writer.put(task.place, task.start + at, memoryview(_ZEROS)[: count * scale])
                elif isinstance(task, Write):
                    data = memoryview(task.data)[at : at + count]
                    writer.pwrite(task.file, task.offset + at, data)
            self.tally.add(0, count * scale * len(self.writers))
            at += count

    # A merge group: every rank its own sources, one sum.

    def run_shared(self, mine: list[Unit]) -> None:
        """All ranks of the group go through the same blocks in the same order."""
        own = assign(self.plan, self.comm)
        me = self.comm.merge_rank
        numbers = [number for number, place in enumerate(own) if place == me]
        spaces = [_Workspace(len(self.writers)) for _ in range(self.plan.request.threads + 1)]
        averages = [unit for unit in mine if isinstance(unit.task, Average)]
        turns = enumerate((u, *at) for u in averages if u.box for at in _blocks(u.box))
        pending: deque[tuple[int, Unit, int, Box, Future[_Work]]] = deque()
        with ThreadPoolExecutor(self.plan.request.threads) as pool:

            def begin() -> None:
                for turn, (unit, first, block) in itertools.islice(turns, 1):
                    space = spaces[turn % len(spaces)]
                    future = pool.submit(self._partial, unit, numbers, first, block, space)
                    pending.append((turn, unit, first, block, future))

            for _ in spaces:
                begin()
            while pending:
                turn, unit, first, block, future = pending.popleft()
                space = spaces[turn % len(spaces)]
                work = self._reduce(unit, future, space, block.numel)
                finished = self._averages(work, block, space)
                with self._reported_later():
                    if turn % self.comm.merge_size == me:
                        self._write(work, block, first, finished, space)
                    self.progress(unit.cost_bytes * block.numel // max(work.box.numel, 1))
                begin()
        if self.failed is not None:
            raise self.failed
        if own[self.last] == me:
            for unit in mine:
                if not isinstance(unit.task, Average):
                    self._do(unit, spaces[0])

    @contextlib.contextmanager
    def _reported_later(self) -> Iterator[None]:
        """Keep an error until the next block: raising alone would leave the group waiting."""
        try:
            yield
        except Exception as error:
            self.failed = self.failed or error

    def _partial(self, unit: Unit, numbers: Sequence[int], first: int, block: Box,
                 space: _Workspace) -> _Work:  # fmt: skip
        assert isinstance(unit.task, Average)
        with self.located_lock:
            if self.located is None or self.located.unit is not unit:
                self.located = self._locate(unit, unit.task, numbers)
            work = self.located
        self._weighted(work, block, first, space)
        return work

    def _reduce(self, unit: Unit, part: Future[_Work], space: _Workspace, numel: int) -> _Work:
        """Sum a block over the group; one rank's error reaches the others with the same block."""
        error, work = self.failed, None
        try:
            work = part.result()
            self.check()
        except Exception as caught:  # raised below, once the others know
            error = error or caught
        assert isinstance(unit.task, Average)
        for k, (how, rooms) in enumerate(zip(self._sums(unit.task), space.sums, strict=True)):
            block = rooms.whole(how.dtype)[: numel + 1]
            block[numel] = 0.0 if error is None else 1.0
            if error is not None:
                block[:numel] = 0.0
            self.comm.reduce_merge_group(block)
            if k == 0 and float(block[numel]) > 0:
                raise error or RankError("another rank of the merge group failed")
        assert work is not None
        return work


def _raise_first(futures: Sequence[Future[None]]) -> None:
    errors = [e for e in (future.exception() for future in futures) if e is not None]
    for error in itertools.chain((e for e in errors if not isinstance(e, RankError)), errors):
        raise error
