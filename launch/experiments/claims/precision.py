"""Averaging float32 main params against averaging the 16-bit weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import MERGED, curve, zero
from lab.stats import Estimate, estimate
from lab.written import Written, distance

LASTS = (3, 6, 10)


def _written(scale: Scale, seed: int, last: int, average: str) -> Written:
    first = scale.end - (last - 1) * scale.every
    iterations = tuple(range(first, scale.end + 1, scale.every))
    return Written(run=constant(scale, seed), iterations=iterations, average=average)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Written]:
    """Both merges of every count and seed, and of the newest checkpoint alone."""
    return [
        _written(scale, seed, last, average)
        for seed in seeds
        for last in LASTS
        for average in ("main-params", "weights")
    ]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses, and how far the weights lie apart."""
    for seed in seeds:
        for last in LASTS:
            main = _written(scale, seed, last, "main-params")
            weights = _written(scale, seed, last, "weights")
            one, other = main.weights(), weights.weights()
            differ = sum(int((one[name] != other[name]).sum()) for name in one)
            yield {
                "seed": seed,
                "last": last,
                "main_params": main.losses()["test"],
                "weights": weights.losses()["test"],
                "distance": distance(one, other),
                "differ": differ / sum(value.numel() for value in one.values()),
            }


def findings(rows: Sequence[Row]) -> Findings:
    """What main params gain over weights."""
    table, gains = [], []
    for (last,), found in groups(rows, "last"):
        gain = estimate([r["weights"] - r["main_params"] for r in found])
        gains.append(gain)
        table.append(
            [
                last,
                f"{gain.mean:+.1e} ± {gain.margin or 0:.1e}",
                f"{estimate([r['differ'] for r in found]).mean:.0%}",
                f"{estimate([r['distance'] for r in found]).mean:.1e}",
            ]
        )
    return Findings(
        verdict=f"a difference of less than {_above(gains)} nats, with the whole interval",
        sentences=[
            "Many weights differ by a rounding, and the test loss by next to nothing (mean over "
            "seeds). The difference matters for a resume: averaged weights leave no main params to "
            "resume from."
        ],
        tables=[
            Table(
                columns=["N", "gain of main params", "weights that differ", "relative distance"],
                rows=table,
            )
        ],
    )


def _above(gains: Sequence[Estimate]) -> str:
    """A number of one digit that no interval reaches."""
    widest = max(abs(gain.mean) + (gain.margin or 0) for gain in gains)
    digit = 10.0 ** math.floor(math.log10(max(widest, 1e-9)))
    return f"{(math.floor(widest / digit) + 1) * digit:.1g}"


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain and distance by count."""
    left, right = figure.subplots(1, 2)
    gains = means(rows, "last", lambda r: r["weights"] - r["main_params"])
    curve(left, gains, color=MERGED, ls="")
    curve(right, means(rows, "last", "differ"), color=MERGED, ls="")
    zero(left)
    left.set(xlabel="checkpoints N", ylabel="gain of main params (test)")
    right.set(xlabel="checkpoints N", ylabel="part of the weights that differ", ylim=(0, None))


EXPERIMENT = Experiment(
    name="precision",
    title="Main params or weights",
    paper="Open: what does averaging 16-bit weights instead of float32 main params cost?",
    setup="Dense, middle size, bf16 weights; merges of the same checkpoints by `--average "
    "main-params` and `--average weights`.",
    seeds=5,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
