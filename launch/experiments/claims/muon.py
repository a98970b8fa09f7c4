"""Whether merging gains as much where Muon makes the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, gain, groups, means
from lab.models import Scale, constant
from lab.pages import curve, shades, zero
from lab.runs import Run
from lab.scoring import Merges
from lab.spreads import Distances
from lab.stats import estimate, verdict
from lab.trainer import Optimizer
from lab.work import Job

LASTS, OPTIMIZERS = (3, 6, 10), ("adam", "muon")
_NAMES = {"adam": "AdamW", "muon": "Muon"}


def _run(scale: Scale, seed: int, optimizer: Optimizer) -> Run:
    run = constant(scale, seed)
    if optimizer == "adam":
        return run
    config = replace(run.config, use_distributed_optimizer=False)  # Muon needs whole matrices
    saves = tuple(
        at
        for end in _ends(scale)
        for at in range(end - (LASTS[-1] - 1) * scale.every, end + 1)
        if at % scale.every == 0
    )
    return replace(run, config=config, optimizer=optimizer, saves=saves)


def _ends(scale: Scale) -> tuple[int, ...]:
    return tuple(scale.end * part // 4 for part in (2, 3, 4))


def _merges(scale: Scale, seed: int, optimizer: Optimizer) -> Merges:
    run = _run(scale, seed, optimizer)
    return Merges(run=run, lasts=LASTS, every=(scale.every,), ends=_ends(scale))


def _distances(scale: Scale, seed: int, optimizer: Optimizer) -> Distances:
    run = _run(scale, seed, optimizer)
    return Distances(run=run, iterations=run.saves)


def _all(seeds: Sequence[int]) -> Iterator[tuple[int, Optimizer]]:
    for optimizer in OPTIMIZERS:
        yield from ((seed, optimizer) for seed in seeds)  # type: ignore[misc]


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """Merges and distances of every run."""
    found: list[Job] = [_merges(scale, *each) for each in _all(seeds)]
    return found + [_distances(scale, *each) for each in _all(seeds)]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Losses at three ends, and how far the members lie apart."""
    for seed, optimizer in _all(seeds):
        merges, apart = (made(scale, seed, optimizer) for made in (_merges, _distances))
        for end in _ends(scale):
            for last in LASTS:
                window = range(end - (last - 1) * scale.every, end + 1, scale.every)
                yield {
                    "optimizer": _NAMES[optimizer],
                    "seed": seed,
                    "tokens": scale.tokens(end),
                    "last": last,
                    "spread": apart.spread(list(window)),
                    "size": apart.size(end),
                    "newest": merges.losses(end, "unmerged")["test"],
                    "merged": merges.losses(end, last=last)["test"],
                }


def findings(rows: Sequence[Row]) -> Findings:
    """Gains of both, at the end and before."""
    end = max(r["tokens"] for r in rows)
    table, late = [], {}
    for (name, tokens, last), found in groups(rows, "optimizer", "tokens", "last"):
        gained = estimate([gain(r) for r in found])
        if tokens == end:
            late[name, last] = found, gained
        newest = estimate([r["newest"] for r in found])
        wide = estimate([r["spread"] / r["size"] ** 2 for r in found])
        table.append(
            [name, f"{tokens:,}", last, f"{newest.mean:.3f}", gained.signed, f"{wide.mean:.1e}"]
        )
    more = {
        last: estimate(
            [
                gain(b) - gain(a)
                for a, b in zip(late["AdamW", last][0], late["Muon", last][0], strict=True)
            ]
        )
        for last in LASTS
    }
    less = [str(last) for last, m in more.items() if m.high < 0]
    greater = [str(last) for last, m in more.items() if m.low > 0]
    said = " and ".join(
        f"{word} with N = {', '.join(counts)}"
        for word, counts in (("less", less), ("more", greater))
        if counts
    )
    muon = [late["Muon", last][1] for last in LASTS]
    return Findings(
        verdict=f"merging improves Muon's checkpoints: {verdict(muon)}; against AdamW at the same "
        f"rate it gains {said or 'neither clearly more nor less'}",
        sentences=[
            f"At the end ({end:,} tokens) merging {', '.join(map(str, LASTS))} checkpoints gains "
            f"{', '.join(g.signed for g in muon)} with Muon, and with AdamW "
            f"{', '.join(late['AdamW', last][1].signed for last in LASTS)}; the difference, seed "
            f"by seed, is {', '.join(m.signed for m in more.values())}. Neither rate was tuned."
        ],
        tables=[
            Table(
                columns=[
                    "optimizer",
                    "tokens",
                    "N",
                    "newest, test",
                    "gain",
                    "spread over squared length",
                ],
                rows=table,
            )
        ],
    )


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Gain by count at every end."""
    ends = sorted({r["tokens"] for r in rows})
    for axis, name in zip(figure.subplots(1, 2), _NAMES.values(), strict=True):
        for color, end in zip(shades(len(ends)), ends, strict=True):
            mine = [r for r in rows if r["optimizer"] == name and r["tokens"] == end]
            curve(axis, means(mine, "last", gain), color=color, label=f"after {end:,} tokens")
        zero(axis)
        axis.set(xlabel="checkpoints N", ylabel="gain (test, nats per byte)", title=name)


EXPERIMENT = Experiment(
    name="muon",
    title="Merging under Muon",
    paper="Open: does merging gain as much under Muon? arXiv 2605.26484 finds that extrapolated "
    "merges help there too (not tried here).",
    setup="Constant-rate runs of which Muon makes the steps of all matrices between layers "
    "(`torch.optim.Muon` inside Megatron's mixed-precision optimizer, scaled to AdamW's rate), "
    "and AdamW the rest; against AdamW alone. Dense, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
