"""Which checkpoints stay, and because of what: from what lies there and what was asked, to a list.

Nothing here looks at a disk. A window is kept for the averages of tomorrow too: wherever a later
one ends, each of its places finds a checkpoint within the tolerance, if one is there now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pma_megatron.base.spelling import given, named
from pma_megatron.errors import SelectionError
from pma_megatron.retention.request import PruneRequest, window_text
from pma_megatron.runs.refs import CheckpointRef, iteration_of, nearest
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import DEFAULT_LAST, SelectionRequest
from pma_megatron.runs.tokens import comparable_run, format_tokens, tokens_of, why_incomparable
from pma_megatron.spikes.healthy import HealthyRequest, choose_healthy

Position = Callable[[CheckpointRef], int]


@dataclass(frozen=True, slots=True)
class Needed:
    """What the rules keep.

    Attributes:
        reasons: path -> why it stays, a clause for each rule.
        notes: what a rule asks for and is not there, a sentence each.
    """

    reasons: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def needed(refs: Sequence[CheckpointRef], end: CheckpointRef, request: PruneRequest) -> Needed:
    """What the rules of `request` need of a run.

    Args:
        refs: all there are. Of those that have one iteration, all stay if one does; those of
            another format than `end` are not counted.
        end: the one that training resumes from.
        request: the rules.

    Raises:
        SelectionError: a rule names what is not there, or measures tokens that cannot be compared.
    """
    numbered = [ref for ref in refs if ref.iteration is not None]
    own = [ref for ref in numbered if ref.format in (end.format, "unknown")]
    twins = _usable(own, iteration_of(end))
    resumable = _each_once([r for r in twins if not r.snapshot and not r.weights_only] or twins)
    usable = _each_once(twins)
    reasons: dict[str, list[str]] = {}
    notes: list[str] = []

    def keep(found: Iterable[CheckpointRef], why: str) -> None:
        chosen = {ref.iteration for ref in found}
        for ref in numbered:
            if ref.iteration in chosen:
                reasons.setdefault(ref.path, []).append(why)

    if request.keep_last is not None:
        keep(resumable[-request.keep_last :], f"one of the newest {request.keep_last}")
    if request.keep_every_tokens is not None:
        every = format_tokens(request.keep_every_tokens)
        found = _every_tokens(resumable, request.keep_every_tokens)
        keep(found, f"the first at a multiple of {every} tokens")
    if request.keep_every_iterations is not None:
        found = _firsts(resumable, iteration_of, request.keep_every_iterations)
        keep(found, f"the first at a multiple of {request.keep_every_iterations} iterations")
    for wanted in request.keep_iterations:
        named_ones = [ref for ref in numbered if ref.iteration == wanted]
        if not named_ones:
            raise SelectionError(
                f"{given('keep_iterations', wanted)} does not exist; {nearest(numbered, wanted)}"
            )
        keep(named_ones, named("keep_iterations"))
    for window in request.keep_window:
        text = f"the window {window_text(window)}"
        keep(_of_window(own, usable, window, notes), text)
    if request.keep_recovery_iterations is not None:
        keep(_of_recoveries(usable, end, request, notes), "recoveries from a spike")
    return Needed({path: tuple(each) for path, each in reasons.items()}, tuple(notes))


def _usable(numbered: Sequence[CheckpointRef], end: int) -> list[CheckpointRef]:
    """Complete and healthy, up to the end, by iteration."""
    found = [r for r in numbered if r.unusable_because is None and iteration_of(r) <= end]
    return sorted(found, key=lambda ref: (iteration_of(ref), ref.path))


def _each_once(refs: Iterable[CheckpointRef]) -> list[CheckpointRef]:
    """The first of each iteration."""
    found: dict[int, CheckpointRef] = {}
    for ref in refs:
        found.setdefault(iteration_of(ref), ref)
    return list(found.values())


def _every_tokens(ordered: Sequence[CheckpointRef], step: int) -> Iterator[CheckpointRef]:
    problem = why_incomparable(ordered) if len(ordered) > 1 else None
    if problem is not None or any(ref.consumed_tokens is None for ref in ordered):
        raise SelectionError(
            f"{named('keep_every_tokens')} needs token counts that can be compared: {problem}; "
            f"use {named('keep_every_iterations')}"
        )
    return _firsts(ordered, tokens_of, step)


def _firsts(
    ordered: Sequence[CheckpointRef], position: Position, step: int
) -> Iterator[CheckpointRef]:
    """The first at or after each multiple: which one that is does not change as a run goes on."""
    before = 0
    for ref in ordered:
        multiple = position(ref) // step
        if multiple > before:
            yield ref
        before = max(before, multiple)


def _of_window(
    refs: Sequence[CheckpointRef],
    usable: Sequence[CheckpointRef],
    window: SelectionRequest,
    notes: list[str],
) -> list[CheckpointRef]:
    """The members of the window today, and what those of tomorrow need.

    Where there are too few today, everything stays that it can be made of once there are more.

    Raises:
        SelectionError: it cannot be made for another reason: what it needs is not known.
    """
    tomorrow = [] if window.end_iteration is not None else _tomorrow(usable, window)
    known = {iteration_of(ref) for ref in usable}
    others = [ref for ref in refs if iteration_of(ref) not in known]
    try:
        end = iteration_of(usable[-1])
        pool = [*usable, *_each_once(others)]
        return [*select(pool, replace(window, allow_gaps=True), resumed=end).refs, *tomorrow]
    except SelectionError as error:
        if window.end_iteration is not None:
            raise
        notes.append(f"the window {window_text(window)} cannot be made now: {error}")
        return _in_reach(usable, window)


def _in_reach(usable: Sequence[CheckpointRef], window: SelectionRequest) -> list[CheckpointRef]:
    """All that lies no further back than the window; all there is, where that is not known."""
    by_tokens = window.interval_tokens is not None or window.window_tokens is not None
    interval = window.interval_tokens or window.interval_iterations
    if interval is None and window.window_tokens is None:
        return list(usable)
    reach = window.window_tokens or (window.last or DEFAULT_LAST) * (interval or 0)
    if not by_tokens:
        return [r for r in usable if iteration_of(r) >= iteration_of(usable[-1]) - reach]
    try:
        run = comparable_run(usable, reach, "window_tokens")
    except SelectionError:
        return list(usable)
    return [ref for ref in run if tokens_of(ref) >= tokens_of(run[-1]) - reach]


def _tomorrow(usable: Sequence[CheckpointRef], window: SelectionRequest) -> list[CheckpointRef]:
    """What windows that end at this newest checkpoint or a later one may take."""
    reach = window.window_tokens
    if window.interval_tokens is None and window.interval_iterations is None:
        if reach is None:
            return list(usable[-(window.last or DEFAULT_LAST) :])
        run = comparable_run(usable, reach, "window_tokens")
        return [ref for ref in run if tokens_of(ref) > tokens_of(run[-1]) - reach]
    by_tokens = window.interval_tokens is not None
    interval = window.interval_tokens or window.interval_iterations or 0
    count = reach // interval if reach else window.last or DEFAULT_LAST
    radius = _radius(interval, window.tolerance)
    if by_tokens:
        span = (count - 1) * interval + radius
        usable = comparable_run(usable, span, "interval_tokens")
    position: Position = tokens_of if by_tokens else iteration_of
    newest = position(usable[-1])
    return cover(usable, position, newest - (count - 1) * interval, radius)


def _radius(interval: int, tolerance: float) -> int:
    """The farthest off that a selection with this tolerance takes a checkpoint."""
    found = math.floor(tolerance * interval) + 1
    while found / interval > tolerance:
        found -= 1
    return found


def cover(
    ordered: Sequence[CheckpointRef], position: Position, first: int, radius: int
) -> list[CheckpointRef]:
    """As few checkpoints as do for every place that one of them does for.

    A checkpoint does for a place that lies at most `radius` from it. Places reach from `first` to
    the newest checkpoint. Made again of what it has chosen, and of newer ones, the places that it
    covers stay covered.

    Args:
        ordered: oldest first.
        position: where each is, in tokens or iterations.
        first: the farthest place.
        radius: how far off a checkpoint may lie.
    """
    left = list(ordered)
    place: int | None = position(ordered[-1])
    chosen = []
    while place is not None and place >= first:
        at = place
        near = [ref for ref in left if abs(position(ref) - at) <= radius]
        if near:
            chosen.append(near[0])
            place = position(near[0]) - radius - 1
        else:
            place = max((p for ref in left if (p := position(ref) + radius) < at), default=None)
    return chosen


def _of_recoveries(
    usable: Sequence[CheckpointRef], end: CheckpointRef, request: PruneRequest, notes: list[str]
) -> Sequence[CheckpointRef]:
    """Everything from the oldest that a recovery from the farthest onset takes: what one from a
    nearer onset takes lies in between."""
    onset = iteration_of(end) - (request.keep_recovery_iterations or 0) + 1
    back = request.recovery_attempts - 1
    try:
        wanted = HealthyRequest(
            onset=max(1, onset), margin_iterations=request.margin_iterations, further_back=back
        )
        chosen = choose_healthy(usable, wanted, request.recovery_last).selection.refs
    except SelectionError as error:
        notes.append(f"recoveries from so far back cannot be made as asked now: {error}")
        return usable
    if len(chosen) < request.recovery_last:
        return usable
    return [ref for ref in usable if iteration_of(ref) >= iteration_of(chosen[0])]
