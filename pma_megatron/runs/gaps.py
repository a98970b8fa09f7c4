"""What lies in the window of an average and is not in it: named, with the reason, or refused.

The window reaches from the oldest checkpoint chosen to the end that was asked for; where none was,
to the newest there is. A gap is a checkpoint in it that would have been chosen, had it been whole
and healthy: without it the average is another one than was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from pma_megatron.base.spelling import given, has, named, switch
from pma_megatron.errors import SelectionError
from pma_megatron.runs.refs import CheckpointRef, iteration_of, why_incomplete
from pma_megatron.storage.paths import path_of

Kind = Literal[
    "being written",
    "unreadable",
    "damaged",
    "spoiled",
    "not judged",
    "given up",
    "excluded",
    "newer",
    "not needed",
    "no iteration",
]
_TOGETHER: tuple[Kind, ...] = ("given up", "excluded", "newer", "not needed")
"""Kinds that share one line: they are what was asked for, or no part of the run any more."""
Wanted = Callable[[CheckpointRef], bool]
"""Whether a checkpoint would have been chosen, had it been whole and healthy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedOver:
    """A checkpoint that lies in the window of an average and is not used.

    Attributes:
        path: its folder.
        iteration: None where it has none.
        kind: `being written`, `unreadable` (it may be whole), `damaged`, `spoiled` (saved in a
            loss spike), `not judged` (saved before the loss after a recovery was known to be well),
            `given up` (a later branch of the run began before it), `excluded`, `newer` than what
            training resumes from, `not needed` by the spacing or list, or without an iteration.
        reason: a clause for people.
        gap: whether it would have been chosen, had it been whole and healthy.
    """

    path: str
    iteration: int | None
    kind: Kind
    reason: str
    gap: bool = False

    def __str__(self) -> str:
        return f"{self.path} is passed over: {self.reason}"


def passed_over(
    ref: CheckpointRef,
    why_not_needed: str = "",
    *,
    excluded: bool = False,
    resumed: int | None = None,
    gap: bool = False,
) -> PassedOver:
    """Why `ref` is not used.

    Args:
        ref: it.
        why_not_needed: what is to be said of a whole and healthy one.
        excluded: the user left it out.
        resumed: what training resumes from, where `ref` is newer than that.
        gap: see `PassedOver`.
    """
    kind: Kind
    if ref.iteration is None and not ref.complete:
        kind = "unreadable" if ref.unreadable else "damaged"
        reason = f"it has no iteration number, and is incomplete ({why_incomplete(ref)})"
    elif ref.iteration is None:
        by_name = f" (name it with {named('paths')} to use it)" if has("paths") else ""
        kind, reason = "no iteration", f"it has no iteration number{by_name}"
    elif excluded:
        kind, reason = "excluded", f"left out by {named('exclude')}"
    elif resumed is not None:
        kind, reason = "newer", f"it is newer than iteration {resumed}, which training resumes from"
    elif ref.state == "being written":
        kind, reason = "being written", f"it is still being written ({why_incomplete(ref)})"
    elif ref.state == "damaged":
        kind, reason = "damaged", f"it is incomplete ({why_incomplete(ref)})"
    elif ref.state == "unreadable":
        kind, reason = "unreadable", f"it cannot be read now ({why_incomplete(ref)})"
    elif ref.state == "complete":
        kind, reason = "not needed", why_not_needed
    else:
        kind, reason = ref.state, str(ref.unhealthy_because)
    return PassedOver(path=ref.path, iteration=ref.iteration, kind=kind, reason=reason, gap=gap)


def left_out(
    refs: Sequence[CheckpointRef],
    chosen: Sequence[CheckpointRef],
    wanted: Wanted,
    exclude: Collection[int],
    end: int | None,
    resumed: int | None,
) -> list[PassedOver]:
    """What is not used of all there is, and lies in the window or would if it were whole.

    Args:
        refs: all there are.
        chosen: of the average, oldest first.
        wanted: of those that cannot be used.
        exclude: iterations that the user left out.
        end: the iteration that the user ended the average at, None for the newest.
        resumed: what training resumes from, if newer ones are there.
    """
    oldest, used = iteration_of(chosen[0]), {ref.iteration for ref in chosen}
    found = []
    for ref in sorted(refs, key=lambda ref: (ref.iteration is None, ref.iteration or 0, ref.path)):
        if ref.iteration is None:
            found.append(passed_over(ref))
            continue
        if ref in chosen or (end is not None and ref.iteration > end):
            continue
        newer = resumed if resumed is not None and ref.iteration > resumed else None
        excluded = ref.iteration in exclude
        unusable = ref.state in ("unreadable", "damaged", "spoiled", "not judged")
        stands_in = ref.iteration in used  # another folder holds that iteration, whole
        gap = unusable and newer is None and not excluded and not stands_in and wanted(ref)
        if gap or ref.iteration >= oldest:
            found.append(passed_over(ref, "not needed", excluded=excluded, resumed=newer, gap=gap))
    return found


def not_named(pool: Sequence[CheckpointRef], chosen: Sequence[CheckpointRef]) -> list[PassedOver]:
    """What lies between checkpoints that the user has listed."""
    between = range(iteration_of(chosen[0]) + 1, iteration_of(chosen[-1]))
    left = (ref for ref in pool if ref.iteration in between and ref not in chosen)
    return [passed_over(ref, f"{named('iterations')} does not name it") for ref in left]


def limit_of(pool: Sequence[CheckpointRef], resumed: int | None) -> int | None:
    """What training resumes from, if full checkpoints are newer whose saves have ended; or None."""
    full = [iteration_of(ref) for ref in pool if not ref.snapshot and not ref.writing]
    return resumed if resumed is not None and full and full[-1] > resumed else None


def too_new(pool: Sequence[CheckpointRef], limit: int | None) -> str:
    """Which whole and healthy checkpoints the limit keeps out, and what takes them; "" for none.

    Args:
        pool: by iteration.
        limit: see `limit_of`.
    """
    newer = [iteration_of(ref) for ref in _beyond(pool, limit)]
    if not newer:
        return ""
    one = newer[0] == newer[-1]
    which = f"iteration {newer[0]} is" if one else f"iterations {newer[0]} to {newer[-1]} are"
    end, takes = end_beyond(pool, limit), ""
    if end is not None and has("end_iteration"):
        what = "those up to it" if end < newer[-1] else "it" if one else "them"
        takes = f": {given('end_iteration', end)} takes {what}"
    return f"{which} newer than iteration {limit}, which training resumes from{takes}"


def end_beyond(pool: Sequence[CheckpointRef], limit: int | None) -> int | None:
    """The newest iteration that the limit keeps out and an average can end at; None without one.

    A snapshot alone cannot be resumed, so that none ends there.
    """
    full = [iteration_of(ref) for ref in _beyond(pool, limit) if not ref.snapshot]
    return full[-1] if full else None


def _beyond(pool: Sequence[CheckpointRef], limit: int | None) -> list[CheckpointRef]:
    newer = (ref for ref in pool if limit is not None and iteration_of(ref) > limit)
    return [ref for ref in newer if ref.unusable_because is None]


def refuse_gaps(passed: Sequence[PassedOver], chosen: Sequence[CheckpointRef]) -> None:
    """Refuse to average over gaps.

    Raises:
        SelectionError: there are some; names each and says what to do.
    """
    gaps = [each for each in passed if each.gap]
    if not gaps:
        return
    exclude = given("exclude", tuple(each.iteration for each in gaps))
    allow = switch("allow_gaps")
    ways = [f"leave it out ({exclude})"] if has("exclude") else []
    ways += [f"allow what cannot be used to be passed over ({allow})"] if has("allow_gaps") else []
    raise SelectionError(
        f"the average of {chosen[0].describe()} to {chosen[-1].describe()} would pass over "
        + "; ".join(f"{each.path}: {each.reason}" for each in gaps)
        + f". {', or '.join(['Restore what is damaged or move it away', *ways])}"
    )


def tokens_about(ref: CheckpointRef, known: Sequence[CheckpointRef]) -> float | None:
    """Consumed tokens of `ref`; where it does not say, from the iterations of its neighbours.

    Args:
        ref: a checkpoint, perhaps damaged.
        known: others with tokens, by iteration.

    Returns None where fewer than two others tell.
    """
    if ref.consumed_tokens is not None:
        return ref.consumed_tokens
    places = [(iteration_of(r), r.consumed_tokens) for r in known if r.consumed_tokens is not None]
    if len(places) < 2:
        return None
    at = iteration_of(ref)
    after = next((i for i, (place, _) in enumerate(places) if place > at), len(places) - 1)
    (x0, y0), (x1, y1) = places[max(after, 1) - 1], places[max(after, 1)]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def lines(passed: Sequence[PassedOver], end: CheckpointRef) -> list[str]:
    """A sentence for each, in one for those that the request leaves out.

    Args:
        passed: by the average.
        end: its newest checkpoint.
    """
    found = []
    for each in passed:
        if each.kind == "being written":
            found.append(f"{each.path}: {each.reason}. The average ends at {end.describe()}")
        elif each.kind not in _TOGETHER:
            found.append(str(each))
    for kind in _TOGETHER:
        of_kind = [each for each in passed if each.kind == kind]
        for reason in dict.fromkeys(each.reason for each in of_kind):
            names = [str(each.iteration) for each in of_kind if each.reason == reason]
            found.append(f"passed over, {reason}: iterations {', '.join(names)}")
    return found


def warnings_of(chosen: Sequence[CheckpointRef]) -> list[str]:
    """What speaks against sources that are used all the same.

    What times say comes in one sentence: a copy without its times says it of all.
    """
    found = [
        f"{ref.path} is used because it was named: {ref.unhealthy_because}"
        for ref in chosen
        if ref.unhealthy_because
    ]
    doubtful = [ref for ref in chosen if ref.warning]
    if doubtful:
        names = ", ".join(path_of(ref.path).name for ref in doubtful)
        found.append(f"of {names}: {doubtful[-1].warning}")
    return found
