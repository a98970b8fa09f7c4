"""What can be named as a place for curves; imports none of their libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import given
from pma_megatron.errors import UsageError
from pma_megatron.runs.told_files import refuse_folder

WANDB, MLFLOW = "wandb", "mlflow"


def refuse_unusable(setting: str, places: Iterable[str], made: Iterable[Path] = ()) -> None:
    """Refuse places for which a package is missing, and folders that are none, or a checkpoint's.

    Args:
        setting: where they were given.
        places: `wandb`, `mlflow`, or folders for TensorBoard.
        made: folders that the same command publishes.

    Raises:
        UsageError: one cannot be written to.
    """
    for place in places:
        package = place if place in (WANDB, MLFLOW) else "tensorboard"
        if package == "tensorboard":
            refuse_remote(setting, place)
            refuse_folder(given(setting, place), Path(place), made)
        try:
            found = importlib.util.find_spec(package) is not None
        except ValueError:  # `sys.modules` says that it is not there
            found = False
        if not found:
            raise UsageError(
                f"{given(setting, place)} needs the package {package}, which is not installed: "
                f"pip install 'pma-megatron[{package}]'"
            )
