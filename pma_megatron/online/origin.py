"""Where a saved running average comes from: `pma.json` in its folder."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path

from pma_megatron.coefficients import implied_decay_weights
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.online.window import Average
from pma_megatron.version import __version__

_log = logging.getLogger(__name__)


def write_origin(folder: Path, average: Average, unit: str = "consumed_tokens") -> None:
    """Say in a finished checkpoint what it is an average of; what cannot be written is logged.

    Args:
        folder: of the checkpoint.
        average: what was saved in it.
        unit: what positions of entries count.
    """
    made = average.coefficients
    values = None if made is None else list(made.values)
    origin = {
        "kind": "online_average",
        "pma_megatron": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "method": average.describe() if made is None else made.describe(),
        "coefficients": values,
        "implied_decay_weights": None if made is None else list(implied_decay_weights(made.values)),
        "entries": [
            {"iteration": e.iteration, unit: e.tokens, "members": e.members}
            for e in average.entries
        ],
    }
    try:
        (folder / MARKER_FILE).write_text(json.dumps(origin, indent=1) + "\n")
    except OSError as error:
        _log.warning("%s has no %s: %s", folder, MARKER_FILE, error)
