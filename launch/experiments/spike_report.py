"""What the spike detector says about runs whose fate is known, with its default settings.

    python launch/experiments/spike_report.py                      # the committed series, seconds
    python launch/experiments/spike_report.py --seeds 11 12        # and new runs, 40 s each
    python launch/experiments/spike_report.py --points 100000      # and long healthy noise, 1 min

Real tiny runs are those of tests/series/make.py. The healthy noise is synthetic: a falling loss
with white, heavy-tailed (Student t, 4 degrees of freedom) or wandering (white plus AR(1) of 500
points) noise, of the size that large runs have.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pma_megatron.spikes.detector import Kind, SpikeDetector, Verdict, detect
from pma_megatron.spikes.metrics import read_metrics
from pma_megatron.testing import run_ranks

SERIES = Path(__file__).parents[2] / "tests" / "series"
sys.path.insert(0, str(SERIES))
import make  # noqa: E402  (it lies beside the series)

Rows = list[tuple[int, float, float | None]]
FATAL = {
    "collapse": {Kind.UNRECOVERED},
    "hard_collapse": {Kind.UNRECOVERED, Kind.DIVERGENCE, Kind.NONFINITE},
    "creep": {Kind.DIVERGENCE, Kind.UNRECOVERED},
    "nan": {Kind.NONFINITE},
}
"""Recipes that do not recover, and what may be said of them."""


def committed() -> dict[tuple[str, int], Rows]:
    """The series beside tests/series/make.py, by recipe and seed."""
    found = {}
    for name in make.RECIPES:
        for seed in make.SEEDS.get(name, (1,)):
            points = read_metrics(make.file_of(name, seed)).points
            found[name, seed] = [(point.iteration, point.loss, point.grad_norm) for point in points]
    return found


def judged(name: str, verdicts: list[Verdict]) -> str:
    """Whether the first fatal verdict is what it should be."""
    fatal = next((verdict for verdict in verdicts if verdict.fatal), None)
    if name in FATAL:
        return "found" if fatal is not None and fatal.kind in FATAL[name] else "MISSED"
    return "quiet" if fatal is None else "FALSE ALARM"


def table_of(runs: dict[tuple[str, int], Rows]) -> Table:
    """One row per run: what was said, from which iteration on, and how long that took."""
    table = Table("run", "seed", "iterations", "said", "onset", "delay", "")
    for (name, seed), rows in runs.items():
        verdicts = detect(rows)
        first = next((v for v in verdicts if v.fatal), verdicts[0] if verdicts else None)
        said = (
            ("-", "", "")
            if first is None
            else (first.kind.value, str(first.onset), str(first.confirmed - first.onset))
        )
        table.add_row(name, str(seed), str(len(rows)), *said, judged(name, verdicts))
    return table


def noise(kind: str, sigma: float, points: int) -> np.ndarray:
    """Losses of a long healthy run, `[points]` float64."""
    rng = np.random.default_rng(0)
    trend = 1.8 + 8 * np.exp(-np.arange(points) / 300) + (1 + np.arange(points) / 500) ** -0.3
    white = rng.normal(0, 1, points)
    if kind == "heavy tails":
        white = rng.standard_t(4, points) / np.sqrt(2)
    elif kind == "wandering":
        slow, keep = np.zeros(points), 1 - 1 / 500
        for index, push in enumerate(rng.normal(0, np.sqrt(1 - keep**2) / 2, points - 1)):
            slow[index + 1] = keep * slow[index] + push
        white = white + slow
    return trend + sigma * white


def noise_table(points: int) -> Table:
    """Verdicts over `points` points of each kind of healthy noise."""
    table = Table("noise", "sigma, nats", "points", "recovered", "higher level", "fatal")
    for kind in ("white", "heavy tails", "wandering"):
        for sigma in (0.02, 0.05, 0.1):
            detector = SpikeDetector()
            said = Counter[str]()
            for index, loss in enumerate(noise(kind, sigma, points)):
                verdict = detector.update(index + 1, float(loss))
                if verdict is not None:
                    said["fatal" if verdict.fatal else verdict.kind.name] += 1
            counts = (said["RECOVERED"], said["SHIFT"], said["fatal"])
            table.add_row(kind, str(sigma), str(points), *map(str, counts))
    return table


def main() -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="of new runs")
    parser.add_argument("--recipes", nargs="*", choices=make.RECIPES, default=list(make.RECIPES))
    parser.add_argument("--points", type=int, default=0, help="of healthy noise; 0: none")
    arguments = parser.parse_args()
    console = Console(width=100)
    console.print(table_of(committed()))
    if arguments.seeds:
        fresh = {
            (name, seed): run_ranks(make.trained, 1, name, seed, timeout_s=500)[0]
            for name in arguments.recipes
            for seed in arguments.seeds
        }
        console.print("New runs", table_of(fresh))
    if arguments.points:
        console.print(noise_table(arguments.points))


if __name__ == "__main__":
    main()
