"""How two checkpoints differ, tensor by tensor, read shard by shard: never more than blocks.

The two need not be of one run, layout or format, as long as tensors have the same names. Bits
decide whether values of one dtype are equal; sizes of differences are taken in float64. The sums of
units are added in the order of the plan: the result does not depend on ranks and threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pma_megatron.base.boxes import Box, Piece, PieceIndex
from pma_megatron.base.comm import Comm
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import FrontEnd, first_few, given, keywords, speaking, switch
from pma_megatron.comparison.differences import (
    COLUMNS,
    Comparison,
    Side,
    TensorComparison,
    combined,
)
from pma_megatron.errors import CheckpointError, PlanError, UsageError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.holding import holding
from pma_megatron.formats.source import Source
from pma_megatron.formats.trainers.saves import checkpoint_in
from pma_megatron.merging.accumulate import Accumulator, Workspace
from pma_megatron.merging.agreement import check_covers
from pma_megatron.merging.cut import Units, share, units
from pma_megatron.merging.engine import Progress, blocks, reading
from pma_megatron.merging.job import Show, silent
from pma_megatron.merging.policy import MAIN
from pma_megatron.merging.source_checksums import checked
from pma_megatron.merging.task_making import average_task
from pma_megatron.merging.tasks import AverageUnit
from pma_megatron.merging.threads import over_threads
from pma_megatron.runs.describe import describe
from pma_megatron.runs.discover import pointed
from pma_megatron.runs.folders import is_checkpoint, what_is
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of
from pma_megatron.transfer.buffers import BLOCK_ELEMENTS, BlockBuffer, BlockBuffers, same_bits
from pma_megatron.transfer.reads import Reads

_WEIGHT = "weight"
_KEYWORDS = FrontEnd(keywords(["first", "second", "weights_only", "atol", "rtol", "threads"]))
_DIFFERENT, _BEYOND, _LARGEST, _SQUARES, _DISTANCES, _NOT_FINITE = range(len(COLUMNS))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonPlan:
    """What will be read (`tasks.Workload`).

    Attributes:
        sources, visible, coefficients, threads: see `tasks.Workload`.
        tensors: every tensor of either checkpoint, as far as it is known without its values.
        units: the work, in the order of the second one's files.
        tensor_of: per unit, the number of its tensor.
    """

    sources: tuple[Source, ...]
    visible: tuple[tuple[int, ...], ...]
    threads: int
    tensors: tuple[TensorComparison, ...]
    units: Units[AverageUnit]
    tensor_of: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...] = ()


@holding()
@speaking(_KEYWORDS)
def compare(
    first: str | Path,
    second: str | Path,
    *,
    weights_only: bool = False,
    atol: float = 0.0,
    rtol: float = 0.0,
    threads: int = 2,
    comm: Comm | None = None,
    show: Show = silent,
) -> Comparison:
    """Read two checkpoints once, side by side, and say how every tensor differs.

    Every rank makes this call and gets the result.

    Args:
        first: a checkpoint's folder, or a root whose tracker names one: the reference.
        second: the one that is compared with it.
        weights_only: True leaves optimizer states and main params out.
        atol: an absolute difference up to which two values count as equal.
        rtol: the same, as a multiple of the first value's size; both are added, as in
            `torch.allclose`.
        threads: reader threads per rank.
        comm: the ranks, each of which sees both; by default those of the current process group.
        show: shows progress.

    Raises:
        UsageError: a tolerance below zero, or both are the same folder.
        CheckpointError: one is not a whole checkpoint, cannot be read, or is damaged.
        PlanError: they have no tensor in common.
        RankError: another rank failed.

    >>> import tempfile
    >>> import torch.distributed.checkpoint as dcp
    >>> root = tempfile.mkdtemp()
    >>> for name, value in (("a", 1.0), ("b", 1.5)):
    ...     saved = {"w": torch.full((4,), value)}
    ...     _ = dcp.save(saved, checkpoint_id=f"{root}/{name}", no_dist=True)
    >>> found = compare(f"{root}/a", f"{root}/b")
    >>> found.same, found.total.different, found.total.max_difference
    (False, 4, 0.5)
    """
    for name, value in (("atol", atol), ("rtol", rtol)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{given(name, value)}: expected a number of at least 0")
    if threads < 1:
        raise UsageError(f"{given('threads', threads)}: expected at least 1")
    comm = comm or Comm()
    refs = comm.agree("open", lambda: _found(first, second))
    sources = comm.on_main("open", lambda: _opened(refs, weights_only))
    plan = comm.agree("plan", lambda: _plan(sources, comm.size, threads, weights_only))
    mine = share(plan.units, comm.rank, comm.size)
    with checked(plan, comm) as what_is_read:

        def run() -> np.ndarray:
            with show("read", mine.cost_bytes) as progress:
                return _measured(plan, [*mine], comm, progress, what_is_read.reads, (atol, rtol))

        rows = np.concatenate(comm.gather(comm.agree("read", run)))
    tensors = combined(plan.tensors, plan.tensor_of, rows)
    return Comparison(
        sides=tuple(Side.of(ref, source) for ref, source in zip(refs, sources, strict=True)),
        tensors=tensors,
        atol=atol,
        rtol=rtol,
        notes=(*_left_out(sources), *what_is_read.compared.sentences()),
    )


def _found(first: str | Path, second: str | Path) -> list[CheckpointRef]:
    refs = []
    for path in (first, second):
        refuse_remote("", path, stores=True)
        folder = pointed(path_of(path)).absolute()
        folder = folder if is_checkpoint(folder) else checkpoint_in(folder) or folder
        if not is_checkpoint(folder):
            raise CheckpointError(what_is(folder))
        ref = describe(folder)
        if not ref.complete:
            raise CheckpointError(f"{folder} is not a whole checkpoint: {ref.incomplete_because}")
        refs.append(ref)
    if path_of(refs[0].path).samefile(path_of(refs[1].path)):
        raise UsageError(f"{first} and {second} are one checkpoint, {refs[0].path}: give two")
    return refs


def _opened(refs: Sequence[CheckpointRef], weights_only: bool) -> list[Source]:
    """Both, with main params where they are wanted, or are the only weights that are stored."""
    known = [registry.get(ref.format, ref.path) for ref in refs]
    pairs = list(zip(known, refs, strict=True))
    if weights_only:
        sources = [each.read_source(ref.path, {}, False) for each, ref in pairs]
        thin = any(source.snapshot for source in sources)
        if not thin and all(map(_stored, (t for s in sources for t in s.space.weights.values()))):
            return sources
    try:
        return [each.read_source(ref.path, {}, True) for each, ref in pairs]
    except PlanError as error:
        raise PlanError(
            f"{error}. Weights alone can be compared with {switch('weights_only')}"
        ) from error


def _plan(sources: Sequence[Source], size: int, threads: int, weights_only: bool) -> ComparisonPlan:
    tensors, tasks = [], []
    for state, key in _entries(sources, weights_only):
        pair = [_held(source, state, key) for source in sources]
        tensors.append(TensorComparison.of(state, key, pair))
        one, other = pair
        if one is not None and other is not None and one.shape == other.shape:
            whole = Piece(Box.whole(one.shape), None)
            for source, tensor in zip(sources, (one, other), strict=True):
                check_covers(source, key, PieceIndex(tensor.pieces), [whole])
            task = average_task(
                sources[1], state, key, lead=other.pieces, numbers=(0, 1), tensors=(one, other)
            )
            tasks.append((len(tensors) - 1, task))
    if not tasks:
        names = [first_few(source.space.weights, 3) for source in sources]
        raise PlanError(
            f"{sources[0].path} ({sources[0].format}) and {sources[1].path} "
            f"({sources[1].format}) have no tensor of one name and shape: they are of two models, "
            "or of two trainers, which call parameters otherwise. Export both (`pma export`) to "
            f"compare them as Hugging Face models. Names in the first: {names[0]}; in the "
            f"second: {names[1]}"
        )
    number_of = {id(task): number for number, task in tasks}
    cut = units(task for _, task in tasks)
    return ComparisonPlan(
        sources=tuple(sources),
        visible=(tuple(range(size)),) * 2,
        threads=threads,
        tensors=tuple(tensors),
        units=cut,
        tensor_of=tuple(number_of[id(unit.task)] for unit in cut),
    )


def _entries(sources: Sequence[Source], weights_only: bool) -> Iterator[tuple[str, str]]:
    """Every state of every tensor of either, each once; weights first.

    Where one of the two stores main params and no weights (a snapshot, whose weights are main
    params; ZeRO-3), main params stand for the weights of both. A snapshot has no moments to lack.
    """
    thin = sources[0].snapshot != sources[1].snapshot
    mains: dict[str, None] = {}
    for key in _either([{**source.space.weights, **source.frozen} for source in sources]):
        weights = [
            None if thin and source.snapshot else _held(source, _WEIGHT, key) for source in sources
        ]
        exact = [_held(source, MAIN, key) for source in sources]
        if None in weights and (None not in exact or weights == [None, None]):
            mains[key] = None
        else:
            yield _WEIGHT, key
    for state in _either([{MAIN: None}, *(source.space.states for source in sources)]):
        for key in _either([source.space.states.get(state, {}) for source in sources]):
            if state == MAIN and not (weights_only or thin):
                mains[key] = None
            elif state != MAIN and not (weights_only or thin):
                yield state, key
        if state == MAIN:
            for key in mains:
                if any(_held(source, MAIN, key) is not None for source in sources):
                    yield MAIN, key


def _held(source: Source, state: str, key: str) -> Tensor | None:
    """A state of a tensor that has values there; a frozen parameter's weight is its value."""
    found = source.tensor(state, key)
    if found is None and state == _WEIGHT:
        found = source.frozen.get(key)
    return found if found is not None and _stored(found) else None


def _stored(tensor: Tensor) -> bool:
    """Weights of tags of ZeRO-3 are known by name alone."""
    return bool(tensor.pieces) or 0 in tensor.shape


def _either(both: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for each in both for name in each))


def _left_out(sources: Sequence[Source]) -> Iterator[str]:
    """What is stored and was not compared, a sentence each."""
    for which, source in zip(("first", "second"), sources, strict=True):
        others = [*source.objects, *source.unnamed, *source.aliases]
        copies = sum(
            len(tensor.replicas)
            for tensors in (source.space.weights, *source.space.states.values())
            for tensor in tensors.values()
        )
        if others:
            yield f"not compared: other entries of the {which}, {first_few(others, 3)}"
        if copies:
            yield f"not compared: {copies} further copies of parts of tensors in the {which}"


class _Space:
    """One thread's buffers."""

    def __init__(self) -> None:
        self.stored = (BlockBuffers(), BlockBuffers())
        self.proof = Workspace(0)


def _measured(
    plan: ComparisonPlan,
    mine: Sequence[AverageUnit],
    comm: Comm,
    progress: Progress,
    reads: Mapping[int, Reads],
    tolerances: tuple[float, float],
) -> np.ndarray:
    """[units, COLUMNS] of this rank."""
    result = np.zeros((len(mine), len(COLUMNS)))
    places = {id(unit): place for place, unit in enumerate(mine)}
    with reading(plan, comm.rank, reads) as readers, comm.watched("read") as check:
        add = Accumulator(plan, readers, (), ())

        def do(unit: AverageUnit, space: _Space) -> None:
            check()
            result[places[id(unit)]] = _unit(add, unit, space, tolerances)
            progress(unit.cost_bytes)

        over_threads(mine, plan.threads, do, _Space)
    return result


def _unit(
    add: Accumulator, unit: AverageUnit, space: _Space, tolerances: tuple[float, float]
) -> np.ndarray:
    work = add.locate(unit, unit.task.numbers)
    for each in work.inputs:
        each.reader.advise()
    row = np.zeros(len(COLUMNS))
    for first, block in blocks(work.box, BLOCK_ELEMENTS):
        pair = []
        for each, buffers in zip(work.inputs, space.stored, strict=True):
            buffer = buffers.buffer(each.dtype, block.numel)
            each.reader.read(block, first, buffer)
            pair.append(buffer)
        if work.proof is not None:
            add.prove(work, block, first, pair[1], space.proof)
        _block(row, pair[0], pair[1], tolerances)
    return row


def _block(
    row: np.ndarray, one: BlockBuffer, other: BlockBuffer, tolerances: tuple[float, float]
) -> None:
    """Add a block to a row of `COLUMNS`."""
    first = one.tensor.double()
    squares = float(torch.dot(first, first))
    if not math.isfinite(squares):
        squares = float(first.nan_to_num(0.0, 0.0, 0.0).square().sum())
    row[_SQUARES] += squares
    alike = one.tensor.dtype == other.tensor.dtype
    if alike and same_bits(one, other):
        return
    second = other.tensor.double()
    if alike and one.itemsize in _BITS:
        bits = _BITS[one.itemsize]
        differs = one.tensor.view(bits) != other.tensor.view(bits)
    else:
        differs = (first != second) & ~(first.isnan() & second.isnan())
    distance = (second - first).abs_()
    beyond = torch.zeros_like(differs)
    if not math.isfinite(float(distance.sum())):
        strange = ~(first.isfinite() & second.isfinite())
        distance[strange] = 0.0
        distance.nan_to_num_()  # two numbers that lie farther apart than float64 reaches
        beyond = differs & (strange | (distance == torch.finfo(torch.float64).max))
        row[_NOT_FINITE] += float((differs & strange).sum())
    atol, rtol = tolerances
    beyond |= differs & (distance > first.abs().mul_(rtol).add_(atol)) if atol or rtol else differs
    row[_DIFFERENT] += float(differs.sum())
    row[_BEYOND] += float(beyond.sum())
    row[_LARGEST] = max(row[_LARGEST], float(distance.max()))
    row[_DISTANCES] += float(torch.dot(distance, distance))
