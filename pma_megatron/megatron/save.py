"""The running average as a checkpoint of its own, written by Megatron's own `save_checkpoint`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.log import say
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.megatron.trees import changed_arguments, current_args
from pma_megatron.online.average_upload import AveragePlace
from pma_megatron.online.origin import mark, origin_of, record
from pma_megatron.online.window import WindowAverage

_log = logging.getLogger(__name__)


def save_average(
    online: OnlineAverage,
    average: WindowAverage,
    fn: Callable[..., Any],
    arguments: Mapping[str, Any],
    place: AveragePlace,
) -> Path:
    """Save once more what Megatron has just saved, with the average in place of the weights.

    Moments, schedule, RNG and data position are the trainer's, so the result resumes like any
    other checkpoint. Megatron's tracker and retention work there as they do on --save; in a store
    nothing is deleted, and the tracker follows what has got there.

    Args:
        online: the running average.
        average: what it is now.
        fn: Megatron's `save_checkpoint`.
        arguments: of the save that has just been made, by name.
        place: where averages go, instead of --save.

    Returns:
        the checkpoint's folder, which may still be being written with --async-save.

    Raises:
        NotSavedError: none is saved: see `AveragePlace.begin`.
    """
    args = current_args()
    changes: dict[str, Any] = {"save": str(place.folder)}
    name = f"iter_{arguments['iteration']:07d}"
    if not place.begin(name) and getattr(args, "save_retain_interval", None):
        changes["save_retain_interval"] = None
        if not place.is_remote:
            say(
                f"PMA: --save-retain-interval deletes nothing in {place.folder} this time: the "
                "tracker there names what is no running average"
            )
    # An async save copies GPU tensors to the host before it returns. Tensors on the CPU it may
    # share with its writer process, who would see the live weights come back.
    if getattr(args, "async_save", False) and online.shard.device.type != "cuda":
        changes["async_save"] = False
    if hasattr(args, "dataloader_save"):
        changes["dataloader_save"] = None  # the trainer's save has written it
    with changed_arguments(args, changes), online.averaged_state():
        # Without the context, which caches the plans and structure of the trainer's saves.
        fn(**{**arguments, "checkpointing_context": None})
    return place.folder / name


def note_origin(
    folder: Path,
    average: WindowAverage,
    place: AveragePlace | None = None,
    *,
    at_exit: bool = False,
) -> threading.Thread | None:
    """Say in a finished checkpoint what it is an average of; None if it is not finished yet.

    Args:
        folder: of the checkpoint.
        average: that it holds.
        place: from which it goes on to a store; None where it stays.
        at_exit: do all of it before this returns: a process that ends can begin no thread.

    Returns:
        the thread that adds the checksums of its files, which takes some reads per file.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    origin = origin_of(average)
    try:
        mark(folder, origin)
    except OSError as error:
        _log.warning("%s has no %s: %s", folder, MARKER_FILE, error)
    # A daemon: a trainer that exits early must not hang here.
    thread = threading.Thread(
        target=_recorded, args=(folder, origin, place), name="pma-sums", daemon=True
    )
    if at_exit:
        thread.run()
    else:
        thread.start()
    return thread


def _recorded(folder: Path, origin: Mapping[str, Any], place: AveragePlace | None) -> None:
    record(folder, origin)
    if place is not None:
        place.saved(folder.name)
