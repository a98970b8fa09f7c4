"""Training on another text, from a merge and from the newest checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import Scale, constant
from lab.pages import curve, rate_color, zero
from lab.runs import Run, Start
from lab.stats import estimate, verdict
from lab.trainer import Rate

LAST = 6
_WHEN = ("first", "early", "half", "end")
_JUMP = 0.3  # nats per byte above the median of the steps before: a spike


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What differs between continued training and fine-tuning.

    Attributes:
        domain: the other text.
        length: iterations, in intervals between checkpoints.
        factors: peaks of the cosine, as parts of the pre-training rate.
        floor: where each ends, as a part of its peak.
    """

    domain: str
    length: int
    factors: tuple[float, ...]
    floor: float

    def run(self, scale: Scale, seed: int, moe: bool, factor: float, merged: bool) -> Run:
        """One run from the end of the constant-rate run."""
        run, begin = constant(scale, seed, moe=moe), scale.end
        end, peak = begin + self.length * scale.every, scale.peak * factor
        start = Start(run=run, iteration=begin)
        if merged:
            start = replace(start, last=LAST, every=scale.every)
        return replace(
            run,
            start=start,
            domain=self.domain,
            end=end,
            saves=(),
            rate=Rate(
                peak=peak,
                begin=begin,
                decay="cosine",
                decay_begin=begin,
                decay_end=end,
                floor=peak * self.floor,
            ),
            scores=tuple(begin + at for at in self.after(scale)),
        )

    def after(self, scale: Scale) -> tuple[int, ...]:
        """Steps after which losses are taken: at once, early, half-way, at the end."""
        end = self.length * scale.every
        return 1, end // 10, end // 2, end

    def each(self, scale: Scale, seeds: Sequence[int]) -> Iterator[tuple[bool, float, bool, int]]:
        """(MoE, factor, merged, seed) of every run."""
        for moe in (False, True):
            for factor in self.factors:
                for merged in (False, True):
                    yield from ((moe, factor, merged, seed) for seed in seeds)

    def jobs(self, scale: Scale, seeds: Sequence[int]) -> list[Run]:
        """All runs."""
        return [
            self.run(scale, seed, moe, factor, merged)
            for moe, factor, merged, seed in self.each(scale, seeds)
        ]

    def rows(self, scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
        """Losses on the new text and the old one, gradient norms and spikes."""
        for moe, factor, merged, seed in self.each(scale, seeds):
            run = self.run(scale, seed, moe, factor, merged)
            record = run.record()
            row: Row = {
                "model": "MoE" if moe else "dense",
                "peak": scale.peak * factor,
                "merged": merged,
                "seed": seed,
                "grad_norm": statistics.fmean(record.grad_norms),
                "grad_norm_deviation": statistics.stdev(record.grad_norms),
                "spikes": _spikes(record.losses),
            }
            for name, after in zip(_WHEN, self.after(scale), strict=True):
                losses = record.score(scale.end + after)
                row |= {name: losses[self.domain], f"{name}_before": losses["test"]}
            yield row

    def findings(self, rows: Sequence[Row]) -> Findings:
        """Merged against plain, seed by seed."""
        plain = {(r["model"], r["peak"], r["seed"]): r for r in rows if not r["merged"]}
        table, starts, ends, smoother = [], [], [], []
        for (model, peak), found in groups((r for r in rows if r["merged"]), "model", "peak"):
            others = [plain[model, peak, r["seed"]] for r in found]
            pairs = list(zip(others, found, strict=True))
            gains = [estimate([o[k] - r[k] for o, r in pairs]) for k in (*_WHEN, "end_before")]
            starts.append(gains[0])
            ends.append(gains[3])
            norm = estimate([o["grad_norm_deviation"] - r["grad_norm_deviation"] for o, r in pairs])
            smoother.append(norm)
            spikes = [sum(r["spikes"] for r in those) for those in (others, found)]
            table.append(
                [
                    model,
                    f"{peak:g}",
                    *(g.signed for g in gains),
                    norm.signed,
                    "{} / {}".format(*spikes),
                ]
            )
        harmful = sum(g.high < 0 for g in ends)
        return Findings(
            verdict=f"at the start {verdict(starts)}; at the end "
            + (
                "better"
                if all(g.low > 0 for g in ends)
                else f"worse in {harmful} of {len(ends)} settings"
                if harmful
                else "no clear difference"
            ),
            sentences=[
                "After one step the merged start is better by "
                f"{min(g.mean for g in starts):.4f} to {max(g.mean for g in starts):.4f}; at the "
                f"end by {min(g.mean for g in ends):.4f} to {max(g.mean for g in ends):.4f}, worse "
                "with the whole interval below zero in "
                f"{harmful} of {len(ends)} settings. The gradient norm varies less in "
                f"{sum(n.low > 0 for n in smoother)} of {len(smoother)} settings (whole interval)."
            ],
            tables=[
                Table(
                    columns=[
                        "model",
                        "peak rate",
                        "gain after 1 step",
                        "early",
                        "half-way",
                        "at the end",
                        "old text, at the end",
                        "less deviation of the grad norm",
                        "spikes, plain / merged",
                    ],
                    rows=table,
                )
            ],
        )

    def plot(self, rows: Sequence[Row], figure: Any) -> None:
        """Gain of the merged start along training."""
        plain = {(r["model"], r["peak"], r["seed"]): r for r in rows if not r["merged"]}
        for axis, model in zip(figure.subplots(1, 2), ("dense", "MoE"), strict=True):
            mine = [r for r in rows if r["merged"] and r["model"] == model]
            for (peak,), found in groups(mine, "peak"):
                gains = {
                    name: estimate([plain[model, peak, r["seed"]][name] - r[name] for r in found])
                    for name in _WHEN
                }
                curve(axis, gains, color=rate_color(peak), label=f"peak {peak:g}")
            zero(axis)
            axis.set(title=model, ylabel=f"gain of PMA-init ({self.domain}, nats per byte)")

    def experiment(self, *, name: str, title: str, paper: str, setup: str) -> Experiment:
        """The experiment of these settings."""
        return Experiment(
            name=name,
            title=title,
            paper=paper,
            setup=setup,
            seeds=5,
            jobs=self.jobs,
            rows=self.rows,
            findings=self.findings,
            plot=self.plot,
        )


def _spikes(losses: Sequence[float]) -> int:
    """Steps whose loss lies far above those before."""
    return sum(
        losses[at] > statistics.median(losses[at - 10 : at]) + _JUMP
        for at in range(10, len(losses))
    )
