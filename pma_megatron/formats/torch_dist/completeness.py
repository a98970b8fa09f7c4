"""Whether a `torch_dist` folder is a whole checkpoint, by its content alone."""

from __future__ import annotations

from pathlib import Path

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete, Item
from pma_megatron.formats.torch_dist.checkpoint import (
    COMMON_FILE,
    CONFIG_FILE,
    TorchDistCheckpoint,
    not_torch_dist,
)

_CLOCKS_APART_S = 10.0  # of nodes that write to one file system


def completeness(path: Path) -> Incomplete | None:
    """Why the checkpoint at `path` is not whole, or None if it is.

    The order of a save is files, `.metadata`, `metadata.json`, tracker. Whole means that both
    metadata files are there, and that in every file the first and the last item lie where
    `.metadata` says: a file that was cut short, is of another save, or whose end never reached the
    disk has something else there. Times are not looked at: see `written_after`.
    """
    reason = not_torch_dist(path)
    if reason:
        return reason
    try:
        checkpoint = TorchDistCheckpoint(path)
        reason = _other_files(checkpoint)
    except CheckpointError as error:
        return Incomplete(str(error))
    if reason is None and not checkpoint.common_is_entry and not (path / COMMON_FILE).is_file():
        return Incomplete(f"{COMMON_FILE} is missing")
    return reason


def _other_files(checkpoint: TorchDistCheckpoint) -> Incomplete | None:
    ends: dict[str, tuple[Item, Item]] = {}
    pieces = (piece for tensor in checkpoint.tensors.values() for piece in tensor.pieces)
    for item in (*(piece.payload.item for piece in pieces), *checkpoint.objects.values()):
        first, last = ends.get(item.file, (item, item))
        ends[item.file] = (
            min(first, item, key=lambda each: each.offset),
            max(last, item, key=lambda each: each.offset),
        )
    for file, items in sorted(ends.items()):
        try:
            nbytes = (checkpoint.path / file).stat().st_size
        except OSError:
            return Incomplete(f"shard file {file} is missing")
        needed = items[1].offset + items[1].length
        if nbytes < needed:
            return Incomplete(
                f"{file} has {nbytes} bytes, .metadata needs {needed}: truncated, or being written "
                "over an older save"
            )
        for item in items:
            checkpoint.records(item)
    return None


def written_after(path: Path) -> str | None:
    """What the times of a whole checkpoint cannot rule out, for a warning; None if nothing.

    A shard that is newer than `metadata.json` was written by a second save into the folder, which
    may have ended or not, or was copied without its times: where both saves have the same sizes,
    the content does not tell.
    """
    try:
        finished_s = (path / CONFIG_FILE).stat().st_mtime
        files = [(p.stat().st_mtime, p.name) for p in path.iterdir() if p.suffix == ".distcp"]
    except OSError:
        return None
    newest_s, file = max(files, default=(finished_s, ""))
    if newest_s <= finished_s + _CLOCKS_APART_S:
        return None
    return (
        f"{file} is {newest_s - finished_s:.0f} s newer than {CONFIG_FILE}: copied without its "
        "times, or saved a second time into the same folder; if that save was cut off, its files "
        "are of two saves"
    )
