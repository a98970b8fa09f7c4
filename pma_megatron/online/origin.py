"""Where a saved running average comes from, for `pma.json` in its folder."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from pma_megatron.coefficients import implied_decay_weights
from pma_megatron.formats.marker import ONLINE_AVERAGE
from pma_megatron.online.window import Average
from pma_megatron.version import __version__


def origin_of(average: Average, *, by_tokens: bool = True) -> dict[str, Any]:
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
