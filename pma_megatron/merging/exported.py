"""An exported model, checked: its tensors where they belong, its values against the sources. So are
the weights that a trainer keeps beside its shards as such a model (`saved_folder`).

Nothing is taken from the plan's layout: the files are opened with the safetensors library, and what
their headers say decides which bytes are compared. The sums are numpy's, in float64.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pma_megatron.base.boxes import Box, PieceIndex, row_major_strides, slices
from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import open_source, read_at
from pma_megatron.errors import VerifyError
from pma_megatron.export.files import Stored, stored_in
from pma_megatron.formats.safetensors.headers import Entry
from pma_megatron.merging.exporting import Filled
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.policy import Action
from pma_megatron.merging.request import Output
from pma_megatron.merging.tolerance import bound_of, refuse_beyond
from pma_megatron.merging.verification import (
    SAMPLE_ELEMENTS,
    Sample,
    Verification,
    partial_sums,
    tensor_of,
)
from pma_megatron.transfer.blocks import BlockReader

SLICE_ELEMENTS = 1 << 20
"""Elements recomputed at once: some 40 MiB of buffers."""


def verify_model(
    plan: MergePlan,
    output: Output,
    folder: Path,
    comm: Comm,
    *,
    samples: int = 64,
    deep: bool = False,
) -> Verification:
    """Check one exported model against its sources. Every rank makes this call.

    Args:
        plan: the plan that made it.
        output: which of its outputs.
        folder: where it lies, staged or published.
        comm: the ranks.
        samples: slices to recompute, spread over all tensors.
        deep: recompute every element instead; every rank sees every source then.

    Raises:
        VerifyError: a tensor is missing, or a value is not what it must be.
    """
    assert plan.export is not None
    entries = {entry.name: entry for entry in plan.export.entries}
    stored = comm.on_main("verify", lambda: _opened(folder, entries))
    check = _Check(plan, output, folder, stored)
    return check.all(plan.export.filled, comm, samples, deep)


def with_weights_beside(
    comm: Comm,
    found: Verification,
    plan: MergePlan,
    output: Output,
    folder: Path,
    *,
    deep: bool = False,
    samples: int = 64,
) -> Verification:
    """What was found of an output's shards, and the same of the weights beside them, if any.

    Arguments and errors are those of `verify_model`.
    """
    if not plan.beside:
        return found
    names = {each.place.record for each in plan.beside}
    files = {each.place.file for each in plan.beside}

    def opened() -> dict[str, Stored]:
        stored = stored_in(folder, files)
        _refuse_other_names(folder, stored, names)
        return stored

    check = _Check(plan, output, folder, comm.on_main("verify", opened))
    more = check.all(plan.beside, comm, samples, deep)
    return replace(
        found,
        entries=found.entries + more.entries,
        samples=found.samples + more.samples,
        elements=found.elements + more.elements,
        worst=max(found.worst, more.worst),
    )


def _opened(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Stored]:
    """What the files say, once it is clear that it is what was planned."""
    found = stored_in(folder)
    _refuse_other_names(folder, found, entries)
    for name, each in found.items():
        if each.entry != entries[name]:
            raise VerifyError(f"{folder}: {name} is {each.entry}, expected {entries[name]}")
    return found


def _refuse_other_names(folder: Path, found: Collection[str], wanted: Collection[str]) -> None:
    if set(found) != set(wanted):
        raise VerifyError(
            f"{folder} has tensors {sorted(set(found) - set(wanted))[:3]} too many and lacks "
            f"{sorted(set(wanted) - set(found))[:3]}"
        )


Wanted = tuple[Sample, Filled]


def _sample(plan: MergePlan, filled: Filled, box: Box) -> Sample:
    rule = plan.rules.get(("weight", filled.key))
    kept = rule is None or rule.action is Action.NEWEST
    return Sample(filled.state, filled.key, box, kept)


def _some(plan: MergePlan, filled: Sequence[Filled], count: int) -> Iterator[Wanted]:
    """Slices at places that depend on the plan alone."""
    draw = random.Random(plan.digest)
    chosen = draw.sample(filled, count) if len(filled) > count else filled
    for each in chosen:
        for _ in range(max(1, count // len(chosen))):
            yield _sample(plan, each, _somewhere(each.box, draw)), each


def _somewhere(box: Box, draw: random.Random) -> Box:
    """At most `SAMPLE_ELEMENTS` elements of a box that follow each other in it."""
    offsets, sizes, room = list(box.offsets), list(box.sizes), SAMPLE_ELEMENTS
    for axis in reversed(range(len(sizes))):
        size = min(sizes[axis], room)
        offsets[axis] += draw.randint(0, sizes[axis] - size)
        whole = size == sizes[axis]
        sizes[axis], room = size, room // size if whole else 1
    return Box(tuple(offsets), tuple(sizes))


def _every(plan: MergePlan, filled: Sequence[Filled]) -> Iterator[Wanted]:
    for each in filled:
        for box in slices(each.box, SLICE_ELEMENTS):
            yield _sample(plan, each, box), each


class _Check:
    """One folder and what its files say."""

    def __init__(
        self, plan: MergePlan, output: Output, folder: Path, stored: Mapping[str, Stored]
    ) -> None:
        self._plan, self._output, self._folder, self._stored = plan, output, folder, stored

    def all(self, filled: Sequence[Filled], comm: Comm, samples: int, deep: bool) -> Verification:
        """Check all that was filled, or `samples` slices of it. Every rank makes this call."""
        plan = self._plan
        if deep:
            wanted = list(_every(plan, filled))[comm.rank :: comm.size]
            parts = comm.gather(comm.agree("verify", lambda: self.alone(wanted)))
        else:
            wanted = list(_some(plan, filled, samples))
            summed = [(sample, each) for sample, each in wanted if each.averaged]
            mine = comm.agree("verify", lambda: self.sums([s for s, _ in summed], comm))
            sums = comm.collect(mine)
            worst = comm.on_main("verify", lambda: self.compare(summed, sums))
            kept = [each for each in wanted if not each[1].averaged]
            sees = comm.rank == plan.visible[-1][0]
            comm.agree("verify", lambda: self.carried(kept) if sees else None)
            parts = [(len(wanted), sum(sample.box.numel for sample, _ in wanted), worst)]
        counts, elements, worsts = zip(*parts, strict=True)
        return Verification(len(self._stored), sum(counts), sum(elements), max(worsts), deep=deep)

    def sums(self, samples: Sequence[Sample], comm: Comm) -> list[tuple[np.ndarray, np.ndarray]]:
        """This rank's part of the sums of some slices."""
        return list(partial_sums(self._plan, self._output, samples, comm))

    def alone(self, wanted: Sequence[Wanted]) -> tuple[int, int, float]:
        """Check slices without other ranks: how many, their elements, the largest error."""
        worst = 0.0
        summed = [each for each in wanted if each[1].averaged]
        sums = partial_sums(self._plan, self._output, (sample for sample, _ in summed), None)
        for each, own in zip(summed, sums, strict=True):
            worst = max(worst, self.compare([each], [[own]]))
        self.carried([each for each in wanted if not each[1].averaged])
        return len(wanted), sum(sample.box.numel for sample, _ in wanted), worst

    def compare(
        self, wanted: Sequence[Wanted], sums: Sequence[list[tuple[np.ndarray, np.ndarray]]]
    ) -> float:
        """The largest error, in units of the bound.

        Raises:
            VerifyError: it is larger than that.
        """
        worst = 0.0
        for number, (sample, filled) in enumerate(wanted):
            exact = np.sum([part[number][0] for part in sums], axis=0)
            size = np.sum([part[number][1] for part in sums], axis=0)
            got = self._read(filled, sample.box).double().numpy()
            terms = 1 if sample.kept else sum(value != 0 for value in self._output.values)
            bound = bound_of(terms, size, exact, filled.place.dtype)
            name = filled.place.record
            worst = max(worst, refuse_beyond(got, exact, bound, self._folder, name, sample.box))
        return worst

    def carried(self, wanted: Sequence[Wanted]) -> None:
        """Compare what is the newest source's, bit for bit.

        Raises:
            VerifyError: it is not.
        """
        newest = self._plan.sources[-1]
        with BlockReader.of(newest.format, newest.path) as reader:
            for sample, filled in wanted:
                tensor = tensor_of(newest, sample.state, sample.key)
                data = reader.values(sample.box, PieceIndex(tensor.pieces), tensor.dtype)
                own = self._read(filled, sample.box)
                if not torch.equal(data.view(torch.uint8), own.view(torch.uint8)):
                    raise VerifyError(
                        f"{self._folder}: {filled.place.record} is not the newest source's, bit "
                        "for bit. Do not use this folder: make it again"
                    )

    def _read(self, filled: Filled, box: Box) -> torch.Tensor:
        """What the export holds of `box`, which has its elements in a row in `filled.box`."""
        stored = self._stored[filled.place.record]
        at = filled.start + _position(box, filled.box)
        itemsize = stored.entry.dtype.itemsize
        data = bytearray(box.numel * itemsize)
        descriptor = open_source(self._folder / stored.file, whole=False)
        try:
            got = read_at(descriptor, memoryview(data), stored.start + at * itemsize)
        finally:
            os.close(descriptor)
        if got != len(data):
            raise VerifyError(f"{self._folder / stored.file} ended early: damaged")
        return torch.frombuffer(data, dtype=stored.entry.dtype)


def _position(box: Box, whole: Box) -> int:
    strides = row_major_strides(whole.sizes)
    pairs: Any = zip(box.offsets, whole.offsets, strides, strict=True)
    return sum((o - b) * s for o, b, s in pairs)
