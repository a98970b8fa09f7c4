"""What speaks against reading a merged loss as that of an annealing run, from scores alone.

Each caution is a sentence. The effects are those of arXiv 2505.12082 (section 4.2: reaching back
into the unstable early phase hurts) and of arXiv 2507.17634 and its use in practice (the tokens a
merge covers matter most; once decay has begun it gains little).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from pma_megatron.base.spelling import first_few
from pma_megatron.runs.tokens import format_tokens, recommend
from pma_megatron.scores.grid import UNMERGED
from pma_megatron.scores.results import Checkpoint, Score, Scores

_SAME_RATE = 1e-6
_FAR_COUNT, _FAR_INTERVAL, _FAR_HORIZON = 2, 4, 2


class Start(Protocol):
    """An annealing run that is compared with (`forecast.Prediction` is one)."""

    @property
    def start_iteration(self) -> int: ...
    @property
    def annealed_tokens(self) -> int | None: ...


def cautions(
    scores: Scores, points: Sequence[Score], starts: Sequence[Start], metric: str
) -> Iterator[str]:
    """Cautions about one series of averages; of the single checkpoints only the first.

    - Not finite: a loss is not a number, or infinite.
    - LR decay: a checkpoint of the window lies after the decay's start, or the window's learning
      rates differ after warmup.
    - Warmup: the oldest checkpoint lies before its end.
    - Early phase: across the window the trained loss still falls by more than twice what merging
      gains at its end. An average lags the newest checkpoint by about half its window, so half of
      that fall is lost to the lag, more than what is left as gain.
    - Horizon: a real annealing run takes more than twice the tokens that the window covers.
    - Size: N more than 2 times, or the interval more than 4 times, off `tokens.recommend`.
    """
    broken = [p.end_iteration for p in points if not math.isfinite(p.losses[metric])]
    if broken:
        yield (
            f"the {metric} at {_listed(broken)} is not a finite number: nothing is compared there. "
            "Look at the checkpoints of that window (pma verify, pma recover)"
        )
    if points[0].method == UNMERGED:
        return
    known = {each.iteration: each for each in scores.checkpoints}
    windows = {p.end_iteration: [known[i] for i in p.iterations] for p in points}
    yield from _schedule(windows)
    early = [p.end_iteration for p in points if _falls_steeply(scores, p, metric)]
    if early:
        yield (
            f"at {_listed(early)} the trained loss falls across the window by more than twice what "
            "the merge gains: the run is not stable enough there, and the real annealed loss will "
            "be lower. Use a shorter window or a later end"
        )
    yield from _horizon(scores, points, starts)
    yield from _size(scores, points[-1])


def _schedule(windows: dict[int, list[Checkpoint]]) -> Iterator[str]:
    decayed = [end for end, window in windows.items() if _decays(window)]
    if decayed:
        yield (
            f"the learning rate changes within the window at {_listed(decayed)}: part of the "
            "annealing is in the checkpoints already, and merging them adds less. Forecast from "
            "the constant-rate part"
        )
    warming = [end for end, window in windows.items() if _in_warmup(window[0])]
    if warming:
        yield f"the window reaches into warmup at {_listed(warming)}: use a later end"
    every = [each for window in windows.values() for each in window]
    if all(each.schedule.samples is None and each.schedule.learning_rate is None for each in every):
        yield (
            "the checkpoints do not say where their learning-rate schedule stood: whether decay "
            "had begun was not checked"
        )


def _decays(window: Sequence[Checkpoint]) -> bool:
    for each in window:
        at, start = each.schedule.samples, each.schedule.decay_start_samples
        if at is not None and start is not None and at > start:
            return True
    rates = [
        each.schedule.learning_rate
        for each in window
        if each.schedule.learning_rate is not None and not _in_warmup(each)
    ]
    return bool(rates) and max(rates) - min(rates) > _SAME_RATE * max(rates)


def _in_warmup(each: Checkpoint) -> bool:
    at, end = each.schedule.samples, each.schedule.warmup_samples
    return at is not None and end is not None and at < end


def _falls_steeply(scores: Scores, point: Score, metric: str) -> bool:
    trained = scores.unmerged(metric)
    oldest = trained.get(point.iterations[0])
    if oldest is None:
        return False
    fall = oldest - trained[point.end_iteration]
    return fall > -2 * scores.gain(point, metric)


def _horizon(scores: Scores, points: Sequence[Score], starts: Sequence[Start]) -> Iterator[str]:
    windows = {p.end_iteration: scores.window_tokens(p) for p in points}
    far = []
    for start in starts:
        window = windows.get(start.start_iteration)
        if window and start.annealed_tokens and start.annealed_tokens > _FAR_HORIZON * window:
            far.append(start.start_iteration)
    if far:
        yield (
            f"the annealing runs from {_listed(far)} take more than {_FAR_HORIZON} times the "
            "tokens that the window covers: they learn on for longer than the merge can show"
        )


def _size(scores: Scores, newest: Score) -> Iterator[str]:
    window = scores.window_tokens(newest)
    if window is None or newest.last < 2 or scores.parameters < 1:
        return
    kind = "moe" if scores.moe else "dense"
    guide = recommend(scores.active_parameters, scores.parameters, kind)  # type: ignore[arg-type]
    spacing = window / (newest.last - 1)
    off = max(spacing / guide.interval_tokens, guide.interval_tokens / spacing) > _FAR_INTERVAL
    if off or not 1 / _FAR_COUNT <= newest.last / guide.last <= _FAR_COUNT:
        yield (
            f"N = {newest.last} checkpoints {format_tokens(round(spacing))} tokens apart are far "
            f"from the guide, {guide.last} that are {format_tokens(guide.interval_tokens)} apart "
            f"({guide.basis})"
        )


def _listed(iterations: Sequence[int]) -> str:
    return f"iteration{'s' if len(iterations) > 1 else ''} {first_few(iterations, 4)}"
