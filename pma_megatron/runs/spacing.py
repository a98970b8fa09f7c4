"""Evenly spaced places that checkpoints are to fill, and what to do where one stays empty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pma_megatron.base.spelling import given, has, named
from pma_megatron.runs.refs import CheckpointRef, Unit, iteration_of, shown, unusable_list
from pma_megatron.runs.tokens import given_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Evenly spaced places, counted back from the end, that checkpoints are to fill."""

    unit: Unit
    setting: str
    position: Callable[[CheckpointRef], int]
    interval: int
    count: int
    tolerance: float

    @property
    def reach(self) -> int:
        """From the end to the farthest that the last place may lie."""
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

    def would_take(
        self, ref: CheckpointRef, at: float | None, chosen: Sequence[CheckpointRef]
    ) -> bool:
        """Whether one of the places would have taken `ref`, had it been usable.

        Args:
            ref: a checkpoint that is not.
            at: its position; None if unknown, which counts as yes.
            chosen: what the places took, newest first.
        """
        end = self.position(chosen[0])
        if at is None or iteration_of(ref) > iteration_of(chosen[0]):
            return True
        for place, taken in enumerate(chosen):
            target = end - place * self.interval
            off, theirs = abs(at - target), abs(self.position(taken) - target)
            newer = off == theirs and at > self.position(taken)
            if off <= self.tolerance * self.interval and (off < theirs or newer):
                return True
        return False

    def given(self, interval: int) -> str:
        """The setting with another interval, as the user may type it."""
        measured = given_tokens if self.unit == "tokens" else given
        return measured(self.setting, interval)


def hole(
    pool: Sequence[CheckpointRef],
    usable: Sequence[CheckpointRef],
    grid: Places,
    place: int,
    exclude: Sequence[int],
    window: int | None,
) -> str:
    """What is missing at one place, what lies around it, and what would work instead."""
    target = grid.position(usable[-1]) - place * grid.interval
    older = next((ref for ref in reversed(usable) if grid.position(ref) <= target), None)
    newer = next(ref for ref in usable if grid.position(ref) > target)
    where = shown(target, "tokens") if grid.unit == "tokens" else f"iteration {target}"
    allowed = shown(int(grid.tolerance * grid.interval), grid.unit)
    before = f"{older.describe()} before it" if older else "none before it"
    sentences = [
        f"{grid.given(grid.interval)} for {grid.count} checkpoints needs a "
        f"complete one near {where}, {place} x that before {usable[-1].describe()}: there is none "
        f"within {allowed} of it" + _by_tolerance(grid),
        f"nearest are {before} and {newer.describe()} after it",
    ]
    inside = range(iteration_of(older) + 1 if older else 0, iteration_of(newer))
    unfinished = unusable_list(ref for ref in pool if ref.iteration in inside)
    sentences += [f"between them {unfinished}"] if unfinished else []
    excluded = [str(iteration) for iteration in sorted(exclude) if iteration in inside]
    sentences += (
        [f"between them {named('exclude')} leaves out {', '.join(excluded)}"] if excluded else []
    )
    if usable[1:]:
        gaps = (grid.position(newer) - grid.position(older) for older, newer in pairwise(usable))
        gap = int(statistics.median(gaps))
        sentences.append(f"complete checkpoints lie {shown(gap, grid.unit)} apart here (median)")
        ways = _ways_out(usable, grid, place, gap, window)
        sentences.append(f"what works: {', or '.join(ways)}")
    return "; ".join(sentences)


def _ways_out(
    usable: Sequence[CheckpointRef], grid: Places, place: int, gap: int, window: int | None
) -> list[str]:
    """Changes to the request that fill every place, each tried out here."""
    farthest = max(distance for distance, _ in grid.distances(usable))
    tolerance = math.ceil(100 * farthest / grid.interval) / 100
    trials = []
    if tolerance < 0.5 and has("tolerance"):
        trials.append((given("tolerance", tolerance), replace(grid, tolerance=tolerance)))
    natural = max(1, round(grid.interval / gap)) * gap
    for other in sorted({natural, gap} - {grid.interval}, reverse=True):
        count = window // other if window else grid.count
        text = grid.given(other)
        trials.append((text, replace(grid, interval=other, count=count)))
    ways = [text for text, trial in trials if 1 < len(trial.pick(usable)) == trial.count]
    if place > 1:
        shorter = given_tokens("window_tokens", place * grid.interval)
        ways.insert(0, shorter if window else given("last", place))
    if has("iterations"):
        ways.append(f"naming the checkpoints with {named('iterations')}")
    return ways or ["another interval"]


def _by_tolerance(grid: Places) -> str:
    return f" ({given('tolerance', grid.tolerance)})" if has("tolerance") else ""
