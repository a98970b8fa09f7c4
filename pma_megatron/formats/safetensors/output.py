"""The folder of an averaged model: the newest source's files again, with new bytes in them."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

import torch

from pma_megatron.base.spelling import named, override
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.output import Changes, Described, Destination, OutputItem, OutputLayout
from pma_megatron.formats.safetensors.config import CONFIG_FILE, config_of
from pma_megatron.formats.safetensors.headers import Entry, header_of
from pma_megatron.formats.safetensors.model import INDEX_FILE, Model
from pma_megatron.formats.safetensors.model_files import model_files
from pma_megatron.storage.paths import path_of


def output_layout(path: str, changes: Changes) -> OutputLayout:
    """Lay out an averaged model after the one in the folder `path`, the newest source.

    Files keep their names and tensors; configuration, tokenizer and the like are carried. The model
    card is another's and is made anew, and what a trainer keeps for a resume is not carried.

    Raises:
        UsageError: learning rates are to be scaled, or everything is to be left out.
    """
    if changes.lr_factor is not None:
        raise UsageError(
            f"{named('lr_factor')}: {path} is a model and stores no learning rates. Leave it out"
        )
    model = Model(path_of(path))
    items: list[OutputItem] = []
    places: dict[Payload, Destination] = {}
    stored: dict[str, tuple[str, Entry]] = {}
    for file in model.files:
        base = model.header(file)
        payloads = {p.record: (p, d) for p, d in changes.payloads.items() if p.item.file == file}
        entries = [
            Entry(e.name, payloads[e.name][1] if e.name in payloads else e.dtype, e.shape)
            for e in base.entries
            if e.name not in changes.drop
        ]
        if not entries:
            continue
        made = header_of(entries, base.metadata)
        placed = Item(file, 0, made.length)
        kept = {e.name: (base.starts[e.name], None) for e in entries if e.name not in payloads}
        for entry in entries:
            stored[entry.name] = file, entry
            if entry.name in payloads:
                start = made.payloads[entry.name][0]
                places[payloads[entry.name][0]] = Destination(
                    file, start, entry.dtype, entry.numel, entry.name, len(items)
                )
        items.append(OutputItem(placed, made, model.item(file), kept))
    if not items:
        raise UsageError(f"{override('...', 'drop')} leaves nothing of {path}: narrow the pattern")
    small, notes = _small_files(model, stored, changes)
    return OutputLayout(
        files={item.placed.file: item.placed.length for item in items},
        items=tuple(items),
        places=places,
        small_files=small,
        last_file=INDEX_FILE if INDEX_FILE in small else None,
        sums_payloads=True,
        described=_described(model, [entry for _, entry in stored.values()]),
        notes=notes,
    )


def _small_files(
    model: Model, stored: dict[str, tuple[str, Entry]], changes: Changes
) -> tuple[OrderedDict[str, bytes], tuple[str, ...]]:
    """The other files, and what is to be said of them."""
    beside = model_files(model.path, implicit=False)
    small = OrderedDict(beside.files)
    if (model.path / CONFIG_FILE).is_file():
        dtype = _most([entry for _, entry in stored.values()])
        changed = any(dtype != payload.dtype for payload, dtype in changes.payloads.items())
        own = model.read(CONFIG_FILE, 0, (model.path / CONFIG_FILE).stat().st_size)
        small[CONFIG_FILE] = config_of(model.config, dtype) if changed else own
    if model.index is not None:
        small[INDEX_FILE] = _index(model, stored)
    # The table of files beside the shards says what is left out.
    return small, tuple(replace(beside, left=[], foreign=[]).notes())


def _index(model: Model, stored: dict[str, tuple[str, Entry]]) -> bytes:
    try:
        said = read_json(model.path / INDEX_FILE).get("metadata")
    except CheckpointError:  # it was read a moment ago
        said = None
    metadata: dict[str, Any] = dict(said) if isinstance(said, dict) else {}
    metadata["total_size"] = sum(entry.nbytes for _, entry in stored.values())
    where = {name: file for name, (file, _) in sorted(stored.items())}
    return (json.dumps({"metadata": metadata, "weight_map": where}, indent=2) + "\n").encode()


def _most(entries: list[Entry]) -> str:
    """The dtype of most elements, as `config.json` spells it."""
    elements: Counter[torch.dtype] = Counter()
    for entry in entries:
        if entry.dtype.is_floating_point:
            elements[entry.dtype] += entry.numel
    dtype = max(elements, key=lambda each: elements[each], default=torch.float32)
    return str(dtype).removeprefix("torch.")


def _described(model: Model, entries: list[Entry]) -> Described:
    return Described(
        config=model.config or None,
        dtype=_most(entries),
        parameters=sum(entry.numel for entry in entries if entry.dtype.is_floating_point),
    )
