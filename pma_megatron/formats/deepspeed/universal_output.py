"""The layout of a merged Universal checkpoint."""

from __future__ import annotations

from pathlib import Path

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
from pma_megatron.formats.output import Changes, OutputLayout
from pma_megatron.formats.relay import reset_steps


def output_layout(path: str, changes: Changes) -> OutputLayout:
    """Lay out a merged Universal checkpoint; see `deepspeed.output.output_layout`.

    Raises:
        UsageError: see there.
    """
    refuse_unresumable(path, changes)
    checkpoint = UniversalCheckpoint(Path(path))
    edits = {}
    if changes.optimizer == "reset":
        for file, content in steps_of(checkpoint).items():
            zero = frozenset(reset_steps(content))
            edits[file] = Edit(content.get(STEP, content), zero)
    if changes.lr_factor is not None:
        groups = {GLOBAL_STATE: checkpoint.state(GLOBAL_STATE)}
        for file in scale_rates(checkpoint, groups, changes.lr_factor):
            edits.setdefault(file, Edit(checkpoint.state(file), frozenset()))
    return lay_out_after(checkpoint, changes, edits)
