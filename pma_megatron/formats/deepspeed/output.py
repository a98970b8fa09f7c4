"""The layout of a merged tag, native or Universal: files of the newest source, new payloads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import given, named, override
from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import base_state
from pma_megatron.formats.deepspeed.universal import (
    GLOBAL_STATE,
    STEP,
    UniversalCheckpoint,
    steps_of,
)
from pma_megatron.formats.output import Changes, Destination, OutputItem, OutputLayout
from pma_megatron.formats.rates import scale_groups, scale_schedule
from pma_megatron.formats.relay import Frames, relay, reset_steps
from pma_megatron.storage.paths import path_of


def output_layout(path: str, changes: Changes) -> OutputLayout:
    """Lay out a merged tag after the one at `path`, the newest source; the client state gets the
    note as `pma`.

    Raises:
        UsageError: something is to be left out or stored in another dtype: DeepSpeed resumes main
            params from the optimizer's files, and expects in every file what it wrote. Or rates are
            to be scaled, and it stores none.
    """
    _refuse_unresumable(path, changes)
    checkpoint = DeepSpeedCheckpoint(path_of(path), private=changes.edits_optimizer)
    optimizers = checkpoint.optimizers() if changes.edits_optimizer else {}
    states = {file: base_state(state) for file, state in optimizers.items()}
    counted = {file: (partial(checkpoint.state, file), state) for file, state in states.items()}
    return _lay_out_after(checkpoint, changes, _edits(checkpoint, changes, counted, states))


def universal_layout(path: str, changes: Changes) -> OutputLayout:
    """Lay out a merged Universal checkpoint after the one at `path`; see `output_layout`.

    Raises:
        UsageError: see there.
    """
    _refuse_unresumable(path, changes)
    checkpoint = UniversalCheckpoint(path_of(path), private=changes.edits_optimizer)
    steps = steps_of(checkpoint) if changes.optimizer == "reset" else {}
    # An int is another object once it is set back, so it is taken out afterwards.
    counted = {file: (partial(said.get, STEP, said), said) for file, said in steps.items()}
    rated = {GLOBAL_STATE: checkpoint.state(GLOBAL_STATE)}
    return _lay_out_after(checkpoint, changes, _edits(checkpoint, changes, counted, rated))


def _edits(
    checkpoint: DeepSpeedCheckpoint,
    changes: Changes,
    counted: Mapping[str, tuple[Callable[[], Any], Any]],
    rated: Mapping[str, Any],
) -> dict[str, _Edit]:
    """What changes in files: `counted` has (all that a file says, what has step counters in it),
    `rated` what has param groups in it.
    """
    edits = {}
    if changes.optimizer == "reset":
        for file, (content, state) in counted.items():
            zero = frozenset(reset_steps(state))
            edits[file] = _Edit(content(), zero)
    if changes.lr_factor is not None:
        for file in _scale_rates(checkpoint, rated, changes.lr_factor):
            edits.setdefault(file, _Edit(checkpoint.state(file), frozenset()))
    return edits


def _scale_rates(
    checkpoint: DeepSpeedCheckpoint, groups: Mapping[str, Any], factor: float
) -> list[str]:
    """Multiply the learning rates in what the files of a tag say; returns which files changed.

    Args:
        checkpoint: the tag; what its files say is changed in place.
        groups: file -> what has param groups in it.
        factor: of all rates.

    Raises:
        UsageError: a scheduler, or the param groups, store none: the script alone sets them.
    """
    changed: list[str] = []
    scaled: dict[int, Any] = {}  # files may share what they say
    for file, state in groups.items():
        changed.append(file)
        if scaled.setdefault(id(state), file) != file:
            continue
        if not scale_groups(state, factor, f"{checkpoint.path / file}"):
            raise _no_rates(checkpoint.path / file, "the optimizer's state has no param groups")
    for file in checkpoint.client_states:
        schedule = checkpoint.state(file).get("lr_scheduler")
        if schedule is None:
            continue
        changed.append(file)
        if scaled.setdefault(id(schedule), file) != file:
            continue
        if not scale_schedule(schedule, factor, f"{checkpoint.path / file}"):
            raise _no_rates(checkpoint.path / file, "the scheduler's state has no rates")
    return changed


def _no_rates(file: Path, why: str) -> UsageError:
    return UsageError(
        f"{named('lr_factor')}: {why} in {file}, so a resumed run takes its learning rates from "
        "its script or ds_config. Leave it out, and lower the rate there"
    )


def _refuse_unresumable(path: str, changes: Changes) -> None:
    if changes.optimizer == "drop" or changes.drop:
        raise UsageError(
            f"{path}: a DeepSpeed checkpoint without all of its parts does not resume, because "
            f"main params lie in the optimizer's files. Leave out "
            f"{given('optimizer_state', 'drop')}, {given('average', 'weights')} and "
            f"{override('...', 'drop')}"
        )
    if any(dtype != payload.dtype for payload, dtype in changes.payloads.items()):
        raise UsageError(
            f"{named('dtype')}: weights of {path} share storages of one dtype, and DeepSpeed "
            "expects its own. Leave it out; zero_to_fp32.py makes float32 weights of a merged tag"
        )


@dataclass(frozen=True, slots=True)
class _Edit:
    """What a file's pickle says now, and which of its small storages become zero."""

    content: Any
    zero: frozenset[str]


def _lay_out_after(
    checkpoint: DeepSpeedCheckpoint, changes: Changes, edits: Mapping[str, _Edit]
) -> OutputLayout:
    """The files of `checkpoint` again, some with new payloads, some edited, the note in some."""
    new: dict[Item, list[Payload]] = {}
    for payload in changes.payloads:
        new.setdefault(payload.item, []).append(payload)
    items: list[OutputItem] = []
    places: dict[Payload, Destination] = {}
    frames = Frames()
    for file in checkpoint.files:
        base, edit = checkpoint.item(file), edits.get(file)
        noted = changes.note if file in checkpoint.client_states else None
        if base in new or edit is not None or noted is not None:
            edited, zero = (None, frozenset()) if edit is None else (edit.content, edit.zero)
            relaid = relay(
                checkpoint,
                base,
                new.get(base, ()),
                len(items),
                partial(Item, file, 0),
                edited,
                zero,
                noted,
                frames,
            )
            items.append(relaid.item)
            places.update(relaid.places)
        else:
            items.append(OutputItem(base, None, base, {}))
    sizes = {item.placed.file: item.placed.length for item in items}
    return OutputLayout(
        files=sizes,
        items=tuple(items),
        places=places,
        small_files=OrderedDict(),
        last_file=None,
        keeps_gaps=True,
    )
