"""Recompute and compare: a merged checkpoint must be what its sources and coefficients say.

`verify_output` recomputes slices of every averaged tensor, `recompute` every element.

Nothing here shares code with the engine but the reading of bytes: the output is opened like any
checkpoint, and samples of every averaged tensor are summed again in float64.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pma_megatron.base.boxes import Box, PieceIndex, slices
from pma_megatron.base.comm import Comm
from pma_megatron.errors import CheckpointError, PlanError, VerifyError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.source import Source
from pma_megatron.merging.padding import common_rows, parts
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.policy import MAIN, Action
from pma_megatron.merging.request import Output
from pma_megatron.merging.tolerance import bound_of, refuse_beyond, refuse_unrounded
from pma_megatron.storage.spool import active
from pma_megatron.transfer.blocks import BlockReader, readers

SAMPLE_ELEMENTS = 1024


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked.

    Attributes:
        entries: tensors and objects found in their place.
        samples: slices recomputed in float64.
        elements: elements in them.
        worst: largest error found, in units of the bound N x 2^-24 x sum |w_i x_i|.
        deep: True where every element was recomputed, not slices alone.
        files: files whose every byte was compared with the checksums in `pma.json`.
        bytes: in those files.
        records: parts of files that were compared with checksums inside the files themselves.
        notes: what was not checked, and why; a sentence each.
        path: the folder that was checked.
    """

    entries: int
    samples: int
    elements: int
    worst: float
    deep: bool = False
    files: int = 0
    bytes: int = 0
    records: int = 0
    notes: tuple[str, ...] = ()
    path: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A slice of a tensor that is to be summed again; `kept` if it is the newest source's."""

    state: str
    key: str
    box: Box
    kept: bool


def verify_output(
    plan: MergePlan, output: Output, folder: Path, comm: Comm, *, samples: int = 64
) -> Verification:
    """Check one output against its sources. Every rank makes this call.

    Args:
        plan: the plan that made it.
        output: which of its outputs.
        folder: where it lies, staged or published.
        comm: the ranks; each recomputes the part of the sources that it can see.
        samples: slices to recompute, spread over all averaged tensors.

    Raises:
        VerifyError: an entry is missing, a value is not what it must be.
    """
    folder = folder / plan.layout.checkpoint
    merged = comm.on_main("verify", lambda: open_merged(plan, folder))
    wanted = list(_samples(plan, samples))
    mine = comm.agree("verify", lambda: list(partial_sums(plan, output, wanted, comm)))
    sums = comm.collect(mine)
    return comm.on_main("verify", lambda: _compare(plan, output, folder, merged, wanted, sums))


def open_merged(plan: MergePlan, folder: Path) -> Source:
    """The output as a source, once it is clear that it has every entry that it must have.

    Raises:
        VerifyError: it cannot be read, or entries are missing or too many.
    """
    base = plan.sources[-1]
    known = registry.get(plan.selection.refs[-1].format, base.path)
    try:
        merged = known.read_source(
            str(folder), base.ranges, plan.request.policy.average == "main-params"
        )
    except (CheckpointError, PlanError) as error:
        raise VerifyError(f"the merged checkpoint {folder} is not right: {error}") from error
    expected = {
        (state, key)
        for (state, key), rule in plan.rules.items()
        if rule.action is not Action.DROP and state != "object"
    }
    found = {("weight", key) for key in merged.space.weights} | {
        (state, key) for state, tensors in merged.space.states.items() for key in tensors
    }
    if expected != found:
        raise VerifyError(
            f"{folder} has entries {sorted(found - expected)[:3]} too many and lacks "
            f"{sorted(expected - found)[:3]}"
        )
    return merged


def _samples(plan: MergePlan, count: int) -> Iterator[Sample]:
    """Slices of every averaged tensor, at places that depend on the plan alone."""
    base, draw = plan.sources[-1], random.Random(plan.digest)
    tensors = [
        (state, key, rule)
        for (state, key), rule in plan.rules.items()
        if state != "object" and rule.action in (Action.AVERAGE, Action.ROUND)
    ]
    if len(tensors) > count:
        tensors = draw.sample(tensors, count)
    per_tensor = max(1, count // max(len(tensors), 1))
    for state, key, _ in tensors:
        tensor = tensor_of(base, "weight" if state == "weight" else state, key)
        rows = rows_averaged(plan, state, key)
        pieces = [
            (piece, padding)
            for part, padding in parts(tensor, rows)
            for piece in part.pieces
            if piece.box.numel
        ]
        kept = plan.rules.get((MAIN, key)) is not None and (
            plan.rules[MAIN, key].action is Action.NEWEST
        )
        for piece, padding in draw.sample(pieces, min(per_tensor, len(pieces))):
            boxes = (
                list(slices(piece.box, SAMPLE_ELEMENTS))
                if piece.box.numel < 1 << 24
                else [next(slices(piece.box, SAMPLE_ELEMENTS))]
            )
            yield Sample(state, key, draw.choice(boxes), kept or padding)


def rows_averaged(plan: MergePlan, state: str, key: str) -> int | None:
    """How many first rows of a tensor are averaged; None for all of them."""
    rule = plan.rules[state, key]
    averaged = rule.action in (Action.AVERAGE, Action.ROUND)
    return common_rows(plan.sources, state, key) if averaged else None


def tensor_of(source: Source, state: str, key: str) -> Tensor:
    """A tensor that the plan has found to be there."""
    tensor = source.tensor(state, key)
    assert tensor is not None, (source.path, state, key)  # the plan has looked for it
    return tensor


def origin_of(plan: MergePlan, state: str, key: str) -> str:
    """The state whose average a stored state must show: rounded weights show main params."""
    rule = plan.rules.get((state, key))
    return MAIN if rule is not None and rule.action is Action.ROUND else state


def partial_sums(
    plan: MergePlan, output: Output, wanted: Iterable[Sample], comm: Comm | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per sample, float64 sums of w x and |w x| over the sources this rank answers for.

    Those are all sources where no ranks share them (`comm` None).
    """
    mine = (
        (number, source)
        for number, source in enumerate(plan.sources)
        if comm is None or plan.visible[number][number % len(plan.visible[number])] == comm.rank
    )
    with readers(mine) as opened:
        wanted = list(wanted)
        for sample in wanted if active() is not None else ():
            for number, reader in opened.items():
                state = origin_of(plan, sample.state, sample.key)
                tensor = tensor_of(plan.sources[number], state, sample.key)
                reader.look_ahead(sample.box, tensor.pieces)
        for sample in wanted:
            total, size = np.zeros(sample.box.numel), np.zeros(sample.box.numel)
            for number, reader in opened.items():
                weight = output.values[number]
                if sample.kept:
                    weight = float(number == len(plan.sources) - 1)
                if weight:
                    state = origin_of(plan, sample.state, sample.key)
                    x = _read(
                        reader, tensor_of(plan.sources[number], state, sample.key), sample.box
                    )
                    total += weight * x
                    size += abs(weight) * np.abs(x)
            yield total, size


def _read(reader: BlockReader, tensor: Tensor, box: Box) -> np.ndarray:
    return reader.values(box, PieceIndex(tensor.pieces), tensor.dtype).double().numpy()


def _compare(
    plan: MergePlan,
    output: Output,
    folder: Path,
    merged: Source,
    wanted: Sequence[Sample],
    sums: Sequence[list[tuple[np.ndarray, np.ndarray]]],
) -> Verification:
    count = sum(value != 0 for value in output.values)
    worst = 0.0
    with BlockReader.of(merged.format, str(folder)) as reader:
        for number, sample in enumerate(wanted):
            exact = np.sum([part[number][0] for part in sums], axis=0)
            size = np.sum([part[number][1] for part in sums], axis=0)
            tensor = tensor_of(merged, sample.state, sample.key)
            got = _read(reader, tensor, sample.box)
            origin = origin_of(plan, sample.state, sample.key)
            if MAIN in merged.space.states and origin == MAIN != sample.state:
                main = merged.space.states[MAIN][sample.key]
                data = torch.from_numpy(_read(reader, main, sample.box)).float()
                rounded = data.to(tensor.dtype).double().numpy()
                refuse_unrounded(got, rounded, folder, sample.key, sample.box)
            bound = bound_of(count, size, exact, tensor.dtype)
            what = f"{sample.state} {sample.key}"
            worst = max(worst, refuse_beyond(got, exact, bound, folder, what, sample.box))
    entries = len(plan.rules) - sum(r.action is Action.DROP for r in plan.rules.values())
    elements = sum(sample.box.numel for sample in wanted)
    return Verification(entries, len(wanted), elements, worst, notes=map_notes(merged))


def map_notes(merged: Source) -> tuple[str, ...]:
    """What is not checked of the map of flat buffers by names and shapes alone, if anything."""
    clauses = registry.get(merged.format, merged.path).unchecked_order(merged)
    if not clauses:
        return ()
    return (
        f"Not checked but by values: which main params are whose where {clauses[0]} "
        f"({len(clauses)} such places); the order in which Megatron registers parameters does not "
        "say so.",
    )
