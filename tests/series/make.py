"""Losses and gradient norms of real tiny runs, healthy and not: python tests/series/make.py

Writes `<name>.csv` beside itself: iteration, loss (nats), grad_norm (before clipping). Each run is
megatron-core's GPT in bf16 with the distributed optimizer, on one rank; a run takes about 30 s.

`COLLAPSE` is the recipe for a run that trains normally and is then lost: the LR is raised 50 times
at iteration 200. The loss jumps from 2.4 to 10 nats, comes down to about 3.3, little better
than letter frequencies, and stays there. A run that resumes from a checkpoint takes the LR from it:
raise it as `EventfulTrainer.set_lr` does, in the scheduler and in the parameter groups.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

HERE = Path(__file__).parent
LR = 1e-2
EVENT = 200
"""Iteration after which something happens to the runs that are not healthy."""
HEALTHY = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "seq_length": 32,
    "micro_batch_size": 32,
    "global_batch_size": 32,
    "lr": LR,
    "warmup_iters": 20,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run: `TinyConfig` settings, and what happens after which iteration."""

    iterations: int = 450
    config: dict[str, Any] = field(default_factory=dict)
    lr: dict[int, float] = field(default_factory=dict)
    """Peak LR from the iteration after the key on."""
    garbage: range = range(0)
    """Iterations on uniformly random tokens."""
    poisoned: int | None = None
    """Iteration after which one weight of the output layer is Inf."""


COLLAPSE = Recipe(lr={EVENT: 50 * LR}, iterations=500)
RECIPES = {
    "healthy": Recipe(),
    "long_warmup": Recipe(config={"warmup_iters": 250, "lr": 3 * LR}),
    "lr_drop": Recipe(lr={EVENT: LR / 10}),
    "lr_raise": Recipe(lr={EVENT: 3 * LR}),
    "lr_rewarmup": Recipe(lr={EVENT: LR / 10, **{300 + i: LR * i / 20 for i in range(1, 41)}}),
    "garbage": Recipe(garbage=range(EVENT + 1, EVENT + 4)),
    "lr_burst": Recipe(lr={EVENT: 30 * LR, EVENT + 3: LR}, iterations=600),
    "collapse": COLLAPSE,
    "hard_collapse": Recipe(lr={EVENT: 100 * LR}, iterations=500),
    "creep": Recipe(lr={EVENT + 20 * i: 2 * LR * 1.35**i for i in range(14)}, iterations=500),
    "nan": Recipe(poisoned=EVENT, iterations=EVENT + 20),
}
SEEDS = {"healthy": (1, 2, 3), "collapse": (1, 2)}
"""Those that are committed; every other recipe has seed 1."""


class EventfulTrainer(TinyTrainer):
    """A tiny run that follows a recipe."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        super().__init__(TinyConfig(**{**HEALTHY, **recipe.config, "seed": seed}))
        self.recipe = recipe

    def series(self) -> list[tuple[int, float, float]]:
        """(iteration, loss, gradient norm) of the whole run."""
        rows = []
        for _ in range(self.recipe.iterations):
            if self.iteration in self.recipe.lr:
                self.set_lr(self.recipe.lr[self.iteration])
            if self.iteration == self.recipe.poisoned:
                self._poison()
            loss = self.train(1)[0]
            rows.append((self.iteration, loss, self.grad_norm))
        return rows

    def set_lr(self, lr: float) -> None:
        """Train with this peak LR from here on."""
        self.scheduler.max_lr = lr
        for group in self.optimizer.param_groups:
            group["max_lr"] = group["lr"] = lr

    def _poison(self) -> None:
        *_, output_layer = self.models[-1].parameters()
        output_layer.data.view(-1)[0] = float("inf")

    def _microbatch_stream(self, first: int, held_out: bool) -> Iterator[tuple[torch.Tensor, ...]]:
        for inputs, labels in super()._microbatch_stream(first, held_out):
            if self.iteration + 1 in self.recipe.garbage and not held_out:
                noise = torch.randint(self.config.vocab_size, (2, *inputs.shape))
                inputs, labels = noise[0], noise[1]
            yield inputs, labels


def trained(rank: int, world_size: int, name: str, seed: int) -> list[tuple[int, float, float]]:
    """The series of one run, in this rank of a job."""
    return EventfulTrainer(RECIPES[name], seed).series()


def file_of(name: str, seed: int) -> Path:
    """Where the series of one run is committed."""
    return HERE / (f"{name}.csv" if seed == 1 else f"{name}_{seed}.csv")


def main() -> None:
    """Write every committed series, or those that the command line names."""
    for name in sys.argv[1:] or RECIPES:
        for seed in SEEDS.get(name, (1,)):
            rows = run_ranks(trained, 1, name, seed, timeout_s=500)[0]
            path = file_of(name, seed)
            with path.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("iteration", "loss", "grad_norm"))
                writer.writerows((i, f"{loss:.5f}", f"{norm:.4g}") for i, loss, norm in rows)
            print(f"{path.name}: {len(rows)} iterations", flush=True)


if __name__ == "__main__":
    main()
