"""Where a saved running average comes from, and what its files hold: `pma.json` in its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pma_megatron.base.durable import write_small
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.manifest import replace_marker
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE, SEAL_FILE
from pma_megatron.merging.coefficients import implied_decay_weights
from pma_megatron.merging.folder_checksums import record_sums
from pma_megatron.online.window import WindowAverage
from pma_megatron.version import __version__

_log = logging.getLogger(__name__)


def origin_of(average: WindowAverage, *, by_tokens: bool = True) -> dict[str, Any]:
    """What an average was made of and how, as plain values.

    Args:
        average: the one that is saved.
        by_tokens: False where its entries are some iterations apart, and tokens are not known.
    """
    made = average.coefficients
    values = None if made is None else list(made.values)
    return {
        "kind": ONLINE_AVERAGE,
        "pma_megatron": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "method": average.describe() if made is None else made.describe(),
        "coefficients": values,
        "implied_decay_weights": None if made is None else list(implied_decay_weights(made.values)),
        "entries": [
            {
                "iteration": e.iteration,
                "consumed_tokens": e.tokens if by_tokens else None,
                "members": e.members,
            }
            for e in average.entries
        ],
    }


def mark(folder: Path, origin: Mapping[str, Any]) -> None:
    """Say in `folder` that it is an average, before or after the trainer fills it.

    Raises:
        OSError: the storage fails.
    """
    (folder / SEAL_FILE).unlink(missing_ok=True)  # of an earlier save of the same name
    write_small(folder / MARKER_FILE, (json.dumps(origin, indent=1) + "\n").encode())


def record(folder: Path, origin: Mapping[str, Any]) -> None:
    """Say it with the checksums of all files, once the trainer has written them, for `pma verify`.

    What goes wrong is logged: the checkpoint is good without them, and says the rest if it can.
    """
    try:
        replace_marker(folder, origin, record_sums(folder))
        return
    except (CheckpointError, OSError) as error:
        _log.warning("%s gets no checksums of its files: %s", folder, error)
    if not (folder / MARKER_FILE).is_file():
        try:  # a disk that was full for a moment: without it nothing tells what this is
            mark(folder, origin)
        except OSError as error:
            _log.warning("%s has no %s: %s", folder, MARKER_FILE, error)
