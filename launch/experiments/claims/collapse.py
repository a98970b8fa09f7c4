"""Collapse at an excessive learning rate, and ways back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lab.breaking import EVENTS, PMA, ROLLBACK, STRATEGIES
from lab.collapse import Collapse
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale
from lab.pages import ANNEALED, MERGED, NEWEST
from lab.stats import NOT_REPRODUCED, REPRODUCED, estimate


def jobs(_scale: Scale, seeds: Sequence[int]) -> list[Collapse]:
    """Every strategy after every event; two of them where nothing happens."""
    return [
        Collapse(seed=seed, event=event, strategy=name)
        for seed in seeds
        for event in EVENTS
        for name in (STRATEGIES if event != "healthy" else ("nothing", PMA))
    ]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """What became of each."""
    for job in jobs(scale, seeds):
        yield job.result()


def findings(rows: Sequence[Row]) -> Findings:
    """Who came back, and PMA against rollback, seed by seed."""
    table = []
    for (event, name), found in groups(rows, "event", "strategy"):
        known = [r["known"] - r["onset"] for r in found if r["known"] and r["onset"]]
        table.append(
            [
                event,
                name,
                _back(found),
                f"{estimate([r['end'] for r in found])}",
                f"{statistics.median(known):.0f}" if known else "-",
                f"{sum(r['spent'] for r in found)} of {len(found)}",
            ]
        )
    ends = {(r["event"], r["strategy"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    back = [ends["burst", PMA, s] for s in seeds]
    gains = {
        other: estimate(
            [ends["burst", other, s]["end"] - r["end"] for s, r in zip(seeds, back, strict=True)]
        )
        for other in STRATEGIES
        if other not in ("nothing", PMA)
    }
    alarms = sum(bool(ends["healthy", PMA, s]["known"]) for s in seeds)
    lost = [ends["burst", "nothing", s] for s in seeds]
    stays = [r for r in rows if r["event"] == "stays"]
    plain = gains[ROLLBACK]
    better = "better" if plain.low > 0 else "worse" if plain.high < 0 else "no better"
    return Findings(
        verdict=f"recovery {verdict_of(back)}; {better} than rollback",
        sentences=[
            f"Left alone, {_back(lost)} runs come back after a burst; with PMA of three healthy "
            f"checkpoints {_back(back)}. By how much PMA of three ends better: "
            + "; ".join(f"than {other} {gain.signed}" for other, gain in gains.items())
            + f". Where the rate stays too large, {_back(stays)} come back, whatever is done: the "
            f"paper's run went on, this one does not. False alarms: {alarms} of {len(seeds)} "
            "healthy runs."
        ],
        tables=[
            Table(
                columns=[
                    "LR too large",
                    "strategy",
                    "back",
                    "loss at the end",
                    "known after, points",
                    "gave up",
                ],
                rows=table,
            )
        ],
    )


def verdict_of(rows: Sequence[Row]) -> str:
    """Whether all runs ended no worse than they were before the collapse."""
    return REPRODUCED if all(r["end"] <= r["before"] for r in rows) else NOT_REPRODUCED


def _back(rows: Sequence[Row]) -> str:
    return f"{sum(r['end'] <= r['before'] for r in rows)} of {len(rows)}"


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Loss at the end by strategy, and before the collapse."""
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, event in ((left, "burst"), (right, "stays")):
        mine = [r for r in rows if r["event"] == event]
        for (name,), found in groups(mine, "strategy"):
            place, end = list(STRATEGIES).index(name), estimate([r["end"] for r in found])
            color = MERGED if "PMA" in name else NEWEST
            axis.plot([r["end"] for r in found], [place] * len(found), ".", ms=3, color=color)
            label = ("PMA" if "PMA" in name else "no average") if event == "burst" else None
            style = {"fmt": "o", "ms": 5, "color": color, "label": label}
            axis.errorbar(end.mean, place, xerr=end.margin or 0, **style)
        before = estimate([r["before"] for r in mine])
        healthy = {"color": ANNEALED, "alpha": 0.2, "label": "before the collapse"}
        axis.axvspan(before.low, before.high, **healthy)
        axis.set(title=event, xlabel="loss at the end (held-out, nats per byte)")
    left.set_yticks(range(len(STRATEGIES)), list(STRATEGIES))
    left.invert_yaxis()


EXPERIMENT = Experiment(
    name="collapse",
    title="Collapse and recovery",
    paper="A run that diverged at an excessive learning rate does not come back; resumed from the "
    "merge of three checkpoints before the collapse it passes that point and goes on.",
    setup="A small dense model; the rate is 50 times too large for 40 iterations, or to the end. "
    "The detector and the recovery are those of `--pma-recover` (docs/recovery.md); data since "
    "the checkpoint is skipped but where the strategy says otherwise.",
    seeds=5,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
