"""What metrics do not tell: no verdict, or not yet, and checkpoints of which nothing was judged."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from pma_megatron.base.spelling import first_few, given, in_python, named
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.spikes.healthy import Span
from pma_megatron.spikes.metrics import Metrics
from pma_megatron.spikes.onsets import Course, from_the_start, judge
from pma_megatron.spikes.points import MetricsPoint
from pma_megatron.spikes.settings import SpikeSettings

_SHOWN = 5  # checkpoints or spans that one sentence names


def nothing_lost(metrics: Metrics, course: Course, settings: SpikeSettings, most: int) -> str:
    """Why nothing is recovered from, and what to do about it: sentences.

    Args:
        metrics: of the run.
        course: what was made of them; nothing that is lost.
        settings: that it was made with.
        most: iterations that a recovery skips at most.
    """
    points = metrics.points
    ways: list[str] = []
    open_, onset = [], math.inf
    if course.suspicion is not None:
        onset = course.suspicion.onset
        rise, ways = _rising(course, settings)
        open_.append(rise)
    for what, count, least, first in _at_the_end(points, settings):
        onset = min(onset, first)
        open_.append(
            f"{what} of the last {count} logged point(s) is not finite (nor others since iteration "
            f"{first}), and {least} in a row count as lost"
            if first < points[-count].iteration
            else f"{what} of the last {count} logged point(s), from iteration {first} on, is not "
            f"finite, and {least} in a row count as lost"
        )
    end = f"the last logged iteration is {points[-1].iteration}"
    learned = [span for span in course.learned if span.last == points[-1].iteration]
    if open_:
        said = f"no verdict yet: {'; '.join(open_)}; {end}"
        first = course.well_until(int(onset)) + 1
        skipped = Span(first, min(points[-1].iteration, first + most - 1))
        skip = skipped if in_python("skip") else f"{skipped.first}:{skipped.last}"
        ways.append(
            f"{given('onset', first)} with {given('skip', skip)} and without {named('metrics')}"
        )
        todo = f"If you will not wait, or the run ended there: {', or '.join(ways)}"
    else:
        said = (
            f"no spike that the run did not recover from is in its {len(points)} points, "
            f"iterations {points[0].iteration} to {points[-1].iteration}{_seen(course)}"
        )
        todo = (
            "If you know better, or mean one that it came back from, name its first iteration with "
            f"{named('onset')}, without {named('metrics')}; {named('patience')} and "
            f"{named('fatal_rise')} change what counts"
        )
    if learned and learned[0].first == points[0].iteration:
        said += (
            f". Nothing was judged: the first {settings.warmup} logged points are learned from, "
            f"and there are {len(points)}"
        )
        if not from_the_start(points):
            said += f". Give the log from before too, as one more file of {named('metrics')}"
    if course.doubted:
        where = first_few([f"{span.first} to {span.last}" for span in course.doubted], _SHOWN)
        said += f". Among points that are learned from, the loss was too high in iterations {where}"
    notes = f". Of the metrics: {' '.join(metrics.notes)}" if metrics.notes else ""
    return f"{metrics.source}: {said}. {todo}{notes}"


def _rising(course: Course, settings: SpikeSettings) -> tuple[str, list[str]]:
    """What is known of a rise that is open, and with which patience it would be lost by now."""
    watched = course.suspicion
    assert watched is not None
    since = [p.loss for p in course.points if p.iteration >= watched.onset]
    finite = [loss for loss in since if math.isfinite(loss)]
    rise = statistics.median(finite[-settings.settle :]) - watched.baseline
    waits = f"of the {settings.patience} that {named('patience')} gives it"
    if watched.points >= settings.patience:
        waits = f"and each {settings.patience} ({named('patience')}) it had shrunk by a third"
    said = (
        f"the loss has been {rise:.1f} nats above its baseline since iteration {watched.onset}, "
        f"for {len(since)} logged points {waits}"
    )
    least = max(settings.settle, watched.points // 10 * 10)
    lost = judge(course.points, replace(settings, patience=least)).lost
    if least > watched.points or lost is None or lost.onset != watched.onset:
        return said, []
    return said, [given("patience", least)]


def _at_the_end(
    points: Sequence[MetricsPoint], settings: SpikeSettings
) -> list[tuple[str, int, int, int]]:
    """Losses and gradient norms at the end that are not finite: what, how many in a row, how many
    count, and the first iteration of those that come close one after another."""

    def last(bad: list[bool]) -> tuple[int, int]:
        places = [place for place, each in enumerate(bad) if each]
        first = len(bad)
        for place in reversed(places):
            if first - place > settings.settle:
                break
            first = place
        return len([*itertools.takewhile(bool, reversed(bad))]), first

    losses, since = last([not math.isfinite(p.loss) for p in points])
    norms, also = last([p.grad_norm is not None and not math.isfinite(p.grad_norm) for p in points])
    found = [("the loss", losses, settings.nonfinite_losses, since)]
    if norms > losses:
        found.append(("the gradient norm", norms, settings.nonfinite_grad_norms, also))
    return [(*each[:3], points[each[3]].iteration) for each in found if 0 < each[1] < each[2]]


def _seen(course: Course) -> str:
    seen = [
        f"{verdict.kind.value} from iteration {verdict.onset}"
        f"{f', back at iteration {back}' if verdict.fatal else ''}: {verdict.reason}"
        for verdict, back in zip(course.verdicts, course.back, strict=True)
    ]
    return f" (seen: {'; '.join(seen)})" if seen else ""


def not_judged(chosen: Sequence[CheckpointRef], course: Course) -> tuple[str, ...]:
    """What is chosen though the metrics do not say that it was well: a sentence for each reason.

    Args:
        chosen: by their iterations.
        course: of the metrics.
    """
    points = course.points
    step = points[1].iteration - points[0].iteration if points[1:] else 1
    begins = 0 if from_the_start(points) else points[0].iteration - step
    iterations = [ref.iteration or 0 for ref in chosen]
    before = [at for at in iterations if at < begins]
    notes = []
    if before:
        notes.append(
            f"the metrics begin at iteration {points[0].iteration}, so nothing says that the run "
            f"was well at {first_few(before, _SHOWN)}: give the log from before too, or look at "
            "the run there"
        )
    for span in course.learned:
        among = [at for at in iterations if at >= begins and span.first - step <= at <= span.last]
        if among:
            notes.append(
                f"{first_few(among, _SHOWN)}: nothing was judged there, for losses of iterations "
                f"{span.first} to {span.last} are learned from, and were only seen to stay level"
            )
    return tuple(notes)
