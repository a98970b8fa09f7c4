"""Go on with a merge that was cut off: which of its units are there, bit for bit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from pma_megatron.base.comm import Comm
from pma_megatron.formats.output import Folder
from pma_megatron.merging.accumulate import Workspace
from pma_megatron.merging.cut import Units, share
from pma_megatron.merging.engine import block_elements, blocks
from pma_megatron.merging.journal import Done, name_of, named
from pma_megatron.merging.tasks import AverageUnit, Unit
from pma_megatron.merging.threads import over_threads
from pma_megatron.transfer.blocks import BlockWriter, FolderWriters
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS, as_bytes
from pma_megatron.transfer.checksums import Checksums
from pma_megatron.transfer.readback import NoReader, ReadBack
from pma_megatron.transfer.reads import Reads
from pma_megatron.transfer.units import UnitWriter

Writers = Mapping[int, Mapping[Folder, BlockWriter]]
"""Number of an output -> folder -> who writes into it."""


@dataclass(slots=True)
class Split:
    """The units of this rank.

    Attributes:
        todo: what it has to do.
        there: how many units are there already, of those that it looked at.
        there_bytes: what they would have cost.
    """

    todo: Sequence[Unit]
    there: int = 0
    there_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, unit: Unit) -> None:
        """Count a unit that is there."""
        with self._lock:
            self.there += 1
            self.there_bytes += unit.cost_bytes

    def redo(self, unit: Unit) -> None:
        """A unit is not what its line says."""
        with self._lock:
            self.todo = [*self.todo, unit]


def sums_of(writers: Writers) -> dict[str, Checksums]:
    """What takes note of what is written, by the names that a journal has for outputs."""
    return {
        f"{number}-{folder.value}": writer.checksums
        for number, each in writers.items()
        for folder, writer in each.items()
    }


def split(
    units: Units[Unit],
    done: Mapping[str, Done],
    writers: Writers,
    reads: Mapping[int, Reads],
    comm: Comm,
    threads: int,
) -> Split:
    """This rank's part of the units: what is there is read back, and taken note of.

    Args:
        units: all of the plan.
        done: what a journal says of some of them.
        writers: of the outputs; theirs are the checksums.
        reads: number of a source -> takes note of what was read of it.
        comm: the ranks; every one makes this call.
        threads: of this rank.

    Raises:
        CheckpointError: what was read of a source is damaged.
        PublishError: a staging folder cannot be read.
    """
    if not done:
        return Split(share(units, comm.shard_rank, comm.shard_size))
    keys, names = set(sums_of(writers)), [*named(units)]
    often = Counter(name for _, name in names)
    promised = [
        number
        for number, name in names
        if name in done and done[name].wrote.keys() >= keys and often[name] == 1
    ]
    rest = np.ones(len(units), dtype=bool)
    rest[promised] = False
    found = Split(share(units.part(np.flatnonzero(rest)), comm.shard_rank, comm.shard_size))
    mine = share(units.part(np.array(promised, dtype=np.int64)), comm.shard_rank, comm.shard_size)
    with _readers(writers) as folders:

        def look(unit: Unit, space: Workspace) -> None:
            line = done[name_of(unit)]
            fresh = _read_back(unit, folders, space)
            if any(each.told() != line.wrote[name] for name, each in fresh.items()):
                found.redo(unit)
                return
            for name, own in sums_of(writers).items():
                own.join(fresh[name])
            for number, each in reads.items():
                each.recall(line.read.get(number, ()), line.unsummed.get(number, ()))
            found.keep(unit)
            comm.moved()

        over_threads(mine, threads, look, lambda: Workspace(len(writers)))
    return found


@contextmanager
def _readers(writers: Writers) -> Iterator[Mapping[int, Mapping[Folder, ReadBack]]]:
    """Readers of the staging folders. What they looked at is on the disk when the block ends."""
    found = {
        number: {
            folder: ReadBack(writer.folder, type(writer.checksums)(), setting=folder.value)
            for folder, writer in each.items()
        }
        for number, each in writers.items()
    }
    with ExitStack() as stack:
        every = [reader for each in found.values() for reader in each.values()]
        for reader in every:
            stack.callback(reader.close)
        yield found
        for reader in every:
            reader.sync()


def _read_back(
    unit: Unit, folders: Mapping[int, Mapping[Folder, ReadBack]], space: Workspace
) -> dict[str, Checksums]:
    """What the folders hold where the unit writes, by the names of outputs."""
    own = {
        number: {folder: reader.alone() for folder, reader in each.items()}
        for number, each in folders.items()
    }
    writers = [FolderWriters(each) for each in own.values()]
    if isinstance(unit, AverageUnit):
        outputs = [UnitWriter(writer, unit.box, unit.task.targets) for writer in writers]
        for first, block in blocks(unit.box, block_elements(unit.task)):
            for place, out in enumerate(outputs):
                out.write(block, first, space.rounded(place, out.dtypes, block.numel))
    else:
        buffer = as_bytes(space.raw().whole(torch.float32)[:BLOCK_ELEMENTS])
        unit.fill(NoReader(), writers, buffer)
    return sums_of(own)
