"""Losses of many averages of one run with one live model, and no merge written anywhere.

Each point of a grid is averaged straight into the weights of the forward pass and scored by the
caller; afterwards the weights are what they were. Checkpoints are opened once, not once per point;
replicas share the reading as in PMA-init.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.comm import Comm
from pma_megatron.errors import UsageError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import holding
from pma_megatron.formats.source import Source
from pma_megatron.live.load import DEFAULTS, Job, run
from pma_megatron.live.plan import LivePlan, average_units
from pma_megatron.megatron.load import replicas
from pma_megatron.megatron.params import MegatronTensor, live_tensors
from pma_megatron.megatron.swap import weights_restored
from pma_megatron.merging.agreement import refuse_rounded
from pma_megatron.merging.opening import open_sources
from pma_megatron.merging.policy import MAIN
from pma_megatron.merging.request import MergeRequest
from pma_megatron.merging.source_checksums import checked
from pma_megatron.runs.discover import choose, list_checkpoints, pointers_of
from pma_megatron.runs.gaps import PassedOver
from pma_megatron.runs.notices import announce
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.scores.grid import Grid, GridPoint
from pma_megatron.scores.identity import identified
from pma_megatron.scores.results import Checkpoint, Other, Score, Scores

Losses = float | Mapping[str, float]
EachLoss = Callable[[Callable[[torch.Tensor], None]], None]
"""Calls what it is given with one differentiable scalar per batch, the same batches each time;
their mean is the loss. Where gradients are off, the scalars need not be differentiable."""
LOSS = "loss"
"""Name of the loss where `score` returns a bare number."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A model and what scores it: what a provider of `pma evaluate` returns on every rank.

    Attributes:
        models: the model chunks, wrapped or not.
        score: forward passes over fixed held-out batches; the same result on every rank.
        metadata: what the model's `sharded_state_dict` gets; None for its default.
        close: called at the end.
    """

    models: Sequence[Any]
    score: Callable[[], Losses]
    metadata: Mapping[str, Any] | None = None
    close: Callable[[], None] = field(default=lambda: None)


@holding()
def score_merges(
    models: Sequence[Any],
    load: str,
    grid: Grid,
    score: Callable[[], Losses],
    *,
    metadata: Mapping[str, Any] | None = None,
    threads: int = DEFAULTS.threads,
    others: Sequence[str] = (),
    comm: Comm | None = None,
) -> Scores:
    """Score every average of a grid with a live model. Every rank makes this call.

    An average is the float32 average of the main params where the checkpoints hold them, rounded
    once into the weights' dtype: the bits that a resume from the offline merge gives. Weights keep
    their storage, and whatever is raised they are at the end bit for bit what they were. Main
    params and optimizer state of a live optimizer are not touched.

    Args:
        models: the model chunks, in any wrapping of Megatron's, with or without an optimizer.
        load: the run's folder.
        grid: which averages.
        score: forward passes over fixed held-out batches, in evaluation mode; returns a loss, or
            losses by name, the same on every rank.
        metadata: what the model's `sharded_state_dict` gets; None for its default.
        threads: reader threads per rank.
        others: further folders (a run's, or one `iter_*`) whose newest checkpoint is scored as it
            is: the ends of annealing runs.
        comm: the ranks; by default those of the current process group.

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError: refused, on every rank.
        RankError: another rank failed.
    """
    comm = comm or Comm()
    request = comm.agree("request", lambda: MergeRequest(load=load, threads=threads))
    refs = comm.on_main("discover", lambda: scored_refs(load, grid))
    points, skipped = comm.agree("grid", lambda: grid.points(refs))
    left = _passed_over(points, aloud=comm.is_main)
    ends = [comm.on_main("discover", functools.partial(_newest, root)) for root in others]
    tensors = comm.agree("model", lambda: live_tensors(models, None, metadata))
    members = _open(request, points, comm)
    stored = comm.on_main("schedule", lambda: _checkpoints([*points, *ends]))

    def scored(point: GridPoint, opened: Mapping[str, Source]) -> dict[str, float]:
        sources = [opened[ref.path] for ref in point.selection.refs]
        average_into(tensors, sources, point.coefficients, comm, threads)
        losses = losses_of(score, comm)
        _tell(point, losses)
        return losses

    with weights_restored(models, tensors):
        made = [Score.of(point, scored(point, members)) for point in points]
        apart = []
        for root, end in zip(others, ends, strict=True):
            opened = _open(request, [end], comm)
            [known] = _identified([end.end], stored, opened)
            apart.append(Other(root=root, checkpoint=known, losses=scored(end, opened)))
    newest = members[points[-1].end.path]
    return Scores(
        load=load,
        parameters=newest.parameters,
        active_parameters=newest.active_parameters,
        moe=newest.is_moe,
        checkpoints=_identified(_members(points), stored, members),
        points=tuple(made),
        skipped=tuple(skipped),
        passed_over=left,
        others=tuple(apart),
    )


def _identified(
    refs: Sequence[CheckpointRef], stored: Mapping[str, Checkpoint], opened: Mapping[str, Source]
) -> tuple[Checkpoint, ...]:
    return tuple(identified(stored[ref.path], opened[ref.path]) for ref in refs)


def _newest(root: str) -> GridPoint:
    """The newest checkpoint of a run as it is."""
    alone = Grid(lasts=(1,))
    points, _ = alone.points(scored_refs(root, alone))
    return points[0]


def _tell(point: GridPoint, losses: Mapping[str, float]) -> None:
    shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    what = f"{point.label}, N = {len(point.coefficients)}, up to {point.end.path}"
    _log.info("%s: %s", what, shown)


def _members(points: Sequence[GridPoint]) -> list[CheckpointRef]:
    """Every checkpoint of the points once, oldest first."""
    found = {ref.path: ref for point in points for ref in point.selection.refs}
    return sorted(found.values(), key=lambda ref: ref.iteration or 0)


def scored_refs(root: str, grid: Grid, *, aloud: bool = True) -> list[CheckpointRef]:
    """The checkpoints of a run, up to where an average ends by default, unless ends are named.

    What is newer is said on the log if `aloud`.

    Raises:
        SelectionError: the folder is of no use.
    """
    refs = list_checkpoints(root)
    newest = SelectionRequest(last=1, exclude=grid.exclude, allow_gaps=grid.allow_gaps)
    selection = choose(refs, newest, root, pointers_of(root))
    if aloud:
        announce(selection)
    if not isinstance(grid.ends, str):
        return refs
    newer = {each.path for each in selection.passed_over}
    return [ref for ref in refs if ref.path not in newer]


def _passed_over(points: Sequence[GridPoint], *, aloud: bool) -> tuple[PassedOver, ...]:
    """What lies in the window of any of them, and cannot be used; by iteration."""
    found = {each.path: each for point in points for each in point.selection.passed_over}
    bad = (
        e for e in found.values() if e.kind in ("damaged", "unreadable", "spoiled", "not judged")
    )
    left = tuple(sorted(bad, key=lambda each: each.iteration or 0))
    for each in left if aloud else ():
        _log.warning(str(each))
    return left


def _open(request: MergeRequest, points: Sequence[GridPoint], comm: Comm) -> dict[str, Source]:
    """Every checkpoint of the points by path, each opened once."""
    refs = _members(points)
    ends = {point.end.path for point in points}
    numbers = [number for number, ref in enumerate(refs) if ref.path in ends]
    everywhere = (tuple(range(comm.size)),) * len(refs)
    return {s.path: s for s in open_sources(request, refs, everywhere, comm, numbers)}


def average_into(
    tensors: Sequence[MegatronTensor],
    sources: Sequence[Source],
    coefficients: Sequence[float],
    comm: Comm,
    threads: int,
) -> None:
    """The weights become the average. Every rank makes this call.

    Args:
        tensors: of this rank; see `swap.weights_restored` for what puts them back.
        sources: oldest first, opened with the newest's map.
        coefficients: one per source.
        comm: the ranks.
        threads: reader threads per rank.

    Raises:
        CheckpointError, PlanError: a source is damaged, or of another model; on every rank.
        RankError: another rank failed.
    """
    plan = LivePlan(
        sources=tuple(sources),
        visible=(tuple(range(comm.size)),) * len(sources),
        coefficients=(tuple(coefficients),),
        threads=threads,
    )
    with checked(plan, comm) as found:
        for job in comm.agree("plan", lambda: _jobs(plan, tensors)):
            comm.agree("average", functools.partial(run, plan, job, comm, found.reads))


def _jobs(plan: LivePlan, tensors: Sequence[MegatronTensor]) -> list[Job]:
    """Units per team of replicas, in one order on all ranks."""
    refuse_rounded(plan.sources)
    active = [number for number, value in enumerate(plan.coefficients[0]) if value != 0]
    jobs = []
    for expert in (False, True):
        group = [live for live in tensors if live.expert is expert]
        team = replicas(expert, by_source=False)
        units = average_units(plan, active, group, (MAIN,), whole=team.size > 1, rounded=True)
        jobs.append((units, team))
    return jobs


def losses_of(score: Callable[[], Losses], comm: Comm) -> dict[str, float]:
    """What `score` finds, by name. Every rank makes this call.

    Raises:
        UsageError: no loss, or another one on another rank.
    """
    found = comm.agree("score", score)
    losses = comm.agree("losses", lambda: _plain(found))
    by_rank = comm.gather(losses)
    wrong = [rank for rank, theirs in enumerate(by_rank) if repr(theirs) != repr(by_rank[0])]
    if wrong:
        raise UsageError(
            f"score() returned {by_rank[0]} on rank 0 and {by_rank[wrong[0]]} on rank {wrong[0]}: "
            "return the same on every rank, for instance by an all-reduce over the data-parallel "
            "ranks and a broadcast from the last pipeline stage"
        )
    return losses


def _plain(found: Losses) -> dict[str, float]:
    losses = dict(found) if isinstance(found, Mapping) else {LOSS: found}
    if not losses:
        raise UsageError("score() returned no loss: return a number, or names and numbers")
    return {str(name): float(value) for name, value in losses.items()}


def _checkpoints(points: Sequence[GridPoint]) -> dict[str, Checkpoint]:
    return {
        ref.path: Checkpoint(
            path=ref.path,
            iteration=ref.iteration or 0,
            consumed_tokens=ref.consumed_tokens,
            schedule=registry.get(ref.format, ref.path).schedule(Path(ref.path)),
        )
        for ref in _members(points)
    }
