"""The physical floor of a merge: its reads and its writes, and nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pma_megatron.base.boxes import overlaps
from pma_megatron.base.comm import Comm
from pma_megatron.formats import registry
from pma_megatron.merging.cut import share
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.tasks import AverageUnit, Copy, Keep, Unit, Write, Zero

Range = tuple[str, int, int]
"""(file, offset, bytes)."""


@dataclass(frozen=True)
class Bytes:
    """What a merge reads and writes, in bytes."""

    read: int
    written: int


class Floor:
    """The reads and writes of one rank's part of a plan, as byte ranges per unit."""

    def __init__(self, plan: MergePlan, folder: Path, comm: Comm) -> None:
        self._plan, self._folder = plan, folder
        self._files = [
            registry.get(ref.format, source.path).files(Path(source.path))
            for source, ref in zip(plan.sources, plan.selection.refs, strict=True)
        ]
        self._open: dict[str, int] = {}
        self.wall_s = self.cpu_s = 0.0
        mine = share(plan.units, comm.shard_rank, comm.shard_size)
        self._work = [(list(self._reads(u)), list(self._writes(u))) for u in mine]

    def _reads(self, unit: Unit) -> Iterator[Range]:
        task, base = unit.task, self._plan.sources[-1].path
        if isinstance(task, Copy):
            yield f"{base}/{task.item.file}", task.source_offset + unit.first, unit.count
        if isinstance(task, Keep):
            path, start = self._files[-1].locate(task.payload)
            size = task.payload.dtype.itemsize
            yield str(path), start + (task.start + unit.first) * size, unit.count * size
        if not isinstance(unit, AverageUnit):
            return
        wanted = list(zip(task.numbers, task.sources, strict=True))
        if task.proof is not None:
            wanted.append((len(self._plan.sources) - 1, task.proof))
        for number, index in wanted:
            for part in overlaps(unit.box, index.touching(unit.box)):
                path, start = self._files[number].locate(part.payload)
                size = part.payload.dtype.itemsize
                yield str(path), start + part.start * size, part.numel * size

    def _writes(self, unit: Unit) -> Iterator[Range]:
        task = unit.task
        if isinstance(task, (Copy, Write)):
            yield str(self._folder / task.file), task.offset + unit.first, unit.count
        elif isinstance(task, (Keep, Zero)):
            size, place = task.place.dtype.itemsize, task.place
            start = place.start + (task.start + unit.first) * size
            yield str(self._folder / place.file), start, unit.count * size
        elif isinstance(unit, AverageUnit):
            for part in overlaps(unit.box, task.targets.touching(unit.box)):
                place, size = part.payload, part.payload.dtype.itemsize
                start = place.start + part.start * size
                yield str(self._folder / place.file), start, part.numel * size

    def open(self) -> None:
        """Open every file, outputs for writing."""
        for reads, writes in self._work:
            for ranges, flags in ((reads, os.O_RDONLY), (writes, os.O_RDWR)):
                for file, _, _ in ranges:
                    if file not in self._open:
                        self._open[file] = os.open(file, flags)

    def run(self, threads: int, block_bytes: int) -> Bytes:
        """Do it with `threads` threads that take units from one list."""
        queue, lock, done = iter(self._work), threading.Lock(), [0, 0]

        def work(buffer: memoryview) -> None:
            total = [0, 0]
            while (unit := _next(queue, lock)) is not None:
                for kind, move in ((0, _pread), (1, _pwrite)):
                    for file, offset, nbytes in unit[kind]:
                        total[kind] += self._move(file, offset, nbytes, buffer, move)
            with lock:
                done[0] += total[0]
                done[1] += total[1]

        buffers = [memoryview(bytearray(b"1") * block_bytes) for _ in range(threads)]
        workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.wall_s, self.cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return Bytes(*done)

    def _move(
        self,
        file: str,
        offset: int,
        nbytes: int,
        buffer: memoryview,
        move: Callable[[int, memoryview, int], int],
    ) -> int:
        descriptor, at = self._open[file], 0
        while at < nbytes:
            at += move(descriptor, buffer[: min(len(buffer), nbytes - at)], offset + at)
        return nbytes


def _next(queue: Iterator[Any], lock: threading.Lock) -> Any:
    with lock:
        return next(queue, None)


def _pread(descriptor: int, buffer: memoryview, offset: int) -> int:
    got = os.preadv(descriptor, [buffer], offset)
    if got == 0:
        raise EOFError("a source ended early")
    return got


def _pwrite(descriptor: int, buffer: memoryview, offset: int) -> int:
    return os.pwrite(descriptor, buffer, offset)


def floor_on_rank(rank: int, ranks: int, request: MergeRequest, block_bytes: int) -> Any:
    """(wall seconds, CPU seconds, bytes) of one rank's part of the floor."""
    comm, folder = Comm(), Path(request.save or request.export or "")
    plan = make_plan(request, comm)
    if comm.is_main:
        # No file of a checkpoint has the name of one of an export: one folder holds both.
        files = {name: n for each in plan.layouts.values() for name, n in each.files.items()}
        for name, nbytes in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.truncate(nbytes)
    dist.barrier()
    floor = Floor(plan, folder, comm)
    floor.open()
    dist.barrier()
    moved = floor.run(request.threads, block_bytes)
    return floor.wall_s, floor.cpu_s, moved
