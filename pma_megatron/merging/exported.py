"""An exported model, checked: its tensors where they belong, its values against the sources.

Nothing is taken from the plan's layout: the files are opened with the safetensors library, and what
their headers say decides which bytes are compared. The sums are numpy's, in float64.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pma_megatron.base.boxes import Box, PieceIndex, row_major_strides, slices
from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import open_source
from pma_megatron.errors import VerifyError
from pma_megatron.export.files import Stored, stored_in
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
    stored = comm.on_main("verify", lambda: _opened(plan, folder))
    check = _Check(plan, output, folder, stored)
    if deep:
        wanted = list(_every(plan))[comm.rank :: comm.size]
        parts = comm.gather(comm.agree("verify", lambda: check.alone(wanted)))
    else:
        wanted = list(_some(plan, samples))
        summed = [(sample, filled) for sample, filled in wanted if filled.averaged]
        mine = comm.agree("verify", lambda: check.sums([s for s, _ in summed], comm))
        sums = comm.collect(mine)
        worst = comm.on_main("verify", lambda: check.compare(summed, sums))
        carried = [each for each in wanted if not each[1].averaged]
        sees = comm.rank == plan.visible[-1][0]
        comm.agree("verify", lambda: check.carried(carried) if sees else None)
        parts = [(len(wanted), sum(sample.box.numel for sample, _ in wanted), worst)]
    counts, elements, worsts = zip(*parts, strict=True)
    return Verification(len(stored), sum(counts), sum(elements), max(worsts), deep=deep)


def _opened(plan: MergePlan, folder: Path) -> dict[str, Stored]:
    """What the files say, once it is clear that it is what was planned."""
    assert plan.export is not None
    found = stored_in(folder)
    wanted = {entry.name: entry for entry in plan.export.entries}
    if set(found) != set(wanted):
        raise VerifyError(
            f"{folder} has tensors {sorted(set(found) - set(wanted))[:3]} too many and lacks "
            f"{sorted(set(wanted) - set(found))[:3]}"
        )
    for name, each in found.items():
        if each.entry != wanted[name]:
            raise VerifyError(f"{folder}: {name} is {each.entry}, expected {wanted[name]}")
    return found


Wanted = tuple[Sample, Filled]


def _sample(plan: MergePlan, filled: Filled, box: Box) -> Sample:
    rule = plan.rules.get(("weight", filled.key))
    kept = rule is None or rule.action is Action.NEWEST
    return Sample(filled.state, filled.key, box, kept)


def _some(plan: MergePlan, count: int) -> Iterator[Wanted]:
    """Slices at places that depend on the plan alone."""
    assert plan.export is not None
    draw = random.Random(plan.digest)
    filled = plan.export.filled
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


def _every(plan: MergePlan) -> Iterator[Wanted]:
    assert plan.export is not None
    for filled in plan.export.filled:
        for box in slices(filled.box, SLICE_ELEMENTS):
            yield _sample(plan, filled, box), filled


class _Check:
    """One folder and what its files say."""

    def __init__(
        self, plan: MergePlan, output: Output, folder: Path, stored: Mapping[str, Stored]
    ) -> None:
        self._plan, self._output, self._folder, self._stored = plan, output, folder, stored

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
                        "for bit. Do not use this export: make it again"
                    )

    def _read(self, filled: Filled, box: Box) -> torch.Tensor:
        """What the export holds of `box`, which has its elements in a row in `filled.box`."""
        stored = self._stored[filled.place.record]
        at = filled.start + _position(box, filled.box)
        itemsize = stored.entry.dtype.itemsize
        data = bytearray(box.numel * itemsize)
        descriptor = open_source(self._folder / stored.file)
        try:
            got = os.preadv(descriptor, [data], stored.start + at * itemsize)
        finally:
            os.close(descriptor)
        if got != len(data):
            raise VerifyError(f"{self._folder / stored.file} ended early: damaged")
        return torch.frombuffer(data, dtype=stored.entry.dtype)


def _position(box: Box, whole: Box) -> int:
    strides = row_major_strides(whole.sizes)
    pairs: Any = zip(box.offsets, whole.offsets, strides, strict=True)
    return sum((o - b) * s for o, b, s in pairs)
