"""How the learning rate changes what merging gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, gain, groups, means
from lab.models import Scale, constant
from lab.pages import MERGED, NEWEST, curve
from lab.scoring import Merges
from lab.stats import UNDECIDED, Estimate, estimate

LAST, FACTORS = 6, (0.25, 0.5, 1.0, 2.0, 4.0)


def _merges(scale: Scale, seed: int, factor: float) -> Merges:
    run = constant(scale, seed, factor=factor)
    return Merges(run=run, lasts=(LAST,), every=(scale.every,), ends=(scale.end,))


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """One run per rate and seed."""
    return [_merges(scale, seed, factor) for factor in FACTORS for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses at the end."""
    for factor in FACTORS:
        for seed in seeds:
            merges = _merges(scale, seed, factor)
            yield {
                "seed": seed,
                "lr": scale.peak * factor,
                "newest": merges.losses(scale.end, "unmerged")["test"],
                "merged": merges.losses(scale.end)["test"],
            }


def findings(rows: Sequence[Row]) -> Findings:
    """The gain at every rate, and the best merged loss."""
    gains = means(rows, "lr", gain)
    newest, merged = (means(rows, "lr", key) for key in ("newest", "merged"))
    slope = estimate([_slope(found) for _, found in groups(rows, "seed")])
    low, usual, high = min(gains), sorted(gains)[len(gains) // 2], max(gains)
    below, above = _change(rows, low, usual), _change(rows, usual, high)
    best = {
        "newest": min(newest, key=lambda lr: newest[lr].mean),
        "merged": min(merged, key=lambda lr: merged[lr].mean),
    }
    return Findings(
        verdict=_verdict(below, above, usual),
        sentences=[
            f"The gain changes by {below.signed} from {low:g} to {usual:g}, the usual rate, and by "
            f"{above.signed} from there to {high:g}; over all, by {slope.signed} for each doubling "
            f"(a straight line for every seed). The best rate without merging is "
            f"{best['newest']:g}, with merging {best['merged']:g}."
        ],
        tables=[
            Table(
                columns=["learning rate", "newest, test", "merged, test", "gain"],
                rows=[
                    [f"{lr:g}", f"{newest[lr]}", f"{merged[lr]}", gains[lr].signed] for lr in gains
                ],
            )
        ],
    )


def _verdict(below: Estimate, above: Estimate, usual: float) -> str:
    if below.low > 0 and above.low > 0:
        return "the gain grows with the rate"
    if below.high < 0 and above.high < 0:
        return "the gain falls with the rate"
    if below.low > 0:
        turn = "falls beyond it" if above.high < 0 else "not decidable beyond it"
        return f"the gain grows with the rate up to {usual:g}; {turn}"
    return UNDECIDED


def _change(rows: Sequence[Row], start: float, end: float) -> Estimate:
    """Gain at rate `end` minus that at `start`, seed by seed."""
    by = {(r["lr"], r["seed"]): gain(r) for r in rows}
    return estimate([by[end, seed] - by[start, seed] for seed in sorted({r["seed"] for r in rows})])


def _slope(rows: Sequence[Row]) -> float:
    """Gain per doubling of the rate, by least squares."""
    return statistics.linear_regression(
        [math.log2(r["lr"]) for r in rows], [gain(r) for r in rows]
    ).slope


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Losses and gain by rate."""
    left, right = figure.subplots(1, 2)
    for color, key in zip((NEWEST, MERGED), ("newest", "merged"), strict=True):
        curve(left, means(rows, "lr", key), color=color, label=key)
    curve(right, means(rows, "lr", gain), color=MERGED)
    left.set(xscale="log", xlabel="learning rate", ylabel="test loss (nats per byte)")
    right.set(xscale="log", xlabel="learning rate", ylabel="gain (test, nats per byte)")


EXPERIMENT = Experiment(
    name="learning_rate",
    title="Learning rate and gain",
    paper="Not studied; the authors believe that a higher learning rate makes merging gain more.",
    setup=f"Dense, middle size, constant rates from a quarter to four times the usual one; SMA of "
    f"the last {LAST} checkpoints. Ten seeds, because five left it open.",
    seeds=10,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
