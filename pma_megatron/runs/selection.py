"""Which checkpoints go into an average: from what lies on disk and what was asked, to a list.

Pure functions on `CheckpointRef`s that a format has read and a `SelectionRequest`. Nothing is
guessed: what cannot be met is refused with what was found instead and what to do. Incomplete
checkpoints are never selected, and nothing in the window of an average is passed over without being
named (`gaps`).
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pma_megatron.base.spelling import given, has, named
from pma_megatron.errors import SelectionError
from pma_megatron.runs.gaps import (
    PassedOver,
    Wanted,
    end_beyond,
    left_out,
    limit_of,
    not_named,
    refuse_gaps,
    tokens_about,
    too_new,
    warnings_of,
)
from pma_megatron.runs.refs import (
    CheckpointRef,
    Unit,
    iteration_of,
    nearest,
    shown,
    unusable_list,
    why_incomplete,
)
from pma_megatron.runs.selection_request import DEFAULT_LAST, SelectionRequest
from pma_megatron.runs.spacing import Places, hole
from pma_megatron.runs.tokens import (
    comparable_run,
    format_tokens,
    given_tokens,
    tokens_of,
    why_incomparable,
)

_SHOWN = 4  # checkpoints named in one note
_UNEVEN = 1.5  # largest gap over smallest, from which on the user is told


@dataclass(frozen=True, kw_only=True, slots=True)
class Spacing:
    """How far apart the chosen checkpoints were to be, and are."""

    unit: Unit
    """Unit of every number here: that of the interval asked for, else the best one known."""
    requested: int | None
    """The interval asked for, None if the checkpoints were taken as they lie."""
    tolerance: float | None
    """Fraction of `requested`; None without one."""
    gaps: tuple[int, ...]
    """From each chosen checkpoint to the next, oldest first; empty where `unit` is unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The checkpoints of one average, oldest first."""

    refs: tuple[CheckpointRef, ...]
    positions: tuple[int, ...]
    """Progress of each, strictly increasing, for decay-derived coefficients; () if unknown."""
    position_unit: Unit
    """`tokens` wherever token counts can be compared, else `iterations`, else `unknown`."""
    spacing: Spacing
    notes: tuple[str, ...]
    """Sentences for the user: what is uneven, what was assumed."""
    passed_over: tuple[PassedOver, ...] = ()
    """What lies in the window and is not used, by iteration."""


def select(
    refs: Sequence[CheckpointRef], request: SelectionRequest, resumed: int | None = None
) -> Selection:
    """Choose the checkpoints of one average.

    With an interval V, place k = 0, 1, ... lies k V before the end checkpoint and takes the
    complete checkpoint nearest to it (the newer of two equally near), if within `tolerance` x V.
    Without one, the last N complete checkpoints as they lie; with a window alone, all complete
    ones in it. The order of `refs` does not matter.

    Args:
        refs: all checkpoints there are.
        request: which of them.
        resumed: iteration that training resumes from, where that is known: an average ends there,
            unless the request names another end. Newer ones are of a branch that was given up.

    Raises:
        SelectionError: a checkpoint that was named is missing or incomplete; there are too few, or
            there is a hole where the interval needs one; two have the same iteration; a selection
            by tokens meets token counts that are unknown or cannot be compared; one that would have
            been chosen is damaged, spoiled or not judged, and the request allows no gaps.

    >>> refs = [
    ...     CheckpointRef(
    ...         path=f"/ckpts/run/iter_{i:07d}", format="torch_dist", iteration=i,
    ...         consumed_samples=i, consumed_tokens=i * 1_000_000, complete=True,
    ...     )
    ...     for i in range(1000, 9000, 1000)
    ... ]
    >>> chosen = select(refs, SelectionRequest(last=3, interval_tokens=2_000_000_000))
    >>> [ref.iteration for ref in chosen.refs], chosen.position_unit, chosen.spacing.gaps
    ([4000, 6000, 8000], 'tokens', (2000000000, 2000000000))
    """
    if request.paths is not None:
        found = _listed(refs, request.paths)
        if request.tokens is not None:
            return _selection(*_with_tokens(found, request.tokens), request)
        return _selection(*_in_order(found), request)
    pool = _pool(refs, request.exclude)
    if request.iterations is not None:
        chosen = [_existing(pool, wanted, "iterations") for wanted in sorted(request.iterations)]
        _refuse_twice(pool, chosen)
        return _selection(chosen, [], request, not_named(pool, chosen))
    limit = None if request.end_iteration is not None else limit_of(pool, resumed)
    usable = _up_to_end(pool, request, limit)
    try:
        chosen, wanted = _chosen(pool, usable, request)
    except SelectionError as error:
        _refuse_twice(pool, usable)  # too few, perhaps because one has another's place
        raise SelectionError("; ".join(filter(None, [str(error), too_new(pool, limit)]))) from None
    _refuse_twice(pool, chosen)
    left = left_out(refs, chosen, wanted, request.exclude, request.end_iteration, limit)
    if not request.allow_gaps:
        refuse_gaps(left, chosen)
    return _selection(chosen, [], request, left)


def newest_of(selection: Selection, count: int, request: SelectionRequest) -> Selection:
    """The newest of what `request` chose, as if no others had been: what those alone lack, as token
    counts that can be compared, does not matter to these."""
    return _selection(selection.refs[-count:], [], request)


def _pool(refs: Sequence[CheckpointRef], exclude: tuple[int, ...]) -> list[CheckpointRef]:
    """Every numbered checkpoint that is not excluded, by iteration."""
    numbered = sorted((ref for ref in refs if ref.iteration is not None), key=iteration_of)
    for unwanted in sorted(set(exclude)):
        if all(ref.iteration != unwanted for ref in numbered):
            raise SelectionError(
                f"{named('exclude')} names iteration {unwanted}, which does not exist; "
                + nearest(numbered, unwanted)
            )
    # Of two with one iteration, the first is taken where only one of them can be.
    numbered.sort(key=lambda ref: (iteration_of(ref), bool(ref.unusable_because), ref.path))
    return [ref for ref in numbered if ref.iteration not in exclude]


def _chosen(
    pool: Sequence[CheckpointRef], usable: list[CheckpointRef], request: SelectionRequest
) -> tuple[list[CheckpointRef], Wanted]:
    if request.interval_tokens or request.interval_iterations:
        return _spaced(pool, usable, request)
    if request.window_tokens:
        return _window(usable, request.window_tokens)
    chosen = _last(pool, usable, request)
    return chosen, lambda ref: iteration_of(ref) > iteration_of(chosen[0])


def _refuse_twice(pool: Sequence[CheckpointRef], chosen: Sequence[CheckpointRef]) -> None:
    """Whole checkpoints of one iteration, where the average takes that one; others stop nobody."""
    used = {ref.iteration for ref in chosen}
    whole = [ref for ref in pool if ref.complete and ref.iteration in used]
    _refuse_duplicates(
        whole,
        f"name the checkpoints to merge with {named('paths')}"
        if has("paths")
        else "move one of them elsewhere",
    )


def _refuse_duplicates(ordered: Sequence[CheckpointRef], way: str) -> None:
    for one, other in pairwise(ordered):
        if one.iteration == other.iteration:
            first, second = sorted((one.path, other.path))
            raise SelectionError(
                f"iteration {one.iteration} exists twice, as {first} and as {second}: {way}"
            )


def _listed(refs: Sequence[CheckpointRef], paths: tuple[str, ...]) -> list[CheckpointRef]:
    """The checkpoints that paths name, in that order."""
    found = {posixpath.normpath(ref.folder): ref for ref in refs}
    found |= {posixpath.normpath(ref.path): ref for ref in refs}
    chosen = []
    for path in paths:
        ref = found.get(posixpath.normpath(path))
        if ref is None:
            raise SelectionError(
                f"{named('paths')} names {path}, which is not a checkpoint that was found"
            )
        if not ref.complete:
            raise SelectionError(
                f"{named('paths')} names {path}, which is incomplete: {why_incomplete(ref)}"
            )
        chosen.append(ref)
    return chosen


def _with_tokens(
    chosen: Sequence[CheckpointRef], tokens: tuple[int, ...]
) -> tuple[list[CheckpointRef], list[str]]:
    """Listed checkpoints with counts that the user says, which order them; and what to tell."""
    notes = []
    others = [
        f"{ref.folder} says {format_tokens(ref.consumed_tokens)}"
        for ref, said in zip(chosen, tokens, strict=True)
        if ref.consumed_tokens not in (None, said)
    ]
    if others:
        notes.append(f"{named('tokens')} counts where {', '.join(others[:_SHOWN])}{_more(others)}")
    numbers = [ref.iteration for ref in chosen if ref.iteration is not None]
    if any(older >= newer for older, newer in pairwise(numbers)):
        notes.append(
            f"iterations do not grow with the tokens given ({', '.join(map(str, numbers))}): "
            f"{named('tokens')} decides the order"
        )
    told = [
        replace(ref, consumed_tokens=said, tokens_unknown_because=None)
        for ref, said in zip(chosen, tokens, strict=True)
    ]
    return told, notes


def _more(named_ones: Sequence[str]) -> str:
    return f", and {len(named_ones) - _SHOWN} more" if len(named_ones) > _SHOWN else ""


def _in_order(chosen: list[CheckpointRef]) -> tuple[list[CheckpointRef], list[str]]:
    """Listed checkpoints oldest first, as far as they say which is; and what to tell."""
    if all(ref.iteration is not None for ref in chosen):
        chosen.sort(key=iteration_of)
        _refuse_duplicates(chosen, f"leave one of the two out of {named('paths')}")
        return chosen, []
    by_tokens = sorted(chosen, key=lambda ref: ref.consumed_tokens or 0)
    if why_incomparable(by_tokens) is None:
        return by_tokens, ["not every path has an iteration: they are ordered by consumed tokens"]
    say = f"; {named('tokens')} can say them" if has("tokens") else ""
    note = f"neither iterations nor tokens order the paths: the order given was kept{say}"
    return chosen, [note]


def _existing(pool: Sequence[CheckpointRef], wanted: int, setting: str) -> CheckpointRef:
    ref = next((ref for ref in pool if ref.iteration == wanted), None)
    if ref is not None and ref.complete:
        return ref
    problem = "does not exist" if ref is None else f"is incomplete ({why_incomplete(ref)})"
    others = nearest([other for other in pool if other.complete], wanted)
    raise SelectionError(f"{named(setting)} names iteration {wanted}, which {problem}; {others}")


def _up_to_end(
    pool: Sequence[CheckpointRef], request: SelectionRequest, limit: int | None
) -> list[CheckpointRef]:
    """The complete and healthy checkpoints, the newest of which is the end of the average; one of
    each iteration."""
    usable = [
        ref
        for ref in pool
        if ref.unusable_because is None and (limit is None or iteration_of(ref) <= limit)
    ]
    complete = list({iteration_of(ref): ref for ref in reversed(usable)}.values())[::-1]
    if request.end_iteration is not None:
        end = _existing(pool, request.end_iteration, "end_iteration")
        return [ref for ref in complete if iteration_of(ref) < request.end_iteration] + [end]
    if not complete:
        found = unusable_list(pool)
        if request.exclude:
            left = f"{given('exclude', request.exclude)} leaves the others out"
            found = f"{found}; {left}" if found else left.replace("the others", "all there are")
        found = "; ".join(filter(None, [found, too_new(pool, limit)]))
        raise SelectionError(f"there is no complete checkpoint: {found or 'nothing was found'}")
    return complete


def _last(
    pool: Sequence[CheckpointRef], usable: Sequence[CheckpointRef], request: SelectionRequest
) -> list[CheckpointRef]:
    count, found = request.last or DEFAULT_LAST, len(usable)
    if found >= count:
        return list(usable[-count:])
    ways = [f"use {given('last', found)}"] if found > 1 else []
    later = request.end_iteration is not None and has("end_iteration")
    ways += [f"choose a later {named('end_iteration')}"] if later else []
    ways += [f"leave fewer out with {named('exclude')}"] if request.exclude else []
    if any(ref.state in ("damaged", "unreadable") for ref in pool):
        ways += ["put right what is said of those", "wait until the run has saved others"]
    elif not has("end_iteration") or end_beyond(pool, iteration_of(usable[-1])) is None:
        ways += ["wait until more are complete"]
    unfinished = unusable_list(pool)
    raise SelectionError(
        f"{given('last', count)} needs {count} complete checkpoints up to "
        f"{usable[-1].describe()}, found {found}{'; ' if unfinished else ''}{unfinished}"
        + (f"; {', or '.join(ways)}" if ways else "")
    )


def _window(
    usable: Sequence[CheckpointRef], window_tokens: int
) -> tuple[list[CheckpointRef], Wanted]:
    run = comparable_run(usable, window_tokens, "window_tokens")
    start = tokens_of(run[-1]) - window_tokens
    chosen = [ref for ref in run if tokens_of(ref) > start]
    if len(chosen) < 2:
        older = f"the next older one is {run[-2].describe()}" if run[1:] else "none is older"
        raise SelectionError(
            f"{given_tokens('window_tokens', window_tokens)} holds only "
            f"{run[-1].describe()}, and "
            f"an average needs two checkpoints: {older}; widen the window or use "
            f"{named('last')}"
        )

    def wanted(ref: CheckpointRef) -> bool:
        at = tokens_about(ref, usable)
        return at is None or at > start

    return chosen, wanted


def _spaced(
    pool: Sequence[CheckpointRef], usable: list[CheckpointRef], request: SelectionRequest
) -> tuple[list[CheckpointRef], Wanted]:
    by_tokens = request.interval_tokens is not None
    interval = request.interval_tokens or request.interval_iterations or 0
    window = request.window_tokens
    grid = Places(
        unit="tokens" if by_tokens else "iterations",
        setting="interval_tokens" if by_tokens else "interval_iterations",
        position=tokens_of if by_tokens else iteration_of,
        interval=interval,
        count=window // interval if window else request.last or DEFAULT_LAST,
        tolerance=request.tolerance,
    )
    if by_tokens:
        usable = comparable_run(usable, grid.reach, grid.setting)
    chosen = grid.pick(usable)
    if len(chosen) < grid.count:
        raise SelectionError(hole(pool, usable, grid, len(chosen), request.exclude, window))

    def wanted(ref: CheckpointRef) -> bool:
        at = tokens_about(ref, usable) if by_tokens else iteration_of(ref)
        return grid.would_take(ref, at, chosen)

    return chosen[::-1], wanted


def _selection(
    chosen: Sequence[CheckpointRef],
    notes: list[str],
    request: SelectionRequest,
    left: Sequence[PassedOver] = (),
) -> Selection:
    positions, unit = _positions(chosen, request.tokens)
    if unit == "iterations" and len(chosen) > 1:
        notes = [*notes, f"positions are in iterations, not tokens: {why_incomparable(chosen)}"]
    measured, gap_unit = positions, unit
    if request.interval_iterations:
        measured, gap_unit = tuple(map(iteration_of, chosen)), "iterations"
    gaps = tuple(newer - older for older, newer in pairwise(measured))
    requested = request.interval_tokens or request.interval_iterations
    if gaps and not requested and max(gaps) > _UNEVEN * min(gaps):
        few, many = shown(min(gaps), gap_unit), shown(max(gaps), gap_unit)
        notes = [*notes, f"the checkpoints are unevenly spaced, from {few} to {many} apart"]
    return Selection(
        refs=tuple(chosen),
        positions=positions,
        position_unit=unit,
        spacing=Spacing(
            unit=gap_unit,
            requested=requested,
            tolerance=request.tolerance if requested else None,
            gaps=gaps,
        ),
        notes=(*notes, *warnings_of(chosen)),
        passed_over=tuple(left),
    )


def _positions(
    chosen: Sequence[CheckpointRef], said_tokens: tuple[int, ...] | None
) -> tuple[tuple[int, ...], Unit]:
    if said_tokens is not None:
        return said_tokens, "tokens"
    if why_incomparable(chosen) is None:
        return tuple(map(tokens_of, chosen)), "tokens"
    if all(ref.iteration is not None for ref in chosen):
        return tuple(map(iteration_of, chosen)), "iterations"
    return (), "unknown"
