"""The layout of a merged Universal checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pma_megatron.formats.base import Payload
from pma_megatron.formats.deepspeed.output import (
    Edit,
    lay_out_after,
    refuse_unresumable,
    scale_rates,
)
from pma_megatron.formats.deepspeed.universal import (
    GLOBAL_STATE,
    STEP,
    UniversalCheckpoint,
    steps_of,
)
from pma_megatron.formats.output import OutputLayout
from pma_megatron.formats.relay import reset_steps


def output_layout(
    path: str,
    *,
    payloads: Mapping[Payload, torch.dtype],
    drop: frozenset[str],
    optimizer: str,
    note: Mapping[str, Any],
    lr_factor: float | None,
) -> OutputLayout:
    """Lay out a merged Universal checkpoint; see `deepspeed.output.output_layout`.

    Raises:
        UsageError: see there.
    """
    refuse_unresumable(path, payloads, drop, optimizer)
    checkpoint = UniversalCheckpoint(Path(path))
    edits = {}
    if optimizer == "reset":
        for file, content in steps_of(checkpoint).items():
            zero = frozenset(reset_steps(content))
            edits[file] = Edit(content.get(STEP, content), zero)
    if lr_factor is not None:
        groups = {GLOBAL_STATE: checkpoint.state(GLOBAL_STATE)}
        for file in scale_rates(checkpoint, groups, lr_factor):
            edits.setdefault(file, Edit(checkpoint.state(file), frozenset()))
    return lay_out_after(checkpoint, payloads, edits, note)
