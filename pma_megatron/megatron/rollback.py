"""Megatron-LM's own load, once more, in a job that goes on training.

Megatron's `load_checkpoint` is meant for the start of a job: it also sets where the job stands
(samples, schedule, microbatches, rerun state). All of that is put back, so that what is left of the
load is the model and its optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.megatron.replicas import rates_kept
from pma_megatron.runs.refs import CheckpointRef

# Where the job stands, which a load sets; zero because releases before 0.15 insist on it.
_POSITION = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")

# How one full checkpoint is loaded, whatever the job was started with.
_LOAD: dict[str, Any] = {
    "no_load_rng": True,
    "no_load_optim": False,
    "finetune": False,
    "pretrained_checkpoint": None,
    "load_main_params_from_ckpt": False,
    "non_persistent_ckpt_type": None,
    "override_ckpt_iteration": None,
    "exit_on_missing_checkpoint": False,
}


def load_again(
    ref: CheckpointRef, args: Any, models: Sequence[Any], optimizer: Any, scheduler: Any
) -> None:
    """Load model and optimizer from a checkpoint; the job's position stays. Every rank calls it.

    Args:
        ref: a full checkpoint.
        args: Megatron's arguments.
        models: the chunks, as Megatron's training passes them around.
        optimizer: Megatron's.
        scheduler: its `OptimizerParamScheduler`.

    Raises:
        CheckpointError: Megatron loaded something else.
    """
    from megatron.core.num_microbatches_calculator import update_num_microbatches
    from megatron.training import training

    steps = scheduler.num_steps
    path = Path(ref.path)
    # Taken from `training`, where releases that changed its arguments bind it.
    with _set_for_load(args, path, ref.iteration), _rerun_state_kept(), rates_kept(optimizer):
        loaded = training.load_checkpoint(models, optimizer, scheduler)[0]
    update_num_microbatches(args.consumed_train_samples, consistency_check=False)
    scheduler.num_steps = steps
    scheduler.step(increment=0)
    if loaded != ref.iteration:
        raise CheckpointError(
            f"Megatron loaded iteration {loaded} where {path} was wanted: stop the job and resume "
            "with `pma recover`"
        )


@contextlib.contextmanager
def _set_for_load(args: Any, folder: Path, iteration: int | None) -> Iterator[None]:
    wanted = {"load": str(folder.parent), "ckpt_step": iteration, **_LOAD}
    wanted |= dict.fromkeys(_POSITION, 0)
    before = {name: getattr(args, name) for name in wanted if hasattr(args, name)}
    for name in before:
        setattr(args, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


@contextlib.contextmanager
def _rerun_state_kept() -> Iterator[None]:
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    machine = get_rerun_state_machine()
    before = dict(vars(machine))
    try:
        yield
    finally:
        vars(machine).update(before)
