"""Constant-rate runs of several kinds, many windows of each scored: what rules are made from."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lab.experiment import Row
from lab.models import Scale, constant
from lab.scoring import Merges
from lab.spreads import Distances
from lab.work import Job
from pma_megatron.scores.grid import UNMERGED

LASTS, TIMES = (3, 10), (1, 2, 4)
_SMOOTHED = 40


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Runs that differ by their seed alone."""

    name: str
    moe: bool = False
    factor: float = 1.0


KINDS = (
    Kind(name="dense"),
    Kind(name="MoE", moe=True),
    Kind(name="dense, half the rate", factor=0.5),
)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """A grid of merges and all distances, of every kind and seed."""
    found: list[Job] = []
    for kind in KINDS:
        for seed in seeds:
            found += [_merges(scale, seed, kind), _distances(scale, seed, kind)]
    return found


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Every window: where it lies, how wide it is, what merging it gains."""
    for kind in KINDS:
        for seed in seeds:
            merges, apart = _merges(scale, seed, kind), _distances(scale, seed, kind)
            trained = merges.run.record().losses
            points = merges.result()["points"]
            newest = {
                p["end_iteration"]: p["losses"]["test"] for p in points if p["method"] == UNMERGED
            }
            for point in points:
                if point["method"] == UNMERGED:
                    continue
                end, window = point["end_iteration"], point["iterations"]
                yield {
                    "kind": kind.name,
                    "seed": seed,
                    "last": point["last"],
                    "interval_tokens": scale.tokens(point["interval_iterations"]),
                    "end_tokens": scale.tokens(end),
                    "oldest": window[0] / end,
                    "trained": end / scale.end,
                    "spread": apart.spread(window),
                    "moved": float(apart.squares([window[0], end])[0, 1]),
                    "size": apart.size(end),
                    "fall": _before(trained, window[0]) - _before(trained, end),
                    "gain": newest[end] - point["losses"]["test"],
                }


def _before(losses: Sequence[float], iteration: int) -> float:
    """Training loss there: the mean of some steps, as it is noisy."""
    return statistics.fmean(losses[iteration - _SMOOTHED : iteration])


def _merges(scale: Scale, seed: int, kind: Kind) -> Merges:
    return Merges(
        run=constant(scale, seed, moe=kind.moe, factor=kind.factor),
        lasts=LASTS,
        every=tuple(n * scale.every for n in TIMES),
        ends=_ends(scale),
    )


def _distances(scale: Scale, seed: int, kind: Kind) -> Distances:
    run = constant(scale, seed, moe=kind.moe, factor=kind.factor)
    return Distances(run=run, iterations=run.saves)


def _ends(scale: Scale) -> tuple[int, ...]:
    """More of them early, where windows reach back far."""
    parts = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)
    return tuple(round(scale.end * part / scale.every) * scale.every for part in parts)
