"""Parts that train megatron-core: PMA-init, the running average, snapshots, score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpu.findings import Finding, found, not_here
from gpu.job import EVERY, LAST, SAVES, WEIGHTS, WITHOUT_TE, Job
from gpu.oracle import Tensors, beyond, differing, largest_error, stored
from pma_megatron import MergeRequest, Method, Policy, SelectionRequest, merge
from pma_megatron.base.comm import Comm
from pma_megatron.megatron.load import merge_into
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.megatron.params import live_tensors, stepping
from pma_megatron.megatron.score import score_merges
from pma_megatron.megatron.shard import MegatronShard
from pma_megatron.megatron.thin import ThinSnapshots
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.online.snapshots import SNAPSHOTS
from pma_megatron.scores.grid import Grid
from pma_megatron.testing import TinyConfig, TinyTrainer, core_api, store

ITERATIONS = tuple(EVERY * (number + 1) for number in range(SAVES))
SMA = Method(name="sma")


class _Interrupted(Exception):
    """Raised inside a swap."""


@dataclass(frozen=True)
class Run:
    """A trained run: its folder, and main params by iteration, whole, on the host."""

    root: Path
    held: dict[int, Tensors]

    @property
    def newest(self) -> list[Tensors]:
        """What an average of the last is made of, oldest first."""
        return [self.held[iteration] for iteration in ITERATIONS[-LAST:]]


def state(trainer: TinyTrainer) -> dict[str, torch.Tensor]:
    """All that an average may touch, on the host: `main`, `weight`, `buffer`, moments, by name."""
    kept = {f"main {name}": value for name, value in trainer.main_params().items()}
    kept |= {f"weight {name}": value for name, value in trainer.model_params().items()}
    kept |= {f"buffer {name}": value for name, value in trainer.buffers().items()}
    for name, moments in trainer.optimizer_state().items():
        kept |= {f"{which} {name}": value for which, value in moments.items()}
    return {name: value.detach().cpu().clone() for name, value in kept.items()}


def main_params(trainer: TinyTrainer) -> dict[str, torch.Tensor]:
    """On the host."""
    return {name: value.detach().cpu().clone() for name, value in trainer.main_params().items()}


def train(
    trainer: TinyTrainer, root: Path, each: Callable[[], object] = lambda: None
) -> dict[int, Tensors]:
    """Train on and save; `each` is called after every iteration. Returns main params per save."""
    held: dict[int, Tensors] = {}
    for _ in range(SAVES):
        for _ in range(EVERY):
            trainer.train(1)
            each()
        trainer.save(root)
        held[trainer.iteration] = main_params(trainer)
    return held


def trained(config: TinyConfig, root: Path) -> Run:
    """A run of its own."""
    trainer = TinyTrainer(config)
    held = train(trainer, root)
    trainer.close()
    return Run(root, held)


def offline(root: Path, save: Path, **settings: object) -> Path:
    """The merge of the last checkpoints; returns the root of its output."""
    selection = SelectionRequest(last=LAST)
    merge(MergeRequest(load=str(root), save=str(save), selection=selection, **settings))
    return save


def resumed(config: TinyConfig, root: Path) -> tuple[dict[str, torch.Tensor], float]:
    """What a fresh trainer holds after Megatron's own load, and its held-out loss."""
    trainer = TinyTrainer(replace(config, seed=config.seed + 1))
    trainer.load(root)
    held, loss = state(trainer), trainer.evaluate(1)
    trainer.close()
    return held, loss


def _average_of(held: Tensors) -> dict[str, torch.Tensor]:
    return {name[5:]: value for name, value in held.items() if name.startswith("main ")}


def _kinds(job: Job) -> Iterator[tuple[str, TinyConfig]]:
    yield from ((name, config) for name, config in job.kinds().items() if config is not None)


def _absent(job: Job) -> Iterator[Finding]:
    for name, config in job.kinds().items():
        if config is None:
            yield not_here(name, WITHOUT_TE)


# PMA-init.


def init(job: Job) -> Iterator[Finding]:
    """`merge_into` in a fresh trainer, against a resume from the offline merge."""
    for kind, config in _kinds(job):
        with job.scratch(f"init {kind}") as folder:
            run = trained(config, folder / "run")
            merged = offline(run.root, folder / "merged")
            wanted, loss = resumed(config, merged)
            average = _average_of(wanted)
            yield found(
                f"{kind}: offline merge, resumed, against float64",
                beyond(average, run.newest, WEIGHTS),
                largest_error=largest_error(average, run.newest, WEIGHTS),
            )
            for share in ("slice", "source"):
                yield _started(kind, config, run, share, wanted, loss)
            if config.use_distributed_optimizer and not config.precision_aware_optimizer:
                yield from _moments(kind, config, run, folder)
    yield from _absent(job)


def _started(
    kind: str, config: TinyConfig, run: Run, share: str, wanted: Tensors, loss: float
) -> Finding:
    trainer = TinyTrainer(replace(config, seed=config.seed + 2))
    trainer.load(run.root)
    report = merge_into(
        trainer.models,
        trainer.optimizer,
        load=str(run.root),
        selection=SelectionRequest(last=LAST),
        share=share,
        metadata=core_api.content_metadata(config),
        resumed=trainer.iteration,
    )
    held = state(trainer)
    wrong = differing(held, wanted)
    if trainer.evaluate(1) != loss:
        wrong.append("the held-out loss is not that of the offline merge")
    trainer.step_with_lr_zero()
    stepped = state(trainer)
    wrong += [f"after a still step {name}" for name in differing(stepped, held, ["main", "weight"])]
    if not all(math.isfinite(each) for each in trainer.train(2)):
        wrong.append("training does not go on: the loss is not finite")
    trainer.close()
    return found(
        f"{kind}: PMA-init by {share} is the offline merge, bit for bit",
        wrong,
        seconds=report.seconds,
        read_bytes=report.read_bytes,
    )


def _moments(kind: str, config: TinyConfig, run: Run, folder: Path) -> Iterator[Finding]:
    for how in ("average", "reset"):
        policy = Policy(optimizer_state=how)
        wanted, _ = resumed(config, offline(run.root, folder / how, policy=policy))
        trainer = TinyTrainer(replace(config, seed=config.seed + 2))
        trainer.load(run.root)
        merge_into(
            trainer.models,
            trainer.optimizer,
            load=str(run.root),
            selection=SelectionRequest(last=LAST),
            optimizer_state=how,
        )
        wrong = differing(state(trainer), wanted)
        trainer.close()
        yield found(f"{kind}: moments by {how}", wrong)


# The running average.


def online(job: Job) -> Iterator[Finding]:
    """The average of a run in training: what it is, that it resumes, that every bit comes back."""
    for kind, config in _kinds(job):
        with job.scratch(f"online {kind}") as folder:
            yield from _online(kind, config, folder)
    yield from _absent(job)


def _online(kind: str, config: TinyConfig, folder: Path) -> Iterator[Finding]:
    trainer = TinyTrainer(config)
    tokens = config.global_batch_size * config.seq_length
    average = OnlineAverage(trainer.models, trainer.optimizer, SMA, LAST, EVERY * tokens)
    losses: list[float] = []

    def each() -> None:
        average.step(trainer.iteration, trainer.consumed_samples * config.seq_length)
        losses.append(trainer.evaluate(1))

    held = train(trainer, folder / "run", each)
    before, places = state(trainer), _addresses(trainer)
    with average.averaged_state():
        made = state(trainer)
        trainer.save(folder / "average")
    yield found(f"{kind}: every bit comes back after a save", differing(state(trainer), before))
    yield _interrupted(kind, config, trainer, average, before, places)
    trainer.close()
    wanted, _ = resumed(config, offline(folder / "run", folder / "merged"))
    yield found(
        f"{kind}: the running average is the offline merge, bit for bit", differing(made, wanted)
    )
    again, _ = resumed(config, folder / "average")
    yield found(f"{kind}: its checkpoint resumes as the average", differing(again, wanted))
    sources = [held[iteration] for iteration in ITERATIONS[-LAST:]]
    yield found(f"{kind}: the average against float64", beyond(_average_of(made), sources, WEIGHTS))
    yield _same_training(kind, config, losses)


def _addresses(trainer: TinyTrainer) -> list[int]:
    return [p.data_ptr() for model in trainer.models for p in model.parameters()]


def _interrupted(
    kind: str,
    config: TinyConfig,
    trainer: TinyTrainer,
    average: OnlineAverage,
    before: Tensors,
    places: list[int],
) -> Finding:
    """Evaluations with the average in place, of which one fails."""
    live, wrong, scored = trainer.evaluate(1), [], []
    for fails in (False, True):
        try:
            with average.averaged_weights():
                scored.append(trainer.evaluate(1))
                if config.bf16:  # in float32 the weights are the main params
                    wrong += differing(state(trainer), before, ["main"])
                if fails:
                    raise _Interrupted
        except _Interrupted:
            pass
        wrong += differing(state(trainer), before)
    if _addresses(trainer) != places:
        wrong.append("weights have moved in memory")
    if trainer.evaluate(1) != live or scored[0] != scored[1]:
        wrong.append("the loss of the same weights is another one")
    if scored[0] == live:
        wrong.append("the average has the loss of the live weights: nothing was swapped in")
    return found(f"{kind}: every bit comes back after evaluations, one of which fails", wrong)


def _same_training(kind: str, config: TinyConfig, losses: list[float]) -> Finding:
    trainer = TinyTrainer(config)
    plain = []
    for _ in losses:
        trainer.train(1)
        plain.append(trainer.evaluate(1))
    trainer.close()
    wrong = [
        f"iteration {number + 1}: {one} with the average, {other} without"
        for number, (one, other) in enumerate(zip(losses, plain, strict=True))
        if one != other
    ]
    return found(f"{kind}: training is what it is without", wrong, losses=len(plain))


# Snapshots.


def snapshots(job: Job) -> Iterator[Finding]:
    """Thin snapshots: what they hold, and a merge of them with full checkpoints."""
    config = job.config()
    with job.scratch("snapshots") as folder:
        trainer, root = TinyTrainer(config), folder / "run"
        tokens = config.global_batch_size * config.seq_length
        shard = MegatronShard(live_tensors(trainer.models, trainer.optimizer))
        thin = ThinSnapshots(
            root / SNAPSHOTS,
            trainer.models,
            HostCopy(shard, stepping(trainer.optimizer)),
            EVERY * tokens,
            dtype=torch.float32,
            keep=None,
            consumed_tokens=0,
            iteration=0,
            comm=Comm(),
            metadata=core_api.content_metadata(config),
        )
        held: dict[int, Tensors] = {}
        for _ in range(EVERY * SAVES):
            trainer.train(1)
            done = trainer.consumed_samples * config.seq_length
            if thin.step(trainer.iteration, done, store._args(trainer)):
                held[trainer.iteration] = main_params(trainer)
        trainer.save(root)
        thin.finish()
        places = trainer.places()
        trainer.close()
        for iteration in ITERATIONS[:-1]:
            kept = stored(root / SNAPSHOTS / f"iter_{iteration:07d}")
            wrong = []
            for name, value in held[iteration].items():
                for piece in places[name]:
                    box = [
                        slice(at, at + size)
                        for at, size in zip(piece.global_offset, piece.local_shape, strict=True)
                    ]
                    size = math.prod(piece.local_shape)
                    part = value.view(-1)[piece.start : piece.start + size]
                    if not torch.equal(kept[piece.key][box].reshape(-1), part):
                        wrong.append(f"{name} differs")
            yield found(f"the snapshot of iteration {iteration} holds the main params", wrong)
        wanted, _ = resumed(config, offline(root, folder / "merged"))
        sources = [held[iteration] for iteration in ITERATIONS[-LAST:]]
        yield found(
            "a merge of snapshots and a full checkpoint, resumed, against float64",
            beyond(_average_of(wanted), sources, WEIGHTS),
        )


# Score.


def score(job: Job) -> Iterator[Finding]:
    """A grid of averages scored in a live model, against the offline merges."""
    config = job.config()
    with job.scratch("score") as folder:
        run = trained(config, folder / "run")
        expected = {}
        for last in (2, LAST):
            selection = SelectionRequest(last=last)
            save = folder / f"merged-{last}"
            merge(MergeRequest(load=str(run.root), save=str(save), selection=selection))
            expected[last] = resumed(config, save)[1]
        trainer = TinyTrainer(config)
        trainer.load(run.root)
        expected[1] = trainer.evaluate(1)
        before = state(trainer)
        grid = Grid(methods=(SMA,), lasts=(1, 2, LAST), ends=(ITERATIONS[-1],))
        scores = score_merges(
            trainer.models, str(run.root), grid, lambda: trainer.evaluate(1)
        ).to_json()
        got = {point["last"]: point["losses"]["loss"] for point in scores["points"]}
        wrong = [
            f"average of {last}: {got.get(last)}, its offline merge {loss}"
            for last, loss in expected.items()
            if got.get(last) != loss
        ]
        yield found("scores are the losses of the offline merges, to the bit", wrong, losses=got)
        yield found("every bit comes back", differing(state(trainer), before))
        trainer.close()
