"""Which checkpoints go into an average: from what lies on disk and what was asked, to a list.

Pure functions on `CheckpointRef`s that a format has read. Nothing is guessed: what cannot be met
is refused with what was found instead and what to do. Incomplete checkpoints are never selected.
"""

from __future__ import annotations

import math
import posixpath
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.tokens import comparable_run, format_tokens, parse_tokens, why_incomparable

DEFAULT_LAST = 10  # arXiv 2505.12082: N = 10 where nothing else is known

_SHOWN = 4  # incomplete checkpoints named in one message

_UNEVEN = 1.5  # largest gap over smallest, from which on the user is told

Unit = Literal["tokens", "iterations", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRef:
    """One checkpoint directory, as far as its metadata tells."""

    path: str
    format: str
    """Name of the format that recognised it, for instance `torch_dist`."""
    iteration: int | None
    """None where neither name nor content carries one (a `release` directory)."""
    consumed_samples: int | None
    consumed_tokens: int | None
    """Tokens that the weights were trained on (`consumed_tokens_of`)."""
    tokens_unknown_because: str | None
    """Why `consumed_tokens` is None, to complete "tokens are unknown because ..."."""
    complete: bool
    """False while it is being written, or if a write was cut off."""
    incomplete_because: str | None
    snapshot: bool = False
    """True for a thin snapshot (main params only): a source, but not one to resume from."""
    unhealthy_because: str | None = None
    """Why only a selection that names it takes it: it was saved in a loss spike."""

    def describe(self) -> str:
        """The name to use in a message: `iteration 4000 (16.78B tokens)`."""
        if self.iteration is None:
            return self.path
        if self.consumed_tokens is None:
            return f"iteration {self.iteration}"
        return f"iteration {self.iteration} ({format_tokens(self.consumed_tokens)} tokens)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionRequest:
    """What the user asked for. Explicit `iterations` or `paths` exclude everything else.

    Raises:
        UsageError: a value out of range, or settings that contradict each other.
    """

    last: int | None = None
    """How many checkpoints; 10 if nothing else says so."""
    interval_tokens: int | None = None
    """Take one checkpoint every so many tokens, counted back from the newest."""
    interval_iterations: int | None = None
    """The same in iterations, for checkpoints that do not say how many tokens they consumed."""
    tolerance: float = 0.25
    """How far from its place a checkpoint may lie, as a fraction of the interval; below 0.5, where
    two places could claim the same checkpoint."""
    end_iteration: int | None = None
    """The newest checkpoint of the average; if None, the newest complete one."""
    window_tokens: int | None = None
    """Every checkpoint of the last so many tokens, the far end excluded; with `interval_tokens`,
    window // interval of them."""
    exclude: tuple[int, ...] = ()
    """Iterations to leave out, as if they were not there."""
    iterations: tuple[int, ...] | None = None
    """Exactly these, in any order."""
    paths: tuple[str, ...] | None = None
    """Exactly these, in any order."""

    def __post_init__(self) -> None:
        for name in ("last", "interval_tokens", "interval_iterations", "window_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} must be at least 1, got {value}")
        if not 0 <= self.tolerance < 0.5:
            raise UsageError(
                f"--tolerance is a fraction of the interval in [0, 0.5), got {self.tolerance}: "
                "from 0.5 on, one checkpoint could stand for two places"
            )
        self._refuse_contradictions()
        for name in ("iterations", "paths"):
            self._refuse_bad_list(name)

    def _refuse_contradictions(self) -> None:
        for one, other, why in (
            ("interval_tokens", "interval_iterations", "an average has one spacing"),
            ("window_tokens", "interval_iterations", "use --interval-tokens, or --last"),
            ("window_tokens", "last", "one counts checkpoints, the other measures tokens"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise UsageError(f"{_flag(one)} and {_flag(other)} cannot be combined: {why}")
        window, interval = self.window_tokens, self.interval_tokens
        if window is not None and interval is not None and window < 2 * interval:
            raise UsageError(
                f"--window-tokens {format_tokens(window)} holds fewer than two checkpoints "
                f"{format_tokens(interval)} apart: widen it or lower --interval-tokens"
            )
        if self.end_iteration is not None and self.end_iteration in self.exclude:
            raise UsageError(f"--end-iteration {self.end_iteration} is also in --exclude")

    def _refuse_bad_list(self, name: str) -> None:
        listed = getattr(self, name)
        if listed is None:
            return
        others = [
            other
            for other in self.__slots__
            if other not in (name, "tolerance") and getattr(self, other) not in (None, ())
        ]
        if others:
            raise UsageError(
                f"{_flag(name)} names the checkpoints, so {', '.join(map(_flag, others))} "
                "would have no effect: drop one or the other"
            )
        keys = [posixpath.normpath(item) if name == "paths" else item for item in listed]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated or not keys:
            found = f"names {', '.join(map(str, repeated))} twice" if keys else "is empty"
            raise UsageError(f"{_flag(name)} {found}: name each checkpoint once")


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
    """Sentences for the user: what was passed over and why, what is uneven."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Evenly spaced places, counted back from the end, that checkpoints are to fill."""

    unit: Unit
    flag: str
    position: Callable[[CheckpointRef], int]
    interval: int
    count: int
    tolerance: float

    @property
    def reach(self) -> int:
        return math.ceil((self.count - 1 + self.tolerance) * self.interval)

    def distances(self, usable: Sequence[CheckpointRef]) -> list[tuple[int, CheckpointRef]]:
        """For each place, newest first: the nearest checkpoint and how far off it is."""
        end = self.position(usable[-1])
        targets = [end - place * self.interval for place in range(self.count)]
        # Newest first, so that min() keeps the newer of two equally near ones.
        near = [(self.position(ref), ref) for ref in reversed(usable)]
        return [
            min(((abs(at - target), ref) for at, ref in near), key=lambda pair: pair[0])
            for target in targets
        ]

    def pick(self, usable: Sequence[CheckpointRef]) -> list[CheckpointRef]:
        """Newest first, and cut short at the first place that nothing is near enough to."""
        chosen = []
        for distance, ref in self.distances(usable):
            if distance / self.interval > self.tolerance:
                break
            chosen.append(ref)
        return chosen

    def typed(self, value: int) -> str:
        """A value as the user may type it: never rounded."""
        short = format_tokens(value)
        return short if self.unit == "tokens" and parse_tokens(short) == value else str(value)


def select(refs: Sequence[CheckpointRef], request: SelectionRequest) -> Selection:
    """Choose the checkpoints of one average.

    With an interval V, place k = 0, 1, ... lies k V before the end checkpoint and takes the
    complete checkpoint nearest to it (the newer of two equally near), if within `tolerance` x V.
    Without one, the last N complete checkpoints as they lie; with a window alone, all complete
    ones in it. The order of `refs` does not matter.

    Raises:
        SelectionError: a checkpoint that was named is missing or incomplete; there are too few, or
            there is a hole where the interval needs one; two have the same iteration; a selection
            by tokens meets token counts that are unknown or cannot be compared.
    """
    if request.paths is not None:
        return _selection(*_by_paths(refs, request.paths), request)
    pool, notes = _pool(refs, request.exclude)
    if request.iterations is not None:
        chosen = [_existing(pool, wanted, "--iterations") for wanted in sorted(request.iterations)]
        return _selection(chosen, notes, request)
    usable = _up_to_end(pool, request.end_iteration)
    if request.interval_tokens or request.interval_iterations:
        chosen = _spaced(pool, usable, request)
    elif request.window_tokens:
        chosen = _window(usable, request.window_tokens)
    else:
        chosen = _last(pool, usable, request)
    return _selection(chosen, notes + _passed_over(pool, usable, chosen), request)


def _pool(
    refs: Sequence[CheckpointRef], exclude: tuple[int, ...]
) -> tuple[list[CheckpointRef], list[str]]:
    """Every numbered checkpoint that is not excluded, by iteration."""
    notes = [
        f"{ref.path} was passed over: it has no iteration number (name it with --paths to use it)"
        for ref in sorted(refs, key=lambda ref: ref.path)
        if ref.iteration is None
    ]
    numbered = sorted((ref for ref in refs if ref.iteration is not None), key=_iteration)
    for unwanted in sorted(set(exclude)):
        if all(ref.iteration != unwanted for ref in numbered):
            raise SelectionError(
                f"--exclude names iteration {unwanted}, which does not exist; "
                + _nearest(numbered, unwanted)
            )
        notes.append(f"iteration {unwanted} was left out by --exclude")
    pool = [ref for ref in numbered if ref.iteration not in exclude]
    _refuse_duplicates(pool)
    return pool, notes


def _refuse_duplicates(ordered: Sequence[CheckpointRef]) -> None:
    for one, other in pairwise(ordered):
        if one.iteration == other.iteration:
            first, second = sorted((one.path, other.path))
            raise SelectionError(
                f"iteration {one.iteration} exists twice, as {first} and as {second}: leave it out "
                "with --exclude, or name the checkpoints to merge with --paths"
            )


def _by_paths(
    refs: Sequence[CheckpointRef], paths: tuple[str, ...]
) -> tuple[list[CheckpointRef], list[str]]:
    found = {posixpath.normpath(ref.path): ref for ref in refs}
    chosen = []
    for path in paths:
        ref = found.get(posixpath.normpath(path))
        if ref is None:
            raise SelectionError(f"--paths names {path}, which is not a checkpoint that was found")
        if not ref.complete:
            raise SelectionError(f"--paths names {path}, which is incomplete: {_why(ref)}")
        chosen.append(ref)
    if all(ref.iteration is not None for ref in chosen):
        chosen.sort(key=_iteration)
        _refuse_duplicates(chosen)
        return chosen, []
    by_tokens = sorted(chosen, key=lambda ref: ref.consumed_tokens or 0)
    if why_incomparable(by_tokens) is None:
        return by_tokens, ["not every path has an iteration: they are ordered by consumed tokens"]
    return chosen, ["neither iterations nor tokens order the paths: the order given was kept"]


def _existing(pool: Sequence[CheckpointRef], wanted: int, flag: str) -> CheckpointRef:
    ref = next((ref for ref in pool if ref.iteration == wanted), None)
    if ref is not None and ref.complete:
        return ref
    problem = "does not exist" if ref is None else f"is incomplete ({_why(ref)})"
    nearest = _nearest([other for other in pool if other.complete], wanted)
    raise SelectionError(f"{flag} names iteration {wanted}, which {problem}; {nearest}")


def _up_to_end(pool: Sequence[CheckpointRef], end_iteration: int | None) -> list[CheckpointRef]:
    """The complete and healthy checkpoints, the newest of which is the end of the average."""
    complete = [ref for ref in pool if ref.complete and ref.unhealthy_because is None]
    if end_iteration is not None:
        end = _existing(pool, end_iteration, "--end-iteration")
        return [ref for ref in complete if _iteration(ref) < end_iteration] + [end]
    if not complete:
        found = _incomplete_list(pool) or "nothing was found"
        raise SelectionError(f"there is no complete checkpoint to merge: {found}")
    return complete


def _last(
    pool: Sequence[CheckpointRef], usable: Sequence[CheckpointRef], request: SelectionRequest
) -> list[CheckpointRef]:
    count, found = request.last or DEFAULT_LAST, len(usable)
    if found >= count:
        return list(usable[-count:])
    ways = [f"--last {found}"] if found > 1 else []
    ways += ["a later --end-iteration"] if request.end_iteration is not None else []
    ways += ["fewer in --exclude"] if request.exclude else []
    unfinished = _incomplete_list(pool)
    raise SelectionError(
        f"--last {count} needs {count} complete checkpoints up to {usable[-1].describe()}, found "
        f"{found}{'; ' if unfinished else ''}{unfinished}; use "
        + ", ".join([*ways, "or wait until more are complete"])
    )


def _window(usable: Sequence[CheckpointRef], window_tokens: int) -> list[CheckpointRef]:
    run = comparable_run(usable, window_tokens, "--window-tokens")
    start = _tokens(run[-1]) - window_tokens
    chosen = [ref for ref in run if _tokens(ref) > start]
    if len(chosen) < 2:
        older = f"the next older one is {run[-2].describe()}" if run[1:] else "none is older"
        raise SelectionError(
            f"--window-tokens {format_tokens(window_tokens)} holds only {run[-1].describe()}, and "
            f"an average needs two checkpoints: {older}; widen the window or use --last"
        )
    return chosen


def _spaced(
    pool: Sequence[CheckpointRef], usable: list[CheckpointRef], request: SelectionRequest
) -> list[CheckpointRef]:
    by_tokens = request.interval_tokens is not None
    interval = request.interval_tokens or request.interval_iterations or 0
    window = request.window_tokens
    grid = _Grid(
        unit="tokens" if by_tokens else "iterations",
        flag=_flag("interval_tokens" if by_tokens else "interval_iterations"),
        position=_tokens if by_tokens else _iteration,
        interval=interval,
        count=window // interval if window else request.last or DEFAULT_LAST,
        tolerance=request.tolerance,
    )
    if by_tokens:
        usable = comparable_run(usable, grid.reach, grid.flag)
    chosen = grid.pick(usable)
    if len(chosen) < grid.count:
        raise SelectionError(_hole(pool, usable, grid, len(chosen), request))
    return chosen[::-1]


def _selection(
    chosen: Sequence[CheckpointRef], notes: list[str], request: SelectionRequest
) -> Selection:
    positions, unit = _positions(chosen)
    if unit == "iterations":
        notes = [*notes, f"positions are in iterations, not tokens: {why_incomparable(chosen)}"]
    measured, gap_unit = positions, unit
    if request.interval_iterations:
        measured, gap_unit = tuple(map(_iteration, chosen)), "iterations"
    gaps = tuple(newer - older for older, newer in pairwise(measured))
    requested = request.interval_tokens or request.interval_iterations
    if gaps and not requested and max(gaps) > _UNEVEN * min(gaps):
        few, many = _show(min(gaps), gap_unit), _show(max(gaps), gap_unit)
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
        notes=tuple(notes),
    )


def _positions(chosen: Sequence[CheckpointRef]) -> tuple[tuple[int, ...], Unit]:
    if why_incomparable(chosen) is None:
        return tuple(map(_tokens, chosen)), "tokens"
    if all(ref.iteration is not None for ref in chosen):
        return tuple(map(_iteration, chosen)), "iterations"
    return (), "unknown"


def _passed_over(
    pool: Sequence[CheckpointRef], usable: Sequence[CheckpointRef], chosen: Sequence[CheckpointRef]
) -> list[str]:
    oldest = _iteration(chosen[0])
    notes = [
        f"{ref.path} was passed over: it is incomplete ({_why(ref)})"
        for ref in pool
        if not ref.complete and _iteration(ref) > oldest
    ]
    notes += [
        f"{ref.path} was passed over: {ref.unhealthy_because}"
        for ref in pool
        if ref.complete and ref.unhealthy_because and ref not in chosen and _iteration(ref) > oldest
    ]
    between = sum(_iteration(ref) > oldest for ref in usable) - len(chosen) + 1
    if between:
        notes.append(f"complete checkpoints between the chosen ones, not needed: {between}")
    return notes


def _hole(
    pool: Sequence[CheckpointRef],
    usable: Sequence[CheckpointRef],
    grid: _Grid,
    place: int,
    request: SelectionRequest,
) -> str:
    """What is missing at one place, what lies around it, and what would work instead."""
    target = grid.position(usable[-1]) - place * grid.interval
    older = next((ref for ref in reversed(usable) if grid.position(ref) <= target), None)
    newer = next(ref for ref in usable if grid.position(ref) > target)
    where = _show(target, "tokens") if grid.unit == "tokens" else f"iteration {target}"
    allowed = _show(int(grid.tolerance * grid.interval), grid.unit)
    before = f"{older.describe()} before it" if older else "none before it"
    sentences = [
        f"{grid.flag} {grid.typed(grid.interval)} for {grid.count} checkpoints needs a complete "
        f"one near {where}, {place} x that before {usable[-1].describe()}: there is none within "
        f"{allowed} of it (--tolerance {grid.tolerance:g})",
        f"nearest are {before} and {newer.describe()} after it",
    ]
    inside = range(_iteration(older) + 1 if older else 0, _iteration(newer))
    unfinished = _incomplete_list(ref for ref in pool if ref.iteration in inside)
    sentences += [f"between them {unfinished}"] if unfinished else []
    excluded = [str(iteration) for iteration in sorted(request.exclude) if iteration in inside]
    sentences += [f"between them --exclude leaves out {', '.join(excluded)}"] if excluded else []
    if usable[1:]:
        gaps = (grid.position(newer) - grid.position(older) for older, newer in pairwise(usable))
        gap = int(statistics.median(gaps))
        sentences.append(f"complete checkpoints lie {_show(gap, grid.unit)} apart here (median)")
        ways = _ways_out(usable, grid, place, gap, request.window_tokens)
        sentences.append(f"what works: {', or '.join(ways)}")
    return "; ".join(sentences)


def _ways_out(
    usable: Sequence[CheckpointRef], grid: _Grid, place: int, gap: int, window: int | None
) -> list[str]:
    """Changes to the request that fill every place, each tried out here."""
    farthest = max(distance for distance, _ in grid.distances(usable))
    tolerance = math.ceil(100 * farthest / grid.interval) / 100
    trials = []
    if tolerance < 0.5:
        trials.append((f"--tolerance {tolerance:g}", replace(grid, tolerance=tolerance)))
    natural = max(1, round(grid.interval / gap)) * gap
    for other in sorted({natural, gap} - {grid.interval}, reverse=True):
        count = window // other if window else grid.count
        text = f"{grid.flag} {grid.typed(other)}"
        trials.append((text, replace(grid, interval=other, count=count)))
    ways = [text for text, trial in trials if 1 < len(trial.pick(usable)) == trial.count]
    if place > 1:
        shorter = f"--window-tokens {grid.typed(place * grid.interval)}"
        ways.insert(0, shorter if window else f"--last {place}")
    return [*ways, "naming the checkpoints with --iterations"]


def _incomplete_list(refs: Iterable[CheckpointRef]) -> str:
    found = [f"{ref.describe()} is incomplete ({_why(ref)})" for ref in refs if not ref.complete]
    more = f", and {len(found) - _SHOWN} older ones" if len(found) > _SHOWN else ""
    return ", ".join(found[-_SHOWN:]) + more


def _nearest(ordered: Sequence[CheckpointRef], wanted: int) -> str:
    below = [ref for ref in ordered if _iteration(ref) < wanted][-1:]
    above = [ref for ref in ordered if _iteration(ref) > wanted][:1]
    names = " and ".join(ref.describe() for ref in below + above)
    return f"nearest: {names}" if names else "there is no other"


def _why(ref: CheckpointRef) -> str:
    return ref.incomplete_because or "no reason given"


def _iteration(ref: CheckpointRef) -> int:
    assert ref.iteration is not None, ref
    return ref.iteration


def _tokens(ref: CheckpointRef) -> int:
    assert ref.consumed_tokens is not None, ref
    return ref.consumed_tokens


def _show(value: int, unit: Unit) -> str:
    return f"{format_tokens(value)} tokens" if unit == "tokens" else f"{value} iterations"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
