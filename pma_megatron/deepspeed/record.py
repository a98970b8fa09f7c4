"""One PMA-init per command: later tags say that their run started from an average.

A job that a scheduler restarts with the same options must not average again: what it resumes then
descends from the average already.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import is_folder, is_unreadable
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.runs.trackers import read_pointers

RECORD = "pma_init"
"""Key in the client state of every later tag."""


def resumed_tag(load: Path, tag: str | None) -> Path | None:
    """The tag that a script's own call would load; None if nothing says which.

    Raises:
        CheckpointError: it names a tag that is not there.
    """
    if tag is None:
        folder = read_pointers(load)[registry.DEEPSPEED].folder
        return None if folder is None else load / folder
    if not is_folder(load / tag):
        raise CheckpointError(f"{load} has no tag {tag}: name one that is there, or none")
    return load / tag


def record_of(folder: Path | None) -> dict[str, Any] | None:
    """What a tag says of the PMA-init that it descends from.

    Raises:
        CheckpointError: it cannot be read now, so whether it descends from one is not known.
    """
    if folder is None:
        return None
    try:
        found = DeepSpeedCheckpoint(folder).head.get(RECORD)
    except KeyError:
        return None  # incomplete; what opens it as a source says so
    except CheckpointError as error:
        if is_unreadable(error):
            raise
        return None  # damaged; likewise
    return found if isinstance(found, dict) and "options" in found else None


def record_in_saves(engine: Any, record: Mapping[str, Any]) -> None:
    """Every later tag says that its run started from an average."""
    plain = engine.save_checkpoint

    @functools.wraps(plain)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(plain).bind(*args, **kwargs).arguments
        call["client_state"] = {RECORD: dict(record), **(call.get("client_state") or {})}
        return plain(**call)

    engine.save_checkpoint = save_checkpoint
