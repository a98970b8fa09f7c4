"""What the ranks of the quickstart do: train, anneal, resume, in real megatron-core runs on CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pma_megatron.testing import TinyConfig, TinyTrainer
from quickstart_common import float64_average, say

Curve = list[tuple[int, float]]
"""(iteration, held-out loss in nats per byte), oldest first."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One quickstart: the run, which of its checkpoints are kept and merged, where files go."""

    out: Path
    """Folder for everything; the run's checkpoints are in `run` below it."""
    config: TinyConfig
    iterations: int
    save_every: int
    first_save: int
    """The first iteration that is saved; evaluation begins at two thirds of it."""
    last: int
    """Checkpoints in a merge."""
    continued: int
    """Iterations to train on from the merge, and from the newest checkpoint."""
    eval_batches: int
    """Held-out batches per evaluation, the same ones each time."""

    @property
    def run(self) -> Path:
        """The folder that Megatron's `--save` would name."""
        return self.out / "run"

    @property
    def saved(self) -> list[int]:
        """Iterations with a checkpoint, oldest first."""
        return list(range(self.first_save, self.iterations + 1, self.save_every))

    @property
    def evaluated(self) -> list[int]:
        """Iterations at which training evaluates: twice as far apart before any is saved."""
        before = range(self.first_save, self.first_save * 2 // 3 - 1, -2 * self.save_every)
        return sorted({*before, *self.saved})

    @property
    def window(self) -> list[int]:
        """Iterations of the checkpoints that are merged, oldest first."""
        return self.saved[-self.last :]

    def tokens(self, iterations: int) -> int:
        """Tokens that so many iterations consume."""
        return iterations * self.config.global_batch_size * self.config.seq_length


@contextlib.contextmanager
def trainer(config: TinyConfig) -> Iterator[TinyTrainer]:
    """A newly built trainer, taken down at the end."""
    run = TinyTrainer(config)
    try:
        yield run
    finally:
        run.close()


def train(rank: int, _world_size: int, settings: Settings) -> dict[str, Any]:
    """Train from scratch under warmup and constant LR; save and evaluate on the way."""
    curve: Curve = []
    with trainer(settings.config) as run:
        while run.iteration < settings.iterations:
            run.train(settings.save_every)
            saving = run.iteration in settings.saved
            if run.iteration in settings.evaluated:
                curve.append((run.iteration, run.evaluate(settings.eval_batches)))
                kept = ", saved" if saving else ""
                say(rank, f"iteration {run.iteration}: held-out loss {curve[-1][1]:.4f}{kept}")
            if saving:
                run.save(settings.run)
        weights = sum(weight.numel() for weight in run.model_params().values())
    return {"curve": curve, "weights_per_rank": weights}


def compare(
    rank: int, _world_size: int, settings: Settings, merged: dict[str, tuple[Path, int]]
) -> dict[str, Any]:
    """Evaluate merges, anneal, resume from the merge called `sma` and from the newest checkpoint.

    `merged` maps a name to the folder and iteration of a merged checkpoint. Every checkpoint comes
    in through the same load as a resume.
    """
    places = {"newest": (settings.run, settings.iterations), **merged}
    with trainer(settings.config) as run:
        losses = {}
        for name, (folder, iteration) in places.items():
            run.load(folder, iteration)
            losses[name] = run.evaluate(settings.eval_batches)
    say(rank, "evaluated the newest checkpoint and the merges; annealing ...")
    annealed = _anneal(settings)
    say(rank, "annealed; resuming from the merge ...")
    checks = _check_resume(settings, merged["sma"][0])
    continued = {
        name: _continue(settings, folder)
        for name, folder in (("sma", merged["sma"][0]), ("newest", settings.run))
    }
    checks["loss before the first step is the merge's"] = continued["sma"][0][1] == losses["sma"]
    return {"losses": losses, "annealed": annealed, "checks": checks, "continued": continued}


def _anneal(settings: Settings) -> Curve:
    """From the oldest merged checkpoint, decay the LR to zero over the tokens of the window."""
    oldest, newest = settings.window[0], settings.window[-1]
    decaying = replace(
        settings.config, decay="linear", decay_start_iter=oldest, decay_iters=newest - oldest
    )
    with trainer(decaying) as run:
        run.load(settings.run, oldest)
        curve = [(oldest, run.evaluate(settings.eval_batches))]
        while run.iteration < newest:
            run.train(settings.save_every)
            curve.append((run.iteration, run.evaluate(settings.eval_batches)))
    return curve


def _continue(settings: Settings, folder: Path) -> Curve:
    """Resume from the newest checkpoint below `folder` and train on at the constant LR."""
    with trainer(settings.config) as run:
        run.load(folder)
        curve = [(run.iteration, run.evaluate(settings.eval_batches))]
        while run.iteration < settings.iterations + settings.continued:
            run.train(2 * settings.save_every)
            curve.append((run.iteration, run.evaluate(settings.eval_batches)))
    return curve


def _check_resume(settings: Settings, merged: Path) -> dict[str, bool]:
    """Whether a resumed run starts from the average, and goes on where the newest stopped."""
    with trainer(settings.config) as run:
        members = _main_params(run, settings)
        average, bound = float64_average(members, len(settings.window))
        run.load(settings.run)
        newest = (run.iteration, run.consumed_samples, run.learning_rate())
    with trainer(settings.config) as run:
        run.load(merged)
        mains, weights = run.main_params(), run.model_params()
        resumed = (run.iteration, run.consumed_samples, run.learning_rate())
        run.step_with_lr_zero()
        stepped = run.main_params()
        stepped_weights = run.model_params()
    return {
        "main params are the average": all(
            bool(((mains[name].double() - average[name]).abs() <= bound[name]).all())
            for name in average
        ),
        "weights are the rounded main params": all(
            torch.equal(mains[name].to(weights[name].dtype), weights[name]) for name in mains
        ),
        "a step at lr = 0 changes no weight": all(
            torch.equal(mains[name], stepped[name])
            and torch.equal(weights[name], stepped_weights[name])
            for name in mains
        ),
        "iteration continues from the newest": resumed[0] == newest[0],
        "consumed samples continue from the newest": resumed[1] == newest[1],
        "learning rate continues from the newest": resumed[2] == newest[2],
    }


def _main_params(run: TinyTrainer, settings: Settings) -> Iterator[dict[str, torch.Tensor]]:
    """Of the merged checkpoints, loaded one by one, in the shape of this rank's shard."""
    for iteration in settings.window:
        run.load(settings.run, iteration)
        yield run.main_params()
