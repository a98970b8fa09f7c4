"""Fine-tuning from a decayed model, from the newest one of a constant rate, and from merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lab.decayed import decayed
from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale, constant
from lab.pages import ANNEALED, MERGED, METHOD_COLORS, NEWEST, curve
from lab.runs import Run, Start
from lab.stats import Estimate, estimate
from lab.trainer import Rate

LAST, DOMAIN, FACTORS, LENGTH, WARMUP = 10, "legal", (1 / 8, 1 / 2), 6, 10
STARTS = ("decayed", "newest", "sma", "1-sqrt")
_COLORS = {"decayed": ANNEALED, "newest": NEWEST, "sma": MERGED, "1-sqrt": METHOD_COLORS["1-sqrt"]}


def _start(scale: Scale, seed: int, moe: bool, begin: str) -> Start:
    if begin == "decayed":
        run = decayed(scale, seed, moe)
        return Start(run=run, iteration=scale.end, optimizer_state="reset")
    start = Start(run=constant(scale, seed, moe=moe), iteration=scale.end, optimizer_state="reset")
    if begin == "newest":
        return start
    return replace(start, last=LAST, every=scale.every, method=begin)


def _tuned(scale: Scale, seed: int, moe: bool, begin: str, factor: float) -> Run:
    end, peak = scale.end + LENGTH * scale.every, scale.peak * factor
    warmup = WARMUP * scale.every // 10
    return replace(
        constant(scale, seed, moe=moe),
        start=_start(scale, seed, moe, begin),
        domain=DOMAIN,
        end=end,
        saves=(),
        scores=(scale.end, end),
        rate=Rate(
            peak=peak,
            begin=scale.end,
            warmup=warmup,
            decay="cosine",
            decay_begin=scale.end + warmup,
            decay_end=end,
            floor=peak / 10,
        ),
    )


def _all(seeds: Sequence[int]) -> Iterator[tuple[int, bool, str, float]]:
    for moe in (False, True):
        for factor in FACTORS:
            for begin in STARTS:
                yield from ((seed, moe, begin, factor) for seed in seeds)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Run]:
    """A short run per model, peak rate, start and seed."""
    return [_tuned(scale, *each) for each in _all(seeds)]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses on both texts before and after."""
    for seed, moe, begin, factor in _all(seeds):
        run = _tuned(scale, seed, moe, begin, factor)
        before, after = (run.record().score(at) for at in run.scores)
        yield {
            "model": "MoE" if moe else "dense",
            "peak": scale.peak * factor,
            "start": begin,
            "seed": seed,
            "before_old": before["test"],
            "before_new": before[DOMAIN],
            "after_old": after["test"],
            "after_new": after[DOMAIN],
        }


_WHAT = ("before_old", "after_new", "after_old")


def findings(rows: Sequence[Row]) -> Findings:
    """Every start against the decayed one, seed by seed."""
    base = {(r["model"], r["peak"], r["seed"]): r for r in rows if r["start"] == "decayed"}
    gains: dict[tuple[str, str], list[Estimate]] = {}
    table = []
    for (model, peak, begin), found in groups(rows, "model", "peak", "start"):
        shown = []
        for what in _WHAT:
            over = [base[model, peak, r["seed"]][what] - r[what] for r in found]
            shown.append(estimate(over))
            if what != "before_old" or peak == rows[0]["peak"]:  # before, no peak has been met
                gains.setdefault((begin, what), []).append(shown[-1])
        losses = [f"{estimate([r[what] for r in found]).mean:.4f}" for what in _WHAT]
        over_decayed = ["-"] * 3 if begin == "decayed" else [g.signed for g in shown]
        pairs = zip(losses, over_decayed, strict=True)
        table.append([model, f"{peak:g}", begin, *(cell for pair in pairs for cell in pair)])
    return Findings(
        verdict="tuned from the newest checkpoint, against the decayed one: "
        f"{_said(gains['newest', 'after_new'])}; from a merge: "
        f"{_said(gains['sma', 'after_new'])} (SMA), {_said(gains['1-sqrt', 'after_new'])} "
        f"(1-sqrt). The SMA before tuning: {_said(gains['sma', 'before_old'])}; on the old text "
        f"after it: {_said(gains['sma', 'after_old'])}",
        sentences=[
            "Loss lower than from the decayed model, dense and MoE (after tuning each at two "
            f"rates). Before tuning, on the old text: {_listed(gains, 'before_old')}. After it, "
            f"on the new text: {_listed(gains, 'after_new')}. After it, on the old text: "
            f"{_listed(gains, 'after_old')}."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "peak rate",
                    "start",
                    "old text before",
                    "over decayed",
                    "new text after",
                    "over decayed",
                    "old text after",
                    "over decayed",
                ],
                rows=table,
            )
        ],
    )


def _listed(gains: dict[tuple[str, str], list[Estimate]], what: str) -> str:
    return "; ".join(
        f"{begin} {min(g.mean for g in gains[begin, what]):+.4f} to "
        f"{max(g.mean for g in gains[begin, what]):+.4f}"
        for begin in STARTS[1:]
    )


def _said(gains: Sequence[Estimate]) -> str:
    better, worse = sum(g.low > 0 for g in gains), sum(g.high < 0 for g in gains)
    if better and not worse:
        return f"better in {better} of {len(gains)} settings"
    if worse and not better:
        return f"worse in {worse} of {len(gains)} settings"
    if better:
        return f"better in {better}, worse in {worse} of {len(gains)} settings"
    return "no clear difference"


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Old text before against new text after, by start: down and left is better."""
    axes = figure.subplots(1, 4, sharey=True)
    settings = list(groups(rows, "model", "peak"))
    for axis, ((model, peak), mine) in zip(axes, settings, strict=True):
        for at, (what, marker) in enumerate(zip(_WHAT, "o*s", strict=True)):
            base = {r["seed"]: r[what] for r in mine if r["start"] == "decayed"}
            for shift, begin in enumerate(STARTS[1:]):
                found = [r for r in mine if r["start"] == begin]
                gain = estimate([base[r["seed"]] - r[what] for r in found])
                label = begin if what == "before_old" else None
                place = {at + 0.2 * (shift - 1): gain}
                curve(axis, place, color=_COLORS[begin], marker=marker, label=label)
        axis.axhline(0, color=ANNEALED, lw=0.8)
        axis.set_xticks(range(3), ["old text\nbefore", "new text\nafter", "old text\nafter"])
        axis.set_title(f"{model}, peak {peak:g}", fontsize=10)
        axis.tick_params(axis="x", labelsize=7)
    axes[0].set_ylabel("gain over the decayed start (nats)")


EXPERIMENT = Experiment(
    name="starts",
    title="Where to fine-tune from",
    paper="arXiv 2603.16127 (WSO): a model that was never decayed has a higher loss before, and "
    "is better after fine-tuning. arXiv 2507.17634 (WSM): merges stay ahead after it.",
    setup="The decay of Averaging and annealing to zero, the newest checkpoint of the constant "
    f"rate, and the SMA and the `1-sqrt` merge of its last {LAST}, all after the same tokens; "
    f"then {10 * LENGTH} steps on licences with new moments and a cosine, at two peak rates. "
    "Dense and MoE, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
