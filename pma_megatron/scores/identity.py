"""Whether a checkpoint is still the one that was scored: by what the file system says of it.

A run that went back writes other weights into the same folder, and metadata may stay the same: so
the names, bytes and times of all files are compared, as a merge does before it publishes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pma_megatron.formats.source import Source, stamps_of
from pma_megatron.scores.results import Checkpoint

State = Literal["same", "changed", "gone", "closed", "unknown"]


def identified(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    """A checkpoint with what tells it from another in the same folder, as it was opened."""
    return replace(
        checkpoint, metadata_digest=source.metadata_digest, files_digest=_digest(source.stamps)
    )


def state_of(checkpoint: Checkpoint, folder: Path) -> State:
    """What lies in a folder now, seen from a checkpoint that was scored.

    `unknown` is one that an earlier release scored, which did not note its files; `closed` one
    that may not be read.
    """
    try:
        if not folder.exists():
            return "gone"
        if checkpoint.files_digest is None:
            return "unknown"
        next(folder.iterdir(), None)  # what may not be read is passed over below, in silence
        now = _digest(stamps_of(folder))
    except PermissionError:
        return "closed"
    except OSError:  # a file went while it was looked at
        return "changed"
    return "same" if now == checkpoint.files_digest else "changed"


def _digest(stamps: Mapping[str, tuple[int, int]]) -> str:
    return hashlib.sha256(json.dumps(sorted(stamps.items())).encode()).hexdigest()
