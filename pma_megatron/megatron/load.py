"""PMA-init: average checkpoints straight into a live model and its optimizer.

Megatron first resumes as always, from one checkpoint; that gives iteration, samples, scheduler, RNG
and moments. Then the sources are averaged into the float32 main params, and the weights follow by
the optimizer's own copy and parameter all-gather, as after a step.

Every source byte is read once over all replicas of a shard. By slice: each replica reads the part
of all sources that its main params hold, and nothing is communicated; where main params are not
sharded, replicas take turns at blocks. By source: replicas read different sources and all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pma_megatron import engine, memory
from pma_megatron.comm import Comm, Team
from pma_megatron.errors import UsageError
from pma_megatron.faultpoints import point
from pma_megatron.megatron.live import LivePlan, LiveWriter, average_units, by_group
from pma_megatron.megatron.params import LiveTensor, live_tensors, parts
from pma_megatron.megatron.replicas import forward_hooks_off, refresh_weights, replica_group
from pma_megatron.planning import Gathered, gather_sources, refuse_changed
from pma_megatron.policy import MAIN, Policy
from pma_megatron.request import MergeRequest, Method
from pma_megatron.selection import SelectionRequest
from pma_megatron.tasks import Unit

SHARES = ("auto", "source", "slice")
STATES = ("latest", "average", "reset")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReport:
    """What a merge into live tensors did.

    Attributes:
        sources: folders, oldest first.
        coefficients: one per source.
        share: how replicas divided the reading, `source` or `slice`.
        read_bytes: payload bytes read over all ranks.
        peak_memory_above_baseline_bytes: per rank.
        seconds: from the call to the end.
    """

    sources: tuple[str, ...]
    coefficients: tuple[float, ...]
    share: str
    read_bytes: int
    peak_memory_above_baseline_bytes: tuple[int, ...]
    seconds: float

    def __str__(self) -> str:
        weights = ", ".join(f"{value:.4g}" for value in self.coefficients)
        return (
            f"{len(self.sources)} checkpoints, {self.sources[0]} to {self.sources[-1]}, "
            f"coefficients {weights}; {self.read_bytes / 2**30:.2f} GiB read by {self.share} in "
            f"{self.seconds:.1f} s"
        )


def merge_into(models: Sequence[Any], optimizer: Any, *, load: str,
               selection: SelectionRequest | None = None, method: Method | None = None,
               optimizer_state: str = "latest", share: str = "auto", threads: int = 2,
               metadata: Mapping[str, Any] | None = None) -> LiveReport:  # fmt: skip
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

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError: refused on every rank. Unless it
            happened while values were read, no live tensor was touched; if it did, they are a
            mixture: do not train on.
        RankError: another rank failed.
    """
    comm, start_s = Comm(), time.perf_counter()
    baseline = memory.resident_bytes()
    memory.reset_peak()
    request = comm.agree(
        "request", lambda: _request(load, selection, method, optimizer_state, share, threads)
    )
    share = "slice" if share == "auto" else share
    found = gather_sources(request, comm, everywhere=share == "source")
    tensors = comm.agree("model", lambda: live_tensors(models, optimizer, metadata))
    plan = LivePlan(
        sources=found.sources,
        visible=found.visible,
        coefficients=tuple(output.values for output in found.outputs),
        threads=threads,
    )
    states = (MAIN, *_MOMENTS) if optimizer_state == "average" else (MAIN,)
    jobs = comm.agree("plan", lambda: _jobs(plan, found, tensors, states, share))
    comm.agree("init", lambda: point("init", comm.rank))
    with forward_hooks_off(models):
        read_bytes = 0
        for units, team in jobs:
            tally = comm.agree(
                "init",
                lambda u=units, t=team: _run(plan, u, comm, t),  # type: ignore[misc]
            )
            read_bytes += tally.read_bytes
        comm.agree("sources", lambda: refuse_changed(plan, comm))
        comm.agree("init", lambda: point("init-refresh", comm.rank))
        if optimizer_state == "reset":
            reset_moments(optimizer, tensors)
        refresh_weights(models, optimizer)
    peaks = comm.gather(max(0, memory.peak_resident_bytes() - baseline))
    return LiveReport(
        sources=tuple(source.path for source in found.sources),
        coefficients=plan.coefficients[0],
        share=share,
        read_bytes=sum(comm.gather(read_bytes)),
        peak_memory_above_baseline_bytes=tuple(peaks),
        seconds=time.perf_counter() - start_s,
    )


def _request(load: str, selection: SelectionRequest | None, method: Method | None,
             optimizer_state: str, share: str, threads: int) -> MergeRequest:  # fmt: skip
    chosen = {"share": (share, SHARES), "optimizer_state": (optimizer_state, STATES)}
    for name, (value, known) in chosen.items():
        if value not in known:
            raise UsageError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    return MergeRequest(
        load=load,
        selection=selection or SelectionRequest(),
        method=method or Method(),
        policy=Policy(optimizer_state=optimizer_state),
        threads=threads,
    )


def _jobs(plan: LivePlan, found: Gathered, tensors: Sequence[LiveTensor], states: Sequence[str],
          share: str) -> list[tuple[list[Unit], Team]]:  # fmt: skip
    """Units per team, in one order on all ranks."""
    jobs = []
    for (sharded, expert), group in by_group(tensors).items():
        alone = sharded and share == "slice"
        team = Team((dist.get_rank() if dist.is_initialized() else 0,), 0) if alone else (
            replicas(expert, by_source=share == "source")
        )  # fmt: skip
        jobs.append((average_units(plan, found.active, group, states, whole=team.size > 1), team))
    return jobs


def _run(plan: LivePlan, units: Sequence[Unit], comm: Comm, team: Team) -> engine.Tally:
    return engine.run(plan, units, [LiveWriter()], comm, team, lambda _: None)


def replicas(expert: bool, *, by_source: bool) -> Team:
    """The ranks that hold the same part of the model as this one, this one included."""
    group = replica_group(expert)
    members = tuple(dist.get_process_group_ranks(group))
    place = members.index(dist.get_rank())
    return Team(members, place, group if len(members) > 1 else None, by_source, all_write=True)


def reset_moments(optimizer: Any, tensors: Sequence[LiveTensor]) -> None:
    """Moments and step count become zero; param groups and their learning rates stay."""
    for live in tensors:
        if live.part is None or live.numel == 0:
            continue
        states = live.states()
        for name in _MOMENTS:
            if name in states:
                states[name].detach().zero_()
        if live.by_copy:
            live.part._set_main_param_and_optimizer_states(live.tensor, states)
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                step = group["step"]
                group["step"] = torch.zeros_like(step) if isinstance(step, torch.Tensor) else 0
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()
