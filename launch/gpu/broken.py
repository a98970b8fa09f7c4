"""The part that breaks a run of megatron-core on purpose, and has it come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu.core import main_params
from gpu.findings import Finding, found
from gpu.job import LAST, Job
from gpu.oracle import Tensors, beyond
from pma_megatron.megatron.flags import RecoverySettings
from pma_megatron.megatron.recover import Recovered, Recovery
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.testing import TinyTrainer
from pma_megatron.testing.breaking import spoil

_SPIKE = SpikeSettings(
    window=24, warmup=24, settle=4, patience=8, cooldown=4, min_rise=0.3, fatal_rise=0.6
)
_BREAK_AT, _SAVE_EVERY, _END = 44, 10, 80


def recovery(job: Job) -> Iterator[Finding]:
    """A run whose weights become far too large, and `Recovery`, which brings it back."""
    config = replace(job.config(), warmup_iters=5, lr=1e-3 if job.gpu else 3e-3)
    with job.scratch("recovery") as folder:
        root, trainer = folder / "run", TinyTrainer(config)
        watch = Recovery(
            trainer.models,
            trainer.optimizer,
            roots=[root],
            settings=RecoverySettings(spike=_SPIKE, margin_iterations=2, last=LAST),
            rollback=lambda ref: trainer.roll_back(Path(ref.path).parent, ref.iteration),
        )
        losses: dict[int, float] = {}
        held: dict[int, Tensors] = {}
        done: list[tuple[Recovered, Tensors]] = []
        while trainer.iteration < _END:
            if trainer.iteration == _BREAK_AT:
                spoil(trainer.models, trainer.optimizer)
            (loss,) = trainer.train(1)
            losses[trainer.iteration] = loss
            back = watch.step(trainer.iteration, loss, trainer.grad_norm)
            if back is not None:
                done.append((back, main_params(trainer)))
            if trainer.iteration % _SAVE_EVERY == 0 and not done:
                trainer.save(root)
                held[trainer.iteration] = main_params(trainer)
        trainer.close()
        yield from _recovered(losses, held, done)


def _recovered(
    losses: dict[int, float], held: dict[int, Tensors], done: list[tuple[Recovered, Tensors]]
) -> Iterator[Finding]:
    before = max(losses[iteration] for iteration in range(30, _BREAK_AT + 1))
    name = "a burst is found, and the run goes back once"
    if len(done) != 1:
        said = f"{len(done)} recoveries; loss {before:.2f} before, {max(losses.values()):.2f} later"
        yield found(name, [said])
        return
    back, average = done[0]
    late = not _BREAK_AT < back.onset <= _BREAK_AT + 2
    yield found(
        name,
        [f"the onset is said to be {back.onset}, it was {_BREAK_AT + 1}"] if late else [],
        onset=back.onset,
        recovered_after_iteration=back.iteration,
    )
    numbers = [int(Path(path).name[5:]) for path in back.sources]
    weights = (1 / len(numbers),) * len(numbers)
    sources = [held[number] for number in numbers]
    yield found(
        "it goes on from the average of the healthy ones, against float64",
        beyond(average, sources, weights) or [f"source {n}" for n in numbers if n > _BREAK_AT],
        sources=numbers,
    )
    after = max(losses[iteration] for iteration in range(back.iteration + 1, _END + 1))
    spoiled = max(losses[iteration] for iteration in range(_BREAK_AT + 1, back.iteration + 1))
    wrong = [] if after < before + 0.3 else [f"loss {after:.3f} after, {before:.3f} before"]
    yield found("the loss is healthy again", wrong, before=before, spoiled=spoiled, after=after)
