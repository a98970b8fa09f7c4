"""Merging along a cosine decay, against the end of that decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, gain, groups, means
from lab.models import Scale, constant
from lab.pages import MERGED, NEWEST, curve
from lab.runs import Run, Start
from lab.scoring import Merges
from lab.stats import NOT_REPRODUCED, REPRODUCED, estimate
from lab.trainer import Rate

LAST, PARTS = 6, 5


def _run(scale: Scale, seed: int, moe: bool) -> Run:
    run = constant(scale, seed, moe=moe)
    return replace(
        run,
        start=Start(run=run, iteration=scale.fork),
        saves=tuple(range(scale.fork + scale.every, scale.end + 1, scale.every)),
        rate=Rate(
            peak=scale.peak,
            decay="cosine",
            decay_begin=scale.fork,
            decay_end=scale.end,
            floor=scale.peak / 10,
        ),
    )


def _merges(scale: Scale, seed: int, moe: bool) -> Merges:
    step = (scale.end - scale.fork) // PARTS
    ends = tuple(range(scale.fork + step, scale.end + 1, step))
    return Merges(run=_run(scale, seed, moe), lasts=(LAST,), every=(scale.every,), ends=ends)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """One grid per model and seed."""
    return [_merges(scale, seed, moe) for moe in (False, True) for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Test losses along the decay."""
    for moe in (False, True):
        for seed in seeds:
            merges = _merges(scale, seed, moe)
            for end in merges.ends:
                done = (end - scale.fork) / (scale.end - scale.fork)
                yield {
                    "model": "MoE" if moe else "dense",
                    "seed": seed,
                    "tokens": scale.tokens(end),
                    "done": done,
                    "newest": merges.losses(end, "unmerged")["test"],
                    "merged": merges.losses(end)["test"],
                }


def findings(rows: Sequence[Row]) -> Findings:
    """The merge at each point against the newest there and against the final model."""
    final = {(r["model"], r["seed"]): r["newest"] for r in rows if r["done"] == 1}
    table, first_near, gains = [], {}, []
    for (model, done), found in groups(rows, "model", "done"):
        over = estimate([gain(r) for r in found])
        behind = estimate([r["merged"] - final[model, r["seed"]] for r in found])
        table.append([model, f"{done:.0%}", over.signed, behind.signed])
        if behind.low <= 0:
            first_near.setdefault(model, done)
        if done <= 0.5:
            gains.append(over)
    near = [f"{model}: {done:.0%}" for model, done in first_near.items()]
    everywhere = len(first_near) == len({r["model"] for r in rows})
    when = max(first_near.values()) if everywhere else 1.0
    return Findings(
        verdict=REPRODUCED
        if when <= 0.5
        else "reproduced in part: on a par late in the decay"
        if when < 1
        else NOT_REPRODUCED,
        sentences=[
            "Part of the decay at which the merge is first no worse than the final model, within "
            f"the interval over seeds: {', '.join(near) or 'never'}. In the first half of the "
            f"decay merging gains {min(g.mean for g in gains):.4f} to "
            f"{max(g.mean for g in gains):.4f} over the newest checkpoint there, and at its end "
            "next to nothing. These runs still learn much over the decay, which a merge early in "
            "it has not seen."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "part of the decay",
                    "gain over the newest",
                    "above the final model",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Both curves."""
    for axis, ((model,), found) in zip(figure.subplots(1, 2), groups(rows, "model"), strict=True):
        for color, key in zip((NEWEST, MERGED), ("newest", "merged"), strict=True):
            curve(axis, means(found, "tokens", key), color=color, label=key)
        axis.set(xlabel="tokens", ylabel="test loss (nats per byte)", title=model)


EXPERIMENT = Experiment(
    name="cosine",
    title="Merging during a cosine decay",
    paper="Merged early in the decay, a model is on a par with, sometimes above, the fully "
    "annealed one.",
    setup=f"Cosine decay to a tenth, from a constant rate; along it the SMA of the last {LAST} "
    "checkpoints. Dense and MoE, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
