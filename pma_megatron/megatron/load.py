"""PMA-init: average checkpoints straight into a live model and its optimizer.

Megatron first resumes as always, from one checkpoint; that gives iteration, samples, scheduler, RNG
and moments. Then the sources are averaged into the float32 main params, and the weights follow by
the optimizer's own copy and parameter all-gather, as after a step. Who reads what: `live_load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pma_megatron.base.comm import Comm, Team
from pma_megatron.base.spelling import given, listing, speaking
from pma_megatron.errors import SelectionError
from pma_megatron.formats.holding import holding
from pma_megatron.live.load import (
    ARGUMENTS,
    DEFAULTS,
    Job,
    Live,
    LiveReport,
    Meter,
    fill,
    live_request,
)
from pma_megatron.live.plan import LivePlan, average_units
from pma_megatron.live.poison import Trainer, chain, state_loads
from pma_megatron.megatron.params import MegatronTensor, live_tensors, parts
from pma_megatron.megatron.replicas import forward_hooks_off, refresh_weights, replica_group
from pma_megatron.merging.planning import OpenedSources, gather_sources
from pma_megatron.merging.policy import MAIN
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.runs.selection_request import SelectionRequest

_MOMENTS = ("exp_avg", "exp_avg_sq")


@holding()
@speaking(ARGUMENTS)
def merge_into(
    models: Sequence[Any],
    optimizer: Any,
    *,
    load: str,
    selection: SelectionRequest | None = None,
    method: Method | None = None,
    optimizer_state: str = DEFAULTS.optimizer_state,
    share: str = DEFAULTS.share,
    threads: int = DEFAULTS.threads,
    metadata: Mapping[str, Any] | None = None,
    check_sources: bool = False,
    resumed: int | None = None,
) -> LiveReport:
    """Replace a live model's weights and main params by an average. Every rank makes this call.

    Args:
        models: the model chunks, wrapped as Megatron's training has them.
        optimizer: Megatron's optimizer of those chunks.
        load: root of the sources.
        selection: which (default: the last 10).
        method: how they are weighted (default: SMA).
        optimizer_state: moments become `latest` (left as they are), `average`, or `reset` (zero,
            and the step count with them).
        share: `slice` or `source`; `auto` is slice. Sources that lie on some nodes only need
            `source`.
        threads: reader threads per rank.
        metadata: what the model's `sharded_state_dict` gets; None for its default.
        check_sources: read records whole that this reads in part, to compare their checksums.
        resumed: iteration of `load` that the model and its moments are of; unless `selection` says
            where the average ends, it ends there. None for what the run's tracker names.

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError: refused on every rank. Unless it
            happened while values were read, no live tensor was touched; if it did, they are a
            mixture, and the next forward pass or step raises `PoisonedError` until a whole load
            has ended well.
        RankError: another rank failed.
    """
    comm = Comm()
    meter = Meter(comm)
    request = comm.agree(
        "request",
        lambda: live_request(
            load,
            selection,
            method,
            Live(optimizer_state=optimizer_state, share=share, threads=threads),
            resumed,
        ),
    )
    share = "slice" if share == "auto" else share
    found = gather_sources(request, comm, everywhere=share == "source")
    comm.agree("select", lambda: _refuse_other_end(found, request))
    tensors = comm.agree("model", lambda: live_tensors(models, optimizer, metadata))
    plan = LivePlan.of(found, threads)
    states = (MAIN, *_MOMENTS) if optimizer_state == "average" else (MAIN,)

    def finish() -> None:
        if optimizer_state == "reset":
            reset_moments(optimizer, tensors)
        refresh_weights(models, optimizer)

    with listing(request.list_setting), forward_hooks_off(models):
        jobs = comm.agree("plan", lambda: _jobs(plan, found, tensors, states, share, comm))
        trainer = trainer_of(models, optimizer)
        fill(plan, jobs, comm, meter, trainer, finish, check_sources=check_sources)
    return meter.report(plan, share, found.selection.passed_over)


def _refuse_other_end(found: OpenedSources, request: MergeRequest) -> None:
    """Moments and iteration are of what was resumed: an average that ends elsewhere is asked for.

    Raises:
        SelectionError: nobody asked for it.
    """
    chosen, end = request.selection, found.selection.refs[-1]
    named = chosen.end_iteration is not None or chosen.iterations or chosen.paths
    if request.resumed in (None, end.iteration) or named:
        return
    if end.snapshot and (end.iteration or 0) > request.resumed:
        way = "It is a snapshot, which nothing resumes from: end the average at what was resumed "
        way += f"({given('end_iteration', request.resumed)})"
    else:
        resume = f"Resume from iteration {end.iteration} (--ckpt-step), or say"
        wanted = f"that it is wanted ({given('end_iteration', end.iteration)})"
        way = f"{'Say' if end.snapshot else resume} {wanted}"
    raise SelectionError(
        f"training has resumed iteration {request.resumed}, and the newest checkpoint of "
        f"{request.load} that an average can end at is {end.path}: moments would be of another "
        f"checkpoint than weights. {way}"
    )


def trainer_of(models: Sequence[Any], optimizer: Any) -> Trainer:
    """What a live load writes into; whole again when Megatron has loaded model and optimizer."""
    holders = [part for part in (optimizer, *parts(optimizer)) if part is not None]
    loaded = [*models, *([] if optimizer is None else [optimizer])]
    return Trainer(
        modules=chain(models),
        methods=tuple((part, "step") for part in dict.fromkeys(holders)),
        loads=state_loads(loaded),
    )


def _jobs(
    plan: LivePlan,
    found: OpenedSources,
    tensors: Sequence[MegatronTensor],
    states: Sequence[str],
    share: str,
    comm: Comm,
) -> list[Job]:
    """Units per team, in one order on all ranks."""
    jobs = []
    for (sharded, expert), group in by_group(tensors).items():
        alone = sharded and share == "slice"
        team = comm.team if alone else replicas(expert, by_source=share == "source")
        jobs.append((average_units(plan, found.active, group, states, whole=team.size > 1), team))
    return jobs


def by_group(tensors: Iterable[MegatronTensor]) -> Mapping[tuple[bool, bool], list[MegatronTensor]]:
    """Tensors by (main params sharded over replicas, replicas are the expert group)."""
    groups: dict[tuple[bool, bool], list[MegatronTensor]] = {
        (sharded, expert): [] for sharded in (True, False) for expert in (False, True)
    }
    for live in tensors:
        groups[live.sharded, live.expert].append(live)
    return groups


def replicas(expert: bool, *, by_source: bool) -> Team:
    """The ranks that hold the same part of the model as this one, this one included."""
    return Team.of(replica_group(expert), by_source=by_source)


def reset_moments(optimizer: Any, tensors: Sequence[MegatronTensor]) -> None:
    """Moments and step count become zero; param groups and their learning rates stay."""
    for live in tensors:
        if live.part is None or live.numel == 0:
            continue
        states = live.states()
        for name in _MOMENTS:
            if name in states:
                states[name].detach().zero_()
        if live.by_copy:
            live.set_states(states)
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                step = group["step"]
                group["step"] = torch.zeros_like(step) if isinstance(step, torch.Tensor) else 0
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()
