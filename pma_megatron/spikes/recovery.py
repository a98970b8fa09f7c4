"""From a run that broke to one that goes on: onset, healthy checkpoints, their merge, a command."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.settings import made, values
from pma_megatron.base.spelling import first_few, given, hint, named, speaking
from pma_megatron.errors import MetricsError, PublishError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import holding
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.trainers.saves import output_name, save_of
from pma_megatron.merging.job import Show, merge, plan, silent
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.report import MergeReport, from_a_copy
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.spikes.detector import Verdict
from pma_megatron.spikes.healthy import GivenUp, Healthy, HealthyRequest, Span, choose_healthy
from pma_megatron.spikes.metrics import Metrics, read_metrics
from pma_megatron.spikes.onsets import Course, given_up, judge
from pma_megatron.spikes.relaunch import Resume, resume, resume_script
from pma_megatron.spikes.request import KEYWORDS, MOST_SKIPPED, RecoveryRequest
from pma_megatron.spikes.unsure import not_judged, nothing_lost
from pma_megatron.storage.paths import absolute, in_store, path_of, place_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was found before anything is written.

    Attributes:
        onset: first iteration that was seen to be off.
        well_until: the last iteration before it that was logged, and well; 0 without any.
        verdicts: all spikes in the metrics, oldest first.
        back: for each of them the iteration at which the loss was back, None where it was not.
        healthy: what to merge, what not, and why.
        resume: how to go on.
        notes: sentences for the user.
    """

    onset: int
    well_until: int
    verdicts: tuple[Verdict, ...]
    back: tuple[int | None, ...]
    healthy: Healthy
    resume: Resume
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "onset": self.onset,
            "well_until": self.well_until,
            "verdicts": [
                {**asdict(verdict), "kind": verdict.kind.value, "back": back}
                for verdict, back in zip(self.verdicts, self.back, strict=True)
            ],
            "chosen": [ref.path for ref in self.healthy.selection.refs],
            "rejected": [
                {"path": each.ref.path, "reason": each.reason} for each in self.healthy.rejected
            ],
            "flags": {flag: list(values) for flag, values in self.resume.flags.items()},
            "resume": self.resume.spelled(),
            "notes": [*self.notes, *self.healthy.notes, *self.resume.notes],
        }


@speaking(KEYWORDS)
def diagnose(request: RecoveryRequest) -> Diagnosis:
    """Find the onset and choose what to recover from; reads metadata, writes nothing.

    Raises:
        MetricsError: the metrics cannot be read, or are of another run than the checkpoints.
        SelectionError: no spike was found, no healthy checkpoint is left, or none to resume from.
        PublishError: the folder to save to holds other averages, which training would save over.
        UsageError, CheckpointError: see `merge`.
    """
    found, healthy = _chosen(request, list_checkpoints(request.load))
    _refuse_others(request, healthy.selection.refs[-1])
    skip, notes = _skipped(request, found)
    how = _resume(request, healthy.selection.refs, skip)
    return Diagnosis(
        onset=found.onset,
        well_until=found.well_until,
        verdicts=found.verdicts,
        back=found.back,
        healthy=healthy,
        resume=how,
        notes=(*found.notes, *notes),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What is known of a spike, and of the run before it."""

    onset: int
    well_until: int
    confirmed: int | None = None
    verdicts: tuple[Verdict, ...] = ()
    back: tuple[int | None, ...] = ()
    course: Course | None = None
    given_up: tuple[GivenUp, ...] = ()
    notes: tuple[str, ...] = ()


def _chosen(request: RecoveryRequest, refs: Sequence[CheckpointRef]) -> tuple[_Found, Healthy]:
    """Where the run went wrong, and what to take from before; raises as `diagnose`."""
    if request.onset is not None:
        found = _Found(onset=request.onset, well_until=request.onset - 1, notes=_unskipped(request))
    else:
        found = _found(request, refs)
    course = found.course
    asked = made(
        HealthyRequest,
        values(request),
        onset=found.onset,
        well_until=found.well_until,
        spans=() if course is None else course.spans(found.onset),
        given_up=found.given_up,
    )
    healthy = choose_healthy(refs, asked)
    unsure = () if course is None else not_judged(healthy.selection.refs, course)
    return replace(found, notes=(*found.notes, *unsure)), healthy


def _found(request: RecoveryRequest, refs: Sequence[CheckpointRef]) -> _Found:
    """What the metrics say.

    Raises:
        MetricsError, SelectionError: see `diagnose`.
    """
    metrics = read_metrics(
        request.metrics or (),
        loss=request.loss,
        grad_norm=request.grad_norm,
        batch_samples=_batch_samples(refs),
    )
    notes = [*metrics.notes, *_same_run(metrics, refs)]
    course = judge(metrics.points, request.spike)
    lost = course.lost
    if lost is None:
        raise SelectionError(nothing_lost(metrics, course, request.spike, MOST_SKIPPED))
    well_until = course.well_until(lost.onset)
    if well_until + 1 < lost.onset:
        unseen = f"between iterations {well_until} and {lost.onset}"
        notes.append(
            f"nothing was logged {unseen}: the run may have been off from {well_until + 1} on, and "
            "that is what checkpoints and skipped data are counted from"
            if well_until
            else f"no loss before iteration {lost.onset} was seen to be well, so no checkpoint is "
            f"known to be healthy: give the log from before too, or {named('onset')}"
        )
    saved: dict[int, int | None] = {}
    for ref in refs:
        if ref.iteration is not None:
            known = saved.setdefault(ref.iteration, ref.consumed_samples)
            saved[ref.iteration] = known if known == ref.consumed_samples else None
    return _Found(
        onset=lost.onset,
        well_until=well_until,
        confirmed=lost.confirmed,
        verdicts=course.verdicts,
        back=course.back,
        course=course,
        given_up=given_up(metrics, saved, request.spike),
        notes=tuple(notes),
    )


@holding()
@speaking(KEYWORDS)
def recover(
    request: RecoveryRequest, comm: Comm | None = None, show: Show = silent
) -> tuple[Diagnosis, MergeReport]:
    """Merge the healthy checkpoints from before a spike into a new run. Every rank makes this call.

    Raises:
        PmaError: see `diagnose` and `job.merge`; nothing was published, no source was touched.
    """
    comm = comm or Comm()
    found = comm.on_main("diagnose", lambda: diagnose(request))
    return found, merge(merge_request(request, found), comm, show)


def merge_request(request: RecoveryRequest, found: Diagnosis) -> MergeRequest:
    """The merge of a recovery."""
    return MergeRequest(
        load=request.load,
        save=request.save,
        selection=SelectionRequest(paths=tuple(ref.path for ref in found.healthy.selection.refs)),
        method=request.method,
        policy=Policy(optimizer_state=request.optimizer_state),
        lr_factor=request.lr_factor,
        threads=request.threads,
        overwrite=request.overwrite,
        passed_over=found.healthy.passed_over,
    )


@holding()
@speaking(KEYWORDS)
def rehearse(request: RecoveryRequest) -> Diagnosis:
    """As `recover`, but nothing is written; finds all that would be refused before the merge."""
    found = diagnose(request)
    plan(merge_request(request, found))
    return found


def _resume(request: RecoveryRequest, chosen: Sequence[CheckpointRef], skip: Span | None) -> Resume:
    """How the run goes on from a merge of `chosen`.

    Raises:
        SelectionError: it is no checkpoint that training wrote.
    """
    newest = chosen[-1]
    known = registry.get(newest.format, newest.path)
    if known.converted:
        raise SelectionError(
            f"{newest.path} is {known.converted}, converted from a run's own: a run goes on "
            f"from those. Give the folder that training saves to{hint('load')}, or merge "
            f"iterations {', '.join(str(ref.iteration) for ref in chosen)} without a recovery"
        )
    folder = path_of(newest.path)
    args, schedule = known.common(folder)["args"], known.schedule(folder)
    save, how = save_of(folder, newest.format), None
    made = place_of(absolute(request.save)) / output_name(save, known, newest.iteration)
    if save.trainer is not None:
        how = save.trainer.resumed(made)
    elif "consumed_train_samples" not in args:
        how = known.resumed(folder, made)
        if how is None and not known.tracker.by_flag:
            how = known.tracker.resumed(made.parent)
    if how is not None:
        how = from_a_copy(made) if in_store(made) else how
        return resume_script(
            how,
            request.save,
            newest.iteration,
            deepspeed=newest.format == registry.DEEPSPEED and save.trainer is None,
            skip=skip,
            lr_factor=request.lr_factor,
            command=request.command,
        )
    return resume(
        args,
        request.save,
        skip=skip,
        lr_factor=request.lr_factor,
        schedule=schedule,
        command=request.command,
    )


def _refuse_others(request: RecoveryRequest, newest: CheckpointRef) -> None:
    """The run goes on in the folder of the recovery, and saves what has its name there.

    What training itself has saved there is refused for every merge.

    Raises:
        PublishError: another average lies there.
    """
    root = path_of(place_of(absolute(request.save)), again=in_store(request.save))
    if not is_folder(root):
        return
    save = save_of(path_of(newest.path), newest.format)
    own = output_name(save, registry.get(newest.format, newest.path), newest.iteration)
    others = sorted(
        each.name
        for each in root.iterdir()
        if each.name != own
        and not each.name.startswith(".")  # what was cut off of this very recovery
        and (each / MARKER_FILE).is_file()
        and registry.detect(each) not in registry.UNTRACKED
    )
    if others:
        raise PublishError(
            f"{given('save', root)} holds {first_few(others, _SHOWN)} beside the recovery, {own}: "
            "the run goes on there, and would save its checkpoints over averages of the same "
            f"iterations. Give a new folder, or move elsewhere what is there"
        )


_SHOWN = 4  # folders that one message names


def _batch_samples(refs: Sequence[CheckpointRef]) -> int | None:
    """Samples per iteration of a run, None where its checkpoints do not agree on one."""
    saved = [ref for ref in refs if ref.complete and ref.iteration]
    sizes = {(ref.consumed_samples or 0) / (ref.iteration or 1) for ref in saved}
    size = sizes.pop() if len(sizes) == 1 else 0.0
    return int(size) if size and size.is_integer() else None


def _unskipped(request: RecoveryRequest) -> tuple[str, ...]:
    """That no data is skipped, where that may not be what was meant."""
    if request.skip is not None or not request.skip_data:
        return ()
    return (
        f"{named('onset')} does not say where the spike was known, so no data is skipped, and what "
        f"the run broke on comes again: name the iterations to pass over with {named('skip')}",
    )


def _skipped(request: RecoveryRequest, found: _Found) -> tuple[Span | None, tuple[str, ...]]:
    """The iterations whose data is skipped, and what to say of them."""
    if not request.skip_data or request.skip is not None or found.confirmed is None:
        return request.skip, ()
    first = found.well_until + 1
    skip = Span(first, min(found.confirmed, first + MOST_SKIPPED - 1))
    if skip.last >= found.onset:
        return skip, ()
    return skip, (
        f"the {MOST_SKIPPED} iterations skipped end before {found.onset}, the first that was seen "
        f"to be off: where in between it began is not known. {named('skip')} names others",
    )


def _same_run(metrics: Metrics, refs: Sequence[CheckpointRef]) -> tuple[str, ...]:
    """Refuse metrics of another run, as far as numbers tell.

    Raises:
        MetricsError: they are.
    """
    points = {point.iteration: point for point in metrics.points}
    given_up_too = {
        (point.iteration, point.consumed_samples)
        for branch in metrics.overwritten
        for point in branch.points
    }
    saved = [ref for ref in refs if ref.iteration is not None and ref.complete]
    for ref in saved:
        point = points.get(ref.iteration or 0)
        if point is None or None in (point.consumed_samples, ref.consumed_samples):
            continue
        if (ref.iteration, ref.consumed_samples) in given_up_too:
            continue
        if point.consumed_samples != ref.consumed_samples:
            raise MetricsError(
                f"{metrics.source} and {ref.path} are of different runs: at iteration "
                f"{ref.iteration} the metrics say {point.consumed_samples} consumed samples, the "
                f"checkpoint {ref.consumed_samples}. Give the metrics of this run, or "
                f"{named('onset')}"
            )
    first, last = metrics.points[0].iteration, metrics.points[-1].iteration
    steps = [later.iteration - point.iteration for point, later in pairwise(metrics.points)]
    slack = 2 * statistics.median(steps) if steps else 0
    newest = max((ref.iteration or 0 for ref in saved), default=0)
    if saved and newest < first - slack:
        raise MetricsError(
            f"{metrics.source} covers iterations {first} to {last}, the newest checkpoint is of "
            f"{newest}: nothing says that they are of one run. Give the metrics of this run, or "
            f"{named('onset')}"
        )
    if newest > last + slack:
        return (
            f"the metrics end at iteration {last}, the newest checkpoint is of {newest}: what "
            "happened in between was not seen",
        )
    return ()
