"""How far ahead the merged loss predicts what annealing would reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale, constant
from lab.pages import NEWEST, shades
from lab.runs import Run, Start
from lab.scoring import Merges
from lab.stats import estimate
from lab.trainer import Rate
from lab.work import Job

from pma_megatron.scores.forecast import Agreement, Prediction, agreement

LAST = 6


def _lengths(scale: Scale) -> tuple[int, ...]:
    return scale.decay // 2, scale.decay, 2 * scale.decay


def _starts(scale: Scale) -> tuple[int, ...]:
    newest = scale.end - max(_lengths(scale))
    return tuple(range(newest - 3 * scale.decay, newest + 1, scale.decay))


def _annealed(scale: Scale, seed: int, start: int, length: int) -> Run:
    run = constant(scale, seed)
    return replace(
        run,
        start=Start(run=run, iteration=start),
        end=start + length,
        saves=(),
        rate=Rate(peak=scale.peak, decay="linear", decay_begin=start, decay_end=start + length),
        scores=(start + length,),
    )


def _merges(scale: Scale, seed: int) -> Merges:
    starts = _starts(scale)
    ends = {*starts, *(start + n for start in starts for n in _lengths(scale))}
    run = constant(scale, seed)
    return Merges(run=run, lasts=(LAST,), every=(scale.every,), ends=tuple(sorted(ends)))


def _pairs(scale: Scale) -> Iterator[tuple[int, int]]:
    yield from ((start, length) for length in _lengths(scale) for start in _starts(scale))


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """Annealing runs from four points, of three lengths, and merges at both of their ends."""
    merges: list[Job] = [_merges(scale, seed) for seed in seeds]
    return merges + [_annealed(scale, seed, *pair) for seed in seeds for pair in _pairs(scale)]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Annealed losses, and trained and merged ones where each decay begins and ends."""
    for seed in seeds:
        merges = _merges(scale, seed)
        for start, length in _pairs(scale):
            annealed = _annealed(scale, seed, start, length).record().score(start + length)
            for where, at in (("start", start), ("end", start + length)):
                yield {
                    "seed": seed,
                    "start": start,
                    "at": at,
                    "where": where,
                    "decay_tokens": scale.tokens(length),
                    "annealed": annealed["test"],
                    "trained": merges.losses(at, "unmerged")["test"],
                    "merged": merges.losses(at)["test"],
                }


def _agreement(found: Sequence[Row], by: str) -> Agreement:
    result = agreement(
        [
            Prediction(
                start_iteration=r["start"],
                iteration=r["at"],
                trained=r["trained"],
                merged=r[by],
                annealed=r["annealed"],
                annealed_tokens=r["decay_tokens"],
                source="",
            )
            for r in found
        ]
    )
    assert result is not None
    return result


def findings(rows: Sequence[Row]) -> Findings:
    """Errors of merged and of trained losses as predictions, by length and place."""
    table, errors = [], {}
    for (tokens, where), found in groups(rows, "decay_tokens", "where"):
        for by in ("trained", "merged"):
            fit = _agreement(found, by)
            errors[tokens, where, by] = fit
            gain = "-" if by == "trained" or fit.gain_pearson is None else f"{fit.gain_pearson:.2f}"
            table.append(
                [f"{tokens:,}", where, by, fit.n, f"{fit.mean_error:+.4f}", f"{fit.rmse:.4f}", gain]
            )
    lengths = sorted({r["decay_tokens"] for r in rows})
    ahead = {t: errors[t, "start", "merged"] for t in lengths}
    beside = {t: errors[t, "end", "merged"] for t in lengths}
    shown = "; ".join(
        f"{t:,} tokens: {ahead[t].mean_error:+.4f} ahead, {beside[t].mean_error:+.4f} beside it"
        for t in lengths
    )
    grows = ahead[lengths[-1]].mean_error > ahead[lengths[0]].mean_error > 0
    halved = all(beside[t].rmse < errors[t, "end", "trained"].rmse / 2 for t in lengths)
    return Findings(
        verdict=(
            "merged where the decay ends, the error is half of the trained loss's or less"
            if halved
            else "merging where the decay ends is no good prediction"
        )
        + (
            "; where it begins it is too pessimistic, the more the longer the decay"
            if grows
            else "; where it begins the error does not grow with the decay"
        ),
        sentences=[f"Mean of merged minus annealed loss, by length of the decay: {shown}."],
        tables=[
            Table(
                columns=[
                    "decay, tokens",
                    "scored at its",
                    "by",
                    "n",
                    "mean error",
                    "RMSE",
                    "correlation of gains",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Merged against annealed loss."""
    for axis, where in zip(figure.subplots(1, 2), ("start", "end"), strict=True):
        mine = [r for r in rows if r["where"] == where]
        lengths = list(groups(mine, "decay_tokens"))
        for color, ((tokens,), found) in zip(shades(len(lengths)), lengths, strict=True):
            for number, (_, same) in enumerate(groups(found, "start")):
                annealed, merged = (
                    estimate([r[key] for r in same]) for key in ("annealed", "merged")
                )
                axis.errorbar(
                    annealed.mean,
                    merged.mean,
                    merged.margin or 0,
                    annealed.margin or 0,
                    fmt="o",
                    ms=4,
                    color=color,
                    label=f"decay over {tokens:,} tokens" if number == 0 else None,
                )
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], color=NEWEST, lw=0.8)
        axis.set(xlabel="annealed loss", ylabel="merged loss", title=f"merged at its {where}")


EXPERIMENT = Experiment(
    name="horizon",
    title="How far ahead merging predicts annealing",
    paper="Open: how well does the merged model predict the annealed loss, and for how long a "
    "decay?",
    setup="Dense, middle size; linear decays of three lengths from four points, and the SMA of "
    f"the last {LAST} checkpoints of the constant-rate run where each begins and where it ends.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
