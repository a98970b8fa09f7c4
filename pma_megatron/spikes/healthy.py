"""Which checkpoints of a run to recover from after a loss spike, and why not the others.

Pure functions on `CheckpointRef`s. The weights of a checkpoint at iteration i were made by i
iterations, so the loss of iteration i + 1 is the first that shows what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pma_megatron.base.settings import described, needed, same, setting
from pma_megatron.base.spelling import named
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.runs.gaps import Kind, PassedOver
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection, select
from pma_megatron.runs.selection_request import SelectionRequest

# Three, from before the collapse: arXiv 2505.12082. In docs/results.md 1 or 5, and other margins,
# made no difference.
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
class Rejected:
    """A checkpoint that is not used."""

    ref: CheckpointRef
    reason: str
    excluded: bool = False

    @property
    def passed_over(self) -> PassedOver:
        """The same, as selections say it."""
        path, iteration, state = self.ref.path, self.ref.iteration, self.ref.state
        kind: Kind = "spoiled" if state == "complete" else state
        kind = "excluded" if self.excluded else kind
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
    exclude: tuple[int, ...] = same(SelectionRequest, "exclude")

    def __post_init__(self) -> None:
        if self.onset < 1:
            raise UsageError(f"{named('onset')} must be at least 1, got {self.onset}")
        if self.margin_iterations < 0 or self.further_back < 0:
            raise UsageError(
                f"{named('margin_iterations')} and {named('further_back')} must be at least 0, got "
                f"{self.margin_iterations} and {self.further_back}"
            )


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
        oldest = _iteration(self.selection.refs[0])
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
        reason = _why_not(ref, request)
        if reason is None:
            usable.append(ref)
        else:
            rejected.append(Rejected(ref, reason, ref.iteration in request.exclude))
    usable.sort(key=_iteration)
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
    kept = [ref for ref in usable if _iteration(ref) <= _iteration(end)]
    rejected += [
        Rejected(
            ref,
            "an earlier attempt from here failed"
            if not ref.snapshot
            else "a snapshot has no optimizer state to resume with, and no full one is newer",
        )
        for ref in usable
        if _iteration(ref) > _iteration(end)
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
        newest=_iteration(full[-1]),
        notes=(*notes, *chosen.notes),
    )


def _why_not(ref: CheckpointRef, request: HealthyRequest) -> str | None:
    iteration, onset = ref.iteration, request.onset
    tests: tuple[tuple[bool, Callable[[], str]], ...] = (
        (iteration is None, lambda: "it has no iteration number"),
        (not ref.complete, lambda: f"it is not complete: {ref.incomplete_because}"),
        (iteration in request.exclude, lambda: f"left out by {named('exclude')}"),
        ((iteration or 0) >= onset, lambda: f"at or after the onset at iteration {onset}"),
        (
            (iteration or 0) + request.margin_iterations >= onset,
            lambda: (
                f"{onset - (iteration or 0)} iterations before the onset, within the margin "
                f"of {request.margin_iterations}"
            ),
        ),
        (ref.unhealthy_because is not None, lambda: str(ref.unhealthy_because)),
        (
            any((iteration or 0) in span for span in request.spans),
            lambda: "it lies in an earlier spike, or just before one",
        ),
    )
    return next((reason() for failed, reason in tests if failed), None)


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
    return (
        f"no healthy full checkpoint lies before the onset at iteration {request.onset}: "
        f"{reasons or 'only snapshots, which have no optimizer state'}. {ways}"
    )


def _iteration(ref: CheckpointRef) -> int:
    assert ref.iteration is not None
    return ref.iteration
