"""What ranks tell each other, smaller: plans of large models are many megabytes."""

from __future__ import annotations

import pickle
from typing import Any

from isal import isal_zlib

_LARGE_BYTES = 1 << 16


def packed(value: Any) -> tuple[bool, Any]:
    """A value as it is broadcast: compressed where it is large.

    >>> unpacked(packed([1] * 100_000)) == [1] * 100_000
    True
    """
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    large = len(data) >= _LARGE_BYTES
    return large, isal_zlib.compress(data, 1) if large else value


def unpacked(made: Any) -> Any:
    """The value that was `packed`; of another rank of this job, and of nobody else."""
    return pickle.loads(isal_zlib.decompress(made[1])) if made[0] else made[1]
