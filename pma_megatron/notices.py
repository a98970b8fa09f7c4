"""What people are told of a selection: what it passes over, what it assumes, where it may hurt."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from pma_megatron.cautions import too_early
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Schedule
from pma_megatron.gaps import lines
from pma_megatron.selection import Selection

_log = logging.getLogger(__name__)


def announce(selection: Selection) -> None:
    """Say on the log what is passed over or assumed, a warning each; one rank calls it."""
    for line in (*lines(selection.passed_over, selection.refs[-1]), *selection.notes):
        _log.warning(line)


def too_early_notes(selection: Selection) -> list[str]:
    """A caution where averages hurt, if this rank can read the oldest checkpoint's schedule."""
    oldest = selection.refs[0]
    schedule = Schedule()
    with contextlib.suppress(CheckpointError, OSError):
        schedule = registry.get(oldest.format, oldest.path).schedule(Path(oldest.path))
    found = too_early(schedule, selection.positions) if selection.refs[1:] else None
    return [] if found is None else [found]
