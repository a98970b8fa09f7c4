"""Whether merged checkpoints lie on a line, and what is gained by going on along it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lab.experiment import Experiment, Findings, Row, Table, groups, means
from lab.models import Scale, constant
from lab.pages import MERGED, MODELS, NEWEST, curve, zero
from lab.spreads import Distances, centred, first_share
from lab.stats import IN_PART, NOT_REPRODUCED, REPRODUCED, Estimate, estimate
from lab.work import Job
from lab.written import Written

LAST, POINTS, FURTHER = 6, 10, (0.0, 0.25, 0.5)


def _ends(scale: Scale) -> tuple[int, ...]:
    return scale.fork, scale.end


def _distances(scale: Scale, seed: int, moe: bool) -> Distances:
    run = constant(scale, seed, moe=moe)
    return Distances(run=run, iterations=run.saves)


def _merge(scale: Scale, seed: int, moe: bool, end: int, further: float) -> Written:
    """The SMA of the last checkpoints, moved on by a part of its way from the SMA before it."""
    first = end - (2 * LAST - 1) * scale.every
    return Written(
        run=constant(scale, seed, moe=moe),
        iterations=tuple(range(first, end + 1, scale.every)),
        coefficients=(-further / LAST,) * LAST + ((1 + further) / LAST,) * LAST,
    )


def _kinds(seeds: Sequence[int]) -> Iterator[tuple[int, bool]]:
    yield from ((seed, moe) for moe in (False, True) for seed in seeds)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """Distances of every run, and merges further and further along the line."""
    found: list[Job] = []
    for kind in _kinds(seeds):
        for end in _ends(scale):
            found += [_merge(scale, *kind, end, further) for further in reversed(FURTHER)]
        found.append(_distances(scale, *kind))
    return found


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Shares of the first direction, and losses along the line."""
    for seed, moe in _kinds(seeds):
        base = {"model": "MoE" if moe else "dense", "seed": seed}
        yield from ({**base, **row} for row in _shares(scale, _distances(scale, seed, moe)))
        for end in _ends(scale):
            for further in FURTHER:
                losses = _merge(scale, seed, moe, end, further).losses()
                yield {
                    **base,
                    "what": "loss",
                    "end_tokens": scale.tokens(end),
                    "further": further,
                    "validation": losses["validation"],
                    "test": losses["test"],
                }


def _shares(scale: Scale, apart: Distances) -> Iterator[Row]:
    """Of single checkpoints and of merges, as far apart from each other, and of a random walk."""
    for name, step in (("overlapping", 1), ("apart", LAST)):
        single, merged = _combinations(step)
        first = scale.end - (single.shape[1] - 1) * scale.every
        window = range(first, scale.end + 1, scale.every)
        products = centred(apart.squares(list(window)))
        steps = np.arange(1, len(window) + 1)
        walk = np.minimum(steps[:, None], steps).astype(float)  # inner products, on average
        yield {
            "what": "share",
            "windows": name,
            "raw": first_share(products, single),
            "merged": first_share(products, merged),
            "raw_walk": first_share(walk, single),
            "merged_walk": first_share(walk, merged),
        }


def _combinations(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Single checkpoints and SMAs that end with them, `step` intervals from one to the next."""
    count = LAST + (POINTS - 1) * step
    single, merged = np.zeros((POINTS, count)), np.zeros((POINTS, count))
    for point in range(POINTS):
        newest = LAST - 1 + point * step
        single[point, newest] = 1
        merged[point, newest - LAST + 1 : newest + 1] = 1 / LAST
    return single, merged


def findings(rows: Sequence[Row]) -> Findings:
    """Shares against those of a random walk; the best way further against the merge."""
    shares = [r for r in rows if r["what"] == "share"]
    losses = [r for r in rows if r["what"] == "loss"]
    table, nearer = [], []
    beyond: dict[str, list[Estimate]] = {"raw": [], "merged": []}
    less = []
    for (model, windows), found in groups(shares, "model", "windows"):
        nearer.append(estimate([r["merged"] - r["raw"] for r in found]))
        less.append(estimate([_beyond(r, "raw") - _beyond(r, "merged") for r in found]))
        shown = []
        for key, kept in beyond.items():
            kept.append(estimate([_beyond(r, key) for r in found]))
            shares_of = (_mean(found, key), _mean(found, f"{key}_walk"))
            shown += [*(f"{share:.0%}" for share in shares_of), kept[-1].signed]
        table.append([model, windows, *shown])
    chosen, second = [], []
    for (model, end), found in groups(losses, "model", "end_tokens"):
        gains = means(_gains(found), "further", "gain")
        best = estimate([_chosen(mine)["gain"] for _, mine in groups(_gains(found), "seed")])
        chosen.append(best)
        second.append([model, f"{end:,}", *(gains[f].signed for f in FURTHER[1:]), best.signed])
    clear = {key: sum(e.low > 0 for e in found) for key, found in beyond.items()}
    apart, near = (
        [r for r in shares if r["windows"] == windows] for windows in ("apart", "overlapping")
    )
    return Findings(
        verdict=f"merges lie nearer to a line than single checkpoints: {_over(nearer)}"
        f"{', but single ones lie on one too' if clear['raw'] else ''}: beyond a random walk "
        f"single in {clear['raw']}, merged in {clear['merged']} of {len(nearer)} settings; going "
        f"on along it: {_over(chosen)}",
        sentences=[
            f"Of {POINTS} merges in windows that do not overlap {_mean(apart, 'merged'):.0%} of "
            f"the squared deviations lie along one direction, of the single checkpoints where "
            f"they end {_mean(apart, 'raw'):.0%}; a random walk has "
            f"{_mean(apart, 'merged_walk'):.0%} and {_mean(apart, 'raw_walk'):.0%}. Where windows "
            f"overlap by all but one, it is {_mean(near, 'merged'):.0%} and "
            f"{_mean(near, 'raw'):.0%}, and of a walk {_mean(near, 'merged_walk'):.0%} and "
            f"{_mean(near, 'raw_walk'):.0%}; most of that line is the overlap. Beyond a walk "
            f"single checkpoints have {_range(beyond['raw'])} of the deviations more, merges "
            f"{_range(beyond['merged'])}; in {sum(e.low > 0 for e in less)} of {len(less)} "
            "settings merges stand out less from theirs than single ones (whole interval). Going "
            "on, as far as is best on the validation text, gains "
            f"{min(g.mean for g in chosen):+.4f} to {max(g.mean for g in chosen):+.4f} on "
            f"the test text over the merge; in {sum(g.low > 0 for g in chosen)} of {len(chosen)} "
            "settings with the whole interval above zero."
        ],
        tables=[
            Table(
                columns=[
                    *("model", "windows"),
                    *("single", "of a walk", "beyond it"),
                    *("merged", "of a walk", "beyond it"),
                ],
                rows=table,
            ),
            Table(
                columns=[
                    "model",
                    "tokens",
                    *(f"gain of {f:g} further" for f in FURTHER[1:]),
                    "chosen on validation",
                ],
                rows=second,
            ),
        ],
    )


def _beyond(row: Row, key: str) -> float:
    """Share of the first direction, less that of a random walk in the same windows."""
    return float(row[key] - row[f"{key}_walk"])


def _range(found: Sequence[Estimate]) -> str:
    return f"{min(e.mean for e in found):+.3f} to {max(e.mean for e in found):+.3f}"


def _over(gains: Sequence[Estimate]) -> str:
    better = sum(g.low > 0 for g in gains)
    if better == len(gains):
        return REPRODUCED
    return f"{IN_PART} ({better} of {len(gains)} settings)" if better else NOT_REPRODUCED


def _mean(rows: Sequence[Row], key: str) -> float:
    return estimate([r[key] for r in rows]).mean


def _gains(rows: Sequence[Row]) -> list[Row]:
    """Each loss against that of the merge of the same seed."""
    plain = {r["seed"]: r["test"] for r in rows if r["further"] == 0}
    return [r | {"gain": plain[r["seed"]] - r["test"]} for r in rows]


def _chosen(rows: Sequence[Row]) -> Row:
    """The best of one seed on the text that may be looked at."""
    return min(rows, key=lambda r: r["validation"])


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Shares of both kinds of points, and gains along the line."""
    left, right = figure.subplots(1, 2)
    settings = list(groups([r for r in rows if r["what"] == "share"], "model", "windows"))
    for at, (key, color) in enumerate((("raw", NEWEST), ("merged", MERGED))):
        label = "single checkpoints" if key == "raw" else "merges"
        found = {n + 0.3 * at: mine for n, (_, mine) in enumerate(settings)}
        shares = {place: estimate([r[key] for r in mine]) for place, mine in found.items()}
        curve(left, shares, color=color, ls="", label=label)
        walks = [mine[0][f"{key}_walk"] for mine in found.values()]
        left.plot(list(found), walks, "_", ms=16, color=color)
    names = ["\n".join(setting) for setting, _ in settings]
    left.set_xticks([n + 0.15 for n in range(len(names))], names)
    left.set(ylim=(0, 1), title="dashes: a random walk", ylabel="share of the first direction")
    losses = [r for r in rows if r["what"] == "loss"]
    newest = max(r["end_tokens"] for r in losses)
    for (model, end), found in groups(losses, "model", "end_tokens"):
        points, ls = means(_gains(found), "further", "gain"), "-" if end == newest else "--"
        curve(right, points, color=MODELS[model], ls=ls, label=f"{model}, {end:,} tokens")
    zero(right)
    right.set(xlabel="further along the line", ylabel="gain over the merge (test, nats per byte)")


EXPERIMENT = Experiment(
    name="line",
    title="Extrapolating merges",
    paper="arXiv 2605.26484: consecutive merged checkpoints lie on a line, single ones do not, and "
    "going on along it beats merging.",
    setup=f"Constant-rate runs; SMA of {LAST}. {POINTS} merges and the single checkpoints where "
    f"they end, in windows that follow each other, or that overlap by all but one; a random walk "
    "is what both would be if no step knew of those before. Then the newest merge plus a part of "
    "the way to it from the merge before, by `--coefficients` of which half are negative. Dense "
    "and MoE, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
