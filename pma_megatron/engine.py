"""The one loop that multiplies a weight by a coefficient.

Per block: read the same box of every source into a reused buffer, add it times its coefficient to a
float32 accumulator per output, round once per stored dtype, write. Threads of a rank take units from
one list; ranks have a part of the list each, or share the sources of a part (merge parallel).
What a block becomes depends on the plan alone, so results do not depend on ranks or threads.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pma_megatron.blocks import BLOCK_ELEMENTS, BlockReader, BlockWriter, Rounded
from pma_megatron.comm import Comm
from pma_megatron.errors import CheckpointError, PlanError, RankError
from pma_megatron.faultpoints import point
from pma_megatron.formats import registry
from pma_megatron.geometry import Box, slices
from pma_megatron.planning import MergePlan
from pma_megatron.tasks import Average, Copy, Unit, Write, Zero, share

Progress = Callable[[int], None]
"""Called with the cost in bytes of each finished unit."""

_COPY_BYTES = 4 << 20
_ZEROS = bytes(_COPY_BYTES)


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
    torch.set_num_threads(
        1
    )  # the threads here are the parallelism; torch's own would get in the way
    try:
        with comm.watched("merge") as check:
            point("merge", comm.rank)
            job = _Job(plan, comm, readers, writers, tally, progress, check)
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
        # One element more than a block: the merge group's error flag travels with the data.
        self.sums = [torch.empty(BLOCK_ELEMENTS + 1) for _ in range(outputs)]
        self.raw: dict[torch.dtype, torch.Tensor] = {}
        self.rounded: dict[torch.dtype, torch.Tensor] = {}

    def room(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """A buffer for `numel` elements as they are stored."""
        if dtype not in self.raw:
            self.raw[dtype] = torch.empty(BLOCK_ELEMENTS, dtype=dtype)
        return self.raw[dtype][:numel]


@dataclass(slots=True)
class _Job:
    plan: MergePlan
    comm: Comm
    readers: dict[int, BlockReader]
    writers: list[BlockWriter]
    tally: Tally
    progress: Progress
    check: Callable[[], None]
    failed: Exception | None = None

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
            assert unit.box is not None
            for number, index in zip(unit.task.numbers, unit.task.sources, strict=True):
                self.readers[number].advise(unit.box, index)
            for box in slices(unit.box, BLOCK_ELEMENTS):
                self.check()
                sums = self._weighted(unit.task, box, unit.task.numbers, space)
                self._refuse_nonfinite(unit.task, box, unit.task.numbers, sums)
                self._write(unit.task, box, sums, space)
        else:
            self._do_bytes(unit)
        self.progress(unit.cost_bytes)

    def _weighted(self, task: Average, box: Box, numbers: Sequence[int],
                  space: _Workspace) -> list[torch.Tensor]:  # fmt: skip
        """Sum of coefficient times source over `numbers`, per output, float32, oldest first."""
        numel = box.numel
        sums = [total[:numel] for total in space.sums]
        begun = [False] * len(sums)
        for number in numbers:
            slot = task.numbers.index(number)
            data = space.room(task.dtypes[slot], numel)
            self.readers[number].read(box, task.sources[slot], data)
            self.tally.add(data.nbytes, 0)
            if number == self.last and task.proof is not None:
                self._prove(task, box, data, space)
            for k, total in enumerate(sums):
                weight = self._coefficient(task, k, number)
                if weight == 0.0:
                    continue
                if begun[k]:
                    total.add_(data, alpha=weight)
                elif weight == 1.0:
                    total.copy_(data)
                else:
                    total.copy_(data).mul_(weight)
                begun[k] = True
        for done, total in zip(begun, sums, strict=True):
            if not done:
                total.zero_()
        return sums

    def _coefficient(self, task: Average, output: int, number: int) -> float:
        return 1.0 if task.kept else self.plan.outputs[output].values[number]

    def _prove(self, task: Average, box: Box, main: torch.Tensor, space: _Workspace) -> None:
        """The newest source's rounded main parameters must be its weights, bit for bit."""
        assert task.proof is not None
        piece = task.proof.touching(box)[0]
        stored = torch.empty(box.numel, dtype=piece.payload.dtype)
        self.readers[self.last].read(box, task.proof, stored)
        self.tally.add(stored.nbytes, 0)
        differ = main.to(stored.dtype).view(torch.uint8) != stored.view(torch.uint8)
        if bool(differ.any()):
            raise PlanError(
                f"{self.plan.sources[-1].path}: main params of {task.key}, rounded, differ from the "
                f"stored weights at {box.offsets}: the optimizer buffer's layout cannot be proved. "
                "Use --average weights, or re-save with --dist-ckpt-optim-fully-reshardable"
            )

    def _refuse_nonfinite(self, task: Average, box: Box, numbers: Sequence[int],
                          sums: Sequence[torch.Tensor]) -> None:  # fmt: skip
        # A sum is finite only if all its terms are: one cheap pass, and a close look if it is not.
        if all(math.isfinite(total.sum().item()) for total in sums):
            return
        for number in numbers:
            slot = task.numbers.index(number)
            data = torch.empty(box.numel, dtype=task.dtypes[slot])
            self.readers[number].read(box, task.sources[slot], data)
            count = int((~torch.isfinite(data)).sum())
            if count:
                raise CheckpointError(
                    f"{self.plan.sources[number].path}: {task.key} has {count} NaN or Inf values "
                    f"in the block at {box.offsets}. Averaging would spread them: leave this "
                    "checkpoint out with --exclude"
                )
        if all(bool(torch.isfinite(total).all()) for total in sums):
            return
        if len(numbers) < len(task.numbers):
            raise RankError(f"{task.key} is not finite in a source that another rank reads")
        raise CheckpointError(
            f"{task.key} at {box.offsets} overflows float32 with these coefficients, though every "
            "source is finite: use coefficients that sum to 1"
        )

    def _write(self, task: Average, box: Box, sums: Sequence[torch.Tensor],
               space: _Workspace) -> None:  # fmt: skip
        for writer, total in zip(self.writers, sums, strict=True):
            written = writer.write(box, task.targets, Rounded(total, space.rounded))
            self.tally.add(0, written)

    def _do_bytes(self, unit: Unit) -> None:
        task, at, end = unit.task, unit.first, unit.first + unit.count
        buffer = bytearray(_COPY_BYTES) if isinstance(task, Copy) else None
        scale = task.place.dtype.itemsize if isinstance(task, Zero) else 1
        while at < end:
            count = min(_COPY_BYTES // scale, end - at)
            for writer in self.writers:
                if isinstance(task, Copy):
                    assert buffer is not None
                    data = memoryview(buffer)[:count]
                    if writer is self.writers[0]:
                        reader = self.readers[self.last]
                        reader.pread(task.source_file, task.source_offset + at, data)
                        self.tally.add(count, 0)
                    writer.pwrite(task.file, task.offset + at, data)
                elif isinstance(task, Zero):
                    data = memoryview(_ZEROS)[: count * scale]
                    start = (task.start + at) * scale
                    writer.pwrite(task.place.file, task.place.start + start, data)
                    writer.checksums.add(task.place, start, data)
                elif isinstance(task, Write):
                    writer.pwrite(
                        task.file, task.offset + at, memoryview(task.data)[at : at + count]
                    )
                self.tally.add(0, count * scale)
            at += count

    # A merge group: every rank its own sources, one sum.

    def run_shared(self, mine: list[Unit]) -> None:
        """All ranks of the group go through the same blocks in the same order."""
        own = assign(self.plan, self.comm)
        me = self.comm.merge_rank
        blocks = [
            (unit, box)
            for unit in mine
            if isinstance(unit.task, Average) and unit.box is not None
            for box in slices(unit.box, BLOCK_ELEMENTS)
        ]
        ahead = self.plan.request.threads + 1
        spaces = [_Workspace(len(self.writers)) for _ in range(ahead)]
        with ThreadPoolExecutor(self.plan.request.threads) as pool:

            def begin(turn: int) -> Future[list[torch.Tensor]]:
                unit, box = blocks[turn]
                task = unit.task
                assert isinstance(task, Average)
                numbers = [n for n in task.numbers if own[n] == me]
                return pool.submit(self._weighted, task, box, numbers, spaces[turn % ahead])

            pending = [begin(turn) for turn in range(min(ahead, len(blocks)))]
            for turn, (unit, box) in enumerate(blocks):
                assert isinstance(unit.task, Average)
                space = spaces[turn % ahead]
                self._reduce(pending[turn], space, box.numel)
                sums = [total[: box.numel] for total in space.sums]
                numbers = [n for n in unit.task.numbers if own[n] == me]
                self._refuse_nonfinite(unit.task, box, numbers, sums)
                if turn % self.comm.merge_size == me and self.failed is None:
                    try:
                        self._write(unit.task, box, sums, space)
                    except Exception as error:  # the group learns of it with the next block
                        self.failed = error
                if turn + ahead < len(blocks):
                    pending.append(begin(turn + ahead))
                self.progress(unit.cost_bytes * box.numel // max(unit.box.numel, 1))  # type: ignore[union-attr]
        if self.failed is not None:
            raise self.failed
        if own[self.last] == me:
            for unit in mine:
                if not isinstance(unit.task, Average):
                    self._do(unit, spaces[0])

    def _reduce(self, part: Future[list[torch.Tensor]], space: _Workspace, numel: int) -> None:
        """Sum a block over the group; an error on one rank reaches the others with the same block."""
        error = self.failed
        try:
            part.result()
            self.check()
        except Exception as caught:  # raised below, once the others know
            error = caught
        for k, total in enumerate(space.sums):
            block = total[: numel + 1]
            block[numel] = 0.0 if error is None else 1.0
            if error is not None:
                block[:numel] = 0.0
            self.comm.reduce_merge_group(block)
            if k == 0 and float(block[numel]) > 0:
                raise error or RankError("another rank of the merge group failed")


def _raise_first(futures: Sequence[Future[None]]) -> None:
    errors = [e for e in (future.exception() for future in futures) if e is not None]
    for error in itertools.chain((e for e in errors if not isinstance(e, RankError)), errors):
        raise error
