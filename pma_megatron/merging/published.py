"""A published folder, checked: every byte against what was written, values against the sources."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import is_folder, read_source_file, why_closed
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import FrontEnd, keywords, speaking, switch
from pma_megatron.errors import CheckpointError, PmaError, RankError, VerifyError
from pma_megatron.export.files import stored_in
from pma_megatron.export.template import CONFIG_FILE
from pma_megatron.formats import registry
from pma_megatron.formats.holding import holding
from pma_megatron.formats.manifest import TENSORS, Marker, read_marker
from pma_megatron.formats.marker import EXPORT, MARKER_FILE, ONLINE_AVERAGE, SNAPSHOT
from pma_megatron.formats.trainers.saves import published_as, save_of
from pma_megatron.merging.exported import verify_model, with_weights_beside
from pma_megatron.merging.folder_checksums import Intact, Record, check_files
from pma_megatron.merging.planning import MergePlan, make_plan
from pma_megatron.merging.provenance import checked_provenance, request_again
from pma_megatron.merging.recompute import recompute
from pma_megatron.merging.request import SAMPLES, MergeRequest
from pma_megatron.merging.verification import Verification, verify_output
from pma_megatron.runs.discover import pointed
from pma_megatron.runs.folders import is_checkpoint
from pma_megatron.storage.paths import path_of

_NO_SOURCES = {
    SNAPSHOT: "a snapshot has no sources: what training held is gone, so its values stand alone",
    ONLINE_AVERAGE: "a running average was made in memory: there are no sources to recompute it "
    "from",
}
_SHOWN = 4
KEYWORDS = FrontEnd(keywords(["path", "samples", "deep", "files_only", "full"]))
"""Settings as Python calls of `verify` spell them."""


@holding()
@speaking(KEYWORDS)
def verify(
    path: str | Path,
    *,
    samples: int = SAMPLES,
    deep: bool = False,
    files_only: bool = False,
    full: bool = True,
    comm: Comm | None = None,
) -> Verification:
    """Check what was published: its files, and its values against its sources.

    Every byte of every file is compared with the checksums in `pma.json`. A merge's sources are
    found through it too, from any working directory. Every rank makes this call.

    Args:
        path: a merge, a snapshot or a saved running average, or the root whose tracker names one.
        samples: slices of averaged tensors to recompute in float64.
        deep: recompute every element instead.
        files_only: leave the sources alone, which may be gone.
        full: False leaves the files unread.
        comm: the ranks; by default those of the current process group.

    Returns:
        What was checked; `notes` says what was not.

    Raises:
        CheckpointError: no `pma.json`; or the files are right, but sources are gone or changed.
        VerifyError: a file or a value is not what it must be.
        UsageError: `path` is empty, or an address.
    """
    refuse_remote("path", path, stores=True)
    comm = comm or Comm()
    folder = comm.on_main("verify", lambda: published(path))
    marker = comm.on_main("verify", lambda: _marker(folder))
    kind, notes = marker.value.get("kind"), list(_not_covered(marker))
    found = Intact(0, 0, 0)
    if full:
        records = _tensors(folder, marker) if TENSORS in marker.value else {}
        found = check_files(folder, marker.sums, comm, records)
    comm.on_main("verify", lambda: _refuse_other_copies(folder))
    values = Verification(0, 0, 0, 0.0)
    if kind not in (None, EXPORT):
        notes.append(_NO_SOURCES.get(str(kind), f"what a {kind} holds was not looked at"))
    elif files_only:
        notes.append("its values were not compared with its sources, as asked")
    else:
        values = _against_sources(folder, marker.value, comm, samples, deep, found.files)
    return replace(
        values,
        files=found.files,
        bytes=found.bytes,
        records=found.records,
        notes=(*values.notes, *notes),
        path=str(folder),
    )


def _marker(folder: Path) -> Marker:
    """Its `pma.json`.

    Raises:
        CheckpointError: there is none, as in what a trainer saved.
        VerifyError: it is not what was written.
    """
    if is_checkpoint(folder) and not _is_marked(folder):
        raise CheckpointError(
            f"{folder} has no {MARKER_FILE}: it was not written by this tool, and only merges, "
            "exports, snapshots and saved running averages can be verified. `pma compare` of it "
            "and another checkpoint of the run reads both, and compares what it reads with their "
            "checksums"
        )
    return read_marker(folder)


def _tensors(folder: Path, marker: Marker) -> dict[str, list[Record]]:
    """The tensors of a model by file, with their checksums, as far as its headers can be read."""
    said = marker.value.get(TENSORS)
    found: dict[str, list[Record]] = {}
    with contextlib.suppress(VerifyError):
        for name, each in stored_in(folder, marker.sums).items():
            crc32 = said.get(name) if isinstance(said, dict) else None
            record = Record(f"tensor {name}", each.start, each.entry.nbytes, str(crc32))
            found.setdefault(each.file, []).append(record)
    return found


def published(path: str | Path) -> Path:
    """The folder that `path` is, or that the tracker in it names; absolute.

    Raises:
        CheckpointError: there is no such folder, or it is not clear which one is meant.
    """
    folder = _marked(path_of(path)).absolute()
    if not is_folder(folder):
        raise CheckpointError(
            f"{folder} is not a folder: give a merge (iter_*, a DeepSpeed tag, step-*, "
            "checkpoint-*, a model), or the folder above it, which it was saved in"
        )
    why = why_closed(folder)
    if why is not None:
        raise CheckpointError(f"{folder} cannot be looked into ({why}): ask for the right to")
    if not (folder / MARKER_FILE).is_file():
        below = sorted(child.parent.name for child in folder.glob(f"*/{MARKER_FILE}"))
        if len(below) == 1 and published_as(folder / below[0]).inside:
            return folder / below[0]  # its trainer has no tracker
        if below:
            raise CheckpointError(
                f"{folder} has no tracker that names one of {', '.join(below[:_SHOWN])} "
                f"({len(below)} in all): give the folder of one"
            )
    return folder


def _refuse_other_copies(folder: Path) -> None:
    """Compare the files of a root that copy files of the checkpoint which its tracker names.

    Raises:
        VerifyError: training would resume from the checkpoint with the state of another.
    """
    trainer = save_of(folder, registry.detect(folder)).trainer
    if trainer is None or not trainer.root_copies:
        return
    try:
        if pointed(folder.parent).absolute() != folder:
            return
    except CheckpointError:
        return  # its tracker names none
    for name, original in trainer.root_copies:
        copy, own = folder.parent / name, folder / original
        if copy.is_file() and read_source_file(copy) == read_source_file(own):
            continue
        found = f"is not the same as {own}" if copy.is_file() else "is not there"
        raise VerifyError(
            f"{copy} {found}, and {trainer.name} reads it to resume from {folder.name}, which the "
            f"tracker beside it names. Copy {own} to it"
        )


def _is_marked(folder: Path) -> bool:
    try:
        return (folder / MARKER_FILE).is_file()
    except OSError:  # it may not be looked into
        return False


def _marked(path: Path) -> Path:
    """The folder that `path` is, or that its tracker names: the one that was published at once."""
    if _is_marked(path):
        return path
    folder = pointed(path)
    if _is_marked(folder) or not is_folder(folder):
        return folder
    return save_of(folder, registry.detect(folder)).folder


def _not_covered(marker: Marker) -> Iterator[str]:
    """What the checksums in a `pma.json` leave out."""
    if marker.sums is None:
        yield (
            f"{MARKER_FILE} has no checksums of files, for an earlier release wrote it, or its "
            "writer was cut off: those inside the zips were compared, where there are any, but no "
            "small file, and no byte around the records"
        )
        return
    partly = sum(each.structure_sha256 is not None for each in marker.sums.values())
    if partly:
        yield (
            f"{partly} files were written by the trainer, so their tensors were compared with the "
            "trainer's own checksums"
        )


def _against_sources(
    folder: Path, value: Mapping[str, Any], comm: Comm, samples: int, deep: bool, files: int
) -> Verification:
    """Recompute slices, or everything, from the sources.

    Raises:
        CheckpointError: they are not what they were, or not there.
        VerifyError: a value is wrong.
    """
    right = f"all {files} files are as they were published" if files else "no file was read"
    try:
        again = _planned_again(folder, value, comm)
        output = again.outputs[0]
        if again.export is not None:
            return verify_model(again, output, folder, comm, samples=samples, deep=deep)
        if deep:
            found = recompute(again, output, folder, comm)
        else:
            found = verify_output(again, output, folder, comm, samples=samples)
        return with_weights_beside(comm, found, again, output, folder, deep=deep, samples=samples)
    except (VerifyError, RankError):
        raise
    except PmaError as error:
        raise CheckpointError(
            f"{folder}: {right}, but its values cannot be compared with its sources: {error} "
            f"({switch('files_only')} leaves the sources alone)"
        ) from error


def _planned_again(folder: Path, value: Mapping[str, Any], comm: Comm) -> MergePlan:
    """The plan of the merge, made again from the same sources."""
    recorded = checked_provenance(folder, value)
    request = request_again(recorded)
    if value.get("kind") == EXPORT:
        request = _exported_again(folder, recorded, request)
    comm.on_main("verify", lambda: _refuse_gone(request.selection.paths or ()))
    again = make_plan(request, comm)
    for source, saved in zip(again.sources, recorded["plan"]["sources"], strict=True):
        if source.metadata_digest != saved["metadata_digest"]:
            raise CheckpointError(
                f"{source.path} is not what was merged: its metadata changed since"
            )
    return again


def _exported_again(
    folder: Path, recorded: Mapping[str, Any], request: MergeRequest
) -> MergeRequest:
    """The request of an export: its own configuration says what its tensors are."""
    asked = recorded["request"]
    try:
        return replace(
            request,
            export=str(folder),
            like=str(folder) if (folder / CONFIG_FILE).is_file() else None,
            max_shard_bytes=int(asked["max_shard_bytes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MARKER_FILE} lacks what an export says ({error!r}): damaged"
        ) from error


def _refuse_gone(paths: tuple[str, ...]) -> None:
    gone = [path for path in paths if not is_folder(path_of(path))]
    if not gone:
        return
    relative = (
        ""
        if path_of(gone[0]).is_absolute()
        else (", which is relative to the folder in which the merge was run: verify from there")
    )
    raise CheckpointError(
        f"{gone[0]} is gone ({len(gone)} of {len(paths)} sources are not there){relative}. If "
        "they were moved, move them back, or link the old name to the new one"
    )
