"""How many checkpoints, at a fixed interval."""

from __future__ import annotations

from collections.abc import Sequence

from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.reach import Reach
from lab.stats import IN_PART, NOT_REPRODUCED, REPRODUCED, UNDECIDED, estimate

REACH = Reach(lasts=(2, 3, 6, 10, 15), times=(1,), by="last")


def findings(rows: Sequence[Row]) -> Findings:
    """Whether fewer are better early, and more are better late."""
    by = {(r["when"], r["last"], r["seed"]): r["gain"] for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    gains = {
        key: estimate([r["gain"] for r in found]) for key, found in groups(rows, "when", "last")
    }
    few, many = 3, max(REACH.lasts)
    more = {
        when: estimate([by[when, many, s] - by[when, few, s] for s in seeds])
        for when in ("early", "late")
    }
    parts = (more["early"].high < 0, more["late"].low > 0)
    against = (more["early"].low > 0, more["late"].high < 0)
    if all(parts):
        said = REPRODUCED
    elif any(against):
        said = IN_PART if any(parts) else NOT_REPRODUCED
    else:
        said = IN_PART if any(parts) else UNDECIDED
    best = {w: max(REACH.lasts, key=lambda n: gains[w, n].mean) for w in ("early", "late")}
    return Findings(
        verdict=said,
        sentences=[
            f"{many} checkpoints instead of {few} change the test loss by {more['early'].signed} "
            f"early and {more['late'].signed} late (positive is better). The best mean is at "
            f"N = {best['early']} early and N = {best['late']} late."
        ],
        tables=[
            Table(
                columns=["N", "gain early", "gain late"],
                rows=[[n, gains["early", n].signed, gains["late", n].signed] for n in REACH.lasts],
            )
        ],
    )


EXPERIMENT = Experiment(
    name="count",
    title="How many checkpoints",
    paper="At a fixed interval, early on more checkpoints hurt; at the end more are better (N = 3 "
    "about one point below N = 15). N = 10 is the default.",
    setup="Dense, middle size, constant rate, the smallest interval; the early end is soon after "
    "the first that 15 checkpoints fit before.",
    seeds=5,
    jobs=REACH.jobs,
    rows=REACH.rows,
    findings=findings,
    plot=REACH.plot,
)
