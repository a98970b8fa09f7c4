"""What a merge into live tensors will read, hold and take, said before the first byte is read."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pma_megatron.base.comm import Comm, Team
from pma_megatron.base.memory import available_bytes
from pma_megatron.base.sizes import sized
from pma_megatron.live.plan import LivePlan
from pma_megatron.merging import engine
from pma_megatron.merging.rate import read_rate
from pma_megatron.merging.tasks import Average, AverageUnit


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one rank, in bytes.

    Attributes:
        read: payload that it reads of the sources, without what is read of records only to compare
            their checksums.
        buffers: host memory of all its threads, beside the plan and the live tensors.
    """

    read: int
    buffers: int


def cost(plan: LivePlan, jobs: Sequence[tuple[list[AverageUnit], Team]]) -> Cost:
    """What this rank's part of a plan takes.

    Args:
        plan: the sources.
        jobs: units of this rank, each with the ranks that do them together.
    """
    read = buffers = 0
    for units, team in jobs:
        numbers = set(range(len(plan.sources)))
        if team.size > 1 and team.by_source:
            owners = engine.assign(plan, team)
            numbers = {number for number, place in enumerate(owners) if place == team.place}
        read += sum(
            numel * _element_bytes(plan, unit.task, numbers) for unit, numel in _parts(units, team)
        )
        threads = plan.threads + (team.size > 1)  # one block more is on its way to the team
        buffers = max(buffers, threads * _buffer_bytes(units, numbers))
    return Cost(read=read, buffers=buffers)


def said(plan: LivePlan, own: Cost, comm: Comm) -> str:
    """One line for the log, the same on every rank. Collective."""
    node, reader = socket.gethostname(), plan.visible[-1][0]
    every = comm.gather((node, own))
    rate = comm.on(reader, "rate", lambda: read_rate(plan))
    memory = comm.on_main("memory", lambda: (node, available_bytes()))
    here = [theirs.buffers for name, theirs in every if name == memory[0]]
    there = f" of {sized(memory[1])} available" if memory[1] else ""
    most = max(theirs.read for _, theirs in every)
    taken = "how long that takes is not known: the newest source could not be read for a try"
    if rate:
        taken = (
            f"about {most / rate:.0f} s if each rank reads {sized(rate)}/s, as rank {reader} just "
            "did alone from the newest source; storage that all ranks share may give each less"
        )
    return (
        f"PMA-init begins: {len(plan.sources)} checkpoints; a rank reads up to {sized(most)}, all "
        f"{len(every)} together {sized(sum(theirs.read for _, theirs in every))}; buffers take up "
        f"to {sized(max(theirs.buffers for _, theirs in every))} of host memory per rank, "
        f"{len(here)} rank(s) on {memory[0]} together {sized(sum(here))}{there}; {taken}"
    )


def _parts(units: Sequence[AverageUnit], team: Team) -> Iterator[tuple[AverageUnit, int]]:
    """Elements of units that this rank reads, of all or of some sources."""
    if team.size == 1 or team.by_source:
        yield from ((unit, unit.box.numel) for unit in units)
        return
    blocks = (
        (unit, block.numel)
        for unit in units
        for _, block in engine.blocks(unit.box, engine.block_elements(unit.task))
    )
    yield from itertools.islice(blocks, team.place, None, team.size)  # members take turns


def _element_bytes(plan: LivePlan, task: Average, numbers: set[int]) -> int:
    """Read of those sources for an element; the newest's stored weights prove its main params."""
    stored = zip(task.numbers, task.dtypes, strict=True)
    proof = task.proof_itemsize if len(plan.sources) - 1 in numbers else 0
    return proof + sum(dtype.itemsize for number, dtype in stored if number in numbers)


def _buffer_bytes(units: Sequence[AverageUnit], numbers: set[int]) -> int:
    """Buffers of one thread: a block of every source, of sum and average, and of what proves."""
    most: dict[tuple[str, int, int], int] = {}
    for unit in units:
        task = unit.task
        numel = min(unit.box.numel, engine.block_elements(task))
        stored = zip(task.numbers, task.dtypes, strict=True)
        read = [dtype.itemsize for number, dtype in stored if number in numbers]
        wide = max((4, *(dtype.itemsize for dtype in task.dtypes)))
        sizes = [*(("source", place, size) for place, size in enumerate(read))]
        sizes += [("sum", 0, wide), ("average", 0, wide)]
        sizes += [(name, 0, task.proof_itemsize) for name in ("stored", "rounded")]
        for key in sizes:
            most[key] = max(most.get(key, 0), numel * key[2])
    return sum(most.values())
