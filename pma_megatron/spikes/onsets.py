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
from itertools import pairwise

from pma_megatron.spikes.detector import SpikeDetector
from pma_megatron.spikes.healthy import GivenUp, Span
from pma_megatron.spikes.metrics import Metrics, Overwritten
from pma_megatron.spikes.points import MetricsPoint
from pma_megatron.spikes.settings import Kind, SpikeSettings, Verdict

_REMEMBERED = 1000  # points before a branch that its baseline is taken from; far above any window


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """A series of points, and what the detector says of it.

    Attributes:
        points: in order.
        verdicts: oldest first.
        back: for each verdict the iteration at which the loss was back, None where it was not.
        suspect_since: onset of a rise that is still open at the end.
    """

    points: Sequence[MetricsPoint]
    verdicts: tuple[Verdict, ...]
    back: tuple[int | None, ...]
    suspect_since: int | None

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
        return tuple(
            Span(self.well_until(verdict.onset) + 1, before if back is None else back)
            for verdict, back in zip(self.verdicts, self.back, strict=True)
            if verdict.onset < before and verdict.kind is not Kind.SHIFT
        )


def judge(points: Sequence[MetricsPoint], settings: SpikeSettings) -> Course:
    """What the detector says of a finished series."""
    detector = SpikeDetector(settings)
    said = (detector.update(p.iteration, p.loss, p.grad_norm) for p in points)
    verdicts = tuple(verdict for verdict in said if verdict is not None)
    back = tuple(
        _back(points, verdict, settings) if verdict.fatal else verdict.confirmed
        for verdict in verdicts
    )
    return Course(points=points, verdicts=verdicts, back=back, suspect_since=detector.suspect_since)


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
    step = max((y.iteration - x.iteration for x, y in pairwise(whole[-2:])), default=1)
    span = Span(after + 1, whole[-1].iteration + step - 1)
    if not any(iteration in span for iteration in saved):
        return None
    newer = _consumed(points)
    anew = frozenset(
        iteration
        for iteration, samples in _consumed(branch.points).items()
        if newer.get(iteration, samples) != samples and saved.get(iteration) == newer[iteration]
    )
    twice = whole[0].iteration <= step  # two runs from the start: each is judged on its own
    if len(shared) < settings.warmup and not twice:
        return GivenUp(span, after, None, anew)
    course = judge(whole, settings)
    off = [v.onset for v in course.verdicts if v.confirmed > after and v.kind is not Kind.SHIFT]
    off += [course.suspect_since] if course.suspect_since is not None else []
    onset = min(off, default=None)
    end = whole[-1].iteration + 1 if onset is None else onset
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
