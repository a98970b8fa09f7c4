"""`pma list`: the checkpoints of a run, as a table or as JSON.

It imports what a listing needs and nothing of merging's, which takes longer to import than a run of
ten checkpoints to look at.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pma_megatron.base.sizes import sized
from pma_megatron.cli.consoles import new_console, new_table, tokens_of
from pma_megatron.cli.verbs import show_result
from pma_megatron.errors import SelectionError
from pma_megatron.formats import registry
from pma_megatron.merging.listing import Listed, listed
from pma_megatron.runs.discover import list_checkpoints
from pma_megatron.runs.folders import what_is
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.trackers import read_pointers
from pma_megatron.storage.paths import in_store, path_of

_log = logging.getLogger(__name__)


def run(arguments: Namespace) -> None:
    """`pma list`."""
    refs = list_checkpoints(arguments.root, problem=_log.warning)
    if not refs:
        raise SelectionError(what_is(path_of(arguments.root)))
    trackers = _trackers(path_of(arguments.root))
    found = listed(refs)
    rows = [
        {
            **asdict(each.ref),
            "state": each.ref.state,
            "tracker": trackers.get(path_of(each.ref.folder)),
            "bytes": each.bytes,
            "origin": each.origin,
        }
        for each in found
    ]
    show_result(arguments, rows, lambda: _print(arguments.root, found, trackers))


def _trackers(root: Path) -> dict[Path, str]:
    """Folder -> the tracker that names it; says what training would stumble over there."""
    pointers = read_pointers(root).values()
    # Formats share a tracker; in a store no trainer follows one.
    for problem in dict.fromkeys(p.problem for p in pointers if not p.missing):
        if problem is not None and not in_store(root):
            _log.warning("%s %s: training does not resume from there", root, problem)
    return {root / p.folder: p.file for p in pointers if p.folder is not None}


def _print(root: str, found: Sequence[Listed], trackers: Mapping[Path, str]) -> None:
    """Names of folders where iterations do not tell the checkpoints apart."""
    title = f"{root}: {len(found)} checkpoints"
    numbers = [each.ref.iteration for each in found]
    told_apart = len(set(numbers)) == len(numbers) and not any(e.ref.saved_in for e in found)
    averages = any(each.origin for each in found)
    further = [*(() if told_apart else ["folder"]), *(["average"] if averages else ())]
    table = new_table(title, "iteration", "tokens", "holds", "size", "format", *further, "state")
    for each in found:
        ref = each.ref
        supported = ref.complete or ref.format in _READ
        state: str = ref.state if supported else "NOT supported"
        if path_of(ref.folder) in trackers:
            state += ", named by the tracker"
        if ref.complete and ref.tokens_unknown_because:
            state += f" (tokens unknown: {ref.tokens_unknown_because})"
        because = ref.unhealthy_because if ref.complete else ref.incomplete_because
        for more in (because, ref.warning):
            state += f": {more}" if more else ""
        name = path_of(ref.path).name if ref.iteration is None else str(ref.iteration)
        holds = ref.holds if ref.complete else ""
        size = "" if each.bytes is None else sized(each.bytes)
        shown = [*(() if told_apart else [_below(root, ref)]), *([each.origin or ""] * averages)]
        table.add_row(name, tokens_of(ref), holds, size, ref.format, *shown, state)
    new_console().print(table)


def _below(root: str, ref: CheckpointRef) -> str:
    """The folder of a checkpoint as its run's folder has it."""
    folder, above = path_of(ref.folder), path_of(root)
    return str(folder.relative_to(above)) if folder.is_relative_to(above) else str(folder)


_READ = {"unknown", *(each.name for each in registry.FORMATS)}
