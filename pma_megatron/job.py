"""discover -> select -> plan -> merge -> verify -> publish, for the offline job."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from pma_megatron import engine, memory, publish, report, verification
from pma_megatron.blocks import BlockWriter
from pma_megatron.comm import Comm
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.faultpoints import point
from pma_megatron.integrity import Compared, checked
from pma_megatron.planning import MergePlan, make_plan
from pma_megatron.publish import Target
from pma_megatron.report import MergeReport, describe_plan
from pma_megatron.request import MergeRequest
from pma_megatron.tasks import share

_log = logging.getLogger(__name__)

Show = Callable[[str, int], AbstractContextManager[engine.Progress]]
"""(stage, total bytes of this rank) -> context that yields a progress callback."""


@contextlib.contextmanager
def silent(stage: str, total_bytes: int) -> Iterator[engine.Progress]:
    """Show nothing."""
    yield lambda _: None


def merge(request: MergeRequest, comm: Comm | None = None, show: Show = silent) -> MergeReport:
    """Merge checkpoints into new ones that Megatron resumes from. Every rank makes this call.

    Args:
        request: what to merge, how, and where to.
        comm: the ranks; by default those of the current process group.
        show: shows progress.

    Raises:
        UsageError, SelectionError, CheckpointError, PlanError, PublishError: the request cannot be
            met; nothing was published and no source was touched.
        VerifyError: the result is not what it must be; nothing was published.
        RankError: another rank failed.
    """
    if request.save is None:
        raise UsageError("merge needs --save, the folder for the merged checkpoint")
    comm = comm or Comm(request.merge_parallel_size)
    baseline = memory.resident_bytes()
    memory.reset_peak()
    clock = _Clock()
    made = make_plan(request, comm)
    token = comm.broadcast(publish.new_token())
    wanted = publish.targets(made, request.save, token)
    comm.on_main("refuse", lambda: publish.refuse(made, wanted))
    clock.lap("plan")
    with contextlib.ExitStack() as stack:
        comm.on_main("lock", lambda: stack.enter_context(publish.locked(wanted)) and None)
        # Again, now that no other job can publish there, and what a killed one left is put right.
        comm.on_main("refuse", lambda: publish.refuse(made, wanted))
        stack.callback(_discard, comm, wanted)
        read, written, compared = _fill(made, wanted, comm, show, clock, stack)
        checks = tuple(
            verification.verify_output(made, output, target.staging, comm)
            for output, target in zip(made.outputs, wanted, strict=True)
        )
        clock.lap("verify")
        comm.on_main("publish", lambda: _publish(made, wanted, comm))
        clock.lap("publish")
    peaks = comm.gather(max(0, memory.peak_resident_bytes() - baseline))
    return MergeReport(
        outputs=tuple(str(target.final) for target in wanted),
        seconds=clock.seconds,
        bytes={"read": read, "written": written},
        peak_memory_above_baseline_bytes=tuple(peaks),
        plan=describe_plan(made),
        verification=checks,
        ranks=comm.size,
        checksums=asdict(compared),
    )


def plan(request: MergeRequest, comm: Comm | None = None) -> MergePlan:
    """What `merge` would do; reads metadata, writes nothing. See `merge` for errors."""
    comm = comm or Comm(request.merge_parallel_size)
    made = make_plan(request, comm)
    if request.save is not None:
        publish.refuse(made, publish.targets(made, request.save, "plan"))
    return made


def verify(folder: Path, *, samples: int = 256, full: bool = True) -> verification.Verification:
    """Check a published merge against its sources, found through its provenance.

    Raises:
        CheckpointError: no provenance, or sources are gone or changed.
        VerifyError: a value is not what it must be.
    """
    recorded = report.read_provenance(folder)
    request = report.request_again(recorded)
    comm = Comm()
    again = make_plan(request, comm)
    for source, saved in zip(again.sources, recorded["plan"]["sources"], strict=True):
        if source.metadata_digest != saved["metadata_digest"]:
            raise CheckpointError(
                f"{source.path} is not what was merged: its metadata changed since. The merged "
                f"checkpoint {folder} can no longer be verified against it"
            )
    return verification.verify_output(
        again, again.outputs[0], folder, comm, samples=samples, full=full
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._from_s = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last call to `stage`."""
        now_s = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now_s - self._from_s
        self._from_s = now_s


def _fill(plan: MergePlan, wanted: tuple[Target, ...], comm: Comm, show: Show,
          clock: _Clock, stack: contextlib.ExitStack
          ) -> tuple[int, int, Compared]:  # fmt: skip
    """Stage and fill every output.

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
    comm.agree("sync", lambda: _sync(writers))
    for number, (output, target) in enumerate(zip(plan.outputs, wanted, strict=True)):
        parts = comm.collect(writers[number].checksums.parts)
        made = report.provenance(plan, output, comm.size, clock.seconds, found.compared)
        comm.on_main("finish", lambda p=parts, t=target, m=made: publish.finish(plan, t, p, m))  # type: ignore[misc]
    clock.lap("publish")
    comm.agree("verify", lambda: point("verify", comm.rank))
    counts = comm.gather((tally.read_bytes, tally.written_bytes))
    read, written = (sum(column) for column in zip(*counts, strict=True))
    return read, written, found.compared


def _say(compared: Compared, comm: Comm) -> None:
    if comm.is_main:
        for sentence in compared.sentences():
            _log.warning("%s", sentence)


def _sync(writers: list[BlockWriter]) -> None:
    for writer in writers:
        writer.sync()
        writer.close()


def _publish(plan: MergePlan, wanted: tuple[Target, ...], comm: Comm) -> None:
    point("publish", comm.rank)
    for target in wanted:
        publish.publish(plan, target)
        _log.debug("published %s", target.final)


def _discard(comm: Comm, wanted: tuple[Target, ...]) -> None:
    if comm.is_main:
        publish.discard(wanted)
