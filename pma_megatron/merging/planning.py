"""What will happen, decided and agreed by all ranks before the first payload byte is read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.once import once_each
from pma_megatron.base.openfiles import unread
from pma_megatron.errors import CheckpointError
from pma_megatron.export.template import read_template
from pma_megatron.formats.output import Changes, Folder, OutputLayout
from pma_megatron.formats.side_files import SideFile, notes
from pma_megatron.formats.source import Source
from pma_megatron.formats.trainers.saves import Save
from pma_megatron.merging.agreement import frozen_notes
from pma_megatron.merging.cut import Units, units
from pma_megatron.merging.entry_rules import Decisions, PolicyRow, Rules, decide
from pma_megatron.merging.exporting import (
    Filled,
    ModelExport,
    carried,
    further_targets,
    plan_export,
)
from pma_megatron.merging.finding import chosen, look_around, roots_of, schedule_notes
from pma_megatron.merging.opening import open_sources
from pma_megatron.merging.padding import padding_notes
from pma_megatron.merging.request import MergeRequest, Output, in_its_words, refuse_other_plans
from pma_megatron.merging.saved_folder import SavedFolder, lay_out_folder
from pma_megatron.merging.task_making import make_tasks
from pma_megatron.merging.tasks import Unit, Workload
from pma_megatron.runs.discover import newest_full
from pma_megatron.runs.notices import announce
from pma_megatron.runs.selection import Selection
from pma_megatron.storage.paths import absolute, in_store, path_of
from pma_megatron.storage.spool import expect
from pma_megatron.version import __version__

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        request: what was asked.
        selection: the sources, oldest first, and how they were found.
        sources: the opened sources.
        outputs: coefficients per output.
        rules: what happens to each entry, (state, key) -> rule.
        table: the rules, grouped for printing.
        layouts: the folders that each output becomes, and the files in them.
        export: what the Hugging Face model consists of; None where none is made.
        units: the work, in the order of the newest source's files.
        active: numbers of the sources with a coefficient other than zero.
        visible: per source, the ranks that can read it.
        read_bytes: payload bytes that will be read, over all ranks.
        digest: SHA-256 of all that decides the result.
        save: what the newest source was saved as, and each checkpoint that is written is.
        side_files: what lies beside its shards, and what becomes of it; () without a checkpoint.
        beside: what is filled of those (`saved_folder`).
        origins: name of an output -> what its only source was merged from, for an export's card.
    """

    request: MergeRequest
    selection: Selection
    sources: tuple[Source, ...]
    outputs: tuple[Output, ...]
    rules: Rules
    table: tuple[PolicyRow, ...]
    layouts: Mapping[Folder, OutputLayout]
    export: ModelExport | None
    units: Units[Unit]
    active: tuple[int, ...]
    visible: tuple[tuple[int, ...], ...]
    read_bytes: int
    digest: str
    save: Save
    side_files: tuple[SideFile, ...] = ()
    beside: tuple[Filled, ...] = ()
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def written_bytes(self) -> int:
        """Bytes that will be written, over all outputs and ranks."""
        return sum(each.nbytes for each in self.layouts.values()) * len(self.outputs)

    @property
    def layout(self) -> OutputLayout:
        """Files of the checkpoint that each output becomes, where one is written."""
        return self.layouts[Folder.CHECKPOINT]

    @property
    def coefficients(self) -> tuple[tuple[float, ...], ...]:
        """Per output, one coefficient per source, oldest first."""
        return tuple(output.values for output in self.outputs)

    @property
    def told(self) -> tuple[str, ...]:
        """What is said of the files that are written: what is carried, and what is not."""
        of_files = tuple(note for each in self.layouts.values() for note in each.notes)
        return of_files if self.export is None else (*of_files, *self.export.notes)

    @property
    def threads(self) -> int:
        """Threads per rank."""
        return self.request.threads

    @property
    def iteration(self) -> int | None:
        """Iteration of the result: the newest source's."""
        return self.selection.refs[-1].iteration


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSources:
    """The sources of a merge, whatever becomes of their average; see `MergePlan`."""

    selection: Selection
    sources: tuple[Source, ...]
    outputs: tuple[Output, ...]
    visible: tuple[tuple[int, ...], ...]

    @property
    def active(self) -> tuple[int, ...]:
        """Numbers of the sources with a coefficient other than zero."""
        numbers = range(len(self.sources))
        return tuple(i for i in numbers if any(o.values[i] != 0 for o in self.outputs))


@in_its_words
@once_each()
def gather_sources(
    request: MergeRequest, comm: Comm, *, everywhere: bool = False, merged: bool = False
) -> OpenedSources:
    """Find, select and open the sources. Every rank makes this call.

    Sources are opened by different ranks and exchanged.

    Args:
        request: what is asked.
        comm: the ranks.
        everywhere: ranks may see different sources (node-local disks): one of each that see the
            same looks for them, not rank 0 alone.
        merged: all of them is read next, so that few large requests to a store are the best.

    Raises:
        SelectionError, CheckpointError, PlanError, UsageError: on every rank.
    """
    if merged and comm.size == 1:  # a run that can be kept
        expect([path_of(root) for root in roots_of(request)])
    refs, seen, found = look_around(request, comm, everywhere)
    selection = chosen(list(refs.values()), request, found, comm)
    visible = tuple(seen[ref.path] for ref in selection.refs)
    said = [] if request.rolling else schedule_notes(selection, visible, comm)
    selection = replace(
        selection,
        passed_over=(*request.passed_over, *selection.passed_over),
        notes=(*selection.notes, *request.notes_of_outputs(selection), *said),
    )
    if comm.is_main:
        announce(selection)
    outputs = comm.agree("coefficients", lambda: request.outputs(selection))
    if merged:  # several ranks read parts of their own, and ask for those
        expect([path_of(ref.path) for ref in reversed(selection.refs)])
        if comm.size == 1:
            expect([path_of(selection.refs[-1].path)], soon=True)
    sources = open_sources(request, selection.refs, visible, comm)
    said = [sentence for source in sources for sentence in source.notes]
    selection = replace(selection, notes=(*selection.notes, *said))
    return OpenedSources(selection=selection, sources=sources, outputs=outputs, visible=visible)


def refuse_changed(plan: Workload, comm: Comm) -> None:
    """A source that was rewritten while it was read would give a mixture of two checkpoints."""
    for number, source in enumerate(plan.sources):
        if comm.rank != plan.visible[number][0]:
            continue
        folder = path_of(source.path, again=in_store(source.path))
        for name, (nbytes, mtime_ns) in source.stamps.items():
            path = folder / name
            try:
                stat = path.stat()
            except OSError as error:
                raise unread(path, error) from error
            if (stat.st_size, stat.st_mtime_ns) != (nbytes, mtime_ns):
                raise CheckpointError(
                    f"{path} changed while it was merged: the run is writing it. Wait for the save "
                    "to end, then merge again"
                )


@once_each()
def make_plan(request: MergeRequest, comm: Comm, *, merged: bool = False) -> MergePlan:
    """Find, select, open and compare the sources; decide what happens to every entry.

    Every rank makes this call.

    Args:
        request: what is asked.
        comm: the ranks.
        merged: see `gather_sources`.

    Raises:
        SelectionError, CheckpointError, PlanError, UsageError: on every rank, before any write.
    """
    request = request.settled()
    found = gather_sources(request, comm, everywhere=comm.merge_size > 1, merged=merged)
    decisions = comm.agree("policy", lambda: decide(request, found.sources, newest_full))
    saved = export = None
    if request.writes_checkpoint:
        saved = _layout(found, decisions, request.lr_factor, comm)
    if request.export is not None:
        export = _export(request, found, decisions, comm)
    plan = comm.agree("plan", lambda: _assemble(request, found, decisions, saved, export))
    refuse_other_plans(comm.gather(plan.digest))
    return plan


def _layout(
    found: OpenedSources, decisions: Decisions, lr_factor: float | None, comm: Comm
) -> SavedFolder:
    """The output's files, laid out by a rank that sees the newest source, and what lies beside."""
    base, owner = found.sources[-1], found.visible[-1][0]  # who has opened it
    changes = Changes(
        payloads=decisions.payloads,
        drop=decisions.dropped,
        optimizer=decisions.optimizer,
        note=origin_note(found),
        lr_factor=lr_factor,
    )

    whole: list[SavedFolder] = []

    def lay_out() -> SavedFolder:
        whole.append(lay_out_folder(base, decisions.rules, changes))
        return whole[0].without_small_files() if comm.is_main else whole[0]

    made = comm.on(owner, "layout", lay_out)
    # Who writes what is small has it; a large `.metadata` is for nobody else.
    made = next(iter(whole), made) if comm.is_main else made.without_small_files()
    if comm.is_main:
        for sentence in notes(str(made.save.folder), made.side_files):
            _log.warning(sentence)
    return made


def _export(
    request: MergeRequest, found: OpenedSources, decisions: Decisions, comm: Comm
) -> ModelExport:
    """The model, laid out by a rank that sees the newest source; rank 0 reads the template."""
    like, owner, base = request.like, found.visible[-1][0], found.sources[-1]
    template = comm.on_main("template", lambda: None if like is None else read_template(like))
    return comm.on(owner, "export", lambda: plan_export(request, base, decisions.rules, template))


def origin_note(found: OpenedSources) -> dict[str, Any]:
    """Where a merge comes from, in a few plain values; in a sweep, coefficients by its names."""
    values = {each.name: list(each.values) for each in found.outputs}
    return {
        "pma_megatron": __version__,
        "sources": [absolute(source.path) for source in found.sources],
        "iterations": [ref.iteration for ref in found.selection.refs],
        "coefficients": values if len(values) > 1 else next(iter(values.values())),
    }


def _assemble(
    request: MergeRequest,
    found: OpenedSources,
    decisions: Decisions,
    saved: SavedFolder | None,
    export: ModelExport | None,
) -> MergePlan:
    save, beside = Save(path_of(found.sources[-1].path)), tuple[SideFile, ...]()
    layouts, filled = {}, tuple[Filled, ...]()
    if saved is not None:
        layouts[Folder.CHECKPOINT], filled = saved.layout, saved.filled
        save, beside = saved.save, saved.side_files
    if export is not None:
        layouts[Folder.MODEL], filled = export.layout, (*filled, *export.filled)
    checkpoint, further = layouts.get(Folder.CHECKPOINT), further_targets(filled)
    tasks = make_tasks(found.sources, found.active, decisions, checkpoint, further)
    more = carried(filled, found.sources[-1])
    work = units([*tasks, *more])
    told = [*(note for each in layouts.values() for note in each.notes)]
    told += [] if export is None else export.notes
    of_sources = (*frozen_notes(found.sources), *padding_notes(found.sources, decisions.rules))
    said = (*found.selection.notes, *of_sources, *notes(str(save.folder), beside), *told)
    return MergePlan(
        request=request,
        selection=replace(found.selection, notes=said),
        sources=found.sources,
        outputs=found.outputs,
        rules=decisions.rules,
        table=tuple(row for row in decisions.table if export is None or _is_told(row, layouts)),
        layouts=layouts,
        export=export,
        units=work,
        active=found.active,
        visible=found.visible,
        read_bytes=work.read_bytes,
        digest=_digest(request, found.sources, found.outputs, decisions.table, export, beside),
        save=save,
        side_files=beside,
        beside=() if saved is None else saved.filled,
    )


def _is_told(row: PolicyRow, layouts: Mapping[Folder, OutputLayout]) -> bool:
    """An export alone has weights, whatever else the sources hold."""
    return Folder.CHECKPOINT in layouts or row.state in ("weight", "main params")


def _digest(
    request: MergeRequest,
    sources: Sequence[Source],
    outputs: Sequence[Output],
    table: Sequence[PolicyRow],
    export: ModelExport | None,
    beside: Sequence[SideFile],
) -> str:
    """What decides the bytes of the result, and nothing else (not ranks, threads or paths)."""
    decisive = {
        "sources": [source.metadata_digest for source in sources],
        "coefficients": {output.name: [v.hex() for v in output.values] for output in outputs},
        # Not why: that is in the words of the front end, and a sweep may be finished from another.
        "table": [(row.state, row.action, row.entries, row.example) for row in table],
        "dtype": request.dtype,
        "side files": [(file.name, file.nbytes, file.fate) for file in beside],
    }
    if request.lr_factor is not None:
        decisive["lr_factor"] = request.lr_factor.hex()
    if export is not None:
        decisive["export"] = export.digest
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
