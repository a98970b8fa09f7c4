"""What every merge into live tensors does, whatever trainer holds them.

Every source byte is read once over all replicas of a shard. By slice: each replica reads the part
of all sources that its main params hold, and nothing is communicated; where main params are not
sharded, replicas take turns at blocks. By source: replicas read different sources and all-reduce.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pma_megatron.base import memory
from pma_megatron.base.comm import Comm, Team
from pma_megatron.base.log import say
from pma_megatron.base.settings import declared, described, refuse_unknown_words, same, setting
from pma_megatron.base.spelling import FrontEnd, fields
from pma_megatron.live.cost import cost, said
from pma_megatron.live.plan import LivePlan, LiveWriter
from pma_megatron.live.poison import Trainer, cure, poisoned_on_failure
from pma_megatron.merging import engine, sums
from pma_megatron.merging.planning import OpenedSources
from pma_megatron.merging.policy import MAIN, RESUMED_STATES, Policy
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.merging.source_checksums import Compared, checked
from pma_megatron.merging.tasks import AverageUnit
from pma_megatron.runs.gaps import PassedOver
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.transfer.reads import Reads


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """How an average is made in live tensors.

    Raises:
        UsageError: an unknown word.
    """

    optimizer_state: str = same(
        Policy,
        "optimizer_state",
        help="moments and step, the latest being those that were resumed",
        choices=RESUMED_STATES,
    )
    share: str = setting(
        "auto",
        "what replicas of a shard divide: the sources, which they all-reduce, or slices of all "
        "of them, as auto does; sources that lie on some nodes only need source",
        choices=("auto", "source", "slice"),
    )
    threads: int = same(MergeRequest, "threads")
    check_sources: bool = same(MergeRequest, "check_sources")

    def __post_init__(self) -> None:
        refuse_unknown_words(self)


DEFAULTS = Live()
"""What calls do that are not told otherwise."""
ARGUMENTS = FrontEnd(
    fields(each.name for kind in (SelectionRequest, Method, Live) for each in declared(kind))
    | fields(["load", "window_dir", "save_dir", "keep"])
)
"""Settings as Python calls with a `SelectionRequest` and a `Method` spell them."""
Job = tuple[list[AverageUnit], Team]
"""Units, and the ranks that do them together."""


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
        compared: how what was read stands to its checksums.
        kernels: what summed, each once (`MergeReport.kernels`).
        passed_over: what lies in the window and was not used.
    """

    sources: tuple[str, ...]
    coefficients: tuple[float, ...]
    share: str
    read_bytes: int
    peak_memory_above_baseline_bytes: tuple[int, ...]
    seconds: float
    compared: Compared
    kernels: tuple[str, ...]
    passed_over: tuple[PassedOver, ...] = ()

    def __str__(self) -> str:
        weights = ", ".join(f"{value:.4g}" for value in self.coefficients)
        said = (
            f"{len(self.sources)} checkpoints, {self.sources[0]} to {self.sources[-1]}, "
            f"coefficients {weights}; {self.read_bytes / 2**30:.2f} GiB read by {self.share} in "
            f"{self.seconds:.1f} s, summed by {' and '.join(self.kernels)}"
        )
        return "; ".join((said, *self.compared.sentences()))


class Meter:
    """What a merge costs, from its making on.

    Attributes:
        read_bytes: payload bytes that this rank read.
        compared: what `fill` says of their checksums.
    """

    def __init__(self, comm: Comm) -> None:
        self.read_bytes = 0
        self.compared: Compared | None = None
        self._comm, self._start_s = comm, time.perf_counter()
        self._baseline_bytes = memory.resident_bytes()
        memory.reset_peak()

    def report(self, plan: LivePlan, share: str, passed_over: tuple[PassedOver, ...]) -> LiveReport:
        """The report of all ranks. Collective."""
        assert self.compared is not None
        peak_bytes = max(0, memory.peak_resident_bytes() - self._baseline_bytes)
        return LiveReport(
            sources=tuple(source.path for source in plan.sources),
            coefficients=plan.coefficients[0],
            share=share,
            read_bytes=sum(self._comm.gather(self.read_bytes)),
            peak_memory_above_baseline_bytes=tuple(self._comm.gather(peak_bytes)),
            seconds=time.perf_counter() - self._start_s,
            compared=self.compared,
            kernels=tuple(dict.fromkeys(self._comm.gather(str(sums.KERNEL)))),
            passed_over=passed_over,
        )


def averaged_states(found: OpenedSources, optimizer_state: str) -> tuple[str, ...]:
    """Main params, and where moments are averaged those that the newest source has."""
    if optimizer_state != "average":
        return (MAIN,)
    return (MAIN, *sorted(set(found.sources[-1].space.states) - {MAIN}))


def live_request(
    load: str,
    selection: SelectionRequest | None,
    method: Method | None,
    live: Live,
    resumed: int | None = None,
) -> MergeRequest:
    """What a merge into live tensors asks for; `resumed` as in `MergeRequest`."""
    return MergeRequest(
        load=load,
        selection=selection or SelectionRequest(),
        method=method or Method(),
        policy=Policy(optimizer_state=live.optimizer_state),
        threads=live.threads,
        check_sources=live.check_sources,
        resumed=resumed,
    )


def fill(
    plan: LivePlan,
    jobs: Sequence[Job],
    comm: Comm,
    meter: Meter,
    trainer: Trainer,
    finish: Callable[[], None],
    *,
    check_sources: bool = False,
) -> None:
    """Average into live tensors. Every rank makes this call, with as many jobs.

    Args:
        plan: the sources.
        jobs: of this rank.
        comm: the ranks.
        meter: gets what was read.
        trainer: what the tensors belong to; poisoned on every rank if anything fails from the
            first element on, and whole again at the end.
        finish: what follows from new main params.
        check_sources: see `MergeRequest`.

    Raises:
        CheckpointError, PlanError: on every rank.
        RankError: another rank failed.
    """
    own = comm.agree("cost", lambda: cost(plan, jobs))
    say(said(plan, own, comm))
    with poisoned_on_failure(trainer, "averaging checkpoints into it"):
        with checked(plan, comm, whole=check_sources) as found:
            for job in jobs:
                tally = comm.agree("init", functools.partial(run, plan, job, comm, found.reads))
                meter.read_bytes += tally.read_bytes
        meter.compared = found.compared
        comm.agree("refresh", finish)
    cure(trainer)


def run(plan: LivePlan, job: Job, comm: Comm, reads: Mapping[int, Reads]) -> engine.Tally:
    """One job, by this rank."""
    units, team = job
    return engine.run(plan, units, [LiveWriter()], comm, team, lambda _: None, reads)
