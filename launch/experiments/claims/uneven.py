"""Unevenly spaced checkpoints: coefficients from their tokens, or from their place in the list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table
from lab.models import Scale, constant
from lab.pages import METHOD_COLORS, zero
from lab.stats import estimate
from lab.work import Job
from lab.written import Written

from pma_megatron.merging.coefficients import coefficients

METHODS = ("linear", "cosine", "1-sqrt")
SPACINGS = {
    "dense at the end": (24, 16, 8, 4, 2, 1, 0),
    "dense at the start": (24, 23, 22, 20, 16, 8, 0),
    "a hole": (24, 23, 22, 21, 2, 1, 0),
}
"""Checkpoints before the newest, in smallest intervals."""


def _written(scale: Scale, seed: int, spacing: str, method: str, by_tokens: bool) -> Written:
    back = SPACINGS[spacing]
    iterations = tuple(scale.end - n * scale.every for n in back)
    if by_tokens or method == "sma":
        return Written(run=constant(scale, seed), iterations=iterations, method=method)
    even = coefficients(method, tokens=tuple(range(len(back))), count=len(back)).values
    return Written(run=constant(scale, seed), iterations=iterations, coefficients=even)


def _arms() -> Iterator[tuple[str, str, bool]]:
    for spacing in SPACINGS:
        yield spacing, "sma", True
        yield from ((spacing, method, by) for method in METHODS for by in (True, False))


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """A merge per spacing, method and kind of position."""
    return [_written(scale, seed, *arm) for seed in seeds for arm in _arms()]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Test losses."""
    for seed in seeds:
        for spacing, method, by_tokens in _arms():
            loss = _written(scale, seed, spacing, method, by_tokens).losses()["test"]
            yield {
                "seed": seed,
                "spacing": spacing,
                "method": method,
                "by_tokens": by_tokens,
                "loss": loss,
            }


def findings(rows: Sequence[Row]) -> Findings:
    """Tokens against list positions, seed by seed."""
    by = {(r["spacing"], r["method"], r["by_tokens"], r["seed"]): r["loss"] for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    table, gains = [], []
    for spacing in SPACINGS:
        for method in METHODS:
            gain = estimate(
                [by[spacing, method, False, s] - by[spacing, method, True, s] for s in seeds]
            )
            over = estimate(
                [by[spacing, "sma", True, s] - by[spacing, method, True, s] for s in seeds]
            )
            gains.append(gain)
            table.append([spacing, method, gain.signed, over.signed])
    better, worse = sum(g.low > 0 for g in gains), sum(g.high < 0 for g in gains)
    return Findings(
        verdict=f"tokens better in {better}, worse in {worse} of {len(gains)} settings",
        sentences=[
            "Counted are settings whose whole interval lies on one side of zero. Positions in "
            "tokens give what the method says: the average of a run whose rate decays along that "
            "curve. They lose where checkpoints crowd at the end and win where they crowd at the "
            "start: either way the coefficients win that lean on newer weights, because these "
            "windows are several times wider than the best one (see the interval). What a merge "
            "covers matters more than how positions are counted."
        ],
        tables=[
            Table(
                columns=[
                    "checkpoints",
                    "method",
                    "gain of tokens over list positions",
                    "gain over SMA",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain of tokens by spacing and method."""
    by = {(r["spacing"], r["method"], r["by_tokens"], r["seed"]): r["loss"] for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    axis = figure.subplots()
    for at, spacing in enumerate(SPACINGS):
        for number, method in enumerate(METHODS):
            gain = estimate(
                [by[spacing, method, False, s] - by[spacing, method, True, s] for s in seeds]
            )
            axis.bar(
                at + 0.25 * (number - 1),
                gain.mean,
                0.22,
                yerr=gain.margin or 0,
                color=METHOD_COLORS[method],
                label=method if at == 0 else None,
            )
    zero(axis)
    axis.set_xticks(range(len(SPACINGS)), list(SPACINGS))
    axis.set_ylabel("gain of tokens over list positions (test)")


EXPERIMENT = Experiment(
    name="uneven",
    title="Unevenly spaced checkpoints",
    paper="Open: which coefficients where checkpoints are unevenly spaced or partly missing?",
    setup="Dense, middle size, constant rate; seven checkpoints, spaced in three ways, merged with "
    "decay-derived coefficients from their tokens and from their places in the list.",
    seeds=5,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
