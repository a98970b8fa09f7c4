"""discover -> select -> plan -> merge -> verify -> publish, for the offline job."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pma_megatron.base import memory, steps
from pma_megatron.base.comm import Comm
from pma_megatron.base.faults import point
from pma_megatron.base.stopping import Stopped, having_published, interruptible, shielded
from pma_megatron.errors import PmaError, PublishError, RankError
from pma_megatron.formats.holding import holding
from pma_megatron.formats.manifest import FileSum
from pma_megatron.formats.output import Folder
from pma_megatron.merging import (
    engine,
    exported,
    finishing,
    journal,
    provenance,
    publish,
    resuming,
    sums,
    targets,
    uploading,
    verification,
)
from pma_megatron.merging.cards import cards
from pma_megatron.merging.carrying import carry, sha256_of
from pma_megatron.merging.exporting import refuse_nested
from pma_megatron.merging.leftovers import removed
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.publish import Target
from pma_megatron.merging.report import MergeReport, describe_plan
from pma_megatron.merging.request import MergeRequest, in_its_words
from pma_megatron.merging.source_checksums import Compared, checked
from pma_megatron.merging.structure import structure
from pma_megatron.runs.notices import moves_back
from pma_megatron.storage.paths import in_store, path_of
from pma_megatron.transfer.blocks import BlockWriter, FolderWriters
from pma_megatron.transfer.checksums import Checksums, ScatteredChecksums

_log = logging.getLogger(__name__)

Show = Callable[[str, int], AbstractContextManager[engine.Progress]]
"""(stage, total bytes of this rank) -> context that yields a progress callback."""


@contextlib.contextmanager
def silent(stage: str, total_bytes: int) -> Iterator[engine.Progress]:
    """Show nothing."""
    yield lambda _: None


@holding()
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
    request.refuse_no_output()
    sums.KERNEL.refuse()
    comm = comm or Comm(request.merge_parallel_size)
    baseline = memory.resident_bytes()
    memory.reset_peak()
    clock = _Clock()
    made = _planned(request, comm, merged=True)
    if comm.is_main:
        for sentence in made.told:
            _log.warning(sentence)
    token = comm.broadcast(publish.new_token())
    wanted = targets.targets(made, token)
    comm.on_main("refuse", lambda: targets.refuse(made, wanted))
    clock.lap("plan")
    published: list[str] = []
    with having_published(published):
        filled, checks = _made(made, wanted, comm, show, clock, published)
        peaks = comm.gather(max(0, memory.peak_resident_bytes() - baseline))
        kernels = comm.gather(str(sums.KERNEL))
        return MergeReport(
            outputs=_named(wanted, Folder.CHECKPOINT),
            exports=_named(wanted, Folder.MODEL),
            seconds=clock.seconds,
            bytes={"read": filled.read_bytes, "written": filled.written_bytes},
            peak_memory_above_baseline_bytes=tuple(peaks),
            plan=describe_plan(made),
            verification=checks,
            ranks=comm.size,
            checksums=asdict(filled.compared),
            kernels=tuple(dict.fromkeys(kernels)),
            reused=filled.reused,
        )


def _named(wanted: Sequence[Target], folder: Folder) -> tuple[str, ...]:
    return tuple(str(target.final) for target in wanted if target.folder is folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Filled:
    """Staging folders that are whole: see `MergeReport`, and how sources stand to checksums."""

    read_bytes: int
    written_bytes: int
    compared: Compared
    reused: Mapping[str, int]


def _made(
    plan: MergePlan,
    wanted: tuple[Target, ...],
    comm: Comm,
    show: Show,
    clock: _Clock,
    published: list[str],
) -> tuple[_Filled, tuple[verification.Verification, ...]]:
    """Make and publish every output; returns what that took, and what was checked of outputs.

    They are added to `published` once all are. Whatever ends this, nothing interrupts what is then
    to be cleaned up.
    """
    with shielded(), contextlib.ExitStack() as stack, interruptible():
        locks, before = comm.on_main("lock", lambda: _locked(plan, wanted, comm, stack))
        wanted = wanted if before is None else before.stagings(wanted)
        # Again, now that no other job can publish there, and what a killed one left is put right.
        comm.on_main("refuse", lambda: targets.refuse(plan, wanted))
        comm.on_main("refuse", lambda: uploading.refuse_claimed_by_others(wanted))
        there = comm.on_main("refuse", lambda: targets.already(plan, wanted))
        stack.enter_context(publish.telling(wanted))
        seen = dict(zip(wanted, publish.stamps(wanted), strict=True))
        verified: list[Target] = []
        stack.push(lambda kind, error, _: _leave(comm, seen, error, verified))
        todo = tuple(target for target, same in zip(wanted, there, strict=True) if not same)
        for target in wanted:
            if comm.is_main and target not in todo:
                _log.info("%s is kept: this very request published it before", target.final)
        done = None
        if locks and comm.merge_size == 1:  # each rank does units of its own
            done = comm.on_main("journal", lambda: journal.opened(plan, wanted, before))
        filled = _fill(plan, todo, comm, show, clock, stack, done)
        checks = tuple(_checked(plan, target, target in todo, comm) for target in wanted)
        clock.lap("verify")
        verified += todo
        begun = uploading.upload(plan, todo, comm, show)
        comm.on_main("publish", lambda: _publish(plan, todo, seen, begun, comm))
        published += [str(target.final) for target in wanted]
        clock.lap("publish")
    return filled, checks


def _locked(
    plan: MergePlan, wanted: Sequence[Target], comm: Comm, stack: contextlib.ExitStack
) -> tuple[bool, journal.Begun | None]:
    """Hold the targets.

    Returns:
        whether there are locks here, and the merge that was cut off and can be gone on with.
    """
    found: list[journal.Begun | None] = []

    def keep() -> list[Path]:
        before = journal.begun(plan, wanted) if comm.merge_size == 1 else None
        found.append(before)
        staged = () if before is None else before.stagings(wanted)
        return [path for each in staged for path in (each.staging, each.journal)]

    stack.enter_context(publish.locked(wanted, keep))
    return bool(found), found[0] if found else None


def _checked(
    plan: MergePlan, target: Target, made_now: bool, comm: Comm
) -> verification.Verification:
    """Compare one folder with the sources, as it is staged or was published before."""
    output = plan.outputs[target.output]
    folder = target.staging if made_now else path_of(str(target.final))
    if target.folder is Folder.MODEL:
        return exported.verify_model(plan, output, folder, comm)
    found = verification.verify_output(plan, output, folder, comm)
    return exported.with_weights_beside(comm, found, plan, output, folder)


@holding()
@in_its_words
def plan(request: MergeRequest, comm: Comm | None = None) -> MergePlan:
    """What `merge` would do; reads metadata, writes nothing. See `merge` for errors."""
    comm = comm or Comm(request.merge_parallel_size)
    made = _planned(request, comm)
    targets.refuse(made, targets.targets(made, "plan"))
    return made


def _planned(request: MergeRequest, comm: Comm, *, merged: bool = False) -> MergePlan:
    with steps.stage("plan"), memory.collector_at_rest():
        comm.agree("export", lambda: refuse_nested(request))
        return provenance.with_origins(make_plan(request, comm, merged=merged), comm)


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
    plan: MergePlan,
    todo: tuple[Target, ...],
    comm: Comm,
    show: Show,
    clock: _Clock,
    stack: contextlib.ExitStack,
    done: journal.Found | None,
) -> _Filled:
    """Stage and fill the folders of `plan` that are not there yet; `done` is without, or noted."""
    comm.on_main("stage", lambda: publish.stage(plan, todo))
    uploading.refuse_unseen(todo, comm)
    numbers = sorted({target.output for target in todo})
    part = replace(plan, outputs=tuple(plan.outputs[number] for number in numbers))
    single = {target: _writer(target) for target in todo}
    folders = {
        number: {t.folder: writer for t, writer in single.items() if t.output == number}
        for number in numbers
    }
    writers = [FolderWriters(each) for each in folders.values()]
    for writer in writers:
        stack.callback(writer.close)

    def split() -> resuming.Split:
        lines = done.lines if done is not None else {}
        return resuming.split(plan.units, lines, folders, found.reads, comm, plan.threads)

    def run() -> engine.Tally:
        todo_bytes = sum(unit.cost_bytes for unit in mine.todo)
        with show("merge", todo_bytes) as progress, contextlib.ExitStack() as over:
            note = None
            if done is not None:
                sums = resuming.sums_of(folders)
                note = over.enter_context(done.noting(comm.rank, sums, found.reads))
            return engine.run(
                part, mine.todo, writers, comm, comm.team, progress, found.reads, note
            )

    whole = plan.request.check_sources
    with checked(plan, comm, whole=whole, telling=done is not None) as found:
        mine = comm.agree("split", split)
        reused = _say_reused(plan, mine, comm)
        tally = comm.agree("merge", run)
    _say(found.compared, comm)
    clock.lap("merge")
    comm.agree("sync", lambda: _sync(writers, comm))
    checkpoints = [target for target in todo if target.folder is Folder.CHECKPOINT]
    files = plan.layout.carried if checkpoints else {}
    beside = carry(files, checkpoints, plan.visible[-1], comm)
    for target, own in single.items():
        carried = beside if target.folder is Folder.CHECKPOINT else {}
        _finish(plan, target, own.checksums, comm, clock, found.compared, carried)
    clock.lap("publish")
    counts = comm.gather((tally.read_bytes, tally.written_bytes))
    read, written = (sum(column) for column in zip(*counts, strict=True))
    return _Filled(read_bytes=read, written_bytes=written, compared=found.compared, reused=reused)


def _say_reused(plan: MergePlan, mine: resuming.Split, comm: Comm) -> dict[str, int]:
    """How much of a merge that was cut off counts, over all ranks."""
    units, nbytes = (sum(c) for c in zip(*comm.gather((mine.there, mine.there_bytes)), strict=True))
    if units and comm.is_main:
        _log.info(
            "going on with a merge that was cut off: %d of %d units are there, read back and as "
            "they were written (%d %% of the work)",
            units,
            len(plan.units),
            100 * nbytes // max(plan.units.cost_bytes, 1),
        )
    return {"units": units, "bytes": nbytes}


def _writer(target: Target) -> BlockWriter:
    scattered = target.folder is Folder.MODEL
    checksums = ScatteredChecksums() if scattered else Checksums()
    return BlockWriter(target.staging, checksums, setting=target.setting)


def _finish(
    plan: MergePlan,
    target: Target,
    own: Checksums,
    comm: Comm,
    clock: _Clock,
    compared: Compared,
    carried: Mapping[str, FileSum],
) -> None:
    layout, output = plan.layouts[target.folder], plan.outputs[target.output]
    found = structure(layout, target, own, comm)
    listed: dict[str, str] = {}
    if layout.digests is not None:
        names = [name for name in sorted(layout.files) if layout.digests.lists(name)]
        listed = sha256_of(target.staging, names, comm)

    def finish() -> None:
        size = comm.size
        clock.lap("publish")  # with this, what it says of its seconds goes back to its begin
        made = provenance.provenance(plan, output, target.folder, size, clock.seconds, compared)
        assert found is not None
        whole = replace(found, sums={**found.sums, **carried})
        finishing.finish(layout, target, whole, made, cards(layout, made), listed)

    comm.on_main("finish", finish)


def _say(compared: Compared, comm: Comm) -> None:
    if comm.is_main:
        for sentence in compared.sentences():
            _log.warning("%s", sentence)


def _sync(writers: Sequence[FolderWriters], comm: Comm) -> None:
    for writer in writers:
        writer.sync(comm.moved)  # no byte that this process moves shows how far a flush is
        writer.close()


def _publish(
    plan: MergePlan,
    wanted: Sequence[Target],
    before: Mapping[Target, publish.Stamp | None],
    begun: uploading.Begun,
    comm: Comm,
) -> None:
    point("publish", comm.rank)
    for target in wanted:
        back = None
        if target.folder is Folder.CHECKPOINT:
            back = moves_back(plan.sources[-1].format, target.final, plan.iteration)
        if in_store(target.final):
            uploading.complete(plan, target, begun)
        else:
            targets.refuse_since(plan, target, is_there=before[target] is not None)
            publish.publish(plan, target, before[target])
        if back is not None:
            _log.warning(back)
        _log.debug("published %s", target.final)
        point("published", comm.rank)


def _leave(
    comm: Comm,
    before: Mapping[Target, publish.Stamp | None],
    error: BaseException | None,
    verified: Sequence[Target],
) -> None:
    """Remove what is left, unless the same command can go on with it: then say that.

    Whoever was stopped, lost another rank, or has it all but published, will ask for the same
    again; not who was refused.
    """
    if not comm.is_main:
        return
    point("leave", comm.rank)
    wanted = tuple(before)
    lost = isinstance(error, RankError) and error.lost
    uploads = any(in_store(target.final) for target in verified)
    refused_late = bool(verified) and isinstance(error, PublishError)
    cut_off = uploads or refused_late or lost or isinstance(error, KeyboardInterrupt)
    pending: list[Target] = []
    if cut_off and journal.has_lines(wanted[0].journal):
        now = publish.stamps(wanted)
        both = zip(wanted, before.values(), now, strict=True)
        left = [t for t, old, new in both if not publish.is_published(t, old, new)]
        pending = [target for target in left if target.staging.exists()]
    publish.discard([target for target in wanted if target not in pending])
    if not pending:
        removed(wanted[0].journal)
    elif isinstance(error, (PmaError, Stopped)):
        error.kept = str(pending[0].staging)
