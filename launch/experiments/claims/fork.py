"""From points of the constant-rate run: constant rate and merging, against real annealing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import ANNEALED, MERGED, NEWEST, curve
from lab.runs import Run, Start
from lab.scoring import Merges
from lab.stats import IN_PART, NOT_REPRODUCED, REPRODUCED, estimate
from lab.trainer import Rate
from lab.work import Job

LAST, PARTS = 6, 5


def _forks(scale: Scale) -> tuple[int, ...]:
    return scale.fork - 2 * scale.decay, scale.fork


def _annealed(scale: Scale, seed: int, moe: bool, fork: int) -> Run:
    run, end = constant(scale, seed, moe=moe), fork + 2 * scale.decay
    return replace(
        run,
        start=Start(run=run, iteration=fork),
        end=end,
        saves=(),
        rate=Rate(peak=scale.peak, decay="linear", decay_begin=fork, decay_end=end),
        scores=_along(scale, fork),
    )


def _along(scale: Scale, fork: int) -> tuple[int, ...]:
    step = 2 * scale.decay // PARTS
    return tuple(fork + step * n for n in range(1, PARTS + 1))


def _merges(scale: Scale, seed: int, moe: bool) -> Merges:
    ends = sorted({at for fork in _forks(scale) for at in _along(scale, fork)})
    run = constant(scale, seed, moe=moe)
    return Merges(run=run, lasts=(LAST,), every=(scale.every,), ends=tuple(ends))


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """Annealing runs from every fork, and merges along the constant-rate run."""
    kinds = [(seed, moe) for moe in (False, True) for seed in seeds]
    found: list[Job] = [_merges(scale, *kind) for kind in kinds]
    return found + [_annealed(scale, *kind, fork) for kind in kinds for fork in _forks(scale)]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Test losses of the three ways along every fork."""
    for moe in (False, True):
        for seed in seeds:
            merges = _merges(scale, seed, moe)
            for fork in _forks(scale):
                record = _annealed(scale, seed, moe, fork).record()
                for at in _along(scale, fork):
                    yield {
                        "model": "MoE" if moe else "dense",
                        "seed": seed,
                        "fork_tokens": scale.tokens(fork),
                        "since_tokens": scale.tokens(at - fork),
                        "constant": merges.losses(at, "unmerged")["test"],
                        "merged": merges.losses(at)["test"],
                        "annealed": record.score(at)["test"],
                    }


def findings(rows: Sequence[Row]) -> Findings:
    """Merged against constant and annealed, at the first and the last point of a fork."""
    since = sorted({r["since_tokens"] for r in rows})
    table, early, late, over = [], [], [], []
    for (model, fork, at), found in groups(rows, "model", "fork_tokens", "since_tokens"):
        against = {
            k: estimate([r[k] - r["merged"] for r in found]) for k in ("constant", "annealed")
        }
        over.append(against["constant"])
        if at == since[0]:
            early.append(against["annealed"])
        if at == since[-1]:
            late.append(against["annealed"])
        if at in (since[0], since[len(since) // 2], since[-1]):
            table.append(
                [
                    model,
                    f"{fork:,}",
                    f"{at:,}",
                    against["constant"].signed,
                    against["annealed"].signed,
                ]
            )
    ahead = all(g.low > 0 for g in early)
    beats = all(g.low > 0 for g in over)
    behind = sum(g.high < 0 for g in late)
    said = REPRODUCED if ahead and beats and not behind else IN_PART
    if any(g.high < 0 for g in over) or not (ahead or beats):
        said = NOT_REPRODUCED
    return Findings(
        verdict=said,
        sentences=[
            f"Constant rate and merging {'beats' if beats else 'does not always beat'} the "
            f"constant rate alone, {'and' if ahead else 'but not everywhere'} annealing at the "
            "first point of a fork. At the end of the decay its loss is lower than the annealed "
            f"one by {min(g.mean for g in late):.4f} to {max(g.mean for g in late):.4f}; it is "
            f"higher with the whole interval in {behind} of {len(late)} forks."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "fork at, tokens",
                    "tokens since",
                    "merged over constant",
                    "merged over annealed",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Mean losses along the forks."""
    axes = figure.subplots(1, 2)
    for axis, model in zip(axes, ("dense", "MoE"), strict=True):
        for (fork,), found in groups((r for r in rows if r["model"] == model), "fork_tokens"):
            for color, key in zip(
                (NEWEST, MERGED, ANNEALED), ("constant", "merged", "annealed"), strict=True
            ):
                losses = means(found, "since_tokens", key)
                curve(
                    axis,
                    {fork + at: loss for at, loss in losses.items()},
                    color=color,
                    marker="." if key != "annealed" else "*",
                    label=key,
                )
        axis.set(xlabel="tokens", ylabel="test loss (nats per byte)", title=model)


EXPERIMENT = Experiment(
    name="fork",
    title="Merging in place of annealing",
    paper="From a fork, constant rate and merging beats both the constant-rate and the annealed "
    "run early on, and is comparable at the end.",
    setup=f"Linear decay to zero from two points of the constant-rate run; meanwhile the SMA of "
    f"the last {LAST} checkpoints of the run that goes on. Dense and MoE, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
