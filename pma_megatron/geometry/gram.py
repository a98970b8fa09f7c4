"""Inner products of whole checkpoints, read shard by shard: never more than blocks in memory.

Per block: the same box of every source, as deviations from the newest source in float64, and one
small matrix product. The sums of units are added in the order of the plan, so that the result has
the same bits for any number of ranks and threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pma_megatron.base import steps
from pma_megatron.base.boxes import Box
from pma_megatron.base.comm import Comm
from pma_megatron.base.spelling import hint
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.formats.holding import holding
from pma_megatron.formats.source import Source
from pma_megatron.geometry.spread import TOTAL, Gram, Spread, spread, total
from pma_megatron.merging.accumulate import Accumulator, Work, Workspace
from pma_megatron.merging.agreement import check_same_model, matching, refuse_rounded
from pma_megatron.merging.cut import Units, share, units
from pma_megatron.merging.engine import Progress, blocks, reading
from pma_megatron.merging.job import Show, silent
from pma_megatron.merging.planning import OpenedSources, gather_sources
from pma_megatron.merging.policy import MAIN
from pma_megatron.merging.request import MergeRequest, in_its_words
from pma_megatron.merging.source_checksums import checked
from pma_megatron.merging.task_making import average_task
from pma_megatron.merging.tasks import AverageUnit
from pma_megatron.merging.threads import over_threads
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS
from pma_megatron.transfer.reads import Reads

GROUPS = (
    ("norms", r"norm"),
    ("router", r"\.router\."),
    ("experts", r"\.experts\."),
    ("attention", r"attention\."),
    ("mlp", r"mlp\."),
    ("embedding", r"embedding"),
    ("output", r"output_layer"),
)
"""(group, pattern found in the keys of megatron-core's tensors); the first match counts.

A shared expert sees every token and counts as `mlp`; the norm that Transformer Engine keeps inside
a linear layer (`linear_fc1.layer_norm_weight`) as `norms`.
"""
OTHER = "other"
_BUFFERS = ("expert_bias",)
_ROWS_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GramPlan:
    """What will be read (`tasks.Workload`).

    Attributes:
        sources, visible, threads: see `tasks.Workload`.
        coefficients: (): nothing is averaged.
        units: the work, in the order of the newest source's files.
        state: `param` (main params), or `weight` where no source has any.
    """

    sources: tuple[Source, ...]
    visible: tuple[tuple[int, ...], ...]
    coefficients: tuple[tuple[float, ...], ...]
    threads: int
    units: Units[AverageUnit]
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Inner products of the selected checkpoints.

    Attributes:
        found: the sources, oldest first, and the coefficients of their mean.
        groups: group of tensors -> its inner products; groups without tensors are left out.
        state: what was read, `param` (main params) or `weight`.
        read_bytes: payload bytes read, over all ranks.
    """

    found: OpenedSources
    groups: Mapping[str, Gram]
    state: str
    read_bytes: int

    @property
    def coefficients(self) -> tuple[float, ...]:
        """[N] of the mean, oldest first."""
        return self.found.outputs[0].values

    @property
    def total(self) -> Gram:
        """Inner products of whole checkpoints."""
        return total(self.groups)

    def spreads(self) -> dict[str, Spread]:
        """`total` and each group -> how the checkpoints lie to each other there."""
        grams = {TOTAL: self.total, **self.groups}
        return {name: spread(gram, self.coefficients) for name, gram in grams.items()}


@holding()
@in_its_words
def measure(request: MergeRequest, comm: Comm | None = None, show: Show = silent) -> Measured:
    """Read the selected checkpoints once and take all their inner products.

    Every rank makes this call and gets the result. Main params are read where the sources have
    them, else weights; floating buffers are no parameters and are left out.

    Args:
        request: which checkpoints, the method of their mean, threads; `policy.average` `weights`
            reads the weights even if there are main params.
        comm: the ranks; by default those of the current process group.
        show: shows progress.

    Raises:
        UsageError: fewer than two checkpoints, or coefficients that do not sum to 1.
        SelectionError, CheckpointError, PlanError: they cannot be found, read or compared.
        RankError: another rank failed.
    """
    comm = comm or Comm()
    with steps.stage("plan"):
        found = gather_sources(request, comm)
        plan = comm.agree("plan", lambda: _plan(request, found))
    mine = share(plan.units, comm.rank, comm.size)

    def run() -> np.ndarray:
        with show("read", mine.cost_bytes) as progress:
            return _products(plan, [*mine], comm, progress, what_is_read.reads)

    with checked(plan, comm, whole=request.check_sources) as what_is_read:
        products = comm.collect(comm.agree("read", run))
    groups = comm.on_main("sum", lambda: _sums(plan, np.concatenate(products)))
    return Measured(found=found, groups=groups, state=plan.state, read_bytes=plan.units.read_bytes)


def group_of(key: str) -> str:
    """The group that the tensor of this key belongs to."""
    return next((name for name, pattern in GROUPS if re.search(pattern, key)), OTHER)


def _plan(request: MergeRequest, found: OpenedSources) -> GramPlan:
    sources, base = found.sources, found.sources[-1]
    _refuse(request, found)
    check_same_model(sources)
    numbers, wants_main = range(len(sources)), request.policy.average == "main-params"
    if wants_main:
        refuse_rounded(sources)
    tasks, states = [], set()
    for key in _trained(sources):
        main = base.tensor(MAIN, key) if wants_main else None
        state = "weight" if main is None else MAIN
        wanted = base.space.weights[key] if main is None else main
        tensors = [matching(source, base, wanted, state, key) for source in sources]
        tasks.append(
            average_task(base, state, key, lead=wanted.pieces, numbers=numbers, tensors=tensors)
        )
        states.add(state)
    return GramPlan(
        sources=sources,
        visible=found.visible,
        coefficients=(),
        threads=request.threads,
        units=units(tasks),
        state=MAIN if MAIN in states else "weight",
    )


def _refuse(request: MergeRequest, found: OpenedSources) -> None:
    if len(found.sources) < 2:
        raise UsageError(
            f"one checkpoint, {found.sources[0].path}, has no distance to anything: select two or "
            f"more{hint('last', 'iterations')}"
        )
    weight = sum(found.outputs[0].values)
    if len(found.outputs) > 1 or abs(weight - 1) > 1e-6:
        raise UsageError(
            f"the mean needs one set of coefficients that sum to 1, not {len(found.outputs)} set(s)"
            f" with sum {weight:.6g}: deviations from anything else would be as long as the weights"
        )


def _trained(sources: Sequence[Source]) -> Iterator[str]:
    """Keys of parameters: what an optimizer trains in any source; without one, all but buffers."""
    trained = {key for source in sources for keys in source.space.states.values() for key in keys}
    for key, tensor in sources[-1].space.weights.items():
        if key in trained or (
            not trained and tensor.dtype.is_floating_point and not key.endswith(_BUFFERS)
        ):
            yield key


class _Space:
    """One thread's buffers: blocks as stored, and [N, block] rows in float64."""

    def __init__(self, count: int) -> None:
        self.stored = Workspace(0)
        self.limit = max(1, min(BLOCK_ELEMENTS, _ROWS_BYTES // (8 * count)))
        self.rows = torch.empty((count, self.limit), dtype=torch.float64)


def _products(
    plan: GramPlan,
    mine: Sequence[AverageUnit],
    comm: Comm,
    progress: Progress,
    reads: Mapping[int, Reads],
) -> np.ndarray:
    """[units, N, N] inner products of this rank's units, laid out as `spread.Gram`'s."""
    count = len(plan.sources)
    result = np.zeros((len(mine), count, count))
    places = {id(unit): place for place, unit in enumerate(mine)}
    with reading(plan, comm.rank, reads) as readers, comm.watched("read") as check:
        add = Accumulator(plan, readers, (), ())

        def do(unit: AverageUnit, space: _Space) -> None:
            check()
            work = add.locate(unit, unit.task.numbers)
            for each in work.inputs:
                each.reader.advise()
            result[places[id(unit)]] = _unit(add, work, space).numpy()
            progress(unit.cost_bytes)

        over_threads(mine, plan.threads, do, lambda: _Space(count))
    return result


def _unit(add: Accumulator, work: Work, space: _Space) -> torch.Tensor:
    """[N, N] inner products of one unit.

    Raises:
        CheckpointError: NaN or Inf in a source, or damage.
        PlanError: main parameters are not what the weights say (the map's proof failed).
    """
    count = len(space.rows)
    products = torch.zeros((count, count), dtype=torch.float64)
    for first, block in blocks(work.box, space.limit):
        rows = space.rows[:, : block.numel]
        for each in work.inputs:
            buffer = space.stored.raw().buffer(each.dtype, block.numel)
            each.reader.read(block, first, buffer)
            if each.number == add.last and work.proof is not None:
                add.prove(work, block, first, buffer, space.stored)
            rows[each.number].copy_(buffer.tensor)
        rows[:-1].sub_(rows[-1])
        products.addmm_(rows, rows.T)
        if not torch.isfinite(products).all():
            for each in work.inputs:
                buffer = space.stored.raw().buffer(each.dtype, block.numel)
                each.reader.read(block, first, buffer)
                add.refuse_nan(work.task, block, each.number, buffer.tensor)
    return products


def _sums(plan: GramPlan, products: np.ndarray) -> dict[str, Gram]:
    """The units' inner products added up per group, in the order of the plan."""
    parts: dict[str, list[tuple[int, Box]]] = {name: [] for name, _ in (*GROUPS, (OTHER, ""))}
    for number, unit in enumerate(plan.units):
        parts[group_of(unit.task.key)].append((number, unit.box))
    groups = {}
    for name, own in parts.items():
        if own:
            matrix = products[[number for number, _ in own]].sum(axis=0)
            elements = sum(box.numel for _, box in own)
            groups[name] = Gram(matrix=(matrix + matrix.T) / 2, elements=elements)
    if not groups:
        raise PlanError(f"{plan.sources[-1].path} holds no floating parameters")
    return groups
