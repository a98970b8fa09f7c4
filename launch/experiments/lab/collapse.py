"""Runs that collapse at an excessive learning rate, and what each way back makes of them.

Each trains normally for 200 iterations and saves every 20th. Then the LR is 50 times too large: for
40 iterations (`burst`), or to the end (`stays`). Every strategy starts from the same checkpoint of
iteration 200 and ends at the same iteration; what tells it is `--pma-recover`'s own detector and
recovery, in process: data and schedule move on past the collapse.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab.text import cache
from pma_megatron import audit
from pma_megatron.durable import write_small
from pma_megatron.megatron.options import RecoverySettings
from pma_megatron.megatron.recover import Recovery, RecoverySpentError
from pma_megatron.spike import SpikeSettings
from pma_megatron.testing import TinyConfig, TinyTrainer

LR, TIMES, BREAK_AT, BURST, END, SAVE_EVERY = 1e-2, 50, 200, 40, 500, 20
CONFIG = TinyConfig(num_layers=4, hidden_size=32, ffn_hidden_size=64, seq_length=32,
                    micro_batch_size=32, global_batch_size=32, lr=LR, warmup_iters=20)  # fmt: skip
SPIKE = SpikeSettings(patience=25)
ATTEMPTS = 2
EVENTS = {"healthy": 0, "burst": BURST, "stays": END}
"""Iterations at the excessive LR, from `BREAK_AT` on."""
STRATEGIES: dict[str, RecoverySettings | None] = {
    "nothing": None,
    "rollback": RecoverySettings(last=1),
    "PMA of 3": RecoverySettings(last=3),
    "PMA of 3, moments averaged": RecoverySettings(last=3, optimizer_state="average"),
    "PMA of 3, moments reset": RecoverySettings(last=3, optimizer_state="reset"),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run; losses in nats per byte, held out."""

    seed: int
    event: str
    strategy: str
    before: float
    end: float
    onset: int | None
    known: int | None
    recoveries: int
    spent: bool


class Breaking(TinyTrainer):
    """A tiny run whose LR is too large for a while."""

    def train_on(self, until: int, excessive: int, each: Callable[[float], Any]) -> None:
        while self.iteration < until:
            wrong = BREAK_AT <= self.iteration < BREAK_AT + excessive
            self._set_lr(LR * (TIMES if wrong else 1))
            each(self.train(1)[0])

    def _set_lr(self, lr: float) -> None:
        if all(group["max_lr"] == lr for group in self.optimizer.param_groups):
            return
        self.scheduler.max_lr = lr
        for group in self.optimizer.param_groups:
            group["max_lr"] = lr
        self.scheduler.step(increment=0)


def watch(trainer: TinyTrainer, root: Path, settings: RecoverySettings) -> Recovery:
    """The recovery of a run that saves in `root`."""
    return Recovery(
        trainer.models, trainer.optimizer, roots=[root],
        settings=replace(settings, spike=SPIKE, attempts=ATTEMPTS),
        rollback=lambda ref: trainer.roll_back(Path(ref.path).parent, ref.iteration or 0),
    )  # fmt: skip


def _prefix(seed: int, root: Path) -> dict[str, Any]:
    trainer = Breaking(replace(CONFIG, seed=seed))
    recovery = watch(trainer, root, RecoverySettings())

    def each(loss: float) -> None:
        recovery.step(trainer.iteration, loss, trainer.grad_norm)
        if trainer.iteration >= 100 and trainer.iteration % SAVE_EVERY == 0:
            trainer.save(root)

    trainer.train_on(BREAK_AT, 0, each)
    loss = trainer.evaluate(8)
    trainer.close()
    return {"loss": loss, "state": recovery.state_dict()}


def _strategy(seed: int, event: str, name: str, root: Path, begun: dict[str, Any]) -> Result:
    trainer = Breaking(replace(CONFIG, seed=seed))
    trainer.load(root, BREAK_AT)
    settings, done, spent = STRATEGIES[name], [], False
    # Watched also where nothing is done, to know when it would have been.
    recovery = watch(trainer, root, settings or RecoverySettings())
    recovery.resumed(BREAK_AT, 0, begun["state"])

    def each(loss: float) -> None:
        nonlocal spent
        if settings is not None and not spent:
            try:
                done.append(recovery.step(trainer.iteration, loss, trainer.grad_norm))
            except RecoverySpentError:
                spent = True

    trainer.train_on(END, EVENTS[event], each)
    loss = trainer.evaluate(8)
    trainer.close()
    seen = [e for e in audit.read(root).events if e["event"] == audit.DETECTED]
    return Result(
        seed=seed, event=event, strategy=name, before=begun["loss"], end=loss,
        onset=seen[0]["onset"] if seen else None, known=seen[0]["iteration"] if seen else None,
        recoveries=sum(found is not None for found in done), spent=spent,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """The healthy part of one seed, which all strategies share."""

    seed: int
    ranks = 1
    own_process = True
    after = ()

    @property
    def folder(self) -> Path:
        """Its checkpoints and what was seen, and the results of its strategies."""
        return cache() / "runs" / f"collapse-{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it has been trained."""
        return (self.folder / "begun.json").exists()

    def perform(self, rank: int) -> None:
        """Train it."""
        begun = _prefix(self.seed, self.folder / "checkpoints")
        write_small(self.folder / "begun.json", json.dumps(begun).encode())

    def __str__(self) -> str:
        return f"before a collapse, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """One seed, event and strategy."""

    seed: int
    event: str
    strategy: str
    ranks = 1
    own_process = False

    @property
    def after(self) -> tuple[Healthy, ...]:
        """What must be done first."""
        return (Healthy(seed=self.seed),)

    @property
    def file(self) -> Path:
        """Where the result is kept."""
        name = f"{self.event}-{self.strategy}.json".replace(" ", "_")
        return Healthy(seed=self.seed).folder / name

    @property
    def is_done(self) -> bool:
        """Whether it has been run."""
        return self.file.exists()

    def perform(self, rank: int) -> None:
        """From iteration 200 to the end, on a copy of the healthy checkpoints: it logs there."""
        healthy, root = Healthy(seed=self.seed).folder, self.file.with_suffix(".run")
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(healthy / "checkpoints", root)
        begun = json.loads((healthy / "begun.json").read_text())
        result = _strategy(self.seed, self.event, self.strategy, root, begun)
        shutil.rmtree(root)
        write_small(self.file, json.dumps(asdict(result)).encode())

    def result(self) -> dict[str, Any]:
        """Fields of `Result`."""
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def __str__(self) -> str:
        return f"{self.event}, {self.strategy}, seed {self.seed}"
