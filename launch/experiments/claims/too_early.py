"""From where on a merge helps: rules for a warning, from many windows, tried on held-out seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from lab import many
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.pages import MERGED, NEWEST, curve, shades, zero
from lab.stats import Estimate, estimate

_NOW = 0.5
"""Where the window begins, as a part of its end, below which `pma plan` warns."""

_RULES: dict[str, Callable[[Row], float]] = {
    "where the window begins": lambda r: r["oldest"],
    "fall of the training loss": lambda r: -r["fall"],
}
"""What a rule looks at: it warns below a threshold."""


def findings(rows: Sequence[Row]) -> Findings:
    """Each rule, its threshold fitted to the other seeds, and the one that is in use."""
    now = [_tried(mine, lambda r: r["oldest"], _NOW) for _, mine in groups(rows, "seed")]
    table = [[f"begins below {_NOW:.0%} of its end (in use)", "-", *_shown(now)]]
    found = {}
    for name, looks in _RULES.items():
        tried, thresholds = [], []
        for (seed,), mine in groups(rows, "seed"):
            thresholds.append(_fitted([r for r in rows if r["seed"] != seed], looks))
            tried.append(_tried(mine, looks, thresholds[-1]))
        found[name] = tried, thresholds
        table.append([name, f"{abs(estimate(thresholds).mean):.3f}", *_shown(tried)])
    begins, fitted = found["where the window begins"]
    falls, _ = found["fall of the training loss"]
    better = estimate([b[0] - n[0] for b, n in zip(begins, now, strict=True)])
    more = estimate([f[0] - b[0] for f, b in zip(falls, begins, strict=True)])
    hurt = sum(r["gain"] < 0 for r in rows)
    safe = [r for r in rows if r["oldest"] >= estimate(fitted).mean]
    return Findings(
        verdict=f"warn where the window begins below {estimate(fitted).mean:.0%} of its end: "
        f"{estimate([b[0] for b in begins]).mean:.0%} of the windows of held-out seeds are judged "
        f"rightly, {estimate([n[0] for n in now]).mean:.0%} with the {_NOW:.0%} in use",
        sentences=[
            f"Merging is worse than the newest checkpoint in {hurt} of {len(rows)} windows. The "
            f"fitted threshold judges {_percent(better)} more of them rightly than {_NOW:.0%}; of "
            f"the windows that it passes {sum(r['gain'] < 0 for r in safe)} of {len(safe)} hurt "
            f"all the same, by {_worst(safe):.4f} at most. The fall of the training loss over the "
            f"window, which no checkpoint knows, judges {_percent(more)} more rightly than where "
            "the window begins."
        ],
        tables=[
            Table(
                columns=["rule", "threshold", "right", "harm that was not warned of", "false"],
                rows=table,
            )
        ],
    )


def _fitted(rows: Sequence[Row], looks: Callable[[Row], float]) -> float:
    """The threshold that judges most windows rightly; in the middle between two of them."""
    values = np.unique([looks(r) for r in rows])
    middles = (values[1:] + values[:-1]) / 2
    return float(max(middles, key=lambda at: (_tried(rows, looks, at)[0], -at)))


def _tried(
    rows: Sequence[Row], looks: Callable[[Row], float], threshold: float
) -> tuple[float, float, float]:
    """Share judged rightly; of harmful windows without a warning; of harmless ones with one."""
    warned = np.asarray([looks(r) < threshold for r in rows])
    hurt = np.asarray([r["gain"] < 0 for r in rows])
    return (
        float(np.mean(warned == hurt)),
        float(np.mean(~warned[hurt])) if hurt.any() else 0.0,
        float(np.mean(warned[~hurt])) if not hurt.all() else 0.0,
    )


def _shown(tried: Sequence[tuple[float, float, float]]) -> list[str]:
    return [_percent(estimate(column), sign="") for column in zip(*tried, strict=True)]


def _percent(found: Estimate, sign: str = "+") -> str:
    margin = "" if found.margin is None else f" ± {100 * found.margin:.0f}"
    return f"{100 * found.mean:{sign}.0f}{margin} %"


def _worst(rows: Sequence[Row]) -> float:
    return max(0.0, -min(r["gain"] for r in rows))


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by where the window begins, for every kind; right and wrong by threshold."""
    left, right = figure.subplots(1, 2)
    edges = np.array([0.0, 0.3, 0.45, 0.55, 0.65, 0.75, 0.82, 0.88, 0.93, 1.0])
    kinds = list(groups(rows, "kind"))
    for color, ((kind,), mine) in zip(shades(len(kinds)), kinds, strict=True):
        points = {}
        for low, high in pairwise(edges):
            inside = [r for r in mine if low <= r["oldest"] < high]
            seeds = [[r["gain"] for r in found] for _, found in groups(inside, "seed")]
            if seeds:
                points[(low + high) / 2] = estimate([float(np.mean(gains)) for gains in seeds])
        curve(left, points, color=color, label=kind)
    zero(left)
    left.set(xlabel="where the window begins, part of its end", ylabel="gain (test, nats per byte)")
    names = ("judged rightly", "harm that was not warned of", "false warnings")
    colors = (NEWEST, MERGED, "#e0a030")
    for which, (name, color) in enumerate(zip(names, colors, strict=True)):
        points = {}
        for at in np.arange(0.3, 1.0, 0.05):
            tried = [_tried(mine, lambda r: r["oldest"], at) for _, mine in groups(rows, "seed")]
            points[float(at)] = estimate([each[which] for each in tried])
        curve(right, points, color=color, label=name)
    right.axvline(_NOW, color=NEWEST, lw=0.8, ls="--")
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
