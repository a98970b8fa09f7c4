"""Runs that break at an excessive learning rate, and what is done about it.

Each trains normally for 200 iterations and saves every 20th. Then the LR is 50 times too large: for
40 iterations (`burst`), or to the end (`stays`). Each strategy starts from the same checkpoint of
iteration 200 and ends at the same iteration; what it is told by is `--pma-recover`'s own detector
and recovery, in process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron.megatron.flags import RecoverySettings
from pma_megatron.megatron.recover import Recovery, RecoverySpentError
from pma_megatron.runs import recovery_log
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.testing import TinyConfig, TinyTrainer

LR, TIMES, BREAK_AT, BURST, END, SAVE_EVERY = 1e-2, 50, 200, 40, 500, 20
CONFIG = TinyConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    seq_length=32,
    micro_batch_size=32,
    global_batch_size=32,
    lr=LR,
    warmup_iters=20,
)
SPIKE = SpikeSettings(patience=25)
ATTEMPTS = 2
EVENTS = {"healthy": 0, "burst": BURST, "stays": END}
"""Iterations at the excessive LR, from `BREAK_AT` on."""
SAME_DATA = "rollback, same data"
ROLLBACK = "rollback, data skipped"
PMA = "PMA of 3"
STRATEGIES: dict[str, RecoverySettings | None] = {
    "nothing": None,
    SAME_DATA: RecoverySettings(last=1),
    ROLLBACK: RecoverySettings(last=1),
    PMA: RecoverySettings(last=3),
    "PMA of 3, moments averaged": RecoverySettings(last=3, optimizer_state="average"),
    "PMA of 3, moments reset": RecoverySettings(last=3, optimizer_state="reset"),
    "PMA of 5": RecoverySettings(last=5),
    "PMA of 3, margin 0": RecoverySettings(last=3, margin_iterations=0),
    "PMA of 3, margin 60": RecoverySettings(last=3, margin_iterations=60),
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


def watch(
    trainer: TinyTrainer, root: Path, settings: RecoverySettings, same_data: bool = False
) -> Recovery:
    """The recovery of a run that saves in `root`; it skips data unless told not to."""

    def rollback(ref: CheckpointRef) -> None:
        trainer.roll_back(Path(ref.path).parent, ref.iteration or 0)
        if same_data:
            trainer.consumed_samples = (ref.iteration or 0) * trainer.config.global_batch_size

    return Recovery(
        trainer.models,
        trainer.optimizer,
        roots=[root],
        rollback=rollback,
        settings=replace(settings, spike=SPIKE, attempts=ATTEMPTS),
    )


def prefix(seed: int, root: Path) -> dict[str, Any]:
    """The healthy part that all strategies share."""
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


def strategy(seed: int, event: str, name: str, root: Path, begun: dict[str, Any]) -> Result:
    """From iteration 200 to the end under one strategy."""
    trainer = Breaking(replace(CONFIG, seed=seed))
    trainer.load(root, BREAK_AT)
    settings, done, spent = STRATEGIES[name], [], False
    # Watched also where nothing is done, to know when it would have been.
    recovery = watch(trainer, root, settings or RecoverySettings(), name == SAME_DATA)
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
    seen = [e for e in recovery_log.read(root).events if e["event"] == recovery_log.DETECTED]
    return Result(
        seed=seed,
        event=event,
        strategy=name,
        before=begun["loss"],
        end=loss,
        onset=seen[0]["onset"] if seen else None,
        known=seen[0]["iteration"] if seen else None,
        recoveries=sum(found is not None for found in done),
        spent=spent,
    )
