"""Why merging helps: eq. 15, the predicted gain, and the loss in the plane of the members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lab.expansion import Expansion
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale, constant
from lab.pages import MERGED, MODELS, NEWEST
from lab.runs import Run, Start
from lab.stats import IN_PART, NOT_REPRODUCED, REPRODUCED, estimate
from lab.trainer import Rate
from lab.work import Job

LAST, GRID = 6, 13


def _run(scale: Scale, seed: int, moe: bool, phase: str) -> Run:
    run = constant(scale, seed, moe=moe)
    if phase == "constant":
        return run
    start = scale.end - LAST * scale.every
    return replace(
        run,
        start=Start(run=run, iteration=start),
        saves=tuple(range(start + scale.every, scale.end + 1, scale.every)),
        rate=Rate(peak=scale.peak, decay="linear", decay_begin=start, decay_end=scale.end),
    )


def _expansion(scale: Scale, seed: int, moe: bool, phase: str) -> Expansion:
    first = scale.end - (LAST - 1) * scale.every
    drawn = seed == 1 and phase == "constant" and not moe
    return Expansion(
        run=_run(scale, seed, moe, phase),
        grid=GRID if drawn else 0,
        iterations=tuple(range(first, scale.end + 1, scale.every)),
    )


_PHASES = [(moe, phase) for moe in (False, True) for phase in ("constant", "annealed")]


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """An expansion per model, phase and seed."""
    return [_expansion(scale, seed, *kind) for kind in _PHASES for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Both sides of eq. 15, gains, the spread; the contour of one run."""
    for moe, phase in _PHASES:
        for seed in seeds:
            found = _expansion(scale, seed, moe, phase).result()
            bent, spread = found["curvature"], found["groups"]["total"]
            yield {
                "model": "MoE" if moe else "dense",
                "phase": phase,
                "seed": seed,
                **{k: bent[k] for k in ("left", "right", "predicted_gain", "measured_gain")},
                "deviation": float(np.mean(spread["deviation_norms"])),
                "next_step_cosine": float(np.mean(np.diagonal(spread["step_cosines"], 1))),
                "contour": found["contour"],
            }


def findings(rows: Sequence[Row]) -> Findings:
    """How often eq. 15 holds, and how large gains are in both phases."""
    table, gains = [], {}
    for (model, phase), found in groups(rows, "model", "phase"):
        gains[model, phase] = estimate([r["measured_gain"] for r in found])
        predicted = estimate([r["predicted_gain"] for r in found])
        table.append(
            [
                model,
                phase,
                f"{estimate([r['left'] for r in found]).mean:.2f}",
                f"{estimate([r['right'] for r in found]).mean:.2f}",
                f"{sum(r['left'] < r['right'] for r in found)} of {len(found)}",
                predicted.signed,
                gains[model, phase].signed,
                f"{estimate([r['deviation'] for r in found]).mean:.2f}",
            ]
        )
    holds = all(r["left"] < r["right"] for r in rows)
    less = all(gains[m, "annealed"].high < gains[m, "constant"].low for m in ("dense", "MoE"))
    return Findings(
        verdict=REPRODUCED if holds and less else IN_PART if holds or less else NOT_REPRODUCED,
        sentences=[
            f"Eq. 15 holds in {sum(r['left'] < r['right'] for r in rows)} of {len(rows)} runs, "
            "and merging has a lower loss than the mean of its members in "
            f"{sum(r['measured_gain'] > 0 for r in rows)}. During annealing the members lie "
            f"nearer to each other and gain {'less' if less else 'not clearly less'}. The "
            "condition says no more than that the loss curves upwards where members differ "
            "(docs/geometry.md); how much is gained is what tells runs apart."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "phase",
                    "left of eq. 15",
                    "right",
                    "holds",
                    "predicted gain",
                    "measured gain",
                    "mean deviation",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Predicted and measured gains; the contour of one run."""
    left, right = figure.subplots(1, 2)
    for (model, phase), found in groups(rows, "model", "phase"):
        predicted, measured = (
            estimate([r[f"{kind}_gain"] for r in found]) for kind in ("predicted", "measured")
        )
        left.errorbar(
            predicted.mean,
            measured.mean,
            measured.margin or 0,
            predicted.margin or 0,
            fmt="o" if phase == "constant" else "s",
            ms=5,
            color=MODELS[model],
            label=f"{model}, {phase}",
        )
    ends = [0, max(left.get_xlim()[1], left.get_ylim()[1])]
    left.plot(ends, ends, color=NEWEST, lw=0.8)
    left.set(xlabel="predicted gain", ylabel="measured gain")
    drawn = next(r["contour"] for r in rows if r["contour"])
    (losses,) = drawn["losses"].values()
    lines = right.contourf(drawn["xs"], drawn["ys"], np.asarray(losses, float), 12, cmap="Blues_r")
    right.plot(*np.asarray(drawn["members"]).T, "o", color=NEWEST, label="members")
    right.plot(*drawn["mean"], "*", ms=12, color=MERGED, label="their mean")
    right.set(xlabel="first principal direction", ylabel="second", title="dense, seed 1")
    figure.colorbar(lines, ax=right, label="validation loss")


EXPERIMENT = Experiment(
    name="geometry",
    title="Why merging helps",
    paper="Merging beats the mean loss of its members where eq. 15 holds; in a contour plot the "
    "mean lies nearer the optimum than the members; late in annealing merging gains little.",
    setup=f"The last {LAST} checkpoints of constant-rate runs, and of the same runs annealed over "
    "those iterations; gradients and losses with float32 weights.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
