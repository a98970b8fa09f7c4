"""What the ranks of the DeepSpeed quickstart do: train, load, resume, in real engines on CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pma_megatron.testing.text_deepspeed import TextConfig, TextDeepSpeed
from quickstart_common import float64_average, say

Curve = list[tuple[int, float]]
"""(iteration, held-out loss in nats per byte), oldest first."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One quickstart: the kinds of runs, which checkpoints are kept and merged, where files go."""

    out: Path
    """Folder for everything; each run has one below it."""
    kinds: Mapping[str, TextConfig]
    iterations: int
    save_every: int
    last: int
    """Checkpoints in a merge, and how many each run saves."""
    continued: int
    """Iterations to train on from the SMA, and from the newest checkpoint."""
    eval_batches: int

    @property
    def window(self) -> list[int]:
        """Iterations of the checkpoints, oldest first."""
        first = self.iterations - (self.last - 1) * self.save_every
        return list(range(first, self.iterations + 1, self.save_every))

    def run(self, kind: str) -> Path:
        """The folder that `engine.save_checkpoint` is given."""
        return self.out / kind / "run"

    def merged(self, kind: str, method: str) -> Path:
        """The root of a merge, for `engine.load_checkpoint`."""
        return self.out / kind / "merged" / f"{method}-last{self.last}"


@contextlib.contextmanager
def trainer(config: TextConfig, seed: int = 0) -> Iterator[TextDeepSpeed]:
    """A newly built engine, taken down at the end; `seed` decides its weights."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    run = TextDeepSpeed(config, seed)
    try:
        yield run
    finally:
        run.close()


def train(rank: int, _world_size: int, settings: Settings) -> dict[str, Curve]:
    """Train every kind under warmup and constant LR; save and evaluate at the end of it."""
    curves: dict[str, Curve] = {}
    for kind, config in settings.kinds.items():
        curve = curves[kind] = []
        with trainer(config) as run:
            for iteration in settings.window:
                run.train(iteration - run.engine.global_steps)
                run.save(settings.run(kind))
                curve.append((iteration, run.evaluate(settings.eval_batches)))
        say(
            rank,
            f"{kind}: held-out loss {curve[0][1]:.4f} at iteration {curve[0][0]}, "
            f"{curve[-1][1]:.4f} at {curve[-1][0]}",
        )
    return curves


def compare(rank: int, _world_size: int, settings: Settings) -> dict[str, Any]:
    """Per kind: losses of newest and merges, checks of a resume, and where training on leads."""
    found = {}
    for kind, config in settings.kinds.items():
        found[kind] = _compare(settings, kind, config)
        say(rank, f"{kind}: resumed from the merge")
    return found


def _compare(settings: Settings, kind: str, config: TextConfig) -> dict[str, Any]:
    batches, end = settings.eval_batches, settings.iterations + settings.continued
    losses, continued = {}, {}
    with trainer(config, seed=1) as run:
        members = _main_params(run, settings, kind)
        average, bound = float64_average(members, len(settings.window))
        newest = _place(run)
        losses["newest"] = run.evaluate(batches)
        run.train(settings.continued)
        continued["newest"] = run.evaluate(batches)
        run.load(settings.merged(kind, "wma"))
        losses["wma"] = run.evaluate(batches)
    with trainer(config, seed=2) as run:
        run.load(settings.merged(kind, "sma"))
        resumed, place = run.snapshot(), _place(run)
        losses["sma"] = run.evaluate(batches)
        run.stop_learning()
        run.train(1)
        stepped = run.snapshot()
    with trainer(config, seed=3) as run:
        run.load(settings.merged(kind, "sma"))
        first = run.evaluate(batches)
        run.train(end - run.engine.global_steps)
        continued["sma"] = run.evaluate(batches)
    masters, weights = resumed["masters"], resumed["weights"]
    checks = {
        "main params are the average": all(
            bool(((masters[name].double() - average[name]).abs() <= bound[name]).all())
            for name in average
        ),
        "weights are the rounded main params": all(
            torch.equal(masters[name].to(weights[name].dtype), weights[name]) for name in masters
        ),
        "a step at lr = 0 changes no weight": all(
            torch.equal(masters[name], stepped["masters"][name])
            and torch.equal(weights[name], stepped["weights"][name])
            for name in masters
        ),
        "step, samples and learning rate are the newest's": place == newest,
        "loss before the first step is the merge's": first == losses["sma"],
    }
    return {"losses": losses, "continued": continued, "checks": checks}


def _place(run: TextDeepSpeed) -> tuple[int, int, float]:
    """Step, samples, learning rate."""
    engine = run.engine
    return engine.global_steps, engine.global_samples, engine.optimizer.param_groups[0]["lr"]


def _main_params(
    run: TextDeepSpeed, settings: Settings, kind: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Of the merged tags, loaded one by one, named as this rank does. The newest stays loaded."""
    for iteration in settings.window:
        run.load(settings.run(kind), f"global_step{iteration}")
        yield run.snapshot()["masters"]
