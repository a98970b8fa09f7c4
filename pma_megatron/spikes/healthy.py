"""Which checkpoints of a run to recover from after a loss spike, and why not the others.

Pure functions on `CheckpointRef`s. The weights of a checkpoint at iteration i were made by i
iterations, so the loss of iteration i + 1 is the first that shows what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pma_megatron.base.settings import described, needed, same, setting
from pma_megatron.base.spelling import hint, named
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.runs.gaps import Kind, PassedOver
from pma_megatron.runs.refs import CheckpointRef, iteration_of
from pma_megatron.runs.selection import Selection, select
from pma_megatron.runs.selection_request import SelectionRequest

# Three, from before the collapse: arXiv 2505.12082. In docs/results.md 1 or 5, and other margins,
# made no clear difference.
LAST = 3
MARGIN_ITERATIONS = 20


@dataclass(frozen=True, slots=True)
class Span:
    """Iterations, both ends included, in which the run was off."""

    first: int
    last: int

    def __contains__(self, iteration: int) -> bool:
        return self.first <= iteration <= self.last


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Iterations that were run twice: the run went back, and what saved them is not known."""

    span: Span
    well_until: int
    """Last iteration with a loss that was well in the branch that was given up."""
    onset: int | None
    """First iteration at which it was off; None if it was not, or not judged."""
    saved_anew: frozenset[int] = frozenset()
    """Checkpoints that are of the newer branch, as their consumed samples tell."""

    def doubts(self, iteration: int, margin: int) -> bool:
        """Whether a checkpoint of it might be of a branch that was off."""
        of_it = iteration in self.span and iteration not in self.saved_anew
        return of_it and iteration + margin > self.well_until

    def reason(self, iteration: int) -> str:
        """Why such a checkpoint is not used: a clause."""
        off = "is not known to have been well after it"
        if self.onset is not None:
            off = f"was off from iteration {self.onset}"
        return (
            f"not judged: iterations {self.span.first} to {self.span.last} were run twice, nothing "
            f"says which of the two saved it, and the one that was given up {off}"
        )


_WEIGHTS_ALONE = "its weights were saved alone, without main params and optimizer state"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A checkpoint that is not used."""

    ref: CheckpointRef
    reason: str
    kind: Kind | None = None
    """None where the state of the checkpoint says it, or it was saved in a spike."""

    @property
    def passed_over(self) -> PassedOver:
        """The same, as selections say it."""
        path, iteration, state = self.ref.path, self.ref.iteration, self.ref.state
        kind: Kind = self.kind or ("spoiled" if state == "complete" else state)
        return PassedOver(path=path, iteration=iteration, kind=kind, reason=self.reason)


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class HealthyRequest:
    """Where the run went wrong, and what to take from before.

    Raises:
        UsageError: a value out of range.
    """

    onset: int = field(metadata=needed("the first iteration that was off", metavar="I"))
    last: int | None = same(SelectionRequest, "last", shown=str(LAST))
    interval_tokens: int | None = same(SelectionRequest, "interval_tokens")
    interval_iterations: int | None = same(SelectionRequest, "interval_iterations")
    # What makes a loss jump may have been at work before the loss shows it.
    margin_iterations: int = setting(
        MARGIN_ITERATIONS, "healthy iterations between a checkpoint and the onset", metavar="M"
    )
    further_back: int = setting(
        0,
        "leave out so many of the newest healthy full checkpoints too, after a recovery that "
        "failed",
        metavar="K",
    )
    spans: tuple[Span, ...] = setting(
        (), "earlier spikes, and what lies too close before them", of=()
    )
    well_until: int | None = setting(
        None, "the last iteration before the onset that was logged and well, if not each was", of=()
    )
    given_up: tuple[GivenUp, ...] = setting((), "what was run twice", of=())
    exclude: tuple[int, ...] = same(SelectionRequest, "exclude")

    def __post_init__(self) -> None:
        if self.onset < 1:
            raise UsageError(f"{named('onset')} must be at least 1, got {self.onset}")
        if self.last is not None and self.last < 1:
            raise UsageError(f"{named('last')} must be at least 1, got {self.last}")
        if self.margin_iterations < 0 or self.further_back < 0:
            raise UsageError(
                f"{named('margin_iterations')} and {named('further_back')} must be at least 0, got "
                f"{self.margin_iterations} and {self.further_back}"
            )

    @property
    def may_be_off(self) -> int:
        """The first iteration that may have been off: the onset, if each before it was logged."""
        return self.onset if self.well_until is None else self.well_until + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Healthy:
    """What to recover from.

    Attributes:
        selection: the checkpoints to merge, oldest first; the newest is a full one.
        rejected: all others from the margin on and those that are not whole, newest first.
        newest: iteration of the newest healthy full checkpoint, before `further_back`.
        notes: sentences for the user.
    """

    selection: Selection
    rejected: tuple[Rejected, ...]
    newest: int
    notes: tuple[str, ...]

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """What is not used and lies after the oldest of those chosen, by iteration."""
        oldest = iteration_of(self.selection.refs[0])
        found = [
            each.passed_over
            for each in reversed(self.rejected)
            if each.ref.iteration is None or each.ref.iteration > oldest
        ]
        return (*found, *self.selection.passed_over)


def choose_healthy(
    refs: Sequence[CheckpointRef], request: HealthyRequest, most: int = LAST
) -> Healthy:
    """Choose the checkpoints to recover from.

    Args:
        refs: all of the run.
        request: where it went wrong.
        most: how many to take where `request.last` is None; fewer will do.

    Raises:
        SelectionError: none is left, naming each with the reason; or what was asked for cannot be
            met by those that are left.
    """
    rejected: list[Rejected] = []
    usable: list[CheckpointRef] = []
    for ref in refs:
        because = _why_not(ref, request)
        if because is None:
            usable.append(ref)
        else:
            rejected.append(because)
    usable.sort(key=iteration_of)
    full = [ref for ref in usable if not ref.snapshot]
    if not full:
        raise SelectionError(_nothing_left(refs, rejected, request))
    if request.further_back >= len(full):
        raise SelectionError(
            f"only {len(full)} healthy full checkpoints lie before the onset at iteration "
            f"{request.onset}, and {request.further_back} of them are to be left out: there is "
            "nothing further back. Lower the learning rate, skip the data, or start from an "
            "earlier backup"
        )
    end = full[-1 - request.further_back]
    kept = [ref for ref in usable if iteration_of(ref) <= iteration_of(end)]
    rejected += [
        Rejected(
            ref,
            "an earlier attempt from here failed"
            if not ref.snapshot
            else "a snapshot has no optimizer state to resume with, and no full one is newer",
        )
        for ref in usable
        if iteration_of(ref) > iteration_of(end)
    ]
    count, notes = _count(request, kept, most)
    chosen = select(
        kept,
        SelectionRequest(
            last=count,
            interval_tokens=request.interval_tokens,
            interval_iterations=request.interval_iterations,
        ),
    )
    rejected.sort(key=lambda each: -(each.ref.iteration or 0))
    return Healthy(
        selection=chosen,
        rejected=tuple(rejected),
        newest=iteration_of(full[-1]),
        notes=(*notes, *chosen.notes),
    )


def _why_not(ref: CheckpointRef, request: HealthyRequest) -> Rejected | None:
    onset, first, at = request.onset, request.may_be_off, ref.iteration or 0
    doubt = next(
        (each for each in request.given_up if each.doubts(at, request.margin_iterations)), None
    )
    what = "the onset" if first == onset else f"iteration {first}, the first that may have been off"
    unseen = f"between iterations {first - 1} and {onset}" if first > 1 else f"before {onset}"
    tests: tuple[tuple[bool, Callable[[], str], Kind | None], ...] = (
        (ref.iteration is None, lambda: "it has no iteration number", None),
        (at in request.exclude, lambda: f"left out by {named('exclude')}", "excluded"),
        (not ref.complete, lambda: f"it is not complete: {ref.incomplete_because}", None),
        (ref.weights_only and not ref.snapshot, lambda: _WEIGHTS_ALONE, None),
        (at >= onset, lambda: f"at or after the onset at iteration {onset}", None),
        (
            at >= first,
            lambda: f"not judged: nothing was logged {unseen}, where the run was off",
            "not judged",
        ),
        (
            at + request.margin_iterations >= first,
            lambda: (
                f"{first - at} iterations before {what}, within the margin of "
                f"{request.margin_iterations}"
            ),
            None,
        ),
        (ref.unhealthy_because is not None, lambda: str(ref.unhealthy_because), None),
        (
            any(at in span for span in request.spans),
            lambda: "it lies in an earlier spike, or just before one",
            None,
        ),
        (doubt is not None, lambda: "" if doubt is None else doubt.reason(at), "not judged"),
    )
    found = ((reason, kind) for failed, reason, kind in tests if failed)
    return next((Rejected(ref, reason(), kind) for reason, kind in found), None)


def _count(
    request: HealthyRequest, kept: Sequence[CheckpointRef], most: int
) -> tuple[int, list[str]]:
    if request.last is not None or len(kept) >= most:
        return request.last or most, []
    few = "one healthy checkpoint is left: this is a plain rollback to it, not an average"
    if len(kept) > 1:
        few = f"only {len(kept)} healthy checkpoints are left, {most} would be better"
    return len(kept), [few]


def _nothing_left(
    refs: Sequence[CheckpointRef], rejected: Sequence[Rejected], request: HealthyRequest
) -> str:
    if not refs:
        return "there is no checkpoint to recover from"
    reasons = "; ".join(
        f"{each.ref.describe()}: {each.reason}"
        for each in sorted(rejected, key=lambda each: -(each.ref.iteration or 0))[:6]
    )
    ways = "Recover from an older backup, or start anew with another learning rate"
    if any("within the margin" in each.reason for each in rejected):
        ways = f"Lower {named('margin_iterations')} if you trust it. {ways}"
    if any(each.reason == _WEIGHTS_ALONE for each in rejected):
        ways = (
            f"Give the folder that training saves its own checkpoints to{hint('load')}, or average "
            f"weights with pma merge. {ways}"
        )
    if any(each.kind == "not judged" for each in rejected):
        ways = f"If you know the first iteration that was off, name it: {named('onset')}. {ways}"
    return (
        f"no healthy full checkpoint lies before the onset at iteration {request.onset}: "
        f"{reasons or 'only snapshots, which have no optimizer state'}. {ways}"
    )
