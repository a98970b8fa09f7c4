"""Whether the gain of a merge follows from how far its members lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from lab import many
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.pages import MERGED, NEWEST, curve, shades, zero
from lab.regression import Features, HeldOut, held_out
from lab.stats import Estimate, estimate

from pma_megatron.runs.notices import OFTEN

_FEATURES: dict[str, Features] = {
    "the mean gain": lambda r: (1.0,),
    "spread": lambda r: (_doublings(r), 1.0),
    "fall of the loss": lambda r: (r["fall"], 1.0),
    "spread and fall": lambda r: (_doublings(r), r["fall"], 1.0),
}


_LATE = 0.5
"""Of a run: windows that end from there on are late ones."""


def _doublings(row: Row) -> float:
    """The spread on a scale on which it is as wide early as late."""
    return math.log2(row["spread"])


def findings(rows: Sequence[Row]) -> Findings:
    """The gain by spread over rates, where nothing else differs; then all windows, held out."""
    slope = estimate([_slope(mine) for _, mine in groups(_at_end(rows), "seed")])
    table, errors = [], {}
    for name, features in _FEATURES.items():
        by_seed, by_kind = (held_out(rows, by, features) for by in ("seed", "kind"))
        errors[name] = by_seed, by_kind
        table.append(
            [
                name,
                f"{_over(by_seed, 'rmse')}",
                f"{_over(by_seed, 'explained').mean:.0%}",
                f"{_over(by_seed, 'signs').mean:.0%}",
                f"{_over(by_kind, 'rmse')}",
                f"{_over(by_kind, 'explained').mean:.0%}",
                f"{_over(by_kind, 'signs').mean:.0%}",
            ]
        )
    alone, both = (errors[name] for name in ("spread", "spread and fall"))
    grows = "grows" if slope.low > 0 else "falls" if slope.high < 0 else "does not clearly change"
    return Findings(
        verdict=f"at the end of runs that differ by their rate the gain {grows} with the spread; "
        f"over all windows the spread alone explains {_over(alone[0], 'explained').mean:.0%} of a "
        "held-out seed, with the fall of the training loss "
        f"{_over(both[0], 'explained').mean:.0%}",
        sentences=[
            f"For each doubling of the spread between rates the gain changes by {slope.signed} "
            f"(N = {max(many.LASTS)}, smallest interval, end of the run). Over all "
            f"{len(rows)} windows, early and late, members also lie apart because the run still "
            "moves, and that does not help. A held-out seed is predicted to within (RMSE, nats) "
            + "; ".join(f"{_over(found[0], 'rmse')} from {name}" for name, found in errors.items())
            + f". With the last, the sign of the gain is right in "
            f"{_over(both[0], 'signs').mean:.0%} of its windows. Of these three kinds of runs, "
            "which are not all, the last explains "
            f"{_over(both[1], 'explained').mean:.0%} where a kind was not fitted, of the worst "
            f"{min(h.explained for h in both[1]):.0%}. {_late(rows)}"
        ],
        tables=[
            Table(
                columns=["model, rate", "spread at the end", "gain"],
                rows=[
                    [kind, f"{_mean(mine, 'spread').mean:.2f}", _mean(mine, "gain").signed]
                    for (kind,), mine in groups(_at_end(rows, rates=False), "kind")
                ],
            ),
            Table(
                columns=[
                    "predicted from",
                    "RMSE, held-out seed",
                    "explained",
                    "sign right",
                    "RMSE, held-out kind",
                    "explained",
                    "sign right",
                ],
                rows=table,
            ),
        ],
    )


def _late(rows: Sequence[Row]) -> str:
    """What the fall of the loss tells where there is little harm to be told of."""
    late = [r for r in rows if r["trained"] >= _LATE and r["oldest"] >= OFTEN]
    explained = [each.explained for each in held_out(late, "seed", _FEATURES["fall of the loss"])]
    return (
        f"What is explained is mostly what hurts: of the {len(late)} windows that end from "
        f"{_LATE:.0%} of the run on and begin from {OFTEN:.0%} of their end on "
        f"{sum(r['gain'] > 0 for r in late)} gain, and fitted to these alone the fall of the loss "
        f"explains {min(explained):.0%} to {max(explained):.0%} of a held-out seed."
    )


def _at_end(rows: Sequence[Row], rates: bool = True) -> list[Row]:
    """One window of every run: the longest with the smallest interval, at the end."""
    least = min(r["interval_tokens"] for r in rows)
    return [
        r
        for r in rows
        if r["trained"] == 1
        and r["interval_tokens"] == least
        and r["last"] == max(many.LASTS)
        and (not rates or r["kind"] != "MoE")
    ]


def _slope(rows: Sequence[Row]) -> float:
    """Gain per doubling of the spread, by least squares."""
    return statistics.linear_regression(
        [_doublings(r) for r in rows], [r["gain"] for r in rows]
    ).slope


def _by_seed(rows: Sequence[Row], key: str) -> Estimate:
    """Of means of each seed: windows of one run are alike, and no number of them makes a run."""
    return estimate([statistics.fmean(r[key] for r in mine) for _, mine in groups(rows, "seed")])


def _mean(rows: Sequence[Row], key: str) -> Estimate:
    return estimate([r[key] for r in rows])


def _over(found: Sequence[HeldOut], what: str) -> Estimate:
    return estimate([getattr(each, what) for each in found])


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by spread for ends early and late; predicted gains of held-out seeds."""
    left, right = figure.subplots(1, 2)
    parts = sorted({r["trained"] for r in rows})[1::2]
    for color, part in zip(shades(len(parts)), parts, strict=True):
        mine = [r for r in rows if r["trained"] == part]
        points = {}
        for _, found in groups(sorted(mine, key=_window), "last", "interval_tokens"):
            points[statistics.fmean(r["spread"] for r in found)] = _by_seed(found, "gain")
        points = dict(sorted(points.items()))
        curve(left, points, color=color, label=f"end at {part:.0%} of the run")
    zero(left)
    left.set(xscale="log", xlabel="spread of the members", ylabel="gain (test, nats per byte)")
    known = [
        {"seed": h.group, "predicted": float(predicted), "gain": float(gain)}
        for h in held_out(rows, "seed", _FEATURES["spread and fall"])
        for predicted, gain in zip(h.predicted, h.found, strict=True)
    ]
    predicted, gains = (np.array([r[key] for r in known]) for key in ("predicted", "gain"))
    right.plot(predicted, gains, ".", ms=4, alpha=0.3, color=MERGED, label="a window")
    edges = np.quantile(predicted, np.linspace(0, 1, 9))
    points = {}
    for low, high in pairwise(edges):
        inside = [r for r in known if low <= r["predicted"] <= high]
        points[_by_seed(inside, "predicted").mean] = _by_seed(inside, "gain")
    curve(right, points, color=MERGED, ls="", label="mean of an eighth of them, by seed")
    right.plot(edges[[0, -1]], edges[[0, -1]], color=NEWEST, lw=0.8)
    right.set(xlabel="gain predicted from spread and fall", ylabel="gain of a held-out seed")


def _window(row: Row) -> tuple[int, int]:
    return row["last"], row["interval_tokens"]


EXPERIMENT = Experiment(
    name="spread",
    title="Gain and spread",
    paper="ACL 2026 industry track (openreview lGHSxRrMZs): what merging gains follows the spread "
    "of the parameters.",
    setup="Constant-rate runs of three kinds (dense, MoE, dense at half the rate), "
    f"N = {' and '.join(map(str, many.LASTS))}, three intervals, eight ends each; the spread is "
    "the mean squared distance of the members from their mean (`pma geometry`), the fall that of "
    "the training loss over the window. Held out: each seed in turn, then each kind.",
    seeds=3,
    jobs=many.jobs,
    rows=many.rows,
    findings=findings,
    plot=plot,
)
