"""Collapse at an excessive learning rate, and ways back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lab.collapse import Collapse
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale
from lab.pages import COLORS
from lab.stats import estimate
from recovery import EVENTS, STRATEGIES


def jobs(_scale: Scale, seeds: Sequence[int]) -> list[Collapse]:
    """Every strategy after every event; two of them where nothing happens."""
    return [
        Collapse(seed=seed, event=event, strategy=name)
        for seed in seeds for event in EVENTS
        for name in (STRATEGIES if event != "healthy" else ("nothing", "PMA of 3"))
    ]  # fmt: skip


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """What became of each."""
    for job in jobs(scale, seeds):
        yield job.result()


def findings(rows: Sequence[Row]) -> Findings:
    """Who came back, and PMA against rollback, seed by seed."""
    table = []
    for (event, name), found in groups(rows, "event", "strategy"):
        known = [r["known"] - r["onset"] for r in found if r["known"] and r["onset"]]
        table.append([
            event, name, f"{sum(r['end'] <= r['before'] for r in found)} of {len(found)}",
            f"{estimate([r['end'] for r in found])}",
            f"{statistics.median(known):.0f}" if known else "-",
            f"{sum(r['spent'] for r in found)} of {len(found)}",
        ])  # fmt: skip
    ends = {(r["event"], r["strategy"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    back = [ends["burst", "PMA of 3", s] for s in seeds]
    plain = [ends["burst", "rollback", s] for s in seeds]
    pairs = [one["end"] - other["end"] for one, other in zip(plain, back, strict=True)]
    alarms = sum(bool(ends["healthy", "PMA of 3", s]["known"]) for s in seeds)
    gain, stays = estimate(pairs), [r for r in rows if r["event"] == "stays"]
    whole = all(r["end"] <= r["before"] for r in back)
    return Findings(
        verdict=("recovery reproduced" if whole else "recovery not reproduced")
        + ("; better than rollback" if gain.low > 0 else "; no better than rollback"),
        sentences=[
            f"After a burst, PMA of three healthy checkpoints comes back in "
            f"{sum(r['end'] <= r['before'] for r in back)} of {len(back)} runs; against plain "
            f"rollback its final loss is better by {gain.signed}. Where the rate stays too large, "
            f"{sum(r['end'] <= r['before'] for r in stays)} of {len(stays)} come back, whatever is "
            f"done: the paper's run went on, this one does not. False alarms: {alarms} of "
            f"{len(seeds)} healthy runs. Every recovery skips the data of the collapse."
        ],
        tables=[Table(columns=["LR too large", "strategy", "back", "loss at the end",
                               "known after, points", "gave up"], rows=table)],
    )  # fmt: skip


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Loss at the end by strategy."""
    for axis, event in zip(figure.subplots(1, 2), ("burst", "stays"), strict=True):
        mine = [r for r in rows if r["event"] == event]
        for at, ((name,), found) in enumerate(groups(mine, "strategy")):
            losses = [r["end"] for r in found]
            axis.plot([at] * len(found), losses, "o", color=COLORS[at], label=name)
        axis.axhline(estimate([r["before"] for r in mine]).mean, color=COLORS[0], lw=0.8, ls="--")
        axis.set(title=event, ylabel="test loss at the end", xticks=[])


EXPERIMENT = Experiment(
    name="collapse",
    title="Collapse and recovery",
    paper="A run that diverged at an excessive learning rate does not come back; resumed from the "
    "merge of three checkpoints before the collapse it passes that point and goes on.",
    setup="A small dense model; the rate is 50 times too large for 40 iterations, or to the end. "
    "The detector and the recovery are those of `--pma-recover` (docs/recovery.md).",
    seeds=5,
    jobs=jobs, rows=rows, findings=findings, plot=plot,
)  # fmt: skip
