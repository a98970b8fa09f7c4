"""The folder that an output becomes, after the newest source's: shards, side files, and averaged
weights in place of those that a trainer keeps beside its checkpoint as a Hugging Face model.

Such weights are a further target of the averages that the plan makes anyway, so sources are read
once. Names, dtypes, files and index are those of the newest source.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pma_megatron.base.boxes import Box, PieceIndex, flat_range
from pma_megatron.base.openfiles import open_source, read_at
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.base import Item
from pma_megatron.formats.output import Carried, Changes, Destination, OutputItem, OutputLayout
from pma_megatron.formats.safetensors.headers import Entry, FileHeader, Header, read_header
from pma_megatron.formats.safetensors.model import INDEX_FILE, Model
from pma_megatron.formats.safetensors.model_files import stays_inside
from pma_megatron.formats.side_files import Fate, SideFile
from pma_megatron.formats.source import Source
from pma_megatron.formats.trainers.saves import Save, laid_out, save_of
from pma_megatron.merging.agreement import AVERAGED
from pma_megatron.merging.entry_rules import Rules
from pma_megatron.merging.exporting import Filled, origin
from pma_megatron.merging.policy import MAIN, Action
from pma_megatron.storage.paths import path_of
from pma_megatron.transfer.blocks import BlockReader
from pma_megatron.transfer.buffers import as_bytes

_COMPARED = 64
"""Elements of each tensor that are compared with the checkpoint's."""
_OF_MODEL = ".safetensors"
_WHY = "weights of the model, averaged in the same pass"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFolder:
    """What is written as a checkpoint.

    Attributes:
        layout: its files.
        save: what the newest source was saved as.
        side_files: what lies beside that source's shards, and what becomes of it.
        filled: what of the averages goes into weights beside the shards.
    """

    layout: OutputLayout
    save: Save
    side_files: tuple[SideFile, ...]
    filled: tuple[Filled, ...] = ()

    def without_small_files(self) -> SavedFolder:
        """The same for a rank that does not write them."""
        return replace(self, layout=self.layout.without_small_files())


def lay_out_folder(base: Source, rules: Rules, changes: Changes) -> SavedFolder:
    """Lay out an output after the newest source. One rank, which sees it, calls.

    Args:
        base: the newest source.
        rules: what happens to its entries.
        changes: what the output has that it has not.

    Raises:
        CheckpointError, PlanError: it cannot be laid out.
        OSError: its folder cannot be read.
    """
    known = registry.get(base.format, base.path)
    save = save_of(path_of(base.path), known.name)
    layout, beside = laid_out(save, known, known.lay_out(base.path, changes))
    made = SavedFolder(layout=layout, save=save, side_files=beside)
    if not (save.trainer is not None and save.trainer.keeps_model and known.own_names):
        return made
    return _with_weights(made, base, rules)


def _with_weights(made: SavedFolder, base: Source, rules: Rules) -> SavedFolder:
    there = {file.name: file for file in made.side_files if _OF_MODEL in file.name}
    if not there:
        return made
    folder, headers = made.save.folder, dict[str, FileHeader]()
    try:
        for name in (*Model(folder).files, *(n for n in there if n == INDEX_FILE)):
            if not stays_inside(folder / name, folder):
                raise CheckpointError(f"{name} is a link that leads out of the folder")
            if name != INDEX_FILE:
                headers[name] = read_header(folder / name)
        reason = _why_not(headers.values(), base, rules) or _other_values(folder, headers, base)
    except CheckpointError as error:
        reason = str(error)
    if reason is not None:
        return replace(made, side_files=tuple(_said(made.side_files, there, reason)))
    return _replaced(made, headers, base, rules)


def _said(files: Sequence[SideFile], names: Collection[str], reason: str) -> Iterator[SideFile]:
    for file in files:
        weights = file.name in names and file.fate is Fate.LEFT_OUT
        yield replace(file, why=f"{file.why}: {reason}") if weights else file


def _why_not(headers: Iterable[FileHeader], base: Source, rules: Rules) -> str | None:
    """Why averages cannot take the place of what the files hold; None if they can."""
    for entry in (entry for header in headers for entry in header.entries):
        key = _key(entry, base)
        weight = base.space.weights.get(key, base.frozen.get(key))
        if weight is None:
            return f"the checkpoint has no {entry.name}"
        if tuple(weight.shape) != entry.shape:
            return f"{entry.name} is {list(entry.shape)} there and {list(weight.shape)} here"
        numbers = weight.dtype in AVERAGED and entry.dtype in AVERAGED
        if not numbers and weight.dtype != entry.dtype:
            return f"{entry.name} is {entry.dtype} there and {weight.dtype} here"
        rule = rules.get(("weight", key))
        if rule is not None and rule.action is Action.DROP:
            return f"{entry.name} is dropped"
    return None


def _other_values(folder: Path, headers: Mapping[str, FileHeader], base: Source) -> str | None:
    """Why the files are not the checkpoint's weights, by the first elements of every tensor; None
    if they are. An average of other weights (EMA, merged adapters) may have the same names."""
    with BlockReader.of(base.format, base.path) as reader:
        for name, header in headers.items():
            descriptor = open_source(folder / name, whole=False)
            try:
                for entry in header.entries:
                    count = min(entry.numel, _COMPARED)
                    nbytes = count * entry.dtype.itemsize
                    data = bytearray(nbytes)
                    read_at(descriptor, memoryview(data), header.starts[entry.name])
                    if count and bytes(data) not in _values(entry, count, base, reader):
                        return f"{entry.name} has other values than the checkpoint"
            finally:
                os.close(descriptor)
    return None


def _values(entry: Entry, count: int, base: Source, reader: BlockReader) -> Iterator[bytes]:
    """The first elements of a tensor as it is stored: its weight, and its main params."""
    key = _key(entry, base)
    whole = Box((0,) * len(entry.shape), entry.shape)
    for tensor in (base.tensor("weight", key), base.frozen.get(key), base.tensor(MAIN, key)):
        if tensor is not None and tensor.pieces:
            index = PieceIndex(tensor.pieces)
            boxes = (box for box, _ in flat_range(whole, 0, count))
            parts = [reader.values(box, index, tensor.dtype) for box in boxes]
            yield bytes(as_bytes(torch.cat(parts).to(entry.dtype).contiguous()))


def _key(entry: Entry, base: Source) -> str:
    named = entry.name in base.space.weights or entry.name in base.frozen
    return entry.name if named else base.aliases.get(entry.name, entry.name)


def _replaced(
    made: SavedFolder, headers: Mapping[str, FileHeader], base: Source, rules: Rules
) -> SavedFolder:
    layout, items = made.layout, [*made.layout.items]
    filled: list[Filled] = []
    carried, files = dict(layout.carried), dict(layout.files)
    for name, header in headers.items():
        places = {e.name: (header.starts[e.name], e.nbytes) for e in header.entries}
        frame = Header(header.data, header.nbytes, places)
        for entry in header.entries:
            place = Destination(
                name, places[entry.name][0], entry.dtype, entry.numel, entry.name, len(items)
            )
            filled += _filled(entry, place, base, rules)
        files[name] = header.nbytes
        items.append(OutputItem(Item(name, 0, header.nbytes), frame, None, {}))
    side_files = []
    for file in made.side_files:
        if file.name in headers:
            file = replace(file, fate=Fate.REMADE, why=_WHY)
        elif file.name == INDEX_FILE:
            file = replace(file, fate=Fate.CARRIED, why="says which weights lie in which file")
            carried[file.name] = Carried(file.path, file.nbytes)
        side_files.append(file)
    return replace(
        made,
        layout=replace(layout, items=tuple(items), files=files, carried=carried),
        side_files=tuple(side_files),
        filled=tuple(filled),
    )


def _filled(entry: Entry, place: Destination, base: Source, rules: Rules) -> Iterator[Filled]:
    key = _key(entry, base)
    state = origin(base, rules, key, entry.dtype)
    tensor = base.tensor(state, key)
    assert tensor is not None
    box = Box((0,) * len(entry.shape), entry.shape)
    yield Filled(state, key, box, place, 0, tensor.dtype in AVERAGED)
