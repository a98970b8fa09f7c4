"""What can be named as a place for curves; imports none of their libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import given
from pma_megatron.errors import UsageError

WANDB, MLFLOW = "wandb", "mlflow"


def refuse_unusable(setting: str, places: Iterable[str]) -> None:
    """Refuse places for which a package is missing, or that are no folder; imports nothing.

    Args:
        setting: where they were given.
        places: `wandb`, `mlflow`, or folders for TensorBoard.

    Raises:
        UsageError: one cannot be written to.
    """
    for place in places:
        package = place if place in (WANDB, MLFLOW) else "tensorboard"
        if package == "tensorboard":
            refuse_remote(setting, place)
            if Path(place).exists() and not Path(place).is_dir():
                raise UsageError(
                    f"{given(setting, place)} is a file: name a folder for TensorBoard, "
                    f"{WANDB} or {MLFLOW}"
                )
        try:
            found = importlib.util.find_spec(package) is not None
        except ValueError:  # `sys.modules` says that it is not there
            found = False
        if not found:
            raise UsageError(
                f"{given(setting, place)} needs the package {package}, which is not installed: "
                f"pip install 'pma-megatron[{package}]'"
            )
