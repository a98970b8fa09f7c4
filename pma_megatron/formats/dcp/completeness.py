"""Whether a folder that DCP wrote is a whole checkpoint, by its content alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pma_megatron.base.boxes import Piece
from pma_megatron.base.openfiles import is_unreadable, unread
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete, Item, Payload, Tensor
from pma_megatron.formats.dcp.checkpoint import DcpCheckpoint, parts_of
from pma_megatron.formats.dcp.metadata import CONFIG_FILE, METADATA_FILE
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.pieces import StoredPieces
from pma_megatron.storage.paths import in_store

_COMMON = "common_state/"
_CLOCKS_APART_S = 10.0  # of nodes that write to one file system


def completeness(path: Path) -> Incomplete | None:
    """Why the checkpoint at `path` is not whole, or None if it is.

    A save writes the ranks' files, then `.metadata`, by a rename. Whole means that `.metadata` is
    there, and that in every file the first and the last item lie where it says. Where model and
    optimizer have folders of their own, the model's is written first.
    """
    if not path.is_dir():
        return Incomplete(f"{path} is not a folder")
    parts = parts_of(path)
    if not parts:
        return Incomplete(f"no {METADATA_FILE}: no checkpoint of torch.distributed.checkpoint")
    for part in parts:
        if not (path / part / METADATA_FILE).is_file():
            return Incomplete(
                f"no {part}{METADATA_FILE}, which is written last: still being written, or cut off",
                unfinished=True,
            )
    try:
        checkpoint = DcpCheckpoint(path)
        if _is_torch_dist(checkpoint):
            there = (path / CONFIG_FILE).is_file()
            return Incomplete(
                "shards of Megatron's torch_dist"
                + ("" if there else f", and no {CONFIG_FILE}: still being written, or cut off"),
                unfinished=not there,
            )
        tensors, objects = checkpoint.tensors.values(), checkpoint.objects.values()
        reason = damaged_files(checkpoint, tensors, objects)
        if reason is None and not checkpoint.names.weights:
            some = ", ".join([*checkpoint.paths][:3])
            reason = Incomplete(f"none of its entries is a tensor of a model ({some}, ...)")
    except CheckpointError as error:
        return Incomplete.of(error)
    return reason


def _is_torch_dist(checkpoint: DcpCheckpoint) -> bool:
    """Whether Megatron's dist_checkpointing called DCP, and writes more than DCP does."""
    return any(
        metadata.original_shapes is not None
        or any(key.startswith(_COMMON) for key in metadata.order)
        for metadata in checkpoint.parts.values()
    )


def damaged_files(
    files: ItemFiles, tensors: Iterable[Tensor], objects: Iterable[Item]
) -> Incomplete | None:
    """Why a file of shards is not the one that `.metadata` describes; None if all may be.

    A file that was cut short, is of another save, or whose end never reached the disk has something
    else where its first and its last item should be. Times are not looked at.

    Raises:
        CheckpointError: one of those is not there, or a file cannot be read.
    """
    ends: dict[str, tuple[Item, Item]] = {}
    for item in (*_ends([tensor.pieces for tensor in tensors]), *objects):
        first, last = ends.get(item.file, (item, item))
        ends[item.file] = (
            min(first, item, key=lambda each: each.offset),
            max(last, item, key=lambda each: each.offset),
        )
    files.look_ahead([item for _, both in sorted(ends.items()) for item in both])
    for file, both in sorted(ends.items()):
        try:
            nbytes = (files.path / file).stat().st_size
        except OSError as error:
            if is_unreadable(error):
                raise unread(files.path / file, error) from error
            return Incomplete(f"shard file {file} is missing")
        needed = both[1].offset + both[1].length
        if nbytes < needed:
            return Incomplete(
                f"{file} has {nbytes} bytes, .metadata needs {needed}: truncated, or being written "
                "over an older save"
            )
        for item in both:
            files.check(item)
    return None


def _ends(every: Sequence[Sequence[Piece[Payload]]]) -> Iterator[Item]:
    """The first and the last item of some pieces in each of their files."""
    of_list: dict[int, list[StoredPieces]] = {}  # all of one `.metadata` share their names of files
    for pieces in every:
        if isinstance(pieces, StoredPieces):
            of_list.setdefault(id(pieces.files), []).append(pieces)
        else:
            yield from (piece.payload.item for piece in pieces)
    for found in of_list.values():
        file = np.concatenate([pieces.file.astype(np.int64) for pieces in found])
        order = np.lexsort((np.concatenate([p.starts.astype(np.int64) for p in found]), file))
        if not len(order):
            continue
        begins = np.flatnonzero(np.diff(file[order], prepend=-1))
        ends = np.append(begins[1:], len(order)) - 1
        bounds = np.cumsum([0, *map(len, found)])
        for row in order[np.unique([*begins, *ends])].tolist():
            number = int(np.searchsorted(bounds, row, side="right")) - 1
            yield found[number][row - int(bounds[number])].payload.item


def written_after(path: Path) -> str | None:
    """What the times of a whole checkpoint cannot rule out, for a warning; None if nothing."""
    found = (newer_shard(path / part, METADATA_FILE) for part in parts_of(path))
    return next((said for said in found if said is not None), None)


def newer_shard(folder: Path, last_file: str) -> str | None:
    """What a shard that is newer than the file that a save writes last may mean.

    It was written by a second save into the folder, which may have ended or not, or was copied
    without its times: where both saves have the same sizes, the content does not tell.
    """
    if in_store(folder):  # when each object was put there says nothing of the save
        return None
    try:
        finished_s = (folder / last_file).stat().st_mtime
        files = [(p.stat().st_mtime, p.name) for p in folder.iterdir() if p.suffix == ".distcp"]
    except OSError:
        return None
    newest_s, file = max(files, default=(finished_s, ""))
    if newest_s <= finished_s + _CLOCKS_APART_S:
        return None
    return (
        f"{file} is {newest_s - finished_s:.0f} s newer than {last_file}: copied without its "
        "times, or saved a second time into the same folder; if that save was cut off, its files "
        "are of two saves"
    )
