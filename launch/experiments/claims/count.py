"""How many checkpoints, at a fixed interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import COLORS, curve, zero
from lab.scoring import Merges
from lab.stats import estimate

LASTS = (2, 3, 6, 10, 15)


def _ends(scale: Scale) -> dict[str, int]:
    return {"early": (max(LASTS) + 4) * scale.every, "late": scale.end}


def _merges(scale: Scale, seed: int) -> Merges:
    ends = tuple(_ends(scale).values())
    return Merges(run=constant(scale, seed), lasts=LASTS, every=(scale.every,), ends=ends)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """One grid per seed."""
    return [_merges(scale, seed) for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Gain of every count at both ends."""
    for seed in seeds:
        merges = _merges(scale, seed)
        for when, end in _ends(scale).items():
            newest = merges.losses(end, "unmerged")["test"]
            for last in LASTS:
                loss = merges.losses(end, last=last)["test"]
                yield {"seed": seed, "when": when, "end_tokens": scale.tokens(end),
                       "interval_tokens": scale.tokens(scale.every), "last": last,
                       "gain": newest - loss}  # fmt: skip


def findings(rows: Sequence[Row]) -> Findings:
    """Whether fewer are better early, and more are better late."""
    by = {(r["when"], r["last"], r["seed"]): r["gain"] for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    gains = {key: estimate([r["gain"] for r in found])
             for key, found in groups(rows, "when", "last")}  # fmt: skip
    few, many = 3, max(LASTS)
    more = {
        when: estimate([by[when, many, s] - by[when, few, s] for s in seeds])
        for when in ("early", "late")
    }
    parts = (more["early"].high < 0, more["late"].low > 0)
    against = (more["early"].low > 0, more["late"].high < 0)
    if all(parts):
        said = "reproduced"
    elif any(against):
        said = "reproduced in part" if any(parts) else "not reproduced"
    else:
        said = "reproduced in part" if any(parts) else "not decidable at this scale"
    best = {w: max(LASTS, key=lambda n: gains[w, n].mean) for w in ("early", "late")}
    return Findings(
        verdict=said,
        sentences=[
            f"{many} checkpoints instead of {few} change the test loss by {more['early'].signed} "
            f"early and {more['late'].signed} late (positive is better). The best mean is at "
            f"N = {best['early']} early and N = {best['late']} late."
        ],
        tables=[Table(
            columns=["N", "gain early", "gain late"],
            rows=[[n, gains["early", n].signed, gains["late", n].signed] for n in LASTS],
        )],
    )  # fmt: skip


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by count."""
    axis = figure.subplots()
    for color, ((when, end), found) in zip(
        COLORS[1:], groups(rows, "when", "end_tokens"), strict=False
    ):
        points = means(found, "last", "gain")
        curve(axis, points, color=color, label=f"{when}: {end:,} tokens")
    zero(axis)
    axis.set(xlabel="checkpoints N", ylabel="gain (test, nats per byte)")


EXPERIMENT = Experiment(
    name="count",
    title="How many checkpoints",
    paper="At a fixed interval, early on more checkpoints hurt; at the end more are better (N = 3 "
    "about one point below N = 15). N = 10 is the default.",
    setup="Dense, middle size, constant rate, the smallest interval; the early end is soon after "
    "the first that 15 checkpoints fit before.",
    seeds=5,
    jobs=jobs, rows=rows, findings=findings, plot=plot,
)  # fmt: skip
