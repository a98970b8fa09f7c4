"""How well does the merged loss forecast the annealed one? Tiny real Megatron runs, several seeds.

    python launch/experiments/forecast.py [--seeds 3] [--out DIR] [--image docs/img/forecast.png]

Per seed: one GPT at a constant rate; from several points of it real annealing runs, of two lengths;
the SMA of the last checkpoints, scored with `score_merges` at the point where each annealing run
begins (a forecast: nothing after that point is needed) and where it ends (as many tokens as the
annealing run has seen, so merging in place of annealing). Prints Markdown; one core, minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")

from matplotlib.figure import Figure

from pma_megatron.forecast import Agreement, Prediction, agreement
from pma_megatron.grid import Grid
from pma_megatron.testing import TinyConfig, run_ranks

CONFIG = TinyConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, seq_length=64,
    global_batch_size=16, micro_batch_size=16, lr=4e-3, warmup_iters=20,
)  # fmt: skip
STARTS = (300, 360, 420, 480)
LENGTHS = (50, 100)
LAST, EVERY = 6, 10
FIRST_SAVE, END = min(STARTS) - (LAST - 1) * EVERY, max(STARTS) + max(LENGTHS)
BATCHES = 16
ENDS = tuple(range(min(STARTS), END + 1, EVERY))


def main() -> int:
    """Run all seeds, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description="Merged against annealed loss, tiny runs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keeps result.json (default: nowhere)")
    parser.add_argument("--image", type=Path, help="where to draw")
    arguments = parser.parse_args()
    runs = {seed: one(replace(CONFIG, seed=seed)) for seed in range(1, arguments.seeds + 1)}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "result.json").write_text(json.dumps(runs, indent=1) + "\n")
    print(report(runs))
    if arguments.image is not None:
        draw(runs, arguments.image)
    return 0


def one(config: TinyConfig) -> dict[str, Any]:
    """Everything of one seed."""
    with tempfile.TemporaryDirectory(prefix="pma_forecast_") as folder:
        run_ranks(train, 1, config, folder, timeout_s=1800)
        return run_ranks(compare, 1, config, folder, timeout_s=1800)[0]  # type: ignore[no-any-return]


def train(_rank: int, _world_size: int, config: TinyConfig, root: str) -> None:
    """The constant-rate run and its checkpoints."""
    from pma_megatron.testing import TinyTrainer

    trainer = TinyTrainer(config)
    while trainer.iteration < END:
        trainer.train(EVERY)
        if trainer.iteration >= FIRST_SAVE:
            trainer.save(root)


def compare(_rank: int, _world_size: int, config: TinyConfig, root: str) -> dict[str, Any]:
    """Losses of single checkpoints, of merges, and of annealing runs from every start."""
    from pma_megatron.megatron.score import score_merges
    from pma_megatron.testing import TinyTrainer

    trainer = TinyTrainer(config)
    grid = Grid(lasts=(LAST,), ends=ENDS)
    scores = score_merges(trainer.models, root, grid, lambda: trainer.evaluate(BATCHES))
    trainer.close()
    curves: dict[str, dict[int, float]] = {"unmerged": {}, "sma": {}}
    for point in scores.points:
        curves[point.method][point.end_iteration] = point.losses["loss"]
    annealed = [
        (start, length, _anneal(config, root, start, length))
        for start in STARTS
        for length in LENGTHS
    ]
    print(f"seed {config.seed}: done", file=sys.stderr, flush=True)
    return {**curves, "annealed": annealed}


def _anneal(config: TinyConfig, root: str, start: int, length: int) -> float:
    from pma_megatron.testing import TinyTrainer

    decay = replace(config, decay="linear", decay_start_iter=start, decay_iters=length)
    trainer = TinyTrainer(decay)
    try:
        trainer.load(root, start)
        trainer.train(length)
        return trainer.evaluate(BATCHES)
    finally:
        trainer.close()


def predictions(runs: dict[int, dict[str, Any]], length: int, by: str, *, at_end: bool
                ) -> list[Prediction]:  # fmt: skip
    """Loss `by` `sma` or `unmerged`, at the start or the end of each annealing run of a length."""
    found = []
    for run in runs.values():
        for start, its_length, loss in run["annealed"]:
            if its_length == length:
                at = start + length if at_end else start
                found.append(Prediction(
                    start_iteration=start, iteration=at, trained=run["unmerged"][at],
                    merged=run[by][at], annealed=loss, annealed_tokens=None, source="",
                ))  # fmt: skip
    return found


def report(runs: dict[int, dict[str, Any]]) -> str:
    """Two Markdown tables: every pair of seed 1, and errors and correlations over all."""
    lines = ["| decay | compared | by | n | mean error | RMSE | Pearson | Spearman | of gains |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for length in LENGTHS:
        for at_end in (False, True):
            where = "at its end" if at_end else "at its start"
            for by in ("unmerged", "sma"):
                found = agreement(predictions(runs, length, by, at_end=at_end))
                assert found is not None
                name = "newest alone" if by == "unmerged" else f"SMA of {LAST}"
                lines.append(f"| {length} it | {where} | {name} | {_cells(found)} |")
    lines += ["", "| seed | start | trained | SMA | annealed " + " | annealed ".join(
        f"{n} it" for n in LENGTHS) + " |", "|---" * (4 + len(LENGTHS)) + "|"]  # fmt: skip
    for seed, run in runs.items():
        for start in STARTS:
            ends = [loss for s, _, loss in run["annealed"] if s == start]
            row = [run["unmerged"][start], run["sma"][start], *ends]
            lines.append(f"| {seed} | {start} | " + " | ".join(f"{v:.4f}" for v in row) + " |")
    return "\n".join(lines)


def _cells(found: Agreement) -> str:
    values = asdict(found)
    parts = [str(values["n"]), f"{found.mean_error:+.4f}", f"{found.rmse:.4f}"]
    for name in ("pearson", "spearman", "gain_pearson"):
        parts.append("-" if values[name] is None else f"{values[name]:.2f}")
    return " | ".join(parts)


def draw(runs: dict[int, dict[str, Any]], path: Path) -> None:
    """The first seed along its run, and all pairs against the diagonal."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    seed, run = next(iter(runs.items()))
    for name, label, color in (("unmerged", "trained, constant LR", "#5b6573"),
                               ("sma", f"merged: SMA of {LAST}", "#d1495b")):  # fmt: skip
        left.plot(list(run[name]), list(run[name].values()), color=color, label=label, lw=1.4)
    for start, length, loss in run["annealed"]:
        left.plot([start, start + length], [run["unmerged"][start], loss], color="#2a7f9e", lw=0.8)
        left.plot(start + length, loss, "*", color="#2a7f9e", ms=8)
    left.plot([], [], "*-", color="#2a7f9e", label="annealed (start to end)")
    left.set(xlabel="iteration", ylabel="held-out loss (nats per byte)", title=f"seed {seed}")
    marks = iter(("o", "^", "s", "D"))
    for length in LENGTHS:
        for at_end, fill in ((False, "none"), (True, "#d1495b")):
            pairs = predictions(runs, length, "sma", at_end=at_end)
            right.plot(
                [p.annealed for p in pairs], [p.merged for p in pairs], next(marks), mfc=fill,
                mec="#d1495b", label=f"{length} it, at its {'end' if at_end else 'start'}",
            )  # fmt: skip
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], color="#5b6573", lw=0.8)
    right.set(xlabel="annealed loss", ylabel="merged loss", title=f"{len(runs)} seeds")
    for axes in (left, right):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
