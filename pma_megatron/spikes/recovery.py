"""From a run that broke to one that goes on: onset, healthy checkpoints, their merge, a command."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.settings import made, values
from pma_megatron.base.spelling import hint, named, speaking
from pma_megatron.errors import MetricsError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import holding
from pma_megatron.formats.trainers.saves import output_name, save_of
from pma_megatron.merging.job import Show, merge, plan, silent
from pma_megatron.merging.policy import Policy
from pma_megatron.merging.report import MergeReport, from_a_copy
from pma_megatron.merging.request import MergeRequest
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.spikes.detector import Kind, SpikeSettings, Verdict, detect
from pma_megatron.spikes.healthy import Healthy, HealthyRequest, Span, choose_healthy
from pma_megatron.spikes.metrics import Metrics, read_metrics
from pma_megatron.spikes.relaunch import Resume, resume, resume_script
from pma_megatron.spikes.request import KEYWORDS, MOST_SKIPPED, RecoveryRequest
from pma_megatron.storage.paths import absolute, in_store, path_of, place_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was found before anything is written.

    Attributes:
        onset: first iteration that was off.
        verdicts: all spikes in the metrics, oldest first.
        healthy: what to merge, what not, and why.
        resume: how to go on.
        notes: sentences for the user.
    """

    onset: int
    verdicts: tuple[Verdict, ...]
    healthy: Healthy
    resume: Resume
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "onset": self.onset,
            "verdicts": [{**asdict(v), "kind": v.kind.value} for v in self.verdicts],
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
        UsageError, CheckpointError: see `merge`.
    """
    refs = list_checkpoints(request.load)
    metrics: Metrics | None = None
    verdicts: tuple[Verdict, ...] = ()
    notes: list[str] = []
    if request.metrics is not None:
        metrics = read_metrics(
            request.metrics,
            loss=request.loss,
            grad_norm=request.grad_norm,
            batch_samples=_batch_samples(refs),
        )
        notes += (*metrics.notes, *_same_run(metrics, refs))
        verdicts = tuple(
            detect(((p.iteration, p.loss, p.grad_norm) for p in metrics.points), request.spike)
        )
    onset, skip = _onset(request, metrics, verdicts)
    spans = () if metrics is None else _spans(metrics, verdicts, onset)
    asked = made(HealthyRequest, values(request), onset=onset, spans=spans)
    healthy = choose_healthy(refs, asked)
    how = _resume(request, healthy.selection.refs, skip)
    return Diagnosis(
        onset=onset, verdicts=verdicts, healthy=healthy, resume=how, notes=tuple(notes)
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
    if newest.format in registry.UNTRACKED:
        raise SelectionError(
            f"{newest.path} is a model without an optimizer, and training cannot go on from it. "
            f"Give the folder that training saves its own checkpoints to{hint('load')}, or average "
            "the models with pma merge"
        )
    folder = path_of(newest.path)
    args, schedule = known.common(folder)["args"], known.schedule(folder)
    save, how = save_of(folder, newest.format), None
    if save.trainer is not None:
        made = place_of(absolute(request.save)) / output_name(save, known, newest.iteration)
        how = from_a_copy(made) if in_store(made) else save.trainer.resumed(made)
    elif not known.tracker.by_flag and "consumed_train_samples" not in args:
        root = place_of(request.save)
        how = from_a_copy(root / "tag") if in_store(root) else known.tracker.resumed(request.save)
    if how is not None:
        return resume_script(
            how,
            request.save,
            newest.iteration,
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


def _batch_samples(refs: Sequence[CheckpointRef]) -> int | None:
    """Samples per iteration of a run, None where its checkpoints do not agree on one."""
    saved = [ref for ref in refs if ref.complete and ref.iteration]
    sizes = {(ref.consumed_samples or 0) / (ref.iteration or 1) for ref in saved}
    size = sizes.pop() if len(sizes) == 1 else 0.0
    return int(size) if size and size.is_integer() else None


def _onset(
    request: RecoveryRequest, metrics: Metrics | None, verdicts: Sequence[Verdict]
) -> tuple[int, Span | None]:
    """The onset, and the iterations whose data is skipped."""
    if request.onset is not None:
        return request.onset, request.skip
    assert metrics is not None
    lost = _lost(metrics, verdicts)
    if lost is None:
        seen = "; ".join(f"{v.kind.value} from iteration {v.onset}: {v.reason}" for v in verdicts)
        raise SelectionError(
            f"{metrics.source} shows no spike that the run did not recover from, in "
            f"{len(metrics.points)} points, iterations {metrics.points[0].iteration} to "
            f"{metrics.points[-1].iteration}{f' (seen: {seen})' if seen else ''}. If you know "
            f"better, name its first iteration with {named('onset')}; {named('patience')} and "
            f"{named('fatal_rise')} change what counts"
        )
    if not request.skip_data or request.skip is not None:
        return lost.onset, request.skip
    return lost.onset, Span(lost.onset, min(lost.confirmed, lost.onset + MOST_SKIPPED - 1))


def _lost(metrics: Metrics, verdicts: Sequence[Verdict]) -> Verdict | None:
    """The fatal verdict that the run has not come back from, None without any.

    The last one, or an earlier one if the loss did not come back in between: what follows a
    collapse may collapse once more.
    """
    fatal = [verdict for verdict in verdicts if verdict.fatal]
    lost = fatal[-1] if fatal else None
    for earlier in reversed(fatal[:-1]):
        assert lost is not None
        if _back(metrics, earlier, lost.onset) is not None:
            break
        lost = earlier
    return lost


def _spans(metrics: Metrics, verdicts: Sequence[Verdict], onset: int) -> tuple[Span, ...]:
    """Spikes before `onset` that the run came back from; a higher level that stays is none."""
    found = []
    for verdict in verdicts:
        if verdict.onset >= onset or verdict.kind is Kind.SHIFT:
            continue
        end = _back(metrics, verdict, onset) if verdict.fatal else verdict.confirmed
        found.append(Span(verdict.onset, onset if end is None else end))
    return tuple(found)


def _back(metrics: Metrics, verdict: Verdict, before: int) -> int | None:
    """Iteration at which the loss was back, over a few points, after a fatal verdict."""
    points = [p for p in metrics.points if verdict.confirmed < p.iteration < before]
    few = SpikeSettings().settle
    for end in range(few, len(points) + 1):
        recent = statistics.median(point.loss for point in points[end - few : end])
        if recent <= verdict.baseline + SpikeSettings().min_rise:
            return points[end - 1].iteration
    return None


def _same_run(metrics: Metrics, refs: Sequence[CheckpointRef]) -> tuple[str, ...]:
    """Refuse metrics of another run, as far as numbers tell.

    Raises:
        MetricsError: they are.
    """
    points = {point.iteration: point for point in metrics.points}
    saved = [ref for ref in refs if ref.iteration is not None and ref.complete]
    for ref in saved:
        point = points.get(ref.iteration or 0)
        if point is None or None in (point.consumed_samples, ref.consumed_samples):
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
