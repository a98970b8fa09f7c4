"""From where on a merge helps: rules for a warning, from many windows, tried on held-out seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from lab import many
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.pages import JUDGED, MODELS, NEWEST, curve, zero
from lab.stats import Estimate, estimate

from pma_megatron.runs.notices import EARLY, OFTEN

_FIRST = 3 / 8
"""Of a run, where most of the harm ends that no warning names."""

_Judged = tuple[float, float, float]
_BEGINS = "where the window begins"
_RULES: dict[str, Callable[[Row], float]] = {
    _BEGINS: lambda r: r["oldest"],
    "fall of the training loss": lambda r: -r["fall"],
}
"""What a rule looks at: it warns below a threshold."""


def findings(rows: Sequence[Row]) -> Findings:
    """What is in use, and each rule with its threshold fitted to the other seeds."""
    fixed = {
        at: [_tried(mine, _RULES[_BEGINS], at) for _, mine in groups(rows, "seed")]
        for at in (EARLY, OFTEN)
    }
    words = {EARLY: "in use: worse", OFTEN: "in use: often worse; the paper's"}
    table = [
        [f"begins below {at:.0%} of its end ({words[at]})", "-", *_shown(tried)]
        for at, tried in fixed.items()
    ]
    found = {}
    for name, looks in _RULES.items():
        tried, thresholds = [], []
        for (seed,), mine in groups(rows, "seed"):
            thresholds.append(_fitted([r for r in rows if r["seed"] != seed], looks))
            tried.append(_tried(mine, looks, thresholds[-1]))
        found[name] = tried, thresholds
        ends = sorted(abs(each) for each in thresholds)
        table.append([name, f"{ends[0]:.3f} to {ends[-1]:.3f}", *_shown(tried)])
    begins, thresholds = found[_BEGINS]
    right = {at: estimate([each[0] for each in tried]) for at, tried in fixed.items()}
    more = _better(begins, fixed[OFTEN])
    falls = _better(found["fall of the training loss"][0], begins)
    below, between, beyond = (
        [r for r in rows if low <= r["oldest"] < high]
        for low, high in pairwise((0.0, EARLY, OFTEN, math.inf))
    )
    hurt = [r for r in beyond if r["gain"] < 0]
    return Findings(
        verdict=f"worse than the newest checkpoint are {_worse(below)} windows that begin below "
        f"{EARLY:.0%} of their end, {_worse(between)} from there to {OFTEN:.0%}, and "
        f"{_worse(beyond)} beyond; a warning below {OFTEN:.0%}, which is the paper's number, "
        f"judges {_percent(right[OFTEN], sign='')} of them rightly, one below {EARLY:.0%} "
        f"{_percent(right[EARLY], sign='')}",
        sentences=[
            f"Merging is worse than the newest checkpoint in {_worse(rows)} windows. Of the "
            f"{len(hurt)} that begin beyond {OFTEN:.0%}, "
            f"{sum(r['trained'] <= _FIRST for r in hurt)} end in the first {Fraction(_FIRST)} of "
            f"the run, and the worst loses {_worst(beyond):.4f}. Thresholds fitted to the other "
            f"seeds ({min(thresholds):.0%} to {max(thresholds):.0%}) judge "
            f"{_percent(more)} more of a seed's windows rightly than {OFTEN:.0%}, which was fitted "
            "to nothing here. The fall of the training loss over the window, which no checkpoint "
            f"knows, judges {_percent(falls)} more rightly than where the window begins, both "
            "fitted."
        ],
        tables=[
            Table(
                columns=["rule", "thresholds", "right", "harm that was not warned of", "false"],
                rows=table,
            )
        ],
    )


def _fitted(rows: Sequence[Row], looks: Callable[[Row], float]) -> float:
    """The threshold that judges most windows rightly; in the middle between two of them."""
    values = np.unique([looks(r) for r in rows])
    middles = (values[1:] + values[:-1]) / 2
    return float(max(middles, key=lambda at: (_tried(rows, looks, at)[0], -at)))


def _tried(rows: Sequence[Row], looks: Callable[[Row], float], threshold: float) -> _Judged:
    """Share judged rightly; of harmful windows without a warning; of harmless ones with one."""
    warned = np.asarray([looks(r) < threshold for r in rows])
    hurt = np.asarray([r["gain"] < 0 for r in rows])
    return (
        float(np.mean(warned == hurt)),
        float(np.mean(~warned[hurt])) if hurt.any() else 0.0,
        float(np.mean(warned[~hurt])) if not hurt.all() else 0.0,
    )


def _shown(tried: Sequence[_Judged]) -> list[str]:
    return [_percent(estimate(column), sign="") for column in zip(*tried, strict=True)]


def _percent(found: Estimate, sign: str = "+") -> str:
    margin = "" if found.margin is None else f" ± {100 * found.margin:.0f}"
    return f"{100 * found.mean:{sign}.0f}{margin} %"


def _better(one: Sequence[_Judged], other: Sequence[_Judged]) -> Estimate:
    """By how much more is judged rightly, seed by seed."""
    return estimate([a[0] - b[0] for a, b in zip(one, other, strict=True)])


def _worse(rows: Sequence[Row]) -> str:
    return f"{sum(r['gain'] < 0 for r in rows)} of {len(rows)}"


def _worst(rows: Sequence[Row]) -> float:
    return max(0.0, -min(r["gain"] for r in rows))


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by where the window begins, for every kind; right and wrong by threshold."""
    left, right = figure.subplots(1, 2)
    edges = np.array([0.0, 0.3, 0.45, 0.55, 0.65, 0.75, 0.82, 0.88, 0.93, 1.0])
    for (kind,), mine in groups(rows, "kind"):
        points = {}
        for low, high in pairwise(edges):
            inside = [r for r in mine if low <= r["oldest"] < high]
            seeds = [[r["gain"] for r in found] for _, found in groups(inside, "seed")]
            if seeds:
                points[(low + high) / 2] = estimate([float(np.mean(gains)) for gains in seeds])
        model, _, slower = kind.partition(", ")
        curve(left, points, color=MODELS[model], ls="--" if slower else "-", label=kind)
    zero(left)
    left.set(xlabel="where the window begins, part of its end", ylabel="gain (test, nats per byte)")
    for which, (name, color) in enumerate(JUDGED.items()):
        points = {}
        for at in np.arange(0.3, 1.0, 0.05):
            tried = [_tried(mine, _RULES[_BEGINS], at) for _, mine in groups(rows, "seed")]
            points[float(at)] = estimate([each[which] for each in tried])
        curve(right, points, color=color, label=name)
    for at in (EARLY, OFTEN):
        right.axvline(at, color=NEWEST, lw=0.8, ls="--")
    right.set(xlabel="warn below this part", ylabel="share of windows", title="dashes: in use")


EXPERIMENT = Experiment(
    name="too_early",
    title="How early is too early",
    paper="At a fixed N, averages that reach back into young weights are worse than the newest "
    "checkpoint: 6 from 22 % of the tokens on, 10 from 29 %; 10 from 65 % are better.",
    setup="The same windows as in Gain and spread. A rule warns below a threshold, which is fitted "
    "to all seeds but one and tried on that one.",
    seeds=3,
    jobs=many.jobs,
    rows=many.rows,
    findings=findings,
    plot=plot,
)
