"""The layout of a merged tag: the newest source's files, with new payloads in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import base_state
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.formats.output import OutputItem, OutputLayout, Place
from pma_megatron.formats.relay import relay, reset_steps


def output_layout(
    path: str, *, payloads: Mapping[Payload, torch.dtype], drop: frozenset[str], optimizer: str
) -> OutputLayout:
    """Lay out a merged tag after the one at `path`.

    Args:
        path: the newest source.
        payloads: its payloads that get new bytes, with their dtype in the output.
        drop: entries left out.
        optimizer: `keep`, `reset` (step counters to zero) or `drop`.

    Raises:
        UsageError: something is to be left out or stored in another dtype: DeepSpeed resumes main
            params from the optimizer's files, and expects in every file what it wrote.
    """
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
    checkpoint = DeepSpeedCheckpoint(Path(path))
    items: list[OutputItem] = []
    places: dict[Payload, Place] = {}
    for file in checkpoint.files:
        base = checkpoint.item(file)
        new = [payload for payload in payloads if payload.item == base]
        edited, zero = None, frozenset[str]()
        if optimizer == "reset" and file in checkpoint.optim.values():
            edited = checkpoint.state(file)
            zero = frozenset(reset_steps(base_state(edited["optimizer_state_dict"])))
        if new or edited is not None:
            relaid = relay(checkpoint, base, new, len(items),
                           lambda length, file=file: Item(file, 0, length), edited, zero)  # type: ignore[misc]  # fmt: skip
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
        (path.name, path.read_bytes())
        for path in sorted(checkpoint.path.iterdir())
        if path.is_file() and path.name not in (*checkpoint.files, MARKER_FILE)
    )
