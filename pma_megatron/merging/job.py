"""discover -> select -> plan -> merge -> verify -> publish, for the offline job."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

from pma_megatron.base import memory
from pma_megatron.base.comm import Comm
from pma_megatron.base.faults import point
from pma_megatron.base.spelling import named
from pma_megatron.base.stopping import Stopped, having_published
from pma_megatron.errors import PmaError, UsageError
from pma_megatron.merging import engine, finishing, provenance, publish, sums, verification
from pma_megatron.merging.integrity import Compared, checked
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.publish import Target
from pma_megatron.merging.report import MergeReport, describe_plan
from pma_megatron.merging.request import MergeRequest, in_its_words
from pma_megatron.merging.tasks import share
from pma_megatron.runs.notices import moves_back
from pma_megatron.transfer.blocks import BlockWriter

_log = logging.getLogger(__name__)

Show = Callable[[str, int], AbstractContextManager[engine.Progress]]
"""(stage, total bytes of this rank) -> context that yields a progress callback."""


@contextlib.contextmanager
def silent(stage: str, total_bytes: int) -> Iterator[engine.Progress]:
    """Show nothing."""
    yield lambda _: None


@in_its_words
def merge(request: MergeRequest, comm: Comm | None = None, show: Show = silent) -> MergeReport:
    """Merge checkpoints into new ones that Megatron resumes from. Every rank makes this call.

    Args:
        request: what to merge, how, and where to.
        comm: the ranks; by default those of the current process group.
        show: shows progress.

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError, PublishError: the request cannot be
            met; no source was touched.
        VerifyError: the result is not what it must be.
        RankError: another rank failed.

    Nothing was published, or what the error's `published` names (outputs of a sweep that came
    before the failure): the same call makes the rest.
    """
    if request.save is None:
        raise UsageError(f"merge needs {named('save')}, the folder for the merged checkpoint")
    comm = comm or Comm(request.merge_parallel_size)
    baseline = memory.resident_bytes()
    memory.reset_peak()
    clock = _Clock()
    made = make_plan(request, comm)
    token = comm.broadcast(publish.new_token())
    wanted = publish.targets(made, request.save, token)
    comm.on_main("refuse", lambda: publish.refuse(made, wanted))
    clock.lap("plan")
    read, written, compared, checks = _made(made, wanted, comm, show, clock)
    with having_published([str(target.final) for target in wanted]):
        peaks = comm.gather(max(0, memory.peak_resident_bytes() - baseline))
        kernels = comm.gather(str(sums.KERNEL))
    return MergeReport(
        outputs=tuple(str(target.final) for target in wanted),
        seconds=clock.seconds,
        bytes={"read": read, "written": written},
        peak_memory_above_baseline_bytes=tuple(peaks),
        plan=describe_plan(made),
        verification=checks,
        ranks=comm.size,
        checksums=asdict(compared),
        kernels=tuple(dict.fromkeys(kernels)),
    )


def _made(
    plan: MergePlan, wanted: tuple[Target, ...], comm: Comm, show: Show, clock: _Clock
) -> tuple[int, int, Compared, tuple[verification.Verification, ...]]:
    """Make and publish every output; returns bytes read and written, and what was checked of
    sources and outputs."""
    with contextlib.ExitStack() as stack:
        comm.on_main("lock", lambda: stack.enter_context(publish.locked(wanted)) and None)
        # Again, now that no other job can publish there, and what a killed one left is put right.
        comm.on_main("refuse", lambda: publish.refuse(plan, wanted))
        there = comm.on_main("refuse", lambda: publish.already(plan, wanted))
        stack.enter_context(_saying_what_is_published(wanted))
        stack.callback(_discard, comm, wanted)
        todo = tuple(target for target, same in zip(wanted, there, strict=True) if not same)
        outputs = tuple(out for out, same in zip(plan.outputs, there, strict=True) if not same)
        for target in wanted:
            if comm.is_main and target not in todo:
                _log.info("%s is kept: this very request published it before", target.final)
        read, written, compared = _fill(
            plan, replace(plan, outputs=outputs), todo, comm, show, clock, stack
        )
        folders = [target.staging if target in todo else target.final for target in wanted]
        checks = tuple(
            verification.verify_output(plan, output, folder, comm)
            for output, folder in zip(plan.outputs, folders, strict=True)
        )
        clock.lap("verify")
        comm.on_main("publish", lambda: _publish(plan, todo, comm))
        clock.lap("publish")
    return read, written, compared, checks


@contextlib.contextmanager
def _saying_what_is_published(wanted: Sequence[Target]) -> Iterator[None]:
    """An error says what this job had published before it."""
    before = publish.stamps(wanted)
    try:
        yield
    except (PmaError, Stopped) as error:
        now = publish.stamps(wanted)
        names = {str(t.final): new != old for t, new, old in zip(wanted, now, before, strict=True)}
        error.published = tuple(name for name, is_new in names.items() if is_new)
        error.unpublished = tuple(name for name, is_new in names.items() if not is_new)
        raise


@in_its_words
def plan(request: MergeRequest, comm: Comm | None = None) -> MergePlan:
    """What `merge` would do; reads metadata, writes nothing. See `merge` for errors."""
    comm = comm or Comm(request.merge_parallel_size)
    made = make_plan(request, comm)
    if request.save is not None:
        publish.refuse(made, publish.targets(made, request.save, "plan"))
    return made


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._from_s = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last call to `stage`."""
        now_s = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now_s - self._from_s
        self._from_s = now_s


def _fill(
    whole: MergePlan,
    plan: MergePlan,
    wanted: tuple[Target, ...],
    comm: Comm,
    show: Show,
    clock: _Clock,
    stack: contextlib.ExitStack,
) -> tuple[int, int, Compared]:
    """Stage and fill the outputs of `plan`, those of `whole` that are not there yet.

    Returns:
        bytes read and written over all ranks, and how sources stand to their checksums.
    """
    comm.on_main("stage", lambda: publish.stage(plan, wanted))
    comm.agree("stage", lambda: point("stage", comm.rank))
    units = share(plan.units, comm.shard_rank, comm.shard_size)
    writers = [BlockWriter(target.staging) for target in wanted]
    for writer in writers:
        stack.callback(writer.close)

    def run() -> engine.Tally:
        with show("merge", sum(unit.cost_bytes for unit in units)) as progress:
            return engine.run(plan, units, writers, comm, comm.team, progress, found.reads)

    comm.agree("merge", lambda: point("merge", comm.rank))
    with checked(plan, comm, whole=plan.request.check_sources) as found:
        tally = comm.agree("merge", run)
    _say(found.compared, comm)
    clock.lap("merge")
    comm.agree("sync", lambda: point("sync", comm.rank))
    comm.agree("sync", lambda: _sync(writers, comm))
    for number, (output, target) in enumerate(zip(plan.outputs, wanted, strict=True)):
        parts = comm.collect(writers[number].checksums)
        made = provenance.provenance(whole, output, comm.size, clock.seconds, found.compared)
        comm.on_main("finish", lambda p=parts, t=target, m=made: finishing.finish(plan, t, p, m))  # type: ignore[misc]
    clock.lap("publish")
    comm.agree("verify", lambda: point("verify", comm.rank))
    counts = comm.gather((tally.read_bytes, tally.written_bytes))
    read, written = (sum(column) for column in zip(*counts, strict=True))
    return read, written, found.compared


def _say(compared: Compared, comm: Comm) -> None:
    if comm.is_main:
        for sentence in compared.sentences():
            _log.warning("%s", sentence)


def _sync(writers: list[BlockWriter], comm: Comm) -> None:
    for writer in writers:
        writer.sync(comm.moved)  # no byte that this process moves shows how far a flush is
        writer.close()


def _publish(plan: MergePlan, wanted: tuple[Target, ...], comm: Comm) -> None:
    point("publish", comm.rank)
    for target in wanted:
        back = moves_back(plan.sources[-1].format, target.final, plan.iteration)
        publish.publish(plan, target)
        if back is not None:
            _log.warning(back)
        _log.debug("published %s", target.final)
        point("published", comm.rank)


def _discard(comm: Comm, wanted: tuple[Target, ...]) -> None:
    if comm.is_main:
        publish.discard(wanted)
