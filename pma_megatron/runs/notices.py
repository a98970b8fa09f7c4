"""What people are told of a selection: what it passes over, what it assumes, where it may hurt."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pma_megatron.base import steps
from pma_megatron.base.spelling import told
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Schedule
from pma_megatron.runs.describe import args_of, describe, schedule_of
from pma_megatron.runs.gaps import lines
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import Selection
from pma_megatron.runs.trackers import read_pointers
from pma_megatron.storage.paths import path_of

EARLY, OFTEN = 0.5, 0.65
"""Where a window begins, as a part of its end: below the first number averages are worse than the
newest checkpoint, below the second most of them are (docs/results.md, How early is too early)."""
_OF_ONE_RUN = (
    "seed",
    "data_path",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
    "vocab_extra_ids",
    "vocab_file",
    "merge_file",
    "tiktoken_num_special_tokens",
    "seq_length",
    "optimizer",
    "lr",
    "min_lr",
    "lr_decay_style",
    "weight_decay",
    "clip_grad",
    "adam_beta1",
    "adam_beta2",
    "bf16",
    "fp16",
)
"""Arguments of Megatron that stay while a run goes on, and say so much of the result that an
average over a change of them should be meant."""

_log = logging.getLogger(__name__)


def announce(selection: Selection) -> None:
    """Say on the log what is passed over or assumed, a warning each; one rank calls it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    steps.to_open(math.ceil(len(selection.refs) / ranks))  # ranks share them
    for line in (*lines(selection.passed_over, selection.refs[-1]), *selection.notes):
        _log.warning(line)


def too_early_notes(selection: Selection) -> list[str]:
    """A caution where averages hurt, if this rank can read the oldest checkpoint's schedule."""
    oldest = selection.refs[0]
    found = too_early(schedule_of(oldest), selection.positions) if selection.refs[1:] else None
    return [] if found is None else [found]


def settings_of(ref: CheckpointRef) -> dict[str, Any]:
    """The arguments that stay while a run goes on, as far as a checkpoint has them."""
    try:
        args = args_of(path_of(ref.path))
    except CheckpointError:
        return {}  # what opens it as a source says why
    return {name: args[name] for name in _OF_ONE_RUN if name in args}


def changed_settings_notes(
    selection: Selection, settings: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What to say where training's own arguments change inside the window.

    A person may have resumed with other flags, and averages over that. But each checkpoint's
    arguments lie in one small file, and one that was restored from another run says so here alone.

    Args:
        selection: the window.
        settings: path of each of its checkpoints -> `settings_of` it.
    """
    before: tuple[CheckpointRef, Mapping[str, Any]] | None = None
    notes = []
    for ref in selection.refs:
        args = settings[ref.path]
        if before is not None:
            changed = [
                f"{name} from {told(before[1][name])} to {told(args[name])}"
                for name in _OF_ONE_RUN
                if name in args and name in before[1] and args[name] != before[1][name]
            ]
            if changed:
                notes.append(
                    f"training's arguments change between {before[0].describe()} and "
                    f"{ref.describe()}: {', '.join(changed)}. If nobody resumed with other flags "
                    f"there, {ref.path} holds a file of another run"
                )
        before = (ref, args) if args else before
    return notes


def moves_back(name: str, made: Path, now: int | None) -> str | None:
    """What to say where a root's tracker goes back to an earlier checkpoint; None where not.

    Args:
        name: of the format.
        made: the merge's folder, before its root's tracker is written.
        now: its iteration.
    """
    root = made.parent
    pointer = read_pointers(root).get(name)
    if pointer is None or pointer.folder is None or pointer.folder == made.name:
        return None
    was = describe(root / pointer.folder).iteration
    if was is None or now is None or now >= was:
        return None
    return (
        f"{root / pointer.file} named {pointer.folder} and now names {made.name}: what resumes "
        f"from {root} goes back from iteration {was} to {now}"
    )


def too_early(oldest: Schedule, positions: Sequence[int]) -> str | None:
    """Why an average may reach back too far to help; None if nothing says so.

    Weights of before the end of warmup, or of the first half of a run, are far from the newest:
    arXiv 2505.12082 (section 4.2) has 6 checkpoints from 22 % of the tokens on, and 10 from 29 %,
    below the newest alone, and 10 from 65 % above it. docs/results.md sees the same: below half
    all averages hurt, and up to the paper's 65 % most do, but not all.

    Args:
        oldest: where the oldest checkpoint stood in its schedule.
        positions: progress of each checkpoint, oldest first; () if unknown.
    """
    use = "use fewer, closer, or a later end"
    hurts = f"such averages are worse than the newest alone. {use.capitalize()}"
    at, end = oldest.samples, oldest.warmup_samples
    if at is not None and end is not None and at < end:
        return f"the window reaches into the warmup of the learning rate: {hurts}"
    if len(positions) > 1 and positions[0] < OFTEN * positions[-1]:
        part = round(100 * positions[0] / positions[-1])
        reaches = f"the window reaches back to where {part} % of the way to its end was trained"
        if positions[0] < EARLY * positions[-1]:
            return f"{reaches}: early in a run {hurts}"
        return (
            f"{reaches}: such averages are often worse than the newest alone (about 4 of 5 in tiny "
            f"models). Score it with `pma evaluate`, or {use}"
        )
    return None
