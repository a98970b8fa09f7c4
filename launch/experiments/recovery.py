"""Recovery from collapses at an excessive learning rate, against plain rollback and doing nothing.

    python launch/experiments/recovery.py [--seeds 1 2 3 4 5] [--json FILE]

Real tiny megatron-core runs. Each trains normally for 200 iterations and saves every 20th. Then the
LR is 50 times too large: for 40 iterations (`burst`), or to the end (`stays`). Each strategy starts
from the same checkpoint of iteration 200 and ends at the same iteration; what it is told by is
`--pma-recover`'s own detector and recovery, in process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron import audit
from pma_megatron.megatron.options import RecoverySettings
from pma_megatron.megatron.recover import Recovery, RecoverySpentError
from pma_megatron.spike import SpikeSettings
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks

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


def prefix(rank: int, _size: int, seed: int, root: Path) -> dict[str, Any]:
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


def strategy(rank: int, _size: int, seed: int, event: str, name: str, root: Path,
             begun: dict[str, Any]) -> Result:  # fmt: skip
    """From iteration 200 to the end under one strategy."""
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


def run(seeds: Sequence[int], folder: Path) -> list[Result]:
    """All strategies for all seeds."""
    results = []
    for seed in seeds:
        root = folder / str(seed)
        begun = run_ranks(prefix, 1, seed, root, timeout_s=600)[0]
        for event in EVENTS:
            for name in STRATEGIES if event != "healthy" else ("nothing", "PMA of 3"):
                (root / audit.FILE).unlink(missing_ok=True)
                result = run_ranks(strategy, 1, seed, event, name, root, begun, timeout_s=600)[0]
                results.append(result)
                print(f"seed {seed}, {event}, {name}: {result.before:.3f} -> {result.end:.3f}, "
                      f"{result.recoveries} recoveries", file=sys.stderr, flush=True)  # fmt: skip
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown; a run is `back` if it ends no worse than it was before the collapse."""
    lines = [
        "| LR too large | strategy | back | loss at the end, mean (least to largest) | "
        "known after, points | recoveries | gave up |",
        "|---|---|---|---|---|---|---|",
    ]
    for event in EVENTS:
        for name in STRATEGIES:
            rows = [r for r in results if (r.event, r.strategy) == (event, name)]
            if not rows:
                continue
            ends = [r.end for r in rows]
            back = sum(r.end <= r.before for r in rows)
            delays = [r.known - r.onset for r in rows if r.known is not None and r.onset]
            delay = f"{statistics.median(delays):.0f}" if delays else "-"
            lines.append(
                f"| {event} | {name} | {back} of {len(rows)} | {statistics.fmean(ends):.3f} "
                f"({min(ends):.3f} to {max(ends):.3f}) | {delay} | "
                f"{statistics.fmean(r.recoveries for r in rows):.1f} | "
                f"{sum(r.spent for r in rows)} of {len(rows)} |"
            )
    alarms = [r for r in results if r.event == "healthy" and r.strategy != "nothing" and r.known]
    healthy = [r for r in results if r.event == "healthy" and r.strategy != "nothing"]
    before = [r.before for r in results]
    lines += [
        "",
        f"Loss before the collapse: {statistics.fmean(before):.3f} (mean). False alarms: "
        f"{len(alarms)} of {len(healthy)} healthy runs.",
        "",
        *pairs(results),
    ]
    return "\n".join(lines)


def pairs(results: Sequence[Result]) -> list[str]:
    """PMA against rollback, seed by seed."""
    ends = {(r.event, r.strategy, r.seed): r.end for r in results}
    lines = []
    for name in list(STRATEGIES)[2:]:
        gains = [end - ends["burst", name, seed] for (event, other, seed), end in ends.items()
                 if (event, other) == ("burst", "rollback")]  # fmt: skip
        if len(gains) > 1:
            error = statistics.stdev(gains) / math.sqrt(len(gains))
            lines.append(
                f"- burst, {name} against rollback: {statistics.fmean(gains):+.4f} nats (standard "
                f"error {error:.4f}, {len(gains)} seeds; positive is better)"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", type=Path, help="write every run's result here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(arguments.seeds, Path(folder))
    if arguments.json:
        lines = (json.dumps(asdict(result)) for result in results)
        arguments.json.write_text("".join(f"{line}\n" for line in lines))
    print(table(results))


if __name__ == "__main__":
    main()
