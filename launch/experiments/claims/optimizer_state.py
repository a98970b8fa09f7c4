"""Which moments a resume from a merge should carry, with and without a new warmup."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lab.experiment import Experiment, Findings, Row, Table, groups
from lab.models import WARMUP, Scale, constant
from lab.pages import NEWEST, curve, shades
from lab.runs import Run, Start
from lab.stats import Estimate, estimate
from lab.trainer import Rate

LAST, AFTER = 6, (1, 10, 100, 1000)
_COLORS = dict(zip(("plain", "latest", "average", "reset"), (NEWEST, *shades(3)), strict=True))
ARMS = tuple(
    (state, warmup) for state in ("plain", "latest", "average", "reset") for warmup in (0, WARMUP)
)


def _resumed(scale: Scale, seed: int, moe: bool, state: str, warmup: int) -> Run:
    run = constant(scale, seed, moe=moe)
    start = Start(run=run, iteration=scale.fork)
    if state != "plain":
        start = replace(start, last=LAST, every=scale.every, optimizer_state=state)
    return replace(
        run,
        start=start,
        end=scale.fork + max(AFTER),
        saves=(),
        rate=Rate(peak=scale.peak, begin=scale.fork, warmup=warmup),
        scores=tuple(scale.fork + after for after in AFTER),
    )


def _all(scale: Scale, seeds: Sequence[int]) -> Iterator[tuple[bool, str, int, int, Run]]:
    for moe in (False, True):
        for state, warmup in ARMS:
            for seed in seeds:
                yield moe, state, warmup, seed, _resumed(scale, seed, moe, state, warmup)


def jobs(scale: Scale, seeds: Sequence[int]) -> list[Run]:
    """One short run per model, moments, warmup and seed."""
    return [run for *_, run in _all(scale, seeds)]


def rows(scale: Scale, seeds: Sequence[int]) -> Iterator[Row]:
    """Test losses after some steps, and what the gradient norm did in the first hundred."""
    for moe, state, warmup, seed, run in _all(scale, seeds):
        record = run.record()
        norms = record.grad_norms[:100]
        row: Row = {
            "model": "MoE" if moe else "dense",
            "state": state,
            "warmup": warmup,
            "seed": seed,
            "grad_norm": statistics.fmean(norms),
            "grad_norm_max": max(norms),
            "loss_max": max(record.losses[:100]),
        }
        for after in AFTER:
            row[f"after_{after}"] = record.score(scale.fork + after)["test"]
        yield row


def findings(rows: Sequence[Row]) -> Findings:
    """Each choice against `latest` without a warmup, seed by seed."""
    keys = [name for name in rows[0] if name.startswith("after_")]
    base = {(r["model"], r["seed"]): r for r in rows if (r["state"], r["warmup"]) == ("latest", 0)}
    table, better = [], []
    for (model, state, warmup), found in groups(rows, "model", "state", "warmup"):
        gains = {k: estimate([base[model, r["seed"]][k] - r[k] for r in found]) for k in keys}
        shown = [f"{estimate([r[k] for r in found]).mean:.4f}" for k in keys]
        last = gains[keys[-1]]
        if state in ("average", "reset") and last.low > 0:
            better.append(f"{model}, {state}, {'warmup' if warmup else 'no warmup'}")
        table.append(
            [
                model,
                "not merged" if state == "plain" else state,
                warmup,
                *shown,
                last.signed,
                f"{estimate([r['grad_norm'] for r in found]).mean:.2f}",
                f"{max(r['grad_norm_max'] for r in found):.2f}",
                f"{max(r['loss_max'] for r in found):.3f}",
            ]
        )
    steps = [key.removeprefix("after_") for key in keys]

    behind = {state: _behind(rows, base, state, keys) for state in ("average", "reset", "plain")}
    shown = {state: ", ".join(e.signed for e in found) for state, found in behind.items()}
    return Findings(
        verdict="; ".join(
            f"{state}: {_clear(behind[state], steps)}" for state in ("average", "reset")
        ),
        sentences=[
            "Against `latest`, over all runs without a warmup (intervals over models and seeds); a "
            "step is named where the whole interval lies on one side. Loss above that of `latest` "
            f"after {', '.join(steps)} steps: averaged {shown['average']}; reset {shown['reset']}; "
            f"not merged {shown['plain']}. Better than `latest` in a whole interval after "
            f"{steps[-1]} steps, by model and warmup: {'; '.join(better) or 'none'}."
        ],
        tables=[
            Table(
                columns=[
                    "model",
                    "moments",
                    "warmup",
                    *(f"test after {n}" for n in steps),
                    f"gain over latest after {steps[-1]}",
                    "grad norm, mean",
                    "largest",
                    "largest loss",
                ],
                rows=table,
            )
        ],
    )


def _behind(
    rows: Sequence[Row], base: Mapping[Any, Row], state: str, keys: Sequence[str]
) -> list[Estimate]:
    """Loss above that of `latest`, all models and seeds, without a warmup, by `keys`."""
    found = [r for r in rows if (r["state"], r["warmup"]) == (state, 0)]
    return [estimate([r[k] - base[r["model"], r["seed"]][k] for r in found]) for k in keys]


def _clear(found: Sequence[Estimate], steps: Sequence[str]) -> str:
    better = [n for n, e in zip(steps, found, strict=True) if e.high < 0]
    worse = [n for n, e in zip(steps, found, strict=True) if e.low > 0]
    said = [
        f"{word} after {', '.join(at)} steps"
        for word, at in (("better", better), ("worse", worse))
        if at
    ]
    return ", ".join(said) or "no clear difference"


def plot(rows: Sequence[Row], figure: Any) -> None:
    """Test loss after some steps, relative to the resume that is not merged."""
    keys = [name for name in rows[0] if name.startswith("after_")]
    steps = [int(key.removeprefix("after_")) for key in keys]
    for axis, model in zip(figure.subplots(1, 2), ("dense", "MoE"), strict=True):
        mine = [r for r in rows if r["model"] == model]
        plain = {r["seed"]: r for r in mine if (r["state"], r["warmup"]) == ("plain", 0)}
        for (state, warmup), found in groups(mine, "state", "warmup"):
            gains = [estimate([plain[r["seed"]][key] - r[key] for r in found]) for key in keys]
            curve(
                axis,
                dict(zip(steps, gains, strict=True)),
                color=_COLORS[state],
                ls="--" if warmup else "-",
                marker=".",
                label=f"{state}, warmup {warmup}",
            )
        axis.set(
            xscale="log",
            xlabel="steps after the resume",
            title=model,
            ylabel="gain over a resume from the newest (test)",
        )


EXPERIMENT = Experiment(
    name="optimizer_state",
    title="Moments on resume",
    paper="Open: which optimizer state should a resume from a merge carry?",
    setup=f"PMA-init of {LAST} checkpoints at a constant rate, with the newest checkpoint's "
    f"moments, averaged or reset ones, each at once and with {WARMUP} steps of warmup; and a "
    "resume that is not merged. Dense and MoE, middle size.",
    seeds=3,
    jobs=jobs,
    rows=rows,
    findings=findings,
    plot=plot,
)
