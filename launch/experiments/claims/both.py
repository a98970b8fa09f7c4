"""Averaging and annealing together, against either alone, for the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lab.decayed import decayed
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale, constant
from lab.pages import MODELS, curve, zero
from lab.scoring import Merges
from lab.stats import Estimate, estimate

LASTS, FLOORS = (3, 6, 15), (1.0, 0.1, 0.0)
"""Where the rate ends, as a part of the constant one: 1 is no decay."""


def _merges(scale: Scale, seed: int, moe: bool, floor: float) -> Merges:
    run = constant(scale, seed, moe=moe) if floor == 1 else decayed(scale, seed, moe, floor)
    return Merges(run=run, lasts=LASTS, every=(scale.every,), ends=(scale.end,))


def _all(seeds: Sequence[int]) -> Iterator[tuple[int, bool, float]]:
    for moe in (False, True):
        for floor in FLOORS:
            yield from ((seed, moe, floor) for seed in seeds)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """Merges at the end of the constant rate and of every decay."""
    return [_merges(scale, *each) for each in _all(seeds)]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses of the newest checkpoint and of every average, at the end."""
    for seed, moe, floor in _all(seeds):
        merges = _merges(scale, seed, moe, floor)
        base = {"model": "MoE" if moe else "dense", "floor": floor, "seed": seed}
        newest = merges.losses(scale.end, "unmerged")
        yield base | {"last": 1, "validation": newest["validation"], "test": newest["test"]}
        for last in LASTS:
            losses = merges.losses(scale.end, last=last)
            yield base | {"last": last, "validation": losses["validation"], "test": losses["test"]}


def findings(rows: Sequence[Row]) -> Findings:
    """What averaging adds to each decay, and the best of all against the best of either."""
    by = {(r["model"], r["floor"], r["seed"], r["last"]): r["test"] for r in rows}
    table, over_decay, over_merge, alone = [], [], [], []
    added: dict[tuple[str, float], Estimate] = {}
    widest: dict[tuple[str, float], Estimate] = {}
    for (model, floor), found in groups(rows, "model", "floor"):
        seeds = sorted({r["seed"] for r in found})
        gains = {
            n: estimate([by[model, floor, s, 1] - by[model, floor, s, n] for s in seeds])
            for n in LASTS
        }
        newest = estimate([by[model, floor, s, 1] for s in seeds])
        added[model, floor] = max(gains.values(), key=lambda g: g.mean)
        widest[model, floor] = gains[LASTS[-1]]
        table.append([model, f"{floor:g}", f"{newest}", *(g.signed for g in gains.values())])
    for _, found in groups(rows, "model"):
        both, decays, merged = [], [], []
        for _, mine in groups(found, "seed"):
            decays.append(_best([r for r in mine if r["floor"] < 1 and r["last"] == 1]))
            merged.append(_best([r for r in mine if r["floor"] == 1 and r["last"] > 1]))
            both.append(_best([r for r in mine if r["floor"] < 1 and r["last"] > 1]))
        over_decay.append(_less(decays, both))
        over_merge.append(_less(merged, both))
        alone.append(_less(merged, decays))
    wide = [widest[model, 0.0] for model in MODELS]
    full = [added[model, 0.0] for model in MODELS]
    none = [added[model, 1.0] for model in MODELS]
    return Findings(
        verdict=f"both together {_said(over_decay)} than annealing alone and {_said(over_merge)} "
        "than averaging alone; the gains do not add up"
        if all(f.high < n.low for f, n in zip(full, none, strict=True))
        else f"both together {_said(over_decay)} than annealing alone and {_said(over_merge)} "
        "than averaging alone",
        sentences=[
            f"At a constant rate the best average gains {_range(none)} over the newest "
            f"checkpoint, after a decay to zero {_range(full)}. The best decay with an average "
            f"(chosen on the validation text) has a lower test loss than the best decay without "
            f"by {_range(over_decay)}, and than the best average at the constant rate by "
            f"{_range(over_merge)} (dense, MoE). Either alone: the loss of the best decay is "
            f"lower than that of the best average at the constant rate by {_range(alone)}"
            f"{_level(alone)}; the decay is linear and was not tuned. Averaging {LASTS[-1]} "
            "checkpoints of a decay to zero, which reaches back to where the rate was high, gains "
            f"{_range(wide)}."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "rate ends at",
                    "newest, test",
                    *(f"gain of averaging {n}" for n in LASTS),
                ],
                rows=table,
            )
        ],
    )


def _best(rows: Sequence[Row]) -> float:
    """Test loss of the one that is best on the text that may be looked at."""
    return float(min(rows, key=lambda r: r["validation"])["test"])


def _less(one: Sequence[float], other: Sequence[float]) -> Estimate:
    return estimate([a - b for a, b in zip(one, other, strict=True)])


def _said(gains: Sequence[Estimate]) -> str:
    if all(g.low > 0 for g in gains):
        return "are better"
    if all(g.high < 0 for g in gains):
        return "are worse"
    return "are not clearly better"


def _level(gains: Sequence[Estimate]) -> str:
    if any(g.low > 0 or g.high < 0 for g in gains):
        return ""
    return f", no clear difference (to within {max(g.margin or 0 for g in gains):.4f})"


def _range(gains: Sequence[Estimate]) -> str:
    return ", ".join(g.signed for g in gains)


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Test loss by where the rate ends; what averaging adds there."""
    left, right = figure.subplots(1, 2)
    for model, color in MODELS.items():
        mine = [r for r in rows if r["model"] == model]
        newest, merged, gains = {}, {}, {}
        for at, floor in enumerate(FLOORS):
            found = [r for r in mine if r["floor"] == floor]
            one = [r["test"] for r in found if r["last"] == 1]
            best = [_best([r for r in of if r["last"] > 1]) for _, of in groups(found, "seed")]
            newest[at], merged[at], gains[at] = estimate(one), estimate(best), _less(one, best)
        curve(left, newest, color=color, ls="--", label=f"{model}, newest")
        curve(left, merged, color=color, marker="*", label=f"{model}, best average")
        curve(right, gains, color=color, marker="*")
    zero(right)
    for axis in (left, right):
        axis.set_xticks(range(len(FLOORS)), [f"{f:g}" for f in FLOORS])
        axis.set_xlabel("rate at the end, as a part of the constant one")
    left.set_ylabel("test loss (nats per byte)")
    right.set_ylabel("gain of the best average (test)")


EXPERIMENT = Experiment(
    name="both",
    title="Averaging and annealing",
    paper="arXiv 2502.06761: averaging and annealing together are best. arXiv 2507.17634: their "
    "gains do not add up. arXiv 2602.03702: a constant rate and averaging match a tuned cosine.",
    setup="The last quarter of the run at its constant rate, or with a linear decay to a tenth "
    f"or to zero, for the same tokens; SMA of the last {', '.join(map(str, LASTS))} "
    "checkpoints at the end. Dense and MoE, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
