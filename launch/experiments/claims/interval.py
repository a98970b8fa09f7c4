"""The interval between merged checkpoints, at a fixed number of them."""

from __future__ import annotations

from collections.abc import Sequence

from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.reach import Reach
from lab.stats import NOT_REPRODUCED, REPRODUCED, UNDECIDED, estimate

REACH = Reach(lasts=(6,), times=(1, 2, 4, 8), by="interval_tokens")


def findings(rows: Sequence[Row]) -> Findings:
    """Whether wide intervals hurt early, and less so later."""
    gains = {
        key: estimate([r["gain"] for r in found])
        for key, found in groups(rows, "when", "interval_tokens")
    }
    intervals = sorted({r["interval_tokens"] for r in rows})
    widest = {when: gains[when, intervals[-1]] for when in ("early", "late")}
    if widest["early"].high < 0 and widest["late"].mean > widest["early"].mean:
        said = REPRODUCED
    else:
        said = NOT_REPRODUCED if widest["early"].low > 0 else UNDECIDED
    best = {w: max(intervals, key=lambda v: gains[w, v].mean) for w in ("early", "late")}
    return Findings(
        verdict=said,
        sentences=[
            f"The widest interval ({intervals[-1]:,} tokens) gains {widest['early'].signed} early "
            f"and {widest['late'].signed} late. The best is {best['early']:,} tokens early and "
            f"{best['late']:,} late."
        ],
        tables=[
            Table(
                columns=["interval, tokens", "gain early", "gain late"],
                rows=[
                    [f"{v:,}", gains["early", v].signed, gains["late", v].signed] for v in intervals
                ],
            )
        ],
    )


EXPERIMENT = Experiment(
    name="interval",
    title="The interval between checkpoints",
    paper="At a fixed N, early on wide intervals fall below the unmerged model, because they "
    "reach back into unstable weights; later the gap closes.",
    setup="Dense, middle size, constant rate; N = 6, and the early end is the first that "
    "every interval fits before.",
    seeds=5,
    jobs=REACH.jobs,
    rows=REACH.rows,
    findings=findings,
    plot=REACH.plot,
)
