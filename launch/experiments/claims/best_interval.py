"""The best interval against model size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import curve, shades, zero
from lab.runs import Start
from lab.scoring import Merges
from lab.stats import NOT_REPRODUCED, REPRODUCED, UNDECIDED, estimate

LAST, TIMES, BACK = 6, (1, 2, 3, 5, 7, 10), 12


def _every(scale: Scale) -> int:
    return scale.every // 5


def _merges(scale: Scale, seed: int, moe: bool, size: int) -> Merges:
    """Of the last part of the constant-rate run, trained again and saved more often."""
    run, begin = constant(scale, seed, moe=moe, size=size), scale.end - BACK * scale.every
    often = replace(
        run,
        start=Start(run=run, iteration=begin),
        saves=tuple(range(begin + _every(scale), scale.end + 1, _every(scale))),
    )
    return Merges(
        run=often,
        lasts=(LAST,),
        every=tuple(n * _every(scale) for n in TIMES),
        ends=(scale.end - scale.every, scale.end),
    )


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """One grid per model and seed."""
    return [_merges(scale, seed, *kind) for kind in scale.kinds() for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Gain of every interval, the mean of two ends; on validation, where a choice is made."""
    for moe, size in scale.kinds():
        for seed in seeds:
            merges = _merges(scale, seed, moe, size)
            for times in TIMES:
                every = times * _every(scale)
                row: Row = {
                    "model": "MoE" if moe else "dense",
                    "seed": seed,
                    "hidden_size": scale.model(moe=moe, size=size).hidden_size,
                    "interval_tokens": scale.tokens(every),
                }
                for name in ("validation", "test"):
                    row[name] = sum(
                        merges.losses(end, "unmerged")[name] - merges.losses(end, every=every)[name]
                        for end in merges.ends
                    ) / len(merges.ends)
                yield row


def findings(rows: Sequence[Row]) -> Findings:
    """The best interval of every seed, by validation, and what it gains on test."""
    table, means = [], {}
    for key, found in groups(rows, "model", "hidden_size"):
        best = [max(at, key=lambda r: r["validation"]) for _, at in groups(found, "seed")]
        means[key] = estimate([r["interval_tokens"] for r in best])
        chosen = ", ".join(f"{r['interval_tokens']:,}" for r in best)
        gain = estimate([r["test"] for r in best])
        table.append([*key, chosen, f"{means[key].mean:,.0f}", gain.signed])
    grows, falls = [], []
    for model in ("dense", "MoE"):
        ordered = [m for (kind, _), m in sorted(means.items()) if kind == model]
        grows.append(ordered[-1].low > ordered[0].high)
        falls.append(ordered[-1].high < ordered[0].low)
    said = UNDECIDED
    if all(grows) or any(falls):
        said = REPRODUCED if all(grows) else NOT_REPRODUCED
    return Findings(
        verdict=said,
        sentences=[
            "The best interval per seed is in the table; a claim is decided only where the "
            "intervals of the smallest and the largest model do not overlap. Sizes span one order "
            "of magnitude here, more than two in the paper."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "hidden size",
                    "best V by seed, tokens",
                    "mean",
                    "its gain (test)",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by interval for every size."""
    axes = figure.subplots(1, 2)
    for axis, model in zip(axes, ("dense", "MoE"), strict=True):
        mine = [r for r in rows if r["model"] == model]
        sizes = list(groups(mine, "hidden_size"))
        for color, ((size,), found) in zip(shades(len(sizes)), sizes, strict=True):
            points = means(found, "interval_tokens", "test")
            curve(axis, points, color=color, label=f"hidden size {size}")
        zero(axis)
        axis.set(xlabel="interval V (tokens)", ylabel="gain (test, nats per byte)", title=model)


EXPERIMENT = Experiment(
    name="best_interval",
    title="The best interval by model size",
    paper="The best interval grows with the model: dense 411M 2B tokens, 2B 5B, 8B 15B, 70B 40B; "
    "MoE 0.7B/7B 4B, 1.3B/13B 8B, 10B/100B 80B.",
    setup=f"N = {LAST} at two ends late in constant-rate runs, dense and MoE at three sizes, whose "
    "last part is saved five times as often; the interval is chosen on the validation text.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
