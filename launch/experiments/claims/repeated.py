"""PMA-init again and again at a constant rate, against once and never."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import MERGED, ONCE, curve, zero
from lab.runs import Run, Start
from lab.scoring import Merges
from lab.stats import Estimate, estimate
from lab.work import Job

LAST, TIMES = 6, 4
ARMS = ("never", "once", "repeated")
_COLORS = {"once": ONCE, "repeated": MERGED}


def _ends(scale: Scale) -> tuple[int, ...]:
    """Where each of the stretches after a start from a merge ends; the first start is before."""
    return tuple(scale.end - scale.decay * n for n in range(TIMES - 1, -1, -1))


def _run(scale: Scale, seed: int, arm: str, end: int) -> Run:
    """The run of which `end` is a checkpoint."""
    run = constant(scale, seed)
    if arm == "never":
        return run
    begin = end - scale.decay
    if arm == "once" or begin == _ends(scale)[0] - scale.decay:
        first = _ends(scale)[0] - scale.decay
        start = Start(run=run, iteration=first, last=LAST, every=scale.every)
        last = scale.end if arm == "once" else end
        stops = _ends(scale) if arm == "once" else (end,)
    else:
        start = Start(
            run=_run(scale, seed, arm, begin), iteration=begin, last=LAST, every=scale.every
        )
        last, stops = end, (end,)
    saves = [range(at - (LAST - 1) * scale.every, at + 1, scale.every) for at in stops]
    return replace(run, start=start, end=last, saves=tuple(n for part in saves for n in part))


def _merges(scale: Scale, seed: int, arm: str, end: int) -> Merges:
    run = _run(scale, seed, arm, end)
    ends = (end,) if arm == "repeated" else _ends(scale)
    return Merges(run=run, lasts=(LAST,), every=(scale.every,), ends=ends)


def _all(scale: Scale, seeds: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    for arm in ARMS:
        for end in _ends(scale):
            yield from ((seed, arm, end) for seed in seeds)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """Merges at the end of every stretch."""
    found: dict[Job, None] = {}
    for each in _all(scale, seeds):
        found[_merges(scale, *each)] = None
    return list(found)


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses of the newest checkpoint and of the merge at the end of every stretch."""
    for seed, arm, end in _all(scale, seeds):
        merges = _merges(scale, seed, arm, end)
        yield {
            "arm": arm,
            "seed": seed,
            "tokens": scale.tokens(end),
            "newest": merges.losses(end, "unmerged")["test"],
            "merged": merges.losses(end)["test"],
        }


def findings(rows: Sequence[Row]) -> Findings:
    """Each arm against never, as loss and as tokens."""
    end = max(r["tokens"] for r in rows)
    table, last = [], {}
    for (arm, at), found in groups(_over_never(rows), "arm", "tokens"):
        gains = {key: estimate([r[key] for r in found]) for key in ("newest", "merged")}
        table.append([arm, f"{at:,}", gains["newest"].signed, gains["merged"].signed])
        if at == end:
            last[arm] = gains
    again = [r for r in rows if r["arm"] == "repeated" and r["tokens"] == end]
    earlier = {
        key: estimate([_tokens_earlier(rows, r, key) / end for r in again])
        for key in ("newest", "merged")
    }
    return Findings(
        verdict="; ".join(
            f"{arm}: {_said(last[arm]['newest'])} than never before a merge, "
            f"{_said(last[arm]['merged'])} after it"
            for arm in last
        ),
        sentences=[
            f"After {end:,} tokens, {TIMES} starts from a merge of {LAST} change the loss of the "
            f"newest checkpoint by {last['repeated']['newest'].signed} and of the merge by "
            f"{last['repeated']['merged'].signed} (positive is better); one start by "
            f"{last['once']['newest'].signed} and {last['once']['merged'].signed}. A run without "
            f"any has the merged loss of repeated starts {_percent(earlier['merged'])} of the "
            f"tokens earlier, and the loss of their newest checkpoint "
            f"{_percent(earlier['newest'])} (on straight lines between its losses)."
        ],
        tables=[
            Table(
                columns=["starts from a merge", "tokens", "newest over never", "merged over never"],
                rows=table,
            )
        ],
    )


def _over_never(rows: Sequence[Row]) -> list[Row]:
    """Losses below those of the run of the same seed that never started from a merge."""
    never = {(r["seed"], r["tokens"]): r for r in rows if r["arm"] == "never"}
    return [
        r | {key: never[r["seed"], r["tokens"]][key] - r[key] for key in ("newest", "merged")}
        for r in rows
        if r["arm"] != "never"
    ]


def _tokens_earlier(rows: Sequence[Row], row: Row, key: str) -> float:
    """How long before `row` a run of its seed without any start from a merge has the same loss.

    On straight lines between its losses, the first and the last of them without an end: one line
    for all is steeper than the curve is late, and tells too few tokens. Negative: later.
    """
    never = [r for r in rows if r["arm"] == "never" and r["seed"] == row["seed"]]
    pairs = list(pairwise(sorted(never, key=lambda r: r["tokens"])))
    inside = [pair for pair in pairs if pair[0][key] >= row[key] > pair[1][key]]
    before, after = inside[-1] if inside else pairs[0 if row[key] > pairs[0][0][key] else -1]
    part = (before[key] - row[key]) / (before[key] - after[key])
    at = before["tokens"] + part * (after["tokens"] - before["tokens"])
    return float(row["tokens"] - at)


def _percent(part: Estimate) -> str:
    margin = "" if part.margin is None else f" ± {100 * part.margin:.1f}"
    return f"{100 * part.mean:.1f}{margin} %"


def _said(gain: Estimate) -> str:
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "not clearly better"


def plot(rows: Sequence[Row], figure: Any) -> None:
    """What is gained over never, seed by seed, before a merge and after it, by tokens."""
    for axis, key in zip(figure.subplots(1, 2), ("newest", "merged"), strict=True):
        for (arm,), found in groups(_over_never(rows), "arm"):
            curve(axis, means(found, "tokens", key), color=_COLORS[arm], label=arm)
        zero(axis)
        axis.set(xlabel="tokens", title=key, ylabel="gain over never (test, nats per byte)")


EXPERIMENT = Experiment(
    name="repeated",
    title="Starting from a merge again and again",
    paper="arXiv 2512.17131: averaging that feeds back into training takes 9 to 10 % fewer steps "
    "to a loss.",
    setup=f"The second half of a constant-rate run, cut into {TIMES}: started from the SMA of the "
    f"last {LAST} checkpoints at the beginning of each part, at the beginning of the first, or "
    "never, with the moments of the newest; the newest checkpoint and the SMA of the last "
    f"{LAST} at the end of each. Dense, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
