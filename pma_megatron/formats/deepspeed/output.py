"""The layout of a merged tag: the newest source's files, with new payloads in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import base_state
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.output import OutputItem, OutputLayout, Place
from pma_megatron.formats.relay import relay, reset_steps
from pma_megatron.openfiles import leads_out


def output_layout(
    path: str, *, payloads: Mapping[Payload, torch.dtype], drop: frozenset[str], optimizer: str,
    note: Mapping[str, Any],
) -> OutputLayout:  # fmt: skip
    """Lay out a merged tag after the one at `path`.

    Args:
        path: the newest source.
        payloads: its payloads that get new bytes, with their dtype in the output.
        drop: entries left out.
        optimizer: `keep`, `reset` (step counters to zero) or `drop`.
        note: what the client state gets as `pma`.

    Raises:
        UsageError: something is to be left out or stored in another dtype: DeepSpeed resumes main
            params from the optimizer's files, and expects in every file what it wrote.
    """
    refuse_unresumable(path, payloads, drop, optimizer)
    checkpoint = DeepSpeedCheckpoint(Path(path))
    edits = {}
    if optimizer == "reset":
        for file, state in checkpoint.optimizers().items():
            zero = reset_steps(base_state(state))
            edits[file] = Edit(checkpoint.state(file), frozenset(zero))
    return lay_out_after(checkpoint, payloads, edits, note)


def refuse_unresumable(
    path: str, payloads: Mapping[Payload, torch.dtype], drop: frozenset[str], optimizer: str
) -> None:
    """See `output_layout`."""
    if optimizer == "drop" or drop:
        raise UsageError(
            f"{path}: a DeepSpeed checkpoint without all of its parts does not resume, because "
            "main params lie in the optimizer's files. Leave out --optimizer-state drop, --average "
            "weights and --policy ...=drop"
        )
    changed = {dtype for payload, dtype in payloads.items() if dtype != payload.dtype}
    if changed:
        raise UsageError(
            f"--dtype: weights of {path} share storages of one dtype, and DeepSpeed expects its "
            "own. Leave --dtype out; zero_to_fp32.py makes float32 weights of a merged tag"
        )


@dataclass(frozen=True, slots=True)
class Edit:
    """What a file's pickle says now, and which of its small storages become zero."""

    content: Any
    zero: frozenset[str]


def lay_out_after(checkpoint: DeepSpeedCheckpoint, payloads: Iterable[Payload],
                  edits: Mapping[str, Edit], note: Mapping[str, Any]) -> OutputLayout:  # fmt: skip
    """The files of `checkpoint` again, some with new payloads, some edited, `note` in some."""
    new: dict[Item, list[Payload]] = {}
    for payload in payloads:
        new.setdefault(payload.item, []).append(payload)
    items: list[OutputItem] = []
    places: dict[Payload, Place] = {}
    for file in checkpoint.files:
        base, edit = checkpoint.item(file), edits.get(file)
        noted = note if file in checkpoint.client_states else None
        if base in new or edit is not None or noted is not None:
            edited, zero = (None, frozenset()) if edit is None else (edit.content, edit.zero)
            relaid = relay(checkpoint, base, new.get(base, ()), len(items),
                           lambda length, file=file: Item(file, 0, length), edited, zero, noted)  # type: ignore[misc]  # fmt: skip
            items.append(relaid.item)
            places.update(relaid.places)
        else:
            items.append(OutputItem(base, None, base, {}))
    sizes = {item.placed.file: item.placed.length for item in items}
    return OutputLayout(
        files=sizes, items=tuple(items), places=places, small_files=_small_files(checkpoint),
        last_file=None, keeps_gaps=True,
    )  # fmt: skip


def _small_files(checkpoint: DeepSpeedCheckpoint) -> OrderedDict[str, bytes]:
    """What else lies in the folder, as it is."""
    return OrderedDict(
        (plain_name(path.name, str(checkpoint.path)), checkpoint.read_small(path.name))
        for path in sorted(checkpoint.path.iterdir())
        if path.is_file()
        and path.name not in (*checkpoint.files, *OWN_FILES)
        and not leads_out(path, checkpoint.path)
    )
