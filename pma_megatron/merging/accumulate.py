"""One block of one tensor: read the same box of every source, average, hand on what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pma_megatron.base.boxes import Box
from pma_megatron.base.spelling import given, left_out, named, override
from pma_megatron.errors import CheckpointError, PlanError, RankError
from pma_megatron.formats import registry
from pma_megatron.merging.sums import Sum, average, prepared
from pma_megatron.merging.tasks import Average, AverageUnit, Workload
from pma_megatron.transfer.blocks import BlockReader
from pma_megatron.transfer.buffers import BlockBuffer, BlockBuffers, Room, same_bits
from pma_megatron.transfer.units import UnitReader, UnitWriter

Rounded = Mapping[torch.dtype, BlockBuffer]
"""One block in every dtype that is wanted."""
_ITSELF = Sum((1.0,), 1.0, torch.float32)


class Workspace:
    """One thread's buffers, made once.

    Attributes:
        sums: per output, what is summed and not yet divided.
        averages: per output, what is written.
        proof, proved: the stored weights, and the main params rounded to their dtype.
        scratch: for `sums.average`.
        desk: what the thread is at.
        room: for `streaming`.
    """

    def __init__(self, outputs: int) -> None:
        self.sums = [BlockBuffers() for _ in range(outputs)]
        self.averages = [BlockBuffers() for _ in range(outputs)]
        self.proof, self.proved, self.scratch = BlockBuffers(), BlockBuffers(), BlockBuffers()
        self.desk: Desk | None = None
        self.room = Room()
        self._raw: list[BlockBuffers] = []

    def raw(self, place: int = 0) -> BlockBuffers:
        """Of the source that is read at this place, counted from 0."""
        while len(self._raw) <= place:
            self._raw.append(BlockBuffers())
        return self._raw[place]

    def sources(self, work: Work, numel: int) -> list[BlockBuffer]:
        """A buffer for every input."""
        return [self.raw(i).buffer(each.dtype, numel) for i, each in enumerate(work.inputs)]

    def rounded(self, place: int, dtypes: Sequence[torch.dtype], numel: int) -> Rounded:
        """Buffers of an output in those dtypes; one of float32 if nobody wants any."""
        own = self.averages[place]
        return {dtype: own.buffer(dtype, numel) for dtype in dtypes or (torch.float32,)}


@dataclass(frozen=True, slots=True)
class Input:
    """One source in a unit."""

    number: int
    reader: UnitReader
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Work:
    """A unit of averaging, with everything located that its blocks need.

    Attributes:
        sums: how each output is summed, with a weight per input.
    """

    unit: AverageUnit
    sums: tuple[Sum, ...]
    inputs: tuple[Input, ...]
    proof: tuple[UnitReader, torch.dtype] | None
    outputs: tuple[UnitWriter, ...]

    @property
    def task(self) -> Average:
        """What the unit is a part of."""
        return self.unit.task

    @property
    def box(self) -> Box:
        """Of the tensor."""
        return self.unit.box


@dataclass(frozen=True, slots=True)
class Desk:
    """What the blocks of one size of a unit have in common, laid out once.

    Attributes:
        sources: a buffer per input.
        averages: what `average` makes of them, per output.
        average: sums, divides and rounds; returns whether all is finite.
    """

    work: Work
    numel: int
    sources: Sequence[BlockBuffer]
    averages: Sequence[Rounded]
    average: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Accumulator:
    """Averages blocks of units; threads may share it, each with a workspace of its own.

    Attributes:
        plan: sources and coefficients.
        readers: the sources that this rank reads, by number.
        writers: one `blocks.Writer` per output.
        sums: how each output is summed.
    """

    plan: Workload
    readers: dict[int, BlockReader]
    writers: Sequence[Any]
    sums: tuple[Sum, ...]

    @property
    def last(self) -> int:
        """Number of the newest source."""
        return len(self.plan.sources) - 1

    def locate(self, unit: AverageUnit, numbers: Sequence[int]) -> Work:
        """Find the bytes of a unit in those sources, and in every output."""
        task, box = unit.task, unit.box
        inputs: list[Input] = []
        proof = None
        for number, index, dtype in zip(task.numbers, task.sources, task.dtypes, strict=True):
            if number in numbers:
                reader = UnitReader(self.readers[number], box, index)
                inputs.append(Input(number, reader, dtype))
        if task.proof is not None and self.last in numbers:
            dtype = task.proof.touching(box)[0].payload.dtype
            proof = (UnitReader(self.readers[self.last], box, task.proof), dtype)
        outputs = tuple(UnitWriter(writer, box, task.targets) for writer in self.writers)
        sums = tuple(
            replace(how, weights=tuple(how.weights[each.number] for each in inputs))
            for how in self.sums_of(task)
        )
        return Work(unit, sums, tuple(inputs), proof, outputs)

    def sums_of(self, task: Average) -> tuple[Sum, ...]:
        """How each output sums this task: what is stored in float64 in float64."""
        sums = self.sums
        if task.kept:
            sums = (Sum((1.0,) * len(self.plan.sources), 1.0, torch.float32),) * len(self.writers)
        if torch.float64 in task.dtypes:
            return tuple(replace(how, dtype=torch.float64) for how in sums)
        return sums

    def read(
        self, work: Work, block: Box, first: int, into: Sequence[BlockBuffer], space: Workspace
    ) -> int:
        """Read the block of every input, oldest first; returns bytes read.

        Raises:
            CheckpointError: a source vanished or is damaged.
            PlanError: main parameters are not what the weights say (the map's proof failed).
        """
        read_bytes = 0
        for each, buffer in zip(work.inputs, into, strict=True):
            each.reader.read(block, first, buffer)
            read_bytes += len(buffer.data)
            if each.number == self.last and work.proof is not None:
                read_bytes += self.prove(work, block, first, buffer, space)
        return read_bytes

    def average(
        self, work: Work, block: Box, first: int, space: Workspace
    ) -> tuple[Sequence[Rounded], int]:
        """Per output, the averages of a block in every dtype that is wanted; and bytes read.

        Raises:
            CheckpointError: NaN or Inf in a source, an overflow, or see `read`.
            PlanError: see `read`.
        """
        desk = space.desk
        if desk is None or desk.work is not work or desk.numel != block.numel:
            desk = space.desk = self._desk(work, block.numel, space)
        read_bytes = self.read(work, block, first, desk.sources, space)
        if not desk.average():
            self._refuse_nonfinite(work, block)
        return desk.averages, read_bytes

    def _desk(self, work: Work, numel: int, space: Workspace) -> Desk:
        sources = space.sources(work, numel)
        averages = [
            space.rounded(place, out.dtypes, numel) for place, out in enumerate(work.outputs)
        ]
        outputs = [tuple(each.values()) for each in averages]
        call = prepared(sources, work.sums, outputs, space.scratch)
        return Desk(work, numel, sources, averages, call)

    def partial(self, work: Work, block: Box, first: int, space: Workspace) -> int:
        """Sum weight times source over the inputs into `space.sums`; returns bytes read.

        Raises:
            CheckpointError, PlanError: see `read`.
        """
        sources = space.sources(work, block.numel)
        read_bytes = self.read(work, block, first, sources, space)
        undivided = [replace(how, divisor=1.0) for how in work.sums]
        outputs = [
            [buffers.buffer(how.dtype, block.numel)]
            for how, buffers in zip(work.sums, space.sums, strict=True)
        ]
        average(sources, undivided, outputs, space.scratch)
        return read_bytes

    def finish(self, work: Work, block: Box, space: Workspace) -> Sequence[Rounded]:
        """The averages of a block whose sums are in `space.sums`; see `average`."""
        averages = []
        for place, (how, out) in enumerate(zip(work.sums, work.outputs, strict=True)):
            averages.append(space.rounded(place, out.dtypes, block.numel))
            sums = [space.sums[place].buffer(how.dtype, block.numel)]
            alone, outputs = replace(how, weights=(1.0,)), tuple(averages[-1].values())
            if not average(sums, [alone], [outputs], space.scratch):
                self._refuse_nonfinite(work, block)
        return averages

    def prove(self, work: Work, block: Box, first: int, main: BlockBuffer, space: Workspace) -> int:
        """The newest source's rounded main parameters must be its weights, bit for bit.

        Returns:
            bytes read.

        Raises:
            CheckpointError: NaN or Inf in them, or the source is damaged.
            PlanError: they are not, so the map that led to them is wrong.
        """
        assert work.proof is not None
        reader, dtype = work.proof
        stored = space.proof.buffer(dtype, main.numel)
        reader.read(block, first, stored)
        rounded = space.proved.buffer(dtype, main.numel)
        average([main], [_ITSELF], [[rounded]], space.scratch)
        if not same_bits(rounded, stored):
            self.refuse_nan(work.task, block, self.last, main.tensor)
            for index in (work.task.sources[work.task.numbers.index(self.last)], work.task.proof):
                assert index is not None
                self.readers[self.last].refuse_damaged(block, index)
            newest = self.plan.sources[-1]
            raise PlanError(
                f"{newest.path}: main params of {work.task.key}, rounded, differ from the stored "
                f"weights at {block.offsets}: the optimizer buffer's layout cannot be proved, "
                "weights were edited, or files of two saves lie in one folder. "
                f"{registry.get(newest.format, newest.path).instead_of_flat()}"
            )
        return len(stored.data)

    def _refuse_nonfinite(self, work: Work, block: Box) -> None:
        task, values = work.task, []
        for each in work.inputs:
            index = task.sources[task.numbers.index(each.number)]
            data = self.readers[each.number].values(block, index, each.dtype)
            self.refuse_nan(task, block, each.number, data)
            values.append(data)
        if len(work.inputs) < len(task.numbers):
            raise RankError(
                f"{task.key} is not finite in a source that another rank reads, or too large there"
            )
        for how, out in zip(work.sums, work.outputs, strict=True):
            _refuse_too_large(task, block, _largest(how, values), out.dtypes)
        raise CheckpointError(
            f"the sum of {task.key} at {block.offsets} over all sources leaves float32, though "
            f"each is finite: keep the newest's with {override(task.key, 'newest')}"
        )

    def refuse_nan(self, task: Average, block: Box, number: int, data: torch.Tensor) -> None:
        count = int((~torch.isfinite(data)).sum())
        if count:
            index = task.sources[task.numbers.index(number)]
            self.readers[number].refuse_damaged(block, index)
            raise CheckpointError(
                f"{self.plan.sources[number].path}: {task.key} has {count} NaN or Inf values in "
                f"the block at {block.offsets}. Averaging would spread them: "
                f"{left_out('this checkpoint')}"
            )

    def write(self, work: Work, block: Box, first: int, averages: Sequence[Rounded]) -> int:
        """Hand the averages to the writers; returns bytes written.

        Raises:
            PublishError: no space, no permission, or a failing disk.
        """
        pairs = zip(work.outputs, averages, strict=True)
        return sum(out.write(block, first, rounded) for out, rounded in pairs)


def _refuse_too_large(
    task: Average, block: Box, largest: float, dtypes: Sequence[torch.dtype]
) -> None:
    for dtype in dtypes:
        ends = torch.finfo(dtype).max
        if torch.isinf(torch.tensor(largest, dtype=torch.float64).to(dtype)):
            wider = f"{given('dtype', 'bf16')} or {given('dtype', 'fp32')}"
            instead = (
                f"take {wider}"
                if largest <= torch.finfo(torch.bfloat16).max
                else f"leave out {named('dtype')}, so that a checkpoint keeps it in float64, which "
                f"no exported model has, or leave it out with {override(task.key, 'drop')}"
            )
            raise CheckpointError(
                f"the average of {task.key} reaches {largest:g} in the block at {block.offsets}, "
                f"and {str(dtype).removeprefix('torch.')} ends at {ends:g}: {instead}"
            )


def _largest(how: Sum, values: Sequence[torch.Tensor]) -> float:
    """The largest magnitude among some averages, in float64: for a message."""
    pairs = zip(how.weights, values, strict=True)
    total = sum(value.double() * weight for weight, value in pairs if weight != 0.0)
    return float((torch.as_tensor(total) / how.divisor).abs().max())
