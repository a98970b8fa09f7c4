"""The interval between merged checkpoints, at a fixed number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import COLORS, curve, zero
from lab.scoring import Merges
from lab.stats import estimate

LAST, TIMES = 6, (1, 2, 4, 8)


def _ends(scale: Scale) -> dict[str, int]:
    reach = (LAST - 1) * max(TIMES) * scale.every
    return {"early": reach + 5 * scale.every, "late": scale.end}


def _merges(scale: Scale, seed: int) -> Merges:
    return Merges(
        run=constant(scale, seed), lasts=(LAST,), every=tuple(n * scale.every for n in TIMES),
        ends=tuple(_ends(scale).values()),
    )  # fmt: skip


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """One grid per seed."""
    return [_merges(scale, seed) for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Gain of every interval at both ends."""
    for seed in seeds:
        merges = _merges(scale, seed)
        for when, end in _ends(scale).items():
            newest = merges.losses(end, "unmerged")["test"]
            for times in TIMES:
                every = times * scale.every
                loss = merges.losses(end, every=every)["test"]
                yield {"seed": seed, "when": when, "end_tokens": scale.tokens(end),
                       "interval_tokens": scale.tokens(every), "gain": newest - loss}  # fmt: skip


def findings(rows: Sequence[Row]) -> Findings:
    """Whether wide intervals hurt early, and less so later."""
    gains = {key: estimate([r["gain"] for r in found])
             for key, found in groups(rows, "when", "interval_tokens")}  # fmt: skip
    intervals = sorted({r["interval_tokens"] for r in rows})
    widest = {when: gains[when, intervals[-1]] for when in ("early", "late")}
    if widest["early"].high < 0 and widest["late"].mean > widest["early"].mean:
        said = "reproduced"
    else:
        said = "not reproduced" if widest["early"].low > 0 else "not decidable at this scale"
    best = {w: max(intervals, key=lambda v: gains[w, v].mean) for w in ("early", "late")}
    return Findings(
        verdict=said,
        sentences=[
            f"The widest interval ({intervals[-1]:,} tokens) gains {widest['early'].signed} early "
            f"and {widest['late'].signed} late. The best is {best['early']:,} tokens early and "
            f"{best['late']:,} late."
        ],
        tables=[Table(
            columns=["interval, tokens", "gain early", "gain late"],
            rows=[[f"{v:,}", gains["early", v].signed, gains["late", v].signed] for v in intervals],
        )],
    )  # fmt: skip


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by interval."""
    axis = figure.subplots()
    for color, ((when, end), found) in zip(
        COLORS[1:], groups(rows, "when", "end_tokens"), strict=False
    ):
        points = means(found, "interval_tokens", "gain")
        curve(axis, points, color=color, label=f"{when}: {end:,} tokens")
    zero(axis)
    axis.set(xscale="log", xlabel="interval V (tokens)", ylabel="gain (test, nats per byte)")


EXPERIMENT = Experiment(
    name="interval",
    title="The interval between checkpoints",
    paper="At a fixed N, early on wide intervals fall below the unmerged model, because they "
    "reach back into unstable weights; later the gap closes.",
    setup=f"Dense, middle size, constant rate; N = {LAST}, and the early end is the first that "
    "every interval fits before.",
    seeds=5,
    jobs=jobs, rows=rows, findings=findings, plot=plot,
)  # fmt: skip
