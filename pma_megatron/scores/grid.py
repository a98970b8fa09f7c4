"""Which averages are scored: methods x counts x intervals x end checkpoints, as one list.

Pure functions on `CheckpointRef`s, as in `selection`. A point that cannot be met, because the run
has too few checkpoints there, is left out with the reason; the single checkpoint at each end is
always a point, the baseline `unmerged`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pma_megatron.base.settings import described, same, setting
from pma_megatron.base.spelling import given, in_full, mistyped, named, one_of, renamed
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.merging.coefficients import DECAYS, MEANS, METHODS
from pma_megatron.merging.request import Method
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection, select
from pma_megatron.runs.selection_request import DEFAULT_LAST, SelectionRequest
from pma_megatron.runs.tokens import format_tokens, parse_tokens

UNMERGED = "unmerged"
_EVERY = "every:"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridPoint:
    """One average to score.

    Attributes:
        request: which checkpoints were asked for.
        method: how they are weighted; None for the single checkpoint at the end.
        selection: the checkpoints, oldest first.
        coefficients: one per checkpoint.
    """

    request: SelectionRequest
    method: Method | None
    selection: Selection
    coefficients: tuple[float, ...]

    @property
    def end(self) -> CheckpointRef:
        """The newest checkpoint of the average."""
        return self.selection.refs[-1]

    @property
    def label(self) -> str:
        """The method as it is typed, or `unmerged`."""
        return UNMERGED if self.method is None else method_label(self.method)


@dataclass(frozen=True, kw_only=True, slots=True)
class Averaging:
    """One way to average, the same from one end to the next.

    Attributes:
        method: as typed, or `unmerged`.
        last: checkpoints in the average.
        interval_tokens: spacing asked for, if in tokens.
        interval_iterations: spacing asked for, if in iterations.
    """

    method: str
    last: int
    interval_tokens: int | None
    interval_iterations: int | None

    @property
    def series(self) -> tuple[str, int, int | None, int | None]:
        """All of it, as the key of a dictionary."""
        return self.method, self.last, self.interval_tokens, self.interval_iterations

    @property
    def spacing(self) -> str:
        """The spacing asked for in as few characters as tell it, none where it was not."""
        if self.interval_tokens is not None:
            short = format_tokens(self.interval_tokens)
            # An average is called by it: two that differ by a little must not have one name.
            exact = parse_tokens(short) == self.interval_tokens
            return short if exact else str(self.interval_tokens)
        return "" if self.interval_iterations is None else f"{self.interval_iterations} it"

    def __str__(self) -> str:
        spacing = f" V={self.spacing}" if self.spacing else ""
        return self.method if self.method == UNMERGED else f"{self.method} N={self.last}{spacing}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped(Averaging):
    """A point that cannot be met."""

    end_iteration: int
    reason: str


_AXES = functools.partial(
    renamed,
    last="lasts",
    interval_tokens="intervals_tokens",
    end_iteration="ends",
    interval_iterations="intervals_iterations",
    iterations="ends",
    method="methods",
)
"""What the user of a grid set, for the settings of each of its averages."""


def parse_method(text: str) -> Method:
    """A method as it is typed in a list: `sma`, `wma`, `ema:0.2` (alpha), `1-sqrt:0.1` (floor).

    Raises:
        UsageError: an unknown name, or a number that the method does not take.
    """
    name, colon, number = text.partition(":")
    if name not in METHODS:
        raise UsageError(f"{mistyped('methods', text)} is unknown; {one_of(name, METHODS)}")
    if not colon:
        return Method(name=name)
    if name in MEANS and name not in ("ema", *DECAYS):
        raise UsageError(f"{mistyped('methods', text)}: {name} takes no number, write {name}")
    try:
        value = float(number)
    except ValueError:
        raise UsageError(
            f"{mistyped('methods', text)}: {number!r} is not a number, as in ema:0.2"
        ) from None
    return Method(name=name, alpha=value) if name == "ema" else Method(name=name, floor=value)


def method_label(method: Method) -> str:
    """The method as `parse_method` reads it."""
    value = method.alpha if method.name == "ema" else (method.floor or None)
    return method.name if value is None else f"{method.name}:{in_full(value)}"


def parse_methods(words: Sequence[str]) -> tuple[Method, ...]:
    """`Grid.methods` as typed."""
    return tuple(map(parse_method, words))


def parse_ends(words: Sequence[str]) -> str | tuple[int, ...]:
    """`Grid.ends` as typed: one word, or iterations.

    Raises:
        UsageError: anything else.
    """
    if len(words) == 1 and not words[0].isdecimal():
        _step(words[0])
        return words[0]
    if not all(word.isdecimal() for word in words):
        raise UsageError(
            f"{given('ends', ' '.join(words))} is not all, newest, every:K, or a list of iterations"
        )
    return tuple(int(word) for word in words)


def _step(ends: str) -> int | None:
    """Every how many checkpoints an average ends; None for the newest alone."""
    if ends in ("all", "newest"):
        return 1 if ends == "all" else None
    number = ends.removeprefix(_EVERY)
    if not ends.startswith(_EVERY) or not number.isdecimal() or int(number) < 1:
        raise UsageError(
            f"{mistyped('ends', ends)} is not all, newest, every:K, or a list of iterations"
        )
    return int(number)


@described
@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Averages to score.

    Raises:
        UsageError: a value out of range, an empty axis, or both kinds of interval.
    """

    methods: tuple[Method, ...] = setting(
        (Method(),),
        "how checkpoints are weighted, ema as ema:ALPHA, decays as NAME[:FLOOR]",
        metavar="M",
        choices=MEANS,
        make=parse_methods,
        shown=Method().name,
    )
    lasts: tuple[int, ...] = setting(
        (DEFAULT_LAST,), "how many checkpoints; the newest alone is always scored", metavar="N"
    )
    intervals_tokens: tuple[int, ...] = setting(
        (),
        "spacings in tokens, e.g. 4B 8B; without any, checkpoints as they lie",
        metavar="V",
        read=parse_tokens,
    )
    intervals_iterations: tuple[int, ...] = setting(
        (), "spacings in iterations, for checkpoints that do not say tokens", metavar="V"
    )
    ends: str | tuple[int, ...] = setting(
        "newest",
        "newest checkpoint of each average: all, newest, every:K (each K-th complete one, counted "
        "back from the newest), or iterations",
        metavar="E",
        make=parse_ends,
    )
    tolerance: float = same(SelectionRequest, "tolerance", flag="tolerance")
    exclude: tuple[int, ...] = same(SelectionRequest, "exclude", flag="exclude")
    allow_gaps: bool = same(SelectionRequest, "allow_gaps", flag="allow_gaps")

    def __post_init__(self) -> None:
        for name in ("methods", "lasts", "ends"):
            if not getattr(self, name):
                raise UsageError(f"{named(name)} is empty: name at least one")
        if any(method.name == "custom" for method in self.methods):
            raise UsageError(
                f"{given('methods', 'custom')}: a list of coefficients fits one count only, use "
                "pma merge"
            )
        if self.intervals_tokens and self.intervals_iterations:
            raise UsageError(
                f"{named('intervals_tokens')} and {named('intervals_iterations')} cannot be "
                "combined: an average has one spacing"
            )
        if isinstance(self.ends, str):
            _step(self.ends)
        with _AXES():
            for _ in self._requests(None):  # SelectionRequest refuses what is out of range
                pass

    def points(self, refs: Sequence[CheckpointRef]) -> tuple[list[GridPoint], list[Skipped]]:
        """Every average that `refs` allow, and those that they do not.

        Ends go from old to new, and at one end from short windows to long ones, so that points
        which follow each other read mostly the same files.

        Raises:
            SelectionError: an end that was named is not there, or no average at all can be met.
            UsageError: coefficients that cannot be made of these checkpoints.
        """
        with _AXES():
            return self._points(refs)

    def _points(self, refs: Sequence[CheckpointRef]) -> tuple[list[GridPoint], list[Skipped]]:
        points: list[GridPoint] = []
        skipped: list[Skipped] = []
        methods = {method_label(method): method for method in self.methods}.values()
        for end in self.end_iterations(refs):
            points.append(self._unmerged(refs, end))
            for request in self._requests(end):
                try:
                    selection = select(refs, request)
                except SelectionError as error:
                    skipped += [self._skip(request, method, str(error)) for method in methods]
                    continue
                points += [_merged(request, method, selection) for method in methods]
        if skipped and all(point.method is None for point in points):
            raise SelectionError(f"no average of the grid can be made: {skipped[-1].reason}")
        return points, skipped

    def _unmerged(self, refs: Sequence[CheckpointRef], end: int) -> GridPoint:
        request = SelectionRequest(last=1, end_iteration=end, exclude=self.exclude)
        return GridPoint(
            request=request, method=None, selection=select(refs, request), coefficients=(1.0,)
        )

    def _requests(self, end: int | None) -> Iterator[SelectionRequest]:
        intervals: dict[tuple[int | None, int | None], None] = {}  # each once, as typed
        intervals |= dict.fromkeys((v, None) for v in self.intervals_tokens)
        intervals |= dict.fromkeys((None, v) for v in self.intervals_iterations)
        for last, (tokens, iterations) in itertools.product(
            sorted(set(self.lasts)), intervals or [(None, None)]
        ):
            if last != 1:
                yield SelectionRequest(
                    last=last,
                    interval_tokens=tokens,
                    interval_iterations=iterations,
                    end_iteration=end,
                    tolerance=self.tolerance,
                    exclude=self.exclude,
                    allow_gaps=self.allow_gaps,
                )

    def end_iterations(self, refs: Sequence[CheckpointRef]) -> list[int]:
        """Iterations of the ends, oldest first."""
        if not isinstance(self.ends, str):
            return sorted(set(self.ends))
        complete = sorted(
            ref.iteration
            for ref in refs
            if ref.complete
            and ref.unhealthy_because is None
            and ref.iteration is not None
            and ref.iteration not in self.exclude
        )
        step = _step(self.ends)
        return complete[-1:] if step is None else complete[::-1][::step][::-1]

    def _skip(self, request: SelectionRequest, method: Method, reason: str) -> Skipped:
        assert request.end_iteration is not None and request.last is not None
        return Skipped(
            end_iteration=request.end_iteration,
            method=method_label(method),
            last=request.last,
            interval_tokens=request.interval_tokens,
            interval_iterations=request.interval_iterations,
            reason=reason,
        )


def _merged(request: SelectionRequest, method: Method, selection: Selection) -> GridPoint:
    made = method.of(selection.positions, len(selection.refs))
    return GridPoint(request=request, method=method, selection=selection, coefficients=made.values)
