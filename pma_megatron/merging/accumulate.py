"""The one place that multiplies a weight by a coefficient: one block of one tensor.

Per block: read the same box of every source into a reused buffer, add it times its coefficient to
an accumulator per output, round once. The accumulator is float32 where the coefficients are exact
in it (`coefficients.exact_weights`), float64 where they are not, so that the result is always
within N x 2^-24 x sum |w_i x_i| of the float64 average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pma_megatron.base.boxes import Box
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError, PlanError, RankError
from pma_megatron.formats import registry
from pma_megatron.merging.coefficients import exact_weights
from pma_megatron.merging.tasks import Average, Unit, Workload
from pma_megatron.transfer.blocks import BlockReader, UnitReader, UnitWriter
from pma_megatron.transfer.buffers import (
    BLOCK_ELEMENTS,
    BlockBuffer,
    BlockBuffers,
    Rounded,
    same_bits,
)


class Workspace:
    """One thread's buffers, made once."""

    def __init__(self, outputs: int) -> None:
        self.sums = [BlockBuffers() for _ in range(outputs)]
        self.averages = [BlockBuffers() for _ in range(outputs)]
        self.raw, self.proof, self.rounded = BlockBuffers(), BlockBuffers(), BlockBuffers()


@dataclass(frozen=True, slots=True)
class Sum:
    """How one output is summed: sum of weight times source, in `dtype`, divided once."""

    weights: tuple[float, ...]
    divisor: float
    dtype: torch.dtype

    @staticmethod
    def of(values: Sequence[float]) -> Sum:
        """The sum that gives these coefficients."""
        exact = exact_weights(values)
        if exact is None:
            return Sum(tuple(values), 1.0, torch.float64)
        return Sum(tuple(map(float, exact[0])), float(exact[1]), torch.float32)

    def divide(self, total: torch.Tensor) -> None:
        """Finish a sum, in place."""
        if self.divisor != 1.0:
            total.div_(self.divisor)

    def into(self, out: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        """Average whole float32 tensors of one device, oldest first; all are 1-D.

        Gives the bits that a merge of the same tensors gives.
        """
        buffer = torch.empty(min(out.numel(), BLOCK_ELEMENTS), dtype=self.dtype, device=out.device)
        for first in range(0, out.numel(), BLOCK_ELEMENTS):
            target = out[first : first + BLOCK_ELEMENTS]
            total, begun = buffer[: target.numel()], False
            for source, weight in zip(sources, self.weights, strict=True):
                begun = add(total, source[first : first + BLOCK_ELEMENTS], weight, begun)
            if not begun:
                total.zero_()
            self.divide(total)
            target.copy_(total)


def add(total: torch.Tensor, block: torch.Tensor, weight: float, begun: bool) -> bool:
    """Add weight times block to a sum, which it becomes if nothing has `begun` it.

    Returns:
        Whether the sum has begun now.
    """
    if weight == 0.0:
        return begun
    if begun:
        total.add_(block, alpha=weight)
    elif weight == 1.0:
        total.copy_(block)
    else:
        total.copy_(block).mul_(weight)
    return True


def fold(average: torch.Tensor, member: torch.Tensor, alpha: float) -> None:
    """One step of an exponential average that runs on, in place (arXiv 2505.12082, eq. 4).

    A member that equals the average leaves it as it is to the bit, whatever alpha is.
    """
    average.lerp_(member, alpha)  # average + alpha (member - average)


@dataclass(frozen=True, slots=True)
class Input:
    """One source in a unit, and its weight per output."""

    number: int
    reader: UnitReader
    dtype: torch.dtype
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A unit of averaging, with everything located that its blocks need."""

    unit: Unit
    task: Average
    box: Box
    sums: tuple[Sum, ...]
    inputs: tuple[Input, ...]
    proof: tuple[UnitReader, torch.dtype] | None
    outputs: tuple[UnitWriter, ...]


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

    def locate(self, unit: Unit, task: Average, numbers: Sequence[int]) -> Work:
        """Find the bytes of a unit in those sources, and in every output."""
        box = unit.box
        assert box is not None
        inputs, proof = [], None
        sums = self.sums_of(task)
        for number, index, dtype in zip(task.numbers, task.sources, task.dtypes, strict=True):
            if number in numbers:
                reader = UnitReader(self.readers[number], box, index)
                weights = tuple(each.weights[number] for each in sums)
                inputs.append(Input(number, reader, dtype, weights))
        if task.proof is not None and self.last in numbers:
            dtype = task.proof.touching(box)[0].payload.dtype
            proof = (UnitReader(self.readers[self.last], box, task.proof), dtype)
        outputs = tuple(UnitWriter(writer, box, task.targets) for writer in self.writers)
        return Work(unit, task, box, sums, tuple(inputs), proof, outputs)

    def sums_of(self, task: Average) -> tuple[Sum, ...]:
        """How each output sums this task."""
        if task.kept:
            return (Sum((1.0,) * len(self.plan.sources), 1.0, torch.float32),) * len(self.writers)
        return self.sums

    def weighted(self, work: Work, block: Box, first: int, space: Workspace) -> int:
        """Sum weight times source over the inputs into `space.sums`, oldest first.

        Returns:
            bytes read.

        Raises:
            CheckpointError: a source vanished or is damaged.
            PlanError: main parameters are not what the weights say (the map's proof failed).
        """
        numel, read_bytes = block.numel, 0
        sums = [r.buffer(s.dtype, numel) for r, s in zip(space.sums, work.sums, strict=True)]
        begun = [False] * len(sums)
        for each in work.inputs:
            buffer = space.raw.buffer(each.dtype, numel)
            each.reader.read(block, first, buffer)
            read_bytes += len(buffer.data)
            if each.number == self.last and work.proof is not None:
                read_bytes += self.prove(work, block, first, buffer, space)
            for k, weight in enumerate(each.weights):
                begun[k] = add(sums[k].tensor, buffer.tensor, weight, begun[k])
        for done, buffer in zip(begun, sums, strict=True):
            if not done:
                buffer.tensor.zero_()
        return read_bytes

    def averages(self, work: Work, block: Box, space: Workspace) -> list[BlockBuffer]:
        """The finished sums as float32 averages, rounded once.

        Raises:
            CheckpointError: NaN or Inf in a source, or an overflow.
        """
        averages = []
        for how, sums, buffers in zip(work.sums, space.sums, space.averages, strict=True):
            buffer = sums.buffer(how.dtype, block.numel)
            how.divide(buffer.tensor)
            if how.dtype != torch.float32:
                rounded = buffers.buffer(torch.float32, block.numel)
                rounded.tensor.copy_(buffer.tensor)
                buffer = rounded
            averages.append(buffer)
        self._refuse_nonfinite(work, block, averages)
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
        if not same_bits(Rounded(main, space.rounded).of(dtype), stored):
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

    def _refuse_nonfinite(self, work: Work, block: Box, sums: Sequence[BlockBuffer]) -> None:
        # A sum is finite only if all its terms are: one cheap pass, and a close look if it is not.
        if all(math.isfinite(buffer.tensor.sum().item()) for buffer in sums):
            return
        task = work.task
        for each in work.inputs:
            data = torch.empty(block.numel, dtype=each.dtype)
            index = task.sources[task.numbers.index(each.number)]
            self.readers[each.number].read(block, index, data)
            self.refuse_nan(task, block, each.number, data)
        if all(bool(torch.isfinite(buffer.tensor).all()) for buffer in sums):
            return
        if len(work.inputs) < len(task.numbers):
            raise RankError(f"{task.key} is not finite in a source that another rank reads")
        raise CheckpointError(
            f"{task.key} at {block.offsets} overflows float32 with these coefficients, though "
            "every source is finite: use coefficients that sum to 1"
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

    def write(
        self, work: Work, block: Box, first: int, averages: Sequence[BlockBuffer], space: Workspace
    ) -> int:
        """Hand the averages to the writers; returns bytes written.

        Raises:
            PublishError: no space, no permission, or a failing disk.
        """
        pairs = zip(work.outputs, averages, strict=True)
        return sum(out.write(block, first, Rounded(buffer, space.rounded)) for out, buffer in pairs)
