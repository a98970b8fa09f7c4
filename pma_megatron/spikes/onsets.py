"""Where a run was lost, what it came back from, and what of it nobody saw: points to iterations.

A point says what the iterations since the point before it were like: with `--log-interval 100` its
loss is their mean, and a TensorBoard file has one of them. So what was off at a point may have
begun right after the last point that was well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pma_megatron.spikes.detector import SIGMA_PER_MAD, SpikeDetector
from pma_megatron.spikes.healthy import GivenUp, Span
from pma_megatron.spikes.metrics import Metrics, Overwritten
from pma_megatron.spikes.points import MetricsPoint
from pma_megatron.spikes.settings import Kind, SpikeSettings, Suspicion, Verdict

_REMEMBERED = 1000  # points before a branch that its baseline is taken from; far above any window


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """A series of points, and what the detector says of it.

    Attributes:
        points: in order.
        verdicts: oldest first.
        back: for each verdict the iteration at which the loss was back, None where it was not.
        suspicion: a rise that is still open at the end.
        learned: what was learned from and not judged, from the first to the last logged iteration.
        doubted: what of that was above the rest of it, from the first iteration that may have been.
    """

    points: Sequence[MetricsPoint]
    verdicts: tuple[Verdict, ...]
    back: tuple[int | None, ...]
    suspicion: Suspicion | None
    learned: tuple[Span, ...]
    doubted: tuple[Span, ...]

    @property
    def lost(self) -> Verdict | None:
        """The first fatal verdict that the loss has not come back from, None without any."""
        both = zip(self.verdicts, self.back, strict=True)
        return next((verdict for verdict, back in both if verdict.fatal and back is None), None)

    def well_until(self, onset: int) -> int:
        """The last logged iteration before `onset` with a loss that was well; 0 without any."""
        well = (p.iteration for p in reversed(self.points) if p.iteration < onset and _finite(p))
        return next(well, 0)

    def spans(self, before: int) -> tuple[Span, ...]:
        """Spikes before an iteration that the run came back from; a level that stays is none."""
        spikes = tuple(
            Span(self.well_until(verdict.onset) + 1, before if back is None else back)
            for verdict, back in zip(self.verdicts, self.back, strict=True)
            if verdict.onset < before and verdict.kind is not Kind.SHIFT
        )
        return spikes + tuple(span for span in self.doubted if span.first < before)


def judge(points: Sequence[MetricsPoint], settings: SpikeSettings) -> Course:
    """What the detector says of a finished series, and what it cannot know."""
    detector = SpikeDetector(settings)
    verdicts: list[Verdict] = []
    unjudged: list[bool] = []
    for point in points:
        verdict = detector.update(point.iteration, point.loss, point.grad_norm)
        verdicts += [verdict] if verdict is not None else []
        unjudged.append(verdict is None and detector.learning)
    back = tuple(
        _back(points, verdict, settings) if verdict.fatal else verdict.confirmed
        for verdict in verdicts
    )
    runs = [
        [point for point, _ in run]
        for learned, run in groupby(zip(points, unjudged, strict=True), itemgetter(1))
        if learned
    ]
    return Course(
        points=points,
        verdicts=tuple(verdicts),
        back=back,
        suspicion=detector.suspicion,
        learned=tuple(Span(run[0].iteration, run[-1].iteration) for run in runs),
        doubted=tuple(
            span
            for run in runs
            for span in _doubted(
                _after_spikes(run, verdicts, back),
                settings,
                falls=run[0] is points[0] and from_the_start(points),
            )
        ),
    )


def from_the_start(points: Sequence[MetricsPoint]) -> bool:
    """Whether points begin where a run begins: no line before the first is missing."""
    step = points[1].iteration - points[0].iteration if points[1:] else 1
    return points[0].iteration <= step


def _after_spikes(
    run: Sequence[MetricsPoint], verdicts: Sequence[Verdict], back: Sequence[int | None]
) -> list[MetricsPoint]:
    """Points of a run that do not lie in a fatal spike, for what lies there is known."""
    ends = [
        math.inf if end is None else end
        for verdict, end in zip(verdicts, back, strict=True)
        if verdict.fatal and verdict.confirmed < run[0].iteration
    ]
    return [point for point in run if point.iteration > max(ends, default=0)]


def _doubted(
    points: Sequence[MetricsPoint], settings: SpikeSettings, *, falls: bool
) -> tuple[Span, ...]:
    """Where the losses that a detector has learned from were above the lowest level among them.

    A loss that was only learned from is known by its neighbours alone. At the beginning of a run it
    falls, so there only what came before counts; later a run that comes from above was in a spike.
    """
    finite = [point for point in points if _finite(point)]
    losses = np.array([point.loss for point in finite])
    if len(losses) < 2 * settings.settle:
        return ()
    medians = np.median(sliding_window_view(losses, settings.settle), axis=1)
    lowest = np.full(len(losses), medians.min())
    if falls:
        lowest[: settings.settle] = math.inf
        lowest[settings.settle :] = np.minimum.accumulate(medians)[:-1]
    steps = np.diff(losses)
    sigma = SIGMA_PER_MAD * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2)
    above = losses - lowest
    off = above > max(settings.fatal_rise, settings.threshold * sigma)
    for end in np.flatnonzero(medians - lowest[settings.settle - 1 :] > settings.fatal_rise):
        window = slice(end, end + settings.settle)
        off[window] |= above[window] > settings.fatal_rise / 2
    found = []
    for is_off, some in groupby(range(len(finite)), off.__getitem__):
        run = [*some]
        if is_off:
            before = finite[run[0] - 1].iteration if run[0] else finite[0].iteration - 1
            found.append(Span(before + 1, finite[run[-1]].iteration))
    return tuple(found)


def given_up(
    metrics: Metrics, saved: Mapping[int, int | None], settings: SpikeSettings
) -> tuple[GivenUp, ...]:
    """What was run twice and has checkpoints, which may be of the branch that was given up.

    Args:
        metrics: of the run.
        saved: iterations of its checkpoints, and the samples that each has consumed, if known.
        settings: of the detector.
    """
    found = (_given_up(metrics.points, branch, saved, settings) for branch in metrics.overwritten)
    return tuple(each for each in found if each is not None)


def _given_up(
    points: Sequence[MetricsPoint],
    branch: Overwritten,
    saved: Mapping[int, int | None],
    settings: SpikeSettings,
) -> GivenUp | None:
    shared = [point for point in points if point.iteration < branch.again]
    after = shared[-1].iteration if shared else 0
    whole = [*shared[-_REMEMBERED:], *branch.points]
    # The branch may have gone on to where its next line would have been.
    last = (whole if whole[1:] else points)[-2:]
    step = max((y.iteration - x.iteration for x, y in pairwise(last)), default=1)
    span = Span(after + 1, whole[-1].iteration + step - 1)
    if not any(iteration in span for iteration in saved):
        return None
    newer = _consumed(points)
    anew = frozenset(
        iteration
        for iteration, samples in _consumed(branch.points).items()
        if newer.get(iteration, samples) != samples and saved.get(iteration) == newer[iteration]
    )
    # Two runs from the start: each is judged on its own.
    twice = from_the_start(whole)
    if len(shared) < settings.warmup and not twice:
        return GivenUp(span, after, None, anew)
    course = judge(whole, settings)
    end = whole[-1].iteration + 1
    unjudged = [each for each in course.learned if each.last > after]
    if unjudged and (not twice or unjudged[-1].last == whole[-1].iteration):
        # As far as it was judged, and not at all where a branch from the start never was.
        end = after + 1 if twice else max(after, unjudged[0].first - 1) + 1
    off = [v.onset for v in course.verdicts if v.confirmed > after and v.kind is not Kind.SHIFT]
    off += [each.first for each in course.doubted if each.last > after]
    off += [course.suspicion.onset] if course.suspicion is not None else []
    onset = min(off, default=None)
    end = end if onset is None else min(end, onset)
    return GivenUp(span, course.well_until(end), onset, anew)


def _consumed(points: Sequence[MetricsPoint]) -> dict[int, int]:
    """Samples by iteration, where they were logged."""
    return {p.iteration: p.consumed_samples for p in points if p.consumed_samples is not None}


def _back(points: Sequence[MetricsPoint], verdict: Verdict, settings: SpikeSettings) -> int | None:
    """Iteration at which the loss was back after a fatal verdict, and stayed for a while.

    It is where the medians of `settle` points and of the `window` from there on are; where no
    baseline is known, finite in a whole window.
    """
    known = math.isfinite(verdict.baseline)
    highest = verdict.baseline + settings.min_rise if known else math.inf
    few = settings.settle if known else settings.window
    after = [point for point in points if point.iteration > verdict.confirmed]
    losses = [point.loss if _finite(point) else math.inf for point in after]

    def is_well(some: list[float]) -> bool:
        median = statistics.median(some)
        return median <= highest and median < math.inf

    for start in range(len(losses) - few + 1):
        if is_well(losses[start : start + few]) and is_well(
            losses[start : start + settings.window]
        ):
            return after[start + few - 1].iteration
    return None


def _finite(point: MetricsPoint) -> bool:
    return math.isfinite(point.loss)
