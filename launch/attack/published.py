"""Flip single bits in published folders, and count how often `pma verify` calls the result right.

    python launch/attack/published.py --count 200 --work /tmp/attack

Real runs of Megatron, DeepSpeed and FSDP2 on the CPU, merged in several layouts, a snapshot, and
running averages that the trainers saved. Half of the flips fall on a file drawn by chance, so that
small files get their share, half on a byte drawn by chance. Ends with 1 unless every flip was
found, and `pma inspect` never failed but by an error of this package. Trainings are kept in
`--work`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pma_megatron import MergeRequest, Method, PmaError, Policy, SelectionRequest, merge, verify
from pma_megatron.base.comm import Comm
from pma_megatron.formats import registry
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.megatron.params import live_tensors, stepping
from pma_megatron.megatron.save import note_origin
from pma_megatron.megatron.shard import MegatronShard
from pma_megatron.megatron.thin import ThinSnapshots
from pma_megatron.merging import folder_checksums
from pma_megatron.merging.inspection import look
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.online.snapshots import SNAPSHOTS
from pma_megatron.runs.discover import pointed
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks
from pma_megatron.testing.tiny_fsdp import STYLES, FsdpConfig
from runs import EVERY, SAVES, flipped, report, to_universal, train_fsdp

BASE = TinyConfig(warmup_iters=2)
TRAINED: dict[str, TinyConfig] = {
    "dp_reshardable": BASE,
    "fully_reshardable": replace(BASE, optim_format="fully_reshardable"),
    "moe": replace(BASE, num_experts=4, expert_model_parallel_size=2),
}
FSDP = {f"fsdp2 as {style} saves": FsdpConfig(style=style) for style in STYLES}
END = SAVES * EVERY
FOUND, CALLED_RIGHT, TRACEBACK = "found", "called right", "traceback"
folder_checksums._SMALL_BYTES = 1024  # in every rank: what a large shard would be treated like


def train_megatron(rank: int, world_size: int, roots: Mapping[str, str]) -> None:
    """Runs with full checkpoints, a snapshot of each, and a running average beside them."""
    import torch

    from pma_megatron.testing import store

    for name, root in roots.items():
        trainer = TinyTrainer(TRAINED[name])
        tokens = trainer.config.global_batch_size * trainer.config.seq_length
        average = OnlineAverage(
            trainer.models, trainer.optimizer, Method(), SAVES, EVERY * tokens, consumed_tokens=0
        )
        shard = MegatronShard(live_tensors(trainer.models, trainer.optimizer, None))
        thin = ThinSnapshots(
            Path(root) / SNAPSHOTS,
            trainer.models,
            HostCopy(shard, stepping(trainer.optimizer)),
            EVERY * tokens,
            dtype=torch.float32,
            keep=1,
            consumed_tokens=0,
            iteration=0,
            comm=Comm(),
        )
        for iteration in range(1, END + 1):
            trainer.train(1)
            average.step(iteration, iteration * tokens)
            thin.step(iteration, iteration * tokens, store._args(trainer))
            if iteration % EVERY == 0:
                trainer.save(root)
        thin.finish()
        made = average.average()
        assert made is not None
        with average.averaged_state():
            folder = trainer.save(f"{root}-average")
        torch.distributed.barrier()
        if rank == 0:
            thread = note_origin(Path(folder), made)
            assert thread is not None
            thread.join()
        trainer.close()


def train_deepspeed(rank: int, world_size: int, roots: Mapping[str, str]) -> None:
    """Runs of ZeRO-2 and ZeRO-3, and a running average beside each."""
    from pma_megatron.deepspeed.online import OnlineAverage as EngineAverage
    from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

    stages = {"zero2": DeepSpeedConfig(stage=2), "zero3": DeepSpeedConfig(stage=3)}
    for name, root in roots.items():
        trainer = TinyDeepSpeed(stages[name])
        average = EngineAverage(trainer.engine, Method(), SAVES, interval_iterations=EVERY)
        for iteration in range(1, END + 1):
            trainer.train(1)
            average.step()
            if iteration % EVERY == 0:
                trainer.save(root)
        average.save_average(f"{root}-average")
        trainer.close()


def published(work: Path) -> dict[str, Path]:
    """Everything that is attacked: name -> a root with a tracker, or a snapshot's folder."""
    runs = work / "runs"
    if not (work / "trained").exists():
        shutil.rmtree(runs, ignore_errors=True)
        run_ranks(train_megatron, 2, {n: str(runs / n) for n in TRAINED})
        zero = {name: str(runs / name) for name in ("zero2", "zero3")}
        run_ranks(train_deepspeed, 2, zero)
        universal = {zero["zero2"]: str(runs / "universal")}
        run_ranks(to_universal, 1, universal, init=False)
        run_ranks(train_fsdp, 2, {str(runs / n): FSDP[n] for n in FSDP})
        (work / "trained").touch()
    found = {}
    for name in (*TRAINED, "zero2", "zero3", "universal", *FSDP):
        found[f"merge of {name}"] = merged(runs / name, work / "merged" / name)
    weights = Policy(optimizer_state="drop")
    found["merge to weights"] = merged(
        runs / "dp_reshardable", work / "merged" / "weights", policy=weights, dtype="fp32"
    )
    for name in ("dp_reshardable", "moe"):
        found[f"snapshot of {name}"] = runs / name / SNAPSHOTS / f"iter_{END:07d}"
    for name in ("dp_reshardable", "fully_reshardable", "zero2", "zero3"):
        found[f"running average of {name}"] = runs / f"{name}-average"
    return found


def merged(run: Path, save: Path, **settings: Any) -> Path:
    """A merge of the last two checkpoints of a run; returns its root."""
    shutil.rmtree(save, ignore_errors=True)
    selection = SelectionRequest(last=2)
    merge(MergeRequest(load=str(run), save=str(save), selection=selection, **settings))
    return save


def drawn(target: Path, draw: random.Random) -> tuple[Path, int, int]:
    """A bit of a file of `target`, by chance: file, byte, bit."""
    folder = pointed(target)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [known.tracker.file for known in registry.FORMATS]
    trackers = {target / name for name in named if name is not None}
    files += sorted(path for path in trackers if path.is_file())  # no other file there is ours
    files = [path for path in files if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    (path,) = draw.choices(files, weights=draw.choice([None, sizes]))
    return path, draw.randrange(path.stat().st_size), draw.randrange(8)


@dataclass
class Verdicts:
    """What became of the flips."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, path: Path) -> None:
        """Count what `verify`, which must find the flip, and `inspect`, which may, do with it."""
        verdict = self._call(what, verify, path)
        self.kinds[verdict] += 1
        if verdict == CALLED_RIGHT:
            self.wrong.append(f"{what}: {verdict}")
        if self._call(what, look, path) == TRACEBACK:
            self.kinds[f"{TRACEBACK} of inspect"] += 1

    def _call(self, what: str, call: Callable[[Path], object], path: Path) -> str:
        try:
            call(path)
        except PmaError:
            return FOUND
        except Exception as error:  # what must never happen
            self.wrong.append(f"{what}: {call.__name__}: {type(error).__name__}: {error}")
            return TRACEBACK
        return CALLED_RIGHT


def attack(targets: Mapping[str, Path], count: int, seed: int) -> Verdicts:
    """Flip `count` bits, one at a time, over all targets in turn."""
    draw, verdicts = random.Random(seed), Verdicts()
    for number in range(count):
        name = list(targets)[number % len(targets)]
        path, byte, bit = drawn(targets[name], draw)
        with flipped(path, byte, bit):
            what = f"{name}: {path.relative_to(targets[name])}, bit {bit} of byte {byte}"
            verdicts.add(what, targets[name])
    return verdicts


def main() -> int:
    """The command."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--count", type=int, default=200, help="flips (default 200)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--work", type=Path, default=Path("/tmp/pma-attack-published"))
    given = flags.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    targets = published(given.work)
    for name, path in targets.items():
        print(f"{name}: {len(verify(path).notes)} notes, {path}", file=sys.stderr)
    start_s = time.perf_counter()
    verdicts = attack(targets, given.count, given.seed)
    seconds = time.perf_counter() - start_s
    said = {"flips": given.count, **verdicts.kinds, "wrong": verdicts.wrong}
    good = verdicts.kinds[FOUND] == given.count and not verdicts.wrong
    return report({**said, "seconds": round(seconds, 1)}, good=good)


if __name__ == "__main__":
    sys.exit(main())
