"""The safetensors files of an export: laid out before a byte is written, and read again.

The library opens the finished files, before they are published and when they are verified.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.errors import CheckpointError, VerifyError
from pma_megatron.formats.base import Item
from pma_megatron.formats.output import Destination, Folder, OutputItem, OutputLayout
from pma_megatron.formats.safetensors.headers import STORABLE, Entry, header_of, read_header
from pma_megatron.formats.safetensors.model import INDEX_FILE, ONE_FILE
from pma_megatron.storage.paths import content_of

__all__ = ["INDEX_FILE", "STORABLE", "Entry", "Stored", "lay_out", "shards", "stored_in"]


def shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """The tensors of each file, in order; a file goes beyond `max_bytes` for one tensor alone.

    >>> import torch
    >>> one = Entry("a", torch.float32, (10,))
    >>> [len(shard) for shard in shards([one, one, one], 80)]
    [2, 1]
    """
    found: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if found[-1] and held + entry.nbytes > max_bytes:
            found.append([])
            held = 0
        found[-1].append(entry)
        held += entry.nbytes
    return found


def lay_out(
    entries: Sequence[Entry], max_bytes: int, aliases: Mapping[str, str], small: Mapping[str, bytes]
) -> tuple[OutputLayout, dict[str, Destination]]:
    """Lay out a folder of safetensors files.

    Args:
        entries: the tensors, in the order of the model.
        max_bytes: of the tensors in one file.
        aliases: second name of a tied parameter -> its first, which is among `entries`.
        small: the other files.

    Returns:
        the folder, and where each tensor goes.
    """
    parts = shards(entries, max_bytes)
    files: dict[str, int] = {}
    items: list[OutputItem] = []
    places: dict[str, Destination] = {}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = ONE_FILE
        if len(parts) > 1:
            name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        names = {entry.name for entry in part}
        tied = {alias: owner for alias, owner in aliases.items() if owner in names}
        header = header_of(part, tied)
        for entry in part:
            start = header.payloads[entry.name][0]
            places[entry.name] = Destination(
                name, start, entry.dtype, entry.numel, entry.name, number, Folder.MODEL
            )
            weight_map[entry.name] = name
        files[name] = header.length
        items.append(OutputItem(Item(name, 0, header.length), header, None, {}))
    last = None
    written = OrderedDict(small)
    if len(parts) > 1:
        total = {"total_size": sum(entry.nbytes for entry in entries)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        last, written[INDEX_FILE] = INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode()
    return (
        OutputLayout(
            files=files,
            items=tuple(items),
            places={},
            small_files=written,
            last_file=last,
            sums_payloads=True,
        ),
        places,
    )


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in an exported folder: `entry` from byte `start` of `file`."""

    entry: Entry
    file: str
    start: int


def stored_in(folder: Path, files: Collection[str] | None = None) -> dict[str, Stored]:
    """The tensors of every safetensors file in a folder, as the library and the headers say.

    Args:
        folder: an exported model.
        files: what was written there, by name; None to take whatever lies there for it.

    Raises:
        VerifyError: a file cannot be opened, is no plain file, has no valid header, or two have the
            same tensor.
    """
    found: dict[str, Stored] = {}
    there = sorted(folder.glob("*.safetensors"))
    for path in (path for path in there if files is None or path.name in files):
        for name, stored in _read_header(path).items():
            if name in found:
                raise VerifyError(f"{folder}: {found[name].file} and {path.name} both have {name}")
            found[name] = stored
    _refuse_other_index(folder, found)
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        header = read_header(path)
        with content_of(path) as name, safe_open(name, framework="pt") as opened:
            names = set(opened.keys())
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise VerifyError(
            f"{path} is no safetensors file that can be read ({error}): damaged"
        ) from error
    if set(header.starts) != names:
        raise VerifyError(f"{path}: its header names tensors that safetensors does not open")
    return {e.name: Stored(e, path.name, header.starts[e.name]) for e in header.entries}


def _refuse_other_index(folder: Path, found: Mapping[str, Stored]) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_bytes())["weight_map"]
        same = said == {name: stored.file for name, stored in found.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerifyError(f"{path} cannot be read ({error}): damaged") from error
    if not same:
        raise VerifyError(f"{path} does not say which tensors lie in which file: damaged")
