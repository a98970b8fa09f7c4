"""The writers that a Megatron job has: TensorBoard's and W&B's on its last rank, an MLflow run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pma_megatron.megatron.trees import global_vars
from pma_megatron.writers.destinations import (
    Destination,
    MLflow,
    TensorBoard,
    WandbOfTheRun,
    Writers,
    said,
)
from pma_megatron.writers.places import MLFLOW, WANDB
from pma_megatron.writers.records import Records, Row


def write(records: Records, iteration: int) -> None:
    """Write to all that this rank has; most have none. What cannot be written stops nothing.

    Args:
        records: what.
        iteration: that the job is at.
    """
    with said("the run's writers"):
        Writers([*_of_this_rank(iteration)]).write(records)


def write_losses(losses: Mapping[str, float], iteration: int) -> None:
    """Losses of the average beside those of the live weights, where Megatron writes these.

    Args:
        losses: in nats, by the names of Megatron's own curves.
        iteration: of the evaluation.
    """
    values = {f"{name} pma": value for name, value in losses.items()}
    write(Records(rows=(Row(iteration=iteration, values=values),)), iteration)


def tensorboard() -> Any:
    """Megatron's `SummaryWriter`; None on ranks that have none."""
    return _held("get_tensorboard_writer")


def _of_this_rank(iteration: int) -> Iterator[tuple[str, Destination]]:
    writer, wandb = tensorboard(), _held("get_wandb_writer")
    if writer:
        yield "TensorBoard", TensorBoard(writer)
    if wandb and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        yield WANDB, WandbOfTheRun(wandb, iteration)
    # Trees that write into MLflow have imported it, and begun a run.
    active = getattr(sys.modules.get(MLFLOW), "active_run", lambda: None)()
    if active is not None:
        yield MLFLOW, MLflow(active.info.run_id, "")


def _held(getter: str) -> Any:
    """What Megatron holds, None where the tree has no such thing."""
    return getattr(global_vars(), getter, lambda: None)()
