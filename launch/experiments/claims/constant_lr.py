"""Constant learning rate: merged against unmerged along training, dense and MoE, every size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, gain, groups, means
from lab.models import Scale, constant
from lab.pages import curve, shades, zero
from lab.scoring import Merges
from lab.stats import estimate, verdict
from lab.text import LOSSES

LAST = 6


def _ends(scale: Scale) -> tuple[int, ...]:
    step = scale.end // 8
    return tuple(range(2 * step, scale.end + 1, step))


def _merges(scale: Scale, seed: int, moe: bool, size: int) -> Merges:
    run = constant(scale, seed, moe=moe, size=size)
    return Merges(run=run, lasts=(LAST,), every=(scale.every,), ends=_ends(scale))


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Merges]:
    """A grid of merges for every model and seed."""
    return [_merges(scale, seed, *kind) for kind in scale.kinds() for seed in seeds]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses of the newest checkpoint and of the merge, at every end."""
    for moe, size in scale.kinds():
        for seed in seeds:
            merges = _merges(scale, seed, moe, size)
            for end in _ends(scale):
                newest, merged = merges.losses(end, "unmerged"), merges.losses(end)
                for name in LOSSES:
                    yield {
                        "model": "MoE" if moe else "dense",
                        "hidden_size": scale.model(moe=moe, size=size).hidden_size,
                        "seed": seed,
                        "tokens": scale.tokens(end),
                        "loss": name,
                        "newest": newest[name],
                        "merged": merged[name],
                    }


def findings(rows: Sequence[Row]) -> Findings:
    """The gain at the end, for every model and held-out text."""
    end = max(row["tokens"] for row in rows)
    table, tests = [], []
    for key, found in groups((r for r in rows if r["tokens"] == end), "model", "hidden_size"):
        gains = [estimate([gain(r) for r in found if r["loss"] == name]) for name in LOSSES]
        tests.append(gains[list(LOSSES).index("test")])
        newest = estimate([r["newest"] for r in found if r["loss"] == "test"])
        table.append([*key, f"{newest.mean:.3f}", *(g.signed for g in gains)])
    return Findings(
        verdict=verdict(tests),
        sentences=[
            f"At the end ({end:,} tokens) the SMA of {LAST} checkpoints has a lower test loss than "
            f"the newest one in {sum(g.low > 0 for g in tests)} of {len(tests)} models, with "
            f"the whole interval above zero; gains lie between {min(g.mean for g in tests):.4f} "
            f"and {max(g.mean for g in tests):.4f}."
        ],
        tables=[
            Table(
                columns=["model", "hidden size", "newest, test", *(f"gain, {n}" for n in LOSSES)],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain along training."""
    axes = figure.subplots(1, 2)
    for axis, model in zip(axes, ("dense", "MoE"), strict=True):
        tests = [r for r in rows if r["model"] == model and r["loss"] == "test"]
        sizes = list(groups(tests, "hidden_size"))
        for color, ((size,), found) in zip(shades(len(sizes)), sizes, strict=True):
            points = means(found, "tokens", gain)
            curve(axis, points, color=color, label=f"hidden size {size}")
        zero(axis)
        axis.set(xlabel="tokens", ylabel="gain (test, nats per byte)", title=model)


EXPERIMENT = Experiment(
    name="constant_lr",
    title="Constant learning rate",
    paper="At a constant learning rate, merging improves every size, dense and MoE.",
    setup=f"Warmup and a constant rate; at every end the SMA of the last {LAST} checkpoints "
    "against the newest one. Dense and MoE (4 experts, 2 per token; expert parallelism 2 but for "
    "the middle size) at three sizes.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
